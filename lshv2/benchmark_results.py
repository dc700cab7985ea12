"""Reader of the benchmark, `benchmark_summary.json`: rows, and what was fitted to them.

    benchmark, problems = read_benchmark(run_path)
    benchmark.fits["lsh", "train_latency"].exponent

Same tolerance and same return as `lshv2.readers`. Files of before there were fixed tokens, several processes or
attention alone are read into the same; what they do not hold is NaN, None or empty.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from lshv2.tolerant import NAN, Problem, Problems, mapping, number, objects, read_object, text

ATTENTIONS = ("lsh", "dense", "window")
MEASURES = ("latency", "train_latency", "attention_latency", "attention_train_latency", "memory")
RANGES = ("all", "from_16k", "longest_decade")
SHARED_COLUMNS = ("latency_ms", "activation_mb")  # ends of columns, and of their percentiles', that a batch shares


@dataclass(frozen=True)
class Row:
    """One length of one attention; `values` holds every number of the row by its name (NaN: not measured)."""

    attention: str
    seq_len: int
    status: str
    reason: str
    values: dict[str, float]

    def get(self, key: str) -> float:
        return self.values.get(key, NAN)


@dataclass(frozen=True)
class Fit:
    """A power law by log-log least squares: exponent with its 95 % interval, over [min_seq_len, max_seq_len].

    bootstrap_low, bootstrap_high: the interval over processes. NaN: not known.
    """

    exponent: float
    low: float
    high: float
    n: float
    r2: float
    min_seq_len: float
    max_seq_len: float
    last_doubling: float
    bootstrap_low: float = NAN
    bootstrap_high: float = NAN

    @property
    def upper(self) -> float:
        """The larger of both upper ends; NaN without an interval."""
        return max(self.high, self.bootstrap_high) if math.isfinite(self.bootstrap_high) else self.high


@dataclass(frozen=True)
class FixedPart:
    """value = fixed + factor · length^exponent, with the exponent's bootstrap interval; error: relative, rms."""

    exponent: float
    low: float
    high: float
    fixed: float
    factor: float
    error: float
    n: float


@dataclass(frozen=True)
class Doubling:
    """Cost at seq_len over cost at half of it, with its bootstrap interval."""

    seq_len: float
    ratio: float
    low: float
    high: float


@dataclass(frozen=True)
class Scaling:
    """All that was fitted to one cost of one attention. `ranges`: the fits by the lengths they take, "all",
    "from_16k" and "longest_decade"; `resampled`: what the bootstraps drew again. Empty in files of before there were
    such."""

    resampled: str
    ranges: dict[str, Fit]
    fixed_part: FixedPart | None
    doublings: tuple[Doubling, ...]


@dataclass(frozen=True)
class Benchmark:
    """One layout's rows and fits; `fixed_tokens` is the same measured with so many tokens at every length, where time
    and memory are those of one sequence."""

    device: str
    dtype: str
    state: str
    rows: tuple[Row, ...]
    fits: dict[tuple[str, str], Fit] = field(default_factory=dict)  # (attention, measure)
    scaling: dict[tuple[str, str], Scaling] = field(default_factory=dict)
    fixed_tokens: Benchmark | None = None
    tokens: float = NAN  # of every row, in `fixed_tokens`
    environment: dict[str, Any] = field(default_factory=dict)  # `torch`, `commit`; empty in older files
    conditions: str = ""  # weights, tokens, what the backward computes again


Numbers = TypeVar("Numbers", Fit, FixedPart)


def read_benchmark(run: Path) -> tuple[Benchmark | None, Problems]:
    name = "benchmark_summary.json"
    content, problems = read_object(run, name)
    if problems:
        return None, problems
    benchmark, problems = _layout(content, content, name, a_sequence=False)
    benchmark = replace(benchmark, environment=mapping(content, "environment"), conditions=_conditions(content))
    again = mapping(content, "fixed_tokens")
    if not again:
        return benchmark, problems
    fixed, more = _layout(content, again, name, a_sequence=True)
    return replace(benchmark, fixed_tokens=fixed if fixed.rows else None), (*problems, *more)


def _conditions(content: dict[str, Any]) -> str:
    """`untrained weights, random tokens, gradient_checkpoint=True`, as far as the file says so."""
    weights, tokens, again = (content.get(key) for key in ("weights", "tokens", "gradient_checkpoint"))
    parts = [text(weights, 80).replace("untrained", "untrained weights")] if weights else []
    parts += [text(tokens, 80).replace("random", "random tokens")] if tokens else []
    parts += [f"gradient_checkpoint={text(again, 20)}"] if again is not None else []
    return ", ".join(parts)


def _layout(content: dict[str, Any], part: dict[str, Any], name: str, a_sequence: bool) -> tuple[Benchmark, Problems]:
    """`rows` and `fits` of the file or of its `fixed_tokens`; a_sequence: times and memory of one of a batch."""
    raw, problems = objects(part, "rows", name)
    rows = []
    for item in raw:
        length = number(item.get("seq_len"))
        if not length >= 1 or item.get("attention") not in ATTENTIONS:
            problems += (Problem(name, f"rows: {text(item, 80)} has no attention or seq_len"),)
            continue
        values = {k: number(v) for k, v in item.items() if isinstance(v, int | float)}
        if isinstance(item.get("processes"), list):
            values["n_processes"] = len(item["processes"])
        if a_sequence:
            values = {k: v / values.get("batch_size", NAN) if k.removesuffix("_p20").removesuffix("_p80").endswith(
                SHARED_COLUMNS) else v for k, v in values.items()}
        status = text(item.get("status") or "error", 40)
        rows.append(Row(item["attention"], int(length), status, text(item.get("reason")), values))
    rows.sort(key=lambda row: (row.attention, row.seq_len))
    entries = {(attention, measure): mapping(mapping(mapping(part, "fits"), attention), measure)
               for attention in ATTENTIONS for measure in MEASURES}
    fits = {key: fit for key, entry in entries.items() if (fit := _numbers(Fit, entry))}
    device, dtype, state = (text(content.get(key), 120) for key in ("device", "dtype", "state"))
    scaling = {key: _scaling(entries[key], name) for key in fits}
    return Benchmark(device, dtype, state, tuple(rows), fits, scaling, tokens=number(part.get("tokens"))), problems


def _scaling(entry: dict[str, Any], name: str) -> Scaling:
    ranges = {key: fit for key in RANGES if (fit := _numbers(Fit, mapping(mapping(entry, "ranges"), key)))}
    doublings = tuple(Doubling(*(number(item.get(key)) for key in Doubling.__dataclass_fields__))
                      for item in objects(entry, "doublings", name)[0])
    return Scaling(text(entry.get("resampled"), 40), ranges, _numbers(FixedPart, mapping(entry, "fixed_part")),
                   tuple(one for one in doublings if one.seq_len >= 1 and one.ratio > 0))


def _numbers(kind: type[Numbers], entry: dict[str, Any]) -> Numbers | None:
    """A dataclass of numbers from the keys of its fields; None without an exponent."""
    if not math.isfinite(number(entry.get("exponent"))):
        return None
    return kind(*(number(entry.get(key)) for key in kind.__dataclass_fields__))
