"""Training curves of a run: `metrics.jsonl` or `training_metrics.json`, whichever is newer, as float arrays.

    training, problems = read_training(run_path)
    training.language_model.train["loss_train"]      # [n] float64, NaN where not measured

`metrics.jsonl` is read while training goes on and after a crash; once `training_metrics.json` has been written last,
its columns are read instead (ten times faster). Same tolerance and same return as `lshv2.readers`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lshv2.runs import read_jsonl
from lshv2.tolerant import Problem, Problems, mapping, number, read_object, refusal, text

Array = NDArray[np.float64]
TRAIN = ("step", "loss_train", "learning_rate", "tokens_per_sec", "ponder_steps", "grad_norm", "tokens")
EVAL = ("eval_step", "loss_eval", "bits_per_byte", "accuracy")
TASKS = ("language_model", "recall")
FILES = ("metrics.jsonl", "training_metrics.json")


@dataclass(frozen=True)
class Curves:
    """One task: columns of `train` events (keys TRAIN) and of `eval` events (keys EVAL), each of equal length [n]."""

    train: dict[str, Array]
    eval: dict[str, Array]

    @property
    def empty(self) -> bool:
        return not len(self.train["step"]) and not len(self.eval["eval_step"])

    def eval_tokens(self) -> Array:
        """Tokens seen at each evaluation, between the training events' (NaN without any)."""
        steps, tokens = self.train["step"], self.train["tokens"]
        good = np.isfinite(steps) & np.isfinite(tokens)
        if not good.any():
            return np.full(len(self.eval["eval_step"]), np.nan)
        return np.interp(self.eval["eval_step"], steps[good], tokens[good])

    def last(self, key: str) -> float:
        """The last measured value of a column, NaN if there is none."""
        values = {**self.train, **self.eval}[key]
        values = values[np.isfinite(values)]
        return float(values[-1]) if len(values) else float("nan")


@dataclass(frozen=True)
class Training:
    """Everything of phase 3 but the profile. Scalars are NaN until `training_metrics.json` holds them."""

    source: str  # the file that the curves were read from
    state: str
    device: str
    parameters: float
    tokens_per_sec_median: float
    order2_bits_per_byte: float
    seconds: float
    chance: float
    environment: dict[str, Any]  # empty in files older than it
    language_model: Curves
    recall: Curves


def read_training(run: Path) -> tuple[Training | None, Problems]:
    summary, problems = read_object(run, "training_metrics.json")
    refused = refusal(run, "metrics.jsonl")
    if refused and not refused.missing:
        problems += (refused,)
    from_lines = not refused and (not summary or _newer(run / "metrics.jsonl", run / "training_metrics.json"))
    if from_lines:
        curves, more = _from_lines(run / "metrics.jsonl")
    elif summary:
        curves, more = _from_columns(summary)
    else:
        return None, problems
    recall = mapping(summary, "recall")
    training = Training(
        FILES[0] if from_lines else FILES[1],
        text(summary.get("state"), 40), text(summary.get("device"), 120), number(summary.get("parameters")),
        number(summary.get("tokens_per_sec_median")), number(summary.get("order2_bits_per_byte")),
        number(summary.get("seconds")), number(recall.get("chance")),
        mapping(summary, "environment"), *curves,
    )
    return training, (*problems, *more)


def _newer(path: Path, other: Path) -> bool:
    try:
        return path.stat().st_mtime_ns > other.stat().st_mtime_ns
    except OSError:
        return False


def _from_lines(path: Path) -> tuple[tuple[Curves, Curves], Problems]:
    records, reason = read_jsonl(path)
    problems: Problems = (Problem(path.name, reason.removeprefix(f"{path.name} ")),) if reason else ()
    kept: dict[tuple[str, str], dict[float, dict[str, Any]]] = {
        (task, event): {} for task in TASKS for event in ("train", "eval")
    }
    for record in records:
        task, event, step = record.get("task"), record.get("event"), number(record.get("step"))
        if task not in TASKS or event not in ("train", "eval", "resume", "restart") or step != step:
            continue
        if event in ("train", "eval"):
            kept[task, event][step] = record  # the same step again: the later line counts
            continue
        for old in ("train", "eval"):  # what a killed run logged beyond its checkpoint is done again
            kept[task, old] = {s: r for s, r in kept[task, old].items() if event == "resume" and s <= step}
    found = []
    for task in TASKS:
        train, evals = ([r for _, r in sorted(kept[task, event].items())] for event in ("train", "eval"))
        columns: dict[str, list[Any]] = {key: [r.get(key) for r in train] for key in TRAIN}
        columns |= {key: [r.get("step" if key == "eval_step" else key) for r in evals] for key in EVAL}
        curves, more = _curves(columns, path.name, task)
        found.append(curves)
        problems += more
    return (found[0], found[1]), problems


def _from_columns(summary: dict[str, Any]) -> tuple[tuple[Curves, Curves], Problems]:
    first, problems = _curves(summary, FILES[1], "")
    second, more = _curves(mapping(summary, "recall"), FILES[1], "recall")
    return (first, second), (*problems, *more)


def _curves(columns: dict[str, Any], name: str, prefix: str) -> tuple[Curves, Problems]:
    train, problems = _table(columns, TRAIN, name, prefix)
    evals, more = _table(columns, EVAL, name, prefix)
    return Curves(train, evals), (*problems, *more)


def _table(columns: dict[str, Any], keys: Sequence[str], name: str, prefix: str) -> tuple[dict[str, Array], Problems]:
    """Equal-length arrays: absent columns are all NaN, longer ones are cut to the shortest."""
    problems: Problems = ()
    arrays: dict[str, Array] = {}
    for key in keys:
        label = f"{prefix}.{key}" if prefix else key
        value = columns.get(key)
        if value is None:
            continue
        if not isinstance(value, list):
            problems += (Problem(name, f"{label}: is not a list"),)
            continue
        arrays[key], wrong = _column(value)
        if wrong:
            problems += (Problem(name, f"{label}: {wrong} of {len(value)} values are not numbers"),)
    position = keys[0]
    if arrays and position not in arrays:
        problems += (Problem(name, f"has no {f'{prefix}.{position}' if prefix else position}: its curves have no x"),)
    lengths = {len(array) for array in arrays.values()}
    length = min(lengths) if lengths else 0
    if len(lengths) > 1:
        spread = f"{min(lengths)} to {max(lengths)}"
        problems += (Problem(name, f"columns differ in length ({spread}): cut to the shortest"),)
    return {key: arrays[key][:length] if key in arrays else np.full(length, np.nan) for key in keys}, problems


def _column(values: list[Any]) -> tuple[Array, int]:
    """Floats, and how many were neither a finite number nor null."""
    try:
        if set(map(type, values)) <= {int, float, type(None)}:
            array = np.array(values, dtype=np.float64)
        else:
            raise TypeError
    except (TypeError, OverflowError):
        array = np.array([number(value) for value in values], dtype=np.float64)
    bad = ~np.isfinite(array)
    wrong = int(bad.sum()) - values.count(None)
    array[bad] = np.nan
    return array, wrong
