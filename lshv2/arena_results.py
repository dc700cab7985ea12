"""Reader of the arena, `arena.jsonl`: what the twins get right at which length, averaged over seeds.

    arena, problems = read_arena(run_path)
    for s in arena.summaries: s.task, s.model, s.seq_len, s.mean, s.low, s.high, s.by["depth"]
    summarise(records)                     # what `benchmark_summary.json` holds as `arena`, from the raw lines

Same tolerance and same return as `lshv2.readers`: a torn last line is no problem, anything else that is wrong is one
line that names it, and the rest is read. Needs neither torch nor pandas. Fields: `runs/README.md`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from lshv2.runs import read_jsonl
from lshv2.tolerant import NAN, Problem, Problems, mapping, number, refusal, text

FILE, PICTURE, CURVE, NEEDLES = "arena.jsonl", "arena.png", "arena_curve.png", "arena_needles.png"
MODELS = {"lsh": "LSH", "dense": "dense", "dense_scaled": "dense, scaled by log n", "window": "window only"}
TASKS = {  # in the order of tables, with the words for them; a user's own task comes after
    "mqar": "MQAR, 64 pairs", "mqar_dense_pairs": "MQAR, n/64 pairs", "duplication": "duplication",
    "induction": "induction heads", "selective_copying": "selective copying, 16 tokens",
    "selective_copying_dense": "selective copying, n/64 tokens", "passkey": "passkey", "kv_needle": "key–value needle",
    "uuid_needle": "UUID needle", "variable_tracking": "variable tracking", "listops": "ListOps",
    "listops_long": "ListOps, long", "bytes": "bytes of real text",
}
LIGHTER_DENSE = "half of the training"  # the quality curve's dense twin, where its points train less than the arena
ACCURACY, BITS = "accuracy", "bits_per_byte"
SCORES = ("mean", "low", "high", "chance")


@dataclass(frozen=True)
class ArenaRow:
    """One line. `value` NaN: not measured, then `status` and `reason` say why; `values`: every other number by name."""

    task: str
    model: str
    seed: int
    setting: str
    trained_len: float
    trained_by: str  # a hash of the recipe; "": not known
    seq_len: int
    metric: str
    value: float
    chance: float
    status: str
    reason: str
    shortcuts: dict[str, float]
    by: dict[str, dict[str, float]]
    values: dict[str, float]
    origin: dict[str, str]  # device, dtype, torch, commit, command


@dataclass(frozen=True)
class Summary:
    """One (task, model, setting, trained length, length) over its seeds; `mean`, `low` (the lowest seed) and `high`
    are NaN where no seed has a value. `by`: grouping -> label -> mean over seeds, labels ordered by their numbers."""

    task: str
    model: str
    setting: str
    trained_len: float
    seq_len: int
    metric: str
    seeds: int  # that have a value
    mean: float
    low: float
    high: float
    chance: float
    status: str  # "ok", or why no seed has a value
    shortcuts: dict[str, float]
    by: dict[str, dict[str, float]]
    values: dict[str, float]

    def get(self, key: str) -> float:
        return self.values.get(key, NAN)

    @property
    def shortcut(self) -> tuple[str, float]:
        """The strongest shortcut and what it reaches; ("", NaN) without one."""
        best = min if self.metric == BITS else max
        return best(self.shortcuts.items(), key=lambda item: item[1], default=("", NAN))


@dataclass(frozen=True)
class Arena:
    rows: tuple[ArenaRow, ...]
    summaries: tuple[Summary, ...]

    @property
    def tasks(self) -> list[str]:
        """Those with a line, known ones first."""
        return sorted({row.task for row in self.rows}, key=lambda task: place(TASKS, task))

    def of(self, task: str, setting: str | None = "") -> list[Summary]:
        """By model, trained length and length; setting None: whatever the evaluation changed."""
        return [s for s in self.summaries if s.task == task and setting in (None, s.setting)]

    def origins(self, key: str, task: str | None = None) -> list[str]:
        """Every distinct device, dtype, torch, commit or command of the lines (of one task), as first seen."""
        rows = [row for row in self.rows if task in (None, row.task)]
        return list(dict.fromkeys(row.origin[key] for row in rows if row.origin[key]))


def read_arena(run: Path) -> tuple[Arena | None, Problems]:
    """None where nothing is readable."""
    if problem := refusal(run, FILE):
        return None, (problem,)
    records, broken = read_jsonl(run / FILE)
    problems: Problems = (Problem(FILE, broken.removeprefix(f"{FILE} ")),) if broken else ()
    rows, more = _rows(records)
    if not rows:
        return None, (*problems, *more) or (Problem(FILE, "has no lines"),)
    return Arena(tuple(rows), tuple(_summaries(rows))), (*problems, *more)


def find_arenas(runs: Path) -> list[Path]:
    """Folders below `runs` with an `arena.jsonl`, those of a CPU last."""
    found = {path.parent for pattern in (f"*/{FILE}", f"reference-*/*/{FILE}") for path in runs.glob(pattern)}
    return sorted(found, key=lambda folder: ("-cpu" in folder.parent.name, folder.as_posix()))


def summarise(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The lines of an arena, averaged over seeds, as plain rows: null for what was not measured."""
    found = []
    for s in _summaries(_rows(records)[0]):
        trained = int(s.trained_len) if math.isfinite(s.trained_len) else None
        scores = {key: None if math.isnan(getattr(s, key)) else getattr(s, key) for key in SCORES}
        found.append({"task": s.task, "model": s.model, "setting": s.setting, "trained_len": trained,
                      "seq_len": s.seq_len, "metric": s.metric, "seeds": s.seeds, **scores})
    return found


