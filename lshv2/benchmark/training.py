"""Training steps of the documented model by length: tokens a second, memory, and where the time goes.

    python -m lshv2.benchmark.training --lengths 131072 4096 --out runs/reference-<machine>/training/training.json

A row is one model (LSH or its dense twin, with or without Ponder) at one length. A step is the trainer's own: copy to
the device, forward, backward, clipping, AdamW, hash update, under its autocast and, on a GPU, torch.compile. Tokens are
random and a step has `--tokens` of them, so that short sequences fill a batch. Medians and 20 to 80 % of `--samples`
steps, timed one by one after `--warm-up` others; peak memory is of torch's allocator over the timed steps. A row that
does not fit says so. JSON is written after every row; rows that are there already are kept (delete the file to begin
anew), each with the `commit` that it was measured at; the environment is the newest row's.

    MFU = tokens/s · FLOP a token / peak,   FLOP a token = 3 · (2·(N + E·d·V) + 4·visible·H·D·n_layers)

N: weights of all matrix products of the blocks, a tied block as often as it is applied; E: exits that are scored (the
ponder steps, or 1); visible: keys a query sees, mean over positions: (T + 1)/2 for the dense twin, for LSH at most
window + n_global + R·W. Recomputation, hashing and elementwise work count as nothing. Peak: dense bf16 as the maker
states it, for the GPUs in `PEAKS`; others have no MFU. `over_dense`: tokens/s over those of the dense twin with equal
settings, where it was measured; `over_dense_commit`: at which `commit`, where that is not the row's own.
Not here: evaluation, data; several GPUs are in `lshv2.benchmark.parallel`.
"""

from __future__ import annotations

import argparse
import gc
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention import sdpa_kernel

from lshv2.batches import Task
from lshv2.benchmark.meter import Meter
from lshv2.benchmark.worker import FASTEST, device_name
from lshv2.config import ModelConfig, Settings
from lshv2.evaluation import Batch
from lshv2.machine import environment
from lshv2.model import LSHModel
from lshv2.parallel.layout import WHOLE, Layout
from lshv2.parallel.ranks import ALONE, Ranks
from lshv2.presets import PRESETS, make_settings
from lshv2.runs import Run, read_json, write_json
from lshv2.trainer import Trainer, pick_device

PEAKS = {"H200": 989.5e12, "H100": 989.5e12, "A100": 312e12}  # dense bf16 FLOP/s
GROUPS = (  # of kernels, by a part of their name, the first that fits
    ("elementwise", ("triton_",)),  # fused by torch.compile, and named after all that is in them, such as _to_copy_
    ("attention", ("_far_", "_local_", "_row_products", "_spans", "_codes", "_earlier", "_best_cells", "_bucket_ids",
                   "flash", "fmha", "cudnn_generated", "RadixSort", "radix")),
    ("matrix products", ("gemm", "nvjet", "cutlass", "xmma", "cublas", "splitK")),
    ("optimizer", ("multi_tensor", "FusedAdam", "fused_adam")),
    ("loss", ("_row_losses", "softmax", "SoftMax", "nll_loss", "scatter")),
    ("copies", ("Memcpy", "Memset", "copy_")),
)


def visible_keys(config: ModelConfig, length: int) -> float:
    """Keys that a query sees at most, mean over the positions of `length` tokens."""
    far = config.n_rounds * config.bucket_size if config.attention == "lsh" else 0
    most = length if config.attention == "dense" else config.window + config.n_global + far
    return float(np.minimum(np.arange(1, length + 1), most).mean())


def flops_a_token(model: LSHModel, length: int) -> float:
    """FLOP of forward and backward, a token: the module's docstring has the formula."""
    config = model.config
    matrices = sum(m.weight.numel() for m in model.blocks.modules() if isinstance(m, torch.nn.Linear))
    exits = config.n_ponder_steps if config.use_ponder else 1
    products = matrices * config.n_ponder_steps + exits * config.vocab_size * config.d_model
    attention = 4 * visible_keys(config, length) * config.n_heads * config.head_dim * config.n_layers
    return 3 * (2 * products + attention)


