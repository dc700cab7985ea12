"""Which attention? Language-model twins that differ in one choice, several seeds each, on one machine.

    python -m lshv2.ablation OUT --seeds 0 1 2 --variants dense_full lsh_codebooks_half

Every variant reads the same bytes of real text in the same order and has the same parameters, steps and learning rate;
what differs is in VARIANTS. OUT gets one run folder a (variant, seed), resumable as any run, and `ablation.json`:
rows of bits per byte on held-out documents, over all positions and over those past `--late` alone, and their mean and
range by variant. Quality only: the speed of these runs says nothing (short inputs go through a dense mask).
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from statistics import mean
from typing import Any

from lshv2.data import ensure
from lshv2.evaluation import evaluate
from lshv2.losses import IGNORE
from lshv2.machine import environment
from lshv2.model import LSHModel
from lshv2.runs import Run, open_run, read_json, write_json
from lshv2.train import language_task
from lshv2.trainer import Trainer

BASE: dict[str, Any] = {
    "model.vocab_size": 257, "model.d_model": 256, "model.n_layers": 4, "model.weight_tied_layers": 4,
    "model.n_heads": 4, "model.n_kv_heads": 4, "model.d_ff": 1024, "model.use_ponder": False,
    "model.max_seq_len": 2048, "model.window": 256,
    "model.bucket_size": 64, "model.n_buckets": 32, "data.max_bytes": None, "train.seq_length": 2048,
    "train.batch_size": 16, "train.num_epochs": 1, "train.num_eval_sequences": 128, "train.learning_rate": 3e-3,
    "train.eval_every": 400, "train.checkpoint_every": 600, "train.keep_checkpoints": 1, "train.log_every": 50,
    "train.profile_components": False, "train.num_workers": 2,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "dense_full": {"model.attention": "dense", "model.rotary_fraction": 1.0},
    "dense_half": {"model.attention": "dense"},
    "window": {"model.attention": "window"},
    "lsh_codebooks_half": {},
    "lsh_codebooks_full": {"model.rotary_fraction": 1.0},
    "lsh_codebooks_quarter": {"model.rotary_fraction": 0.25},
    "lsh_cross_polytope_half": {"model.hashing": "cross_polytope"},
}


def train_variant(base: Run, out: Path, name: str, seed: int, overrides: dict[str, Any], late: int) -> dict[str, Any]:
    """One (variant, seed): train or resume, evaluate, return its row."""
    run = open_run((out / f"{name}-{seed}").resolve(), overrides={**overrides, **VARIANTS[name]}, seed=seed)
    if not run.data.exists():
        shutil.copytree(base.data, run.data)
    task = language_task(run)
    trainer = Trainer(run, task, LSHModel(run.settings.model, seed))
    result = trainer.fit()
    shutil.rmtree(run.data)

    def late_batches() -> Any:
        for i in range(len(task.evaluation)):  # type: ignore[arg-type]
            ids = task.evaluation[i][0][None]
            labels = ids.clone()
            labels[:, :late] = IGNORE
            yield ids, labels

    far = evaluate(trainer.model, late_batches(), trainer.autocast, task.token_bytes)
    return {
        "variant": name, "seed": seed, "bits_per_byte": result.bits_per_byte, "late_bits_per_byte": far.bits_per_byte,
        "steps": trainer.total_steps, "seconds": trainer.seconds, "parameters": trainer.model.count_parameters(),
    }


def summarise(rows: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Mean, lowest and highest by variant."""
    table: dict[str, dict[str, float]] = {}
    for name in dict.fromkeys(row["variant"] for row in rows):
        mine = [row for row in rows if row["variant"] == name]
        table[name] = {"seeds": len(mine)}
        for column in ("bits_per_byte", "late_bits_per_byte"):
            values = [row[column] for row in mine]
            table[name] |= {column: mean(values), f"{column}_low": min(values), f"{column}_high": max(values)}
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--late", type=int, default=1024, help="positions from here on count as late")
    parser.add_argument("--set", nargs="*", default=[], help="section.key=value for every variant, JSON values")
    arguments = parser.parse_args()
    overrides = {**BASE, "train.num_train_sequences": arguments.steps * BASE["train.batch_size"]}
    overrides |= {key: json.loads(value) for key, value in (text.split("=", 1) for text in arguments.set)}
    base = open_run((arguments.out / "data").resolve(), overrides=overrides)
    ensure(base)
    target = arguments.out / "ablation.json"
    rows = (read_json(target)[0] or {}).get("rows", [])
    for seed in arguments.seeds:
        for name in arguments.variants:
            if any((row["variant"], row["seed"]) == (name, seed) for row in rows):
                continue
            rows.append(train_variant(base, arguments.out, name, seed, overrides, arguments.late))
            write_json(target, {"schema": 1, "settings": overrides, "variants": VARIANTS, "environment": environment(),
                                "rows": rows, "summary": summarise(rows)})
            print(json.dumps(rows[-1]), flush=True)
    for name, row in summarise(rows).items():
        print(f"{name:28} {row['bits_per_byte']:.4f} [{row['bits_per_byte_low']:.4f}, {row['bits_per_byte_high']:.4f}]"
              f"  late {row['late_bits_per_byte']:.4f}")


if __name__ == "__main__":
    main()