def _rows(records: Sequence[dict[str, Any]]) -> tuple[list[ArenaRow], Problems]:
    """Later lines in place of earlier ones, and a model's later recipe in place of its earlier one; what makes no
    sense is counted."""
    kept: dict[tuple[Any, ...], ArenaRow] = {}
    nameless = valueless = 0
    for record in records:
        row = _row(record)
        if row is None:
            nameless += 1
            continue
        valueless += row.status == "ok" and math.isnan(row.value)
        trained = None if math.isnan(row.trained_len) else row.trained_len  # NaN is never equal to itself
        key = (row.task, row.model, row.seed, row.setting, row.seq_len, trained)
        kept.pop(key, None)
        kept[key] = row
    problems: Problems = ()
    if nameless:
        problems += (Problem(FILE, f"{nameless} of {len(records)} lines have no task, model or seq_len"),)
    if valueless:
        problems += (Problem(FILE, f"{valueless} of {len(records)} lines are ok and have no value of their metric"),)
    newest = {_trained(row): row.trained_by for row in kept.values()}
    rows = [row for row in kept.values() if row.trained_by == newest[_trained(row)]]
    if former := len(kept) - len(rows):
        problems += (Problem(FILE, f"{former} lines are of models that have since been trained otherwise: left out"),)
    return rows, problems


def _trained(row: ArenaRow) -> tuple[Any, ...]:
    """What is averaged over seeds, and so has to be trained alike."""
    return row.task, row.model, row.setting, None if math.isnan(row.trained_len) else row.trained_len


def _row(record: dict[str, Any]) -> ArenaRow | None:
    task, model, length = text(record.get("task"), 60), text(record.get("model"), 40), number(record.get("seq_len"))
    named = all(isinstance(record.get(key), str) and record[key] for key in ("task", "model"))
    if not named or not length >= 1:
        return None
    metric = text(record.get("metric") or ACCURACY, 40)
    status = text(record.get("status") or "ok", 40)
    seed = number(record.get("seed"))
    by = {text(name, 40): _numbers(groups, metric) for name, groups in mapping(record, "by").items()
          if isinstance(groups, dict)}
    return ArenaRow(
        task, model, int(seed) if math.isfinite(seed) else 0, text(record.get("setting"), 80),
        number(record.get("trained_len")), text(record.get("trained_by"), 64), int(length), metric,
        _score(record.get("value"), metric) if status == "ok" else NAN, _score(record.get("chance"), metric), status,
        text(record.get("reason"), 200), _numbers(mapping(record, "shortcuts"), metric),
        {name: groups for name, groups in by.items() if groups},
        {key: number(value) for key, value in record.items() if math.isfinite(number(value))},
        {key: text(record.get(key), 200)[: 7 if key == "commit" else None]
         for key in ("device", "dtype", "torch", "commit", "command")},
    )


def _score(value: object, metric: str) -> float:
    """A value that the metric can have, else NaN."""
    score = number(value)
    return score if 0 <= score <= (1 if metric == ACCURACY else math.inf) else NAN


def _numbers(groups: dict[str, Any], metric: str) -> dict[str, float]:
    scores = {text(label, 80): _score(value, metric) for label, value in groups.items()}
    return {label: score for label, score in scores.items() if math.isfinite(score)}


def _summaries(rows: Iterable[ArenaRow]) -> list[Summary]:
    groups: dict[tuple[Any, ...], list[ArenaRow]] = {}
    for row in rows:
        trained = -1.0 if math.isnan(row.trained_len) else row.trained_len
        key = (place(TASKS, row.task), place(MODELS, row.model), trained, row.setting, row.seq_len, row.metric)
        groups.setdefault(key, []).append(row)
    return [_summary(groups[key]) for key in sorted(groups)]


def _summary(rows: Sequence[ArenaRow]) -> Summary:
    first = rows[0]
    good = [row for row in rows if math.isfinite(row.value)]
    scores = [row.value for row in good]
    why = next((row.status for row in rows if row.status != "ok"), "no value")
    names = dict.fromkeys(name for row in good for name in row.by)
    return Summary(
        first.task, first.model, first.setting, first.trained_len, first.seq_len, first.metric, len(good),
        fmean(scores) if scores else NAN, min(scores, default=NAN), max(scores, default=NAN),
        mean(row.chance for row in rows), "ok" if good else why, _means([row.shortcuts for row in rows]),
        {name: _means([row.by.get(name, {}) for row in good]) for name in names},
        _means([row.values for row in good or rows]),
    )


def mean(values: Iterable[float]) -> float:
    """Of the finite ones; NaN without any."""
    known = [value for value in values if math.isfinite(value)]
    return fmean(known) if known else NAN


def _means(tables: Sequence[dict[str, float]]) -> dict[str, float]:
    labels = sorted({label for table in tables for label in table}, key=label_place)
    return {label: mean(table.get(label, NAN) for table in tables) for label in labels}


def label_place(label: str) -> tuple[float, str]:
    """Labels by the number they begin with (`0.111`, `4096-8191`), others after them."""
    begin = re.match(r"\d+(\.\d+)?", label)
    return (float(begin[0]) if begin else math.inf, label)


def place(known: dict[str, str], name: str) -> tuple[int, str]:
    return (list(known).index(name) if name in known else len(known), name)
