"""Run folders as the phases write them, at any size: what the reader and dashboard tests look at.

Files follow `runs/README.md`; settings come from `open_run`, exponents from `fit_rows`, every other figure from a
small cost or learning model with seeded noise, the arena's from `example_arena`. Nothing here is a measurement but the
operator's benchmark, which really runs, at a size that says nothing.
"""

from __future__ import annotations

import json
import math
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
from example_arena import arena_rows, write_arena

from lshv2.benchmark.attention import main as operator_benchmark
from lshv2.benchmark.rows import Row, add_process, fit_rows
from lshv2.runs import PHASES, Run, open_run, write_json

TRAIN_KEYS = ("step", "loss_train", "learning_rate", "tokens_per_sec", "ponder_steps", "grad_norm", "tokens")
SECONDS = dict(zip(PHASES, (4.2, 11.8, 171.0, 63.4, 31.5, 5.1), strict=True))


def done_run(path: Path, *, seed: int = 0, device: str = "cpu", steps: int = 250, gpu: str = "",
             overrides: dict[str, Any] | None = None) -> Run:
    """A finished run with every file that the report and the dashboard read."""
    run = open_run(path, preset="quick", overrides=overrides or {}, seed=seed)
    write_training(run, steps=steps, state="done", device=device)
    write_profile(run, device=device)
    write_benchmark(run, device=device)
    for phase in PHASES:
        mark_ok(run, phase)
    write_manifest(run, gpu=gpu)
    return run


def running_run(path: Path, *, seed: int = 1, steps: int = 120, total: int = 250) -> Run:
    """Training is under way: a fresh progress bar, metrics so far, no profile and no benchmark yet."""
    run = open_run(path, preset="quick", seed=seed)
    write_training(run, steps=steps, state="running", recall=False)
    mark_ok(run, "01_model")
    mark_ok(run, "02_data")
    log(run, "03_train", [f"step {n} loss {2 + 3 / n:.3f}" for n in range(1, steps)])
    write_bar(run, done=steps, total=total)
    return run


def failed_run(path: Path) -> Run:
    """Training died of memory; a long log with a redrawn bar and colours."""
    run = open_run(path, preset="quick", overrides={"train.batch_size": 64}, seed=2)
    write_training(run, steps=40, state="running", recall=False)
    mark_ok(run, "01_model")
    mark_ok(run, "02_data")
    log(run, "03_train", [f"\x1b[32mstep {n}\x1b[0m loss {6 - n / 500:.3f}" for n in range(1500)] + ["0%\r50%\r100%"])
    write_json(run.path / "03_train.FAILED", {
        "phase": "03_train", "error": "RuntimeError: [enforce fail] not enough memory: 34359738368 bytes",
        "excerpt": 'File "lshv2/train.py", line 88, in step\n    loss = model(batch, labels=batch).loss\n'
                   "RuntimeError: [enforce fail] not enough memory: you tried to allocate 34359738368 bytes.",
        "log": "logs/03_train.log", "notebook": "notebooks/03_train.ipynb",
        "resume": f"make quick RUN={run.name}", "finished": "2025-11-22T15:40:11",
    })
    return run


def training_events(steps: int, seed: int, task: str, every: int = 50) -> list[dict[str, Any]]:
    """`metrics.jsonl` lines: a power-law loss with noise, a warm-up and cosine, tokens of 8 x 512 a step."""
    rng = np.random.default_rng([seed, task == "recall"])
    events: list[dict[str, Any]] = []
    floor, start = (1.9 + 0.05 * seed, 7.6) if task == "language_model" else (0.02, 5.5)
    for step in range(1, steps + 1):
        level = floor + (start - floor) * step**-0.35 if task == "language_model" else (
            floor + (start - floor) / (1 + math.exp((step - steps * 0.45) / max(1.0, steps * 0.06))))
        common = {"task": task, "step": step, "time": 1.7e9 + step}
        events.append({
            **common, "event": "train", "loss_train": level + 0.08 * rng.standard_normal(),
            "learning_rate": 3e-3 * min(step / max(1, 0.02 * steps), 0.55 + 0.45 * math.cos(math.pi * step / steps)),
            "tokens_per_sec": 9000 + 400 * rng.standard_normal(), "ponder_steps": 1.6 + 0.2 * math.tanh(step / 80),
            "grad_norm": 0.6 + 3 / step + 0.1 * abs(rng.standard_normal()), "tokens": step * 4096,
        })
        if step % every == 0 or step == steps:
            held = level + 0.06
            extra = {"bits_per_byte": held / math.log(2) / 3.1} if task == "language_model" else {
                "accuracy": min(1.0, max(1 / 128, math.exp(-held * 0.35)))}
            events.append({**common, "event": "eval", "loss_eval": held, **extra})
    return events


