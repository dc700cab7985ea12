"""Training steps on several GPUs, against one of them: the same losses, and how much faster.

    torchrun --nproc_per_node=2 -m lshv2.benchmark.parallel --length 131072 --out parallel.json

Rows, by `mode`: "alone" (every process the whole step by itself, at the same time), "data" (as many sequences as
processes, one each), "sequence" (one sequence, shared), all with the trainer's own step on random tokens, as in
`lshv2.benchmark.training`. `tokens_per_sec` are those of all processes together (alone: of the slowest one), `speed_up`
is over alone. Peak memory is the most of any process.
`equality`: the same modes at a small size in float32, a few steps; how far losses and gradient norms lie from those of
one process, as a part of them. A bucket id that is nearly a tie may part the runs after the first step: `first` is
that one's difference, `later` the largest of the others.
Not here: several machines.
"""

from __future__ import annotations

import argparse
import gc
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from lshv2.benchmark.meter import Meter
from lshv2.benchmark.training import make_trainer, settings_of
from lshv2.benchmark.worker import device_name
from lshv2.config import Settings
from lshv2.machine import environment
from lshv2.parallel.layout import WHOLE, Layout, plan
from lshv2.parallel.ranks import ALONE, Ranks, join
from lshv2.presets import PRESETS, make_settings
from lshv2.runs import write_json
from lshv2.trainer import Trainer

MODES = ("alone", "data", "sequence")
SMALL = {
    "model.d_model": 256, "model.n_heads": 4, "model.n_kv_heads": 4, "model.n_layers": 4, "model.weight_tied_layers": 2,
    "model.d_ff": 512, "model.vocab_size": 512, "model.max_seq_len": 4096, "train.seq_length": 4096,
    "train.precision": "float32", "train.compile": False, "train.learning_rate": 1e-3, "train.warmup_fraction": 0.0,
    "train.ponder_from": 0.0, "train.ponder_to": 0.0,  # all exits answer from the first step on
}


def layout_of(mode: str, ranks: Ranks, settings: Settings) -> tuple[Ranks, Layout]:
    """Who takes part in a step of this mode, and how."""
    if mode == "alone":
        return ALONE, WHOLE
    train = settings.train
    sequence = ranks.world if mode == "sequence" else 1
    return ranks, plan(
        ranks.world, batch_size=train.batch_size, length=train.seq_length, config=settings.model, sequence=sequence
    )


def trainer_of(folder: str, settings: Settings, mode: str, ranks: Ranks) -> tuple[Trainer, Tensor]:
    """A trainer of this mode, and what it takes of random tokens that are the same in every mode."""
    trainer = make_trainer(Path(folder), settings, *layout_of(mode, ranks, settings))
    shape = (settings.train.batch_size, settings.train.seq_length)
    ids = torch.randint(settings.model.vocab_size, shape, generator=torch.Generator().manual_seed(settings.seed))
    return trainer, ids[trainer.share.rows(shape[0])]


def followed(settings: Settings, mode: str, ranks: Ranks, steps: int) -> list[list[float]]:
    """[losses, gradient norms] of some steps."""
    with tempfile.TemporaryDirectory() as folder:
        trainer, ids = trainer_of(folder, settings, mode, ranks)
        found = [trainer._train_step(ids, ids) for _ in range(steps)]
        losses = [float(loss) for loss, _, _ in found]
        if mode != "alone":
            losses = [loss / ranks.world for loss in ranks.total(losses)]
        return [losses, [float(norm) for _, _, norm in found]]


def equality(ranks: Ranks, hashing: str, steps: int = 4) -> list[dict[str, Any]]:
    """How far each mode is from one process: the module's docstring."""
    given = {**SMALL, "train.batch_size": ranks.world, "model.hashing": hashing}
    settings = make_settings("full", given)
    one = followed(settings, "alone", ranks, steps)
    rows = []
    for mode in MODES[1:]:
        got = followed(settings, mode, ranks, steps)
        row: dict[str, Any] = {"mode": mode, "hashing": hashing, "losses": got[0], "losses_alone": one[0]}
        for name, a, b in zip(("loss", "norm"), got, one, strict=True):
            off = [abs(x - y) / abs(y) for x, y in zip(a, b, strict=True)]
            row |= {f"{name}_first": off[0], f"{name}_later": max(off[1:])}
        rows.append(row)
    return rows


def measure(case: dict[str, Any], ranks: Ranks, preset: str, samples: int, warm_up: int) -> dict[str, Any]:
    """A row of times."""
    meter, began = Meter(ranks.device), time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        trainer, ids = trainer_of(folder, settings_of(preset, case), case["mode"], ranks)

        def step() -> None:
            trainer._train_step(ids, ids)

        for _ in range(warm_up):
            step()
        ready = time.monotonic() - began
        ranks.wait()
        meter.reset_peak()
        taken = [meter.milliseconds(step) for _ in range(samples)]
        slowest = ranks.most(median(taken))
        row = {**case, "processes": 1 if case["mode"] == "alone" else ranks.world, "step_ms": slowest,
               "samples_ms": taken, "tokens_per_sec": case["batch_size"] * case["seq_len"] / slowest * 1e3,
               "peak_mb": ranks.most(meter.peak_mb()), "warm_up_s": ready}
    gc.collect()
    if meter.cuda:
        torch.cuda.empty_cache()
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=131_072)
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--preset", choices=sorted(PRESETS), default="full")
    parser.add_argument("--ponder", action="store_true")
    parser.add_argument("--checkpoint", choices=["true", "block", "feed_forward", "false"], default="true")
    parser.add_argument("--eager", action="store_true", help="without torch.compile")
    parser.add_argument("--no-equality", action="store_true")
    parser.add_argument("--samples", type=int, default=6)
    parser.add_argument("--warm-up", type=int, default=3)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    with join() as ranks:
        content: dict[str, Any] = {
            "schema": 1, "environment": environment(), "device": device_name(ranks.device), "processes": ranks.world,
            "preset": options.preset, "equality": [], "rows": [],
        }
        hashings = [] if options.no_equality else ["inverted_file", "codebooks"]
        for hashing in hashings:
            content["equality"] += equality(ranks, hashing)
        for mode in options.modes:
            case = {
                "mode": mode, "attention": "lsh", "ponder": options.ponder, "compile": not options.eager, "seed": 0,
                "gradient_checkpoint": {"true": True, "false": False}.get(options.checkpoint, options.checkpoint),
                "seq_len": options.length, "batch_size": ranks.world if mode == "data" else 1,
            }
            row = measure(case, ranks, options.preset, options.samples, options.warm_up)
            alone = next((r["tokens_per_sec"] for r in content["rows"] if r["mode"] == "alone"), None)
            content["rows"].append({**row, "speed_up": row["tokens_per_sec"] / alone if alone else None})
            if ranks.first:
                write_json(options.out, content)
        if ranks.first:
            for row in content["equality"]:
                print({key: value for key, value in row.items() if not key.startswith("losses")}, flush=True)
            for row in content["rows"]:
                print(f"{row['mode']:9} {row['step_ms']:9,.1f} ms, {row['tokens_per_sec']:,.0f} tokens/s, "
                      f"{row['peak_mb'] / 1024:.1f} GB, speed-up {row['speed_up'] or 1:.2f}", flush=True)


if __name__ == "__main__":
    main()