def settings_of(preset: str, case: dict[str, Any]) -> Settings:
    """The preset at the case's length; capacity, and with it the buckets, grow only beyond the preset's own."""
    longest = max(make_settings(preset).model.max_seq_len, case["seq_len"])
    return make_settings(preset, {
        "model.attention": case["attention"], "model.use_ponder": case["ponder"], "model.max_seq_len": longest,
        "train.seq_length": case["seq_len"], "train.batch_size": case["batch_size"],
        "train.gradient_checkpoint": case["gradient_checkpoint"], "train.compile": case["compile"],
        "train.ponder_from": 0.0, "train.ponder_to": 0.0,  # all exits answer from the first step on
    }, seed=case["seed"])


class _Length(torch.utils.data.Dataset[Batch]):
    """So many sequences for the schedule's sake; the benchmark feeds its own."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count


def make_trainer(folder: Path, settings: Settings, ranks: Ranks = ALONE, layout: Layout = WHOLE) -> Trainer:
    train = settings.train
    task = Task(
        "benchmark", _Length(1_000 * train.batch_size), _Length(0), train.batch_size, 1, train.learning_rate, 1_000,
        gradient_checkpoint=train.gradient_checkpoint, compile=train.compile,
    )
    model = LSHModel(settings.model, settings.seed)
    trainer = Trainer(Run(folder, settings), task, model, ranks, layout)
    model.train()
    return trainer


def measure(case: dict[str, Any], preset: str, samples: int, warm_up: int, trace: bool) -> dict[str, Any]:
    """One row: the case with times, rate, MFU and peak memory; or `status` other than ok, and the reason."""
    meter = Meter(pick_device())
    if meter.cuda and case["compile"]:
        torch.compiler.reset()  # a function has eight graphs at most: the ninth shape of a process would run eager
    began = time.monotonic()
    try:
        with tempfile.TemporaryDirectory() as folder, sdpa_kernel(FASTEST, set_priority=True):
            trainer = make_trainer(Path(folder), settings_of(preset, case))
            generator = torch.Generator().manual_seed(case["seed"])
            shape = (case["batch_size"], case["seq_len"])
            ids = torch.randint(trainer.model.config.vocab_size, shape, generator=generator)
            if meter.cuda:
                ids = ids.pin_memory()

            def step() -> None:
                trainer._train_step(ids, ids)

            for _ in range(warm_up):
                step()
            ready = time.monotonic() - began
            meter.reset_peak()
            taken = [meter.milliseconds(step) for _ in range(samples)]
            peak = meter.peak_mb()
            low, median, high = np.quantile(taken, [0.2, 0.5, 0.8]).tolist()
            rate = ids.numel() / median * 1e3
            flops = flops_a_token(trainer.model, case["seq_len"])
            top = next((value for name, value in PEAKS.items() if name in device_name(meter.device)), None)
            row = {
                **case, "status": "ok", "step_ms": median, "step_ms_p20": low, "step_ms_p80": high,
                "samples_ms": taken, "tokens_per_sec": rate, "flop_a_token": flops,
                "mfu": rate * flops / top if top else None, "peak_mb": peak, "warm_up_s": ready,
                "parameters": trainer.model.count_parameters(),
            }
            return {**row, "kernels": kernels(trainer, ids)} if trace and meter.cuda else row
    except (torch.OutOfMemoryError, MemoryError) as error:
        return {**case, "status": "out of memory", "reason": " ".join(str(error).split())[:200]}


def kernels(trainer: Trainer, ids: Tensor) -> dict[str, Any]:
    """Milliseconds of one step's kernels by group, and the longest of them."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as trace:
        trainer._train_step(ids, ids)
        torch.cuda.synchronize()
    groups: dict[str, float] = {}
    events = sorted(trace.key_averages(), key=lambda e: -e.self_device_time_total)
    for event in events:
        group = next((name for name, parts in GROUPS if any(part in event.key for part in parts)), "elementwise")
        groups[group] = groups.get(group, 0.0) + event.self_device_time_total / 1e3
    longest = [{"name": e.key[:90], "count": e.count, "ms": e.self_device_time_total / 1e3} for e in events[:40]]
    return {"groups_ms": groups, "longest": longest}