def columns(events: list[dict[str, Any]]) -> dict[str, list[Any]]:
    train, evals = ([e for e in events if e["event"] == kind] for kind in ("train", "eval"))
    score = "bits_per_byte" if not evals or "bits_per_byte" in evals[0] else "accuracy"
    table = {key: [event[key] for event in train] for key in TRAIN_KEYS}
    return table | {"eval_step": [e["step"] for e in evals], "loss_eval": [e["loss_eval"] for e in evals],
                    score: [e[score] for e in evals]}


def write_training(run: Run, *, steps: int, state: str, device: str = "cpu", recall: bool = True) -> None:
    seed = run.settings.seed
    tasks = {"language_model": training_events(steps, seed, "language_model")}
    if recall:
        tasks["recall"] = training_events(steps, seed, "recall")
    lines = [json.dumps(event) for events in tasks.values() for event in events]
    run.metrics.write_text("\n".join(lines) + "\n", encoding="utf-8")
    content = {"schema": 1, "state": state, "device": device, "parameters": 1_012_000,
               **columns(tasks["language_model"]), "tokens_per_sec_median": 9000.0, "order2_bits_per_byte": 2.31,
               "seconds": 150.0}
    if recall:
        content["recall"] = {**columns(tasks["recall"]), "chance": 1 / 128}
    write_json(run.file("training_metrics.json"), content)


def write_profile(run: Run, *, device: str = "cpu") -> None:
    rng = np.random.default_rng([run.settings.seed, 7])
    shares = {"bucket_attn_ms": 0.27, "feed_forward_ms": 0.23, "projections_ms": 0.14, "logits_loss_ms": 0.12,
              "global_ms": 0.08, "hashing_ms": 0.05, "optimizer_ms": 0.05, "norms_ms": 0.03, "embedding_ms": 0.01}
    step = 640.0 * (1 + 0.1 * rng.random())
    parts = {name: step * share * (1 + 0.1 * rng.standard_normal()) for name, share in shares.items()}
    total = sum(parts.values())
    write_json(run.file("component_profiles.json"), {
        "schema": 1, "device": device, "dtype": "float32", "seq_length": 512, "batch_size": 8, "n_steps": 5,
        "step_ms": step, **{name: parts[name] for name in ("hashing_ms", "bucket_attn_ms", "global_ms")},
        "components_ms": parts, "sum_ms": total, "coverage": total / step,
    })


