"""From the append-only `metrics.jsonl` to the columns of `training_metrics.json`.

A `resume` line supersedes earlier lines of its task past the step it resumed from, a `restart` line all of them, and
a line an earlier one of its event and step: they were computed twice.
"""

from __future__ import annotations

from statistics import median
from typing import Any

from lshv2.runs import SCHEMA, Run, read_jsonl, write_json

TRAIN_COLUMNS = ("step", "loss_train", "learning_rate", "tokens_per_sec", "ponder_steps", "grad_norm", "tokens")
EVAL_COLUMNS = {"step": "eval_step", "loss_eval": "loss_eval", "bits_per_byte": "bits_per_byte", "accuracy": "accuracy",
                "ponder_steps": "eval_ponder_steps", "halted_at": "halted_at"}


def standing(records: list[dict[str, Any]], task: str) -> list[dict[str, Any]]:
    """The task's lines in step order, without those that a later one superseded."""
    kept: dict[tuple[str, int], dict[str, Any]] = {}
    for record in records:
        if record.get("task") != task:
            continue
        event, step = record["event"], record["step"]
        if event == "restart":
            kept = {}
        elif event == "resume":
            kept = {key: r for key, r in kept.items() if r["step"] <= step}
        else:  # an evaluation that a signal cut short is made again by each resume before the next checkpoint
            kept[event, step] = record
    return list(kept.values())


def columns(records: list[dict[str, Any]]) -> dict[str, Any]:
    """Columns of one task: train events by `TRAIN_COLUMNS`, eval events by `EVAL_COLUMNS`, and the median rate."""
    train = [r for r in records if r["event"] == "train"]
    evals = [r for r in records if r["event"] == "eval"]
    content: dict[str, Any] = {name: [r[name] for r in train] for name in TRAIN_COLUMNS}
    for source, name in EVAL_COLUMNS.items():
        if any(source in r for r in evals):
            content[name] = [r.get(source) for r in evals]
    content["tokens_per_sec_median"] = median(content["tokens_per_sec"]) if train else None
    return content


def write_training_metrics(
    run: Run, state: str, language_model: dict[str, Any], recall: dict[str, Any]
) -> dict[str, Any]:
    """Consolidate `metrics.jsonl`; the two dicts are scalars to put beside each task's columns."""
    records, problem = read_jsonl(run.metrics)
    if problem and run.metrics.exists():  # a training that begins has none
        print(problem)
    content = {
        "schema": SCHEMA, "state": state, **columns(standing(records, "language_model")), **language_model,
        "recall": {**columns(standing(records, "recall")), **recall},
    }
    write_json(run.file("training_metrics.json"), content)
    return content
