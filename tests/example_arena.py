"""Lines of an arena as `runs/README.md` describes them, after a formula: nothing here was measured."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from lshv2.arena_results import FILE
from lshv2.runs import append_jsonl

ARENA_TASKS = {  # task -> trained length, chance
    "mqar": (2048, 1 / 4096), "duplication": (1024, 1 / 64), "induction": (256, 1 / 16), "passkey": (2048, 1e-5),
    "variable_tracking": (2048, 0.05), "bytes": (4096, 8.0), "my_own_task": (2048, 0.5),
}


def arena_rows(lengths: tuple[int, ...] = (1024, 4096, 16_384, 131_072), seeds: int = 3) -> list[dict[str, Any]]:
    """Lines of an arena after a formula: LSH falls slowly with length, the window fast, dense has no memory at last."""
    rows = [_arena_row(task, model, seed, "", length, length == lengths[-1])
            for task in ARENA_TASKS for model in ("lsh", "dense", "window") for seed in range(seeds)
            for length in lengths]
    rows += [_arena_row("mqar", "dense_scaled", seed, "", length, False) for seed in range(seeds) for length in lengths]
    for rounds, bucket_size in ((1, 32), (2, 32), (8, 32), (4, 16), (4, 64)):
        setting = f"rounds={rounds}" if bucket_size == 32 else f"bucket_size={bucket_size}"
        rows += [_arena_row(task, "lsh", seed, setting, lengths[0], False, rounds, bucket_size)
                 for task in ("mqar", "duplication", "bytes") for seed in range(seeds)]
    return rows


def _arena_row(task: str, model: str, seed: int, setting: str, length: int, longest: bool, rounds: int = 4,
               bucket_size: int = 32) -> dict[str, Any]:
    trained, chance = ARENA_TASKS[task]
    slope, by_seed = {"lsh": (0.004, 0.004), "dense": (0.002, 0.002), "dense_scaled": (0.001, 0.001),
                      "window": (0.12, 0.03)}[model]
    loss = slope * math.log2(1 + length / 1024) + by_seed * seed
    loss += 0.08 * max(0.0, math.log2(128 / (rounds * bucket_size))) if model == "lsh" else 0.0
    bits = task == "bytes"
    score = 1.3 + loss - 0.02 * math.log2(length / 1024) if bits else max(chance, 1 - loss)

    def spread(labels: list[str], steep: float) -> dict[str, float]:
        signed = steep if bits else -steep
        return {label: max(0.0, min(8.0 if bits else 1.0, score + signed * n / len(labels) * 3 * loss))
                for n, label in enumerate(labels)}

    buckets = [f"{2**n if n > 10 else 0}-{2**(n + 1) - 1}" for n in range(10, 17) if 2**n <= length]
    by = {"passkey": {"depth": spread([f"{n / 9:.3g}" for n in range(10)], 0.5)},
          "variable_tracking": {"hops": spread([str(n) for n in range(1, 9)], 2.0)},
          "bytes": {"position": spread(buckets, -1.0), "part": {"before": score, "end": score}},
          "mqar": {"gap": spread(buckets, 1.0)}}.get(task, {})
    seen = {"lsh": rounds * bucket_size + 64, "window": 64}.get(model, length // 2)
    row = {"schema": 1, "task": task, "model": model, "seed": seed, "setting": setting, "seq_len": length,
           "trained_len": trained, "steps": 300, "sequences": 200,
           "metric": "bits_per_byte" if bits else "accuracy", "chance": chance,
           "device": "cpu (test data)", "dtype": "float32", "torch": "2.13.0", "commit": "0123456789",
           "command": "a test made this line up"}
    if model == "dense" and longest:
        return {**row, "status": "out of memory", "reason": "a test made this up", "value": None}
    return {**row, "status": "ok", "value": score, "by": by, "keys_a_query": seen, "parameters": 812_345,
            "shortcuts": {"order-2 model": 2.31} if bits else {"guess a value shown": min(0.6, 4 * chance),
                                                               "most frequent": chance},
            **({"rounds": rounds, "bucket_size": bucket_size} if model == "lsh" else {})}


SHAPES = {  # label -> keys, recall, copying, bits per byte of text
    "R 1, W 64, cells x 1": (132, 1.0, 0.50, 1.20),
    "R 2, W 64, cells x 1": (196, 1.0, 0.995, 1.40),
    "R 4, W 64, cells x 1": (324, 0.992, 1.0, 1.30),
    "R 8, W 32, cells x 1": (324, 1.0, 0.98, 1.10),
    "R 4, W 64, cells x 4": (324, 1.0, 1.0, 1.35),
    "R 8, W 64, cells x 1": (580, 1.0, 1.0, 1.32),
}


def shape_rows(task: str, which: int, metric: str = "accuracy", seeds: int = 2) -> list[dict[str, Any]]:
    """Lines of a quality curve on one task: value number `which` of each of SHAPES, and two twins."""
    both = {"task": task, "status": "ok", "trained_len": 512, "metric": metric, "seq_len": 1024, "steps": 9}
    lsh = [{**both, "model": "lsh", "setting": label, "keys_a_query": values[0], "seed": seed, "value": values[which],
            "rounds": int(label[2]), "n_buckets": 16, "bucket_size": 64}
           for label, values in SHAPES.items() for seed in range(seeds)]
    window = {**both, "model": "window", "setting": "window 128", "keys_a_query": 132, "seed": 0, "value": 0.1}
    return [*lsh, window, {**both, "model": "dense", "setting": "", "seed": 0, "value": 0.9}]


def write_arena(folder: Path, rows: list[dict[str, Any]]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for row in rows:
        append_jsonl(folder / FILE, row)
    return folder