def write_benchmark(run: Run, *, device: str = "cpu") -> None:
    rng = np.random.default_rng([run.settings.seed, 11])
    settings = run.settings.benchmark
    rows = [_row(attention, length, 1, settings.processes_per_length, rng)
            for attention in ("lsh", "dense") for length in settings.sequence_lengths]
    if device == "cpu":
        rows[-1] = {"attention": "dense", "seq_len": settings.sequence_lengths[-1], "batch_size": 1,
                    "status": "timeout", "reason": "no sample within 60 s", "processes": []}
    fixed = None
    if tokens := settings.fixed_tokens:
        again = [_row(attention, length, tokens // length, settings.processes_per_length, rng)
                 for attention in ("lsh", "dense") for length in settings.sequence_lengths if length <= tokens]
        fixed = {"tokens": tokens, "rows": again, **fit_rows(again)}
    write_json(run.file("benchmark_summary.json"), {
        "schema": 1, "device": device, "dtype": "float32", "state": "done", "rows": rows, **fit_rows(rows),
        "fixed_tokens": fixed,
    })


def _row(attention: str, length: int, batch: int, processes: int, rng: np.random.Generator) -> Row:
    linear, quadratic = (0.021, 0.0) if attention == "lsh" else (0.012, 1.3e-6)
    cost = (12 + batch * (linear * length + quadratic * length**2)) * (1 + 0.04 * rng.standard_normal())
    row: Row | None = None
    for _ in range(processes):
        base = cost * (1 + 0.02 * rng.standard_normal())
        fresh: Row = {"attention": attention, "seq_len": length, "batch_size": batch, "status": "ok", "reason": None,
                      "seconds": 9.0}
        for prefix, factor in (("", 1.0), ("train_", 3.1), ("attention_", 0.1), ("attention_train_", 0.3)):
            samples = sorted(base * factor * (1 + 0.06 * rng.random(7)))
            fresh |= {f"{prefix}latency_ms": float(np.median(samples)),
                      f"{prefix}latency_ms_p20": float(np.quantile(samples, 0.2)),
                      f"{prefix}latency_ms_p80": float(np.quantile(samples, 0.8)),
                      f"{prefix}latency_samples_ms": samples,
                      f"{prefix}tokens_per_sec": batch * length / float(np.median(samples)) * 1e3}
        activation = 0.033 * length * batch * (1 + 0.03 * rng.standard_normal())
        row = add_process(row, fresh | {"rss_mb": 350 + activation, "forward_rss_mb": 350 + activation / 3,
                                        "fixed_mb": 350.0, "activation_mb": activation})
    assert row
    return row


def write_manifest(run: Run, *, gpu: str = "") -> None:
    bench = json.loads(run.file("benchmark_summary.json").read_text())
    alpha, beta = bench["alpha"], bench["beta"]
    flags = [("65,536 tokens feasible", "status ok", None, None), ("alpha", "≤ 1.2", alpha, alpha <= 1.2),
             ("beta", "0.9 – 1.1", beta, 0.9 <= beta <= 1.1), ("throughput", "> 10,000 tokens/s", 9000.0, False)]
    write_json(run.file("pipeline_results.json"), {
        "schema": 1, "run": run.name, "preset": run.settings.preset, "seed": run.settings.seed, "state": "ok",
        "phases": [{"phase": p, "state": "ok", "seconds": SECONDS[p], "notebook": f"notebooks/{p}.ipynb",
                    "log": f"logs/{p}.log", "error": None} for p in PHASES],
        "artifacts": [], "settings": run.settings.model_dump(mode="json"),
        "flags": [{"name": n, "target": t, "value": v, "passed": p, "source": "benchmark_summary.json",
                   "detail": "not measured: the longest length benchmarked is shorter" if p is None else "measured"}
                  for n, t, v, p in flags],
        "environment": {"python": "3.11.9", "torch": "2.13.0", "cores": 2, "gpus": [gpu] if gpu else []},
        "verdict": f"Learns, and scales with an exponent of {alpha:.2f}; 65,536 tokens were not measured.",
    })


def mark_ok(run: Run, phase: str) -> None:
    log(run, phase, [f"{phase} began", f"{phase} ended after {SECONDS[phase]} s"])
    old = time.time() - 3600
    os.utime(run.log(phase), (old, old))
    write_json(run.marker(phase), {"phase": phase, "state": "ok", "seconds": SECONDS[phase],
                                   "finished": "2025-11-22T15:31:00", "inputs": {}, "outputs": {}})


def write_bar(run: Run, *, done: int, total: int, phase: str = "03_train", age_s: float = 0.0) -> None:
    write_json(run.progress, {
        "phase": phase, "label": "language model", "done": done, "total": total, "unit": "step",
        "elapsed_s": 0.4 * done, "eta_s": 0.4 * (total - done), "figures": {"loss": 3.12345, "tokens_per_sec": 9021.4},
        "time": time.time() - age_s,
    })


def log(run: Run, phase: str, lines: list[str]) -> None:
    run.log(phase).write_text("\n".join(lines) + "\n", encoding="utf-8")


def example_runs(root: Path) -> Path:
    """Done, running, failed, stopped and reference, as in a well-used runs folder."""
    done_run(root / "quick", seed=0)
    done_run(root / "quick-small-buckets", seed=3, overrides={"model.bucket_size": 32, "train.learning_rate": 1e-3})
    failed_run(root / "big-batch")
    done_run(root / "reference-h200" / "full", seed=1, device="cuda", gpu="NVIDIA H200", steps=2000,
             overrides={"benchmark.sequence_lengths": [2**n for n in range(10, 18)], "benchmark.fixed_tokens": 131_072,
                        "benchmark.processes_per_length": 3})
    running_run(root / "quick-seed-1")
    write_arena(root / "quick", arena_rows())
    out = root / "reference-cpu" / "attention" / "attention.json"
    operator_benchmark(["--quick", "--lengths", "160", "96", "--samples", "1", "--out", str(out)])
    return root