def beside_twins(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows, LSH ones with `over_dense`: their rate over that of the dense twin in the same row of settings."""
    keys = ("seq_len", "batch_size", "ponder", "gradient_checkpoint", "compile")
    dense = {tuple(row[key] for key in keys): row for row in rows if row["attention"] == "dense"}
    result = []
    for row in rows:
        twin = dense.get(tuple(row[key] for key in keys), {})
        row = {name: value for name, value in row.items() if not name.startswith("over_dense")}
        if row["attention"] == "lsh" and row["status"] == "ok" and twin.get("status") == "ok":
            row = {**row, "over_dense": row["tokens_per_sec"] / twin["tokens_per_sec"]}
            if twin.get("commit") != row.get("commit"):
                row["over_dense_commit"] = twin.get("commit")
        result.append(row)
    return result


def line(row: dict[str, Any]) -> str:
    """A row for the terminal."""
    name = row["attention"] + (" ponder" if row["ponder"] else "")
    head = f"{name:12} {row['seq_len']:>9,} x {row['batch_size']:<3} checkpoint {row['gradient_checkpoint']!s:12}"
    head += "" if row["compile"] else " eager"
    if row["status"] != "ok":
        return f"{head} {row['status']}"
    mfu = "" if row["mfu"] is None else f", MFU {row['mfu']:.3f}"
    return (f"{head} {row['step_ms']:9,.1f} ms ({row['step_ms_p20']:,.1f} to {row['step_ms_p80']:,.1f}), "
            f"{row['tokens_per_sec']:,.0f} tokens/s{mfu}, {row['peak_mb'] / 1024:.1f} GB; "
            f"ready in {row['warm_up_s']:.0f} s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", nargs="+", type=int, default=[131_072, 4_096, 16_384, 65_536])
    parser.add_argument("--attentions", nargs="+", choices=["lsh", "dense", "window"], default=["lsh", "dense"])
    parser.add_argument("--tokens", type=int, default=131_072, help="of a step: sequences a batch follow from it")
    parser.add_argument("--preset", choices=sorted(PRESETS), default="full")
    parser.add_argument("--ponder", nargs="+", choices=["off", "on"], default=["off"])
    parser.add_argument("--checkpoint", nargs="+", choices=["true", "block", "feed_forward", "false"], default=["true"])
    parser.add_argument("--compile", nargs="+", choices=["on", "off"], default=["on"])
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--warm-up", type=int, default=3)
    parser.add_argument("--trace", action="store_true", help="also one step's kernels, by group (CUDA)")
    parser.add_argument("--budget-s", type=float, default=float("inf"), help="no row is begun after so many seconds")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="rows and environment as JSON, gone on with where it is there")
    options = parser.parse_args()
    began = time.monotonic()
    before = read_json(options.out)[0] if options.out and options.out.exists() else None
    rows: list[dict[str, Any]] = list(before["rows"]) if isinstance(before, dict) else []
    cases = [
        {"attention": attention, "seq_len": length, "batch_size": max(1, options.tokens // length),
         "ponder": ponder == "on", "gradient_checkpoint": {"true": True, "false": False}.get(checkpoint, checkpoint),
         "compile": compile == "on", "seed": options.seed}
        for ponder in options.ponder for length in options.lengths for compile in options.compile
        for checkpoint in options.checkpoint for attention in options.attentions
    ]
    for case in cases:
        if any(all(row.get(key) == value for key, value in case.items()) for row in rows):
            continue
        if time.monotonic() - began > options.budget_s:
            print("the time is up: run the same command again for the rest")
            break
        row = measure(case, options.preset, options.samples, options.warm_up, options.trace)
        machine = environment()
        rows.append({**row, "commit": machine["commit"]})
        print(line(row), flush=True)
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        if options.out:
            about = {"schema": 1, "environment": machine, "device": device_name(pick_device()),
                     "preset": options.preset, "tokens_a_step": options.tokens}
            write_json(options.out, {**about, "rows": beside_twins(rows)})


if __name__ == "__main__":
    main()
