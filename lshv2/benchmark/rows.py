"""A row of the benchmark from the processes that measured it, and what is fitted to rows.

A process gives medians over its samples. A row's figure is the median over its processes' medians; its spread, 20th to
80th percentile, is of all samples of all of them, so that it shows also how processes differ. `processes` keeps each
one's own medians: they are what the bootstrap of `lshv2.resampling` draws from.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from lshv2.resampling import Observation, fit_observations

RESOLUTION_MB = 1.0  # peaks below this are within the allocator's granularity
MEASURES = {
    "latency": "latency_ms", "train_latency": "train_latency_ms", "attention_latency": "attention_latency_ms",
    "attention_train_latency": "attention_train_latency_ms", "memory": "activation_mb",
}
PARTS = ("", "train_", "attention_", "attention_train_")  # each is timed: `<part>latency_ms` and so on
MEMORY = ("fixed_mb", "forward_rss_mb", "rss_mb", "activation_mb")
Row = dict[str, Any]


class Case(NamedTuple):
    """What a row is of."""

    attention: str
    seq_len: int
    batch_size: int


def add_process(row: Row | None, fresh: Row) -> Row:
    """The row with one more process; None: the first one. A failure after the first counts as a process, no more."""
    mine = {name: fresh[name] for name in ("status", "seconds", *MEASURES.values(), *MEMORY) if name in fresh}
    if fresh["status"] != "ok":
        mine["reason"] = fresh["reason"]
    if row is None:
        return {**fresh, "processes": [mine]}
    joined = {**row, "processes": [*row["processes"], mine], "seconds": round(row["seconds"] + fresh["seconds"], 2)}
    if fresh["status"] != "ok":
        return joined
    good = [process for process in joined["processes"] if process["status"] == "ok"]
    for part in PARTS:
        if f"{part}latency_ms" in row and f"{part}latency_ms" in fresh:
            joined |= _times(part, row, fresh, [process[f"{part}latency_ms"] for process in good])
    for part in ("", "train_"):
        joined[f"{part}tokens_per_sec"] = round(row["seq_len"] * row["batch_size"] / joined[f"{part}latency_ms"] * 1e3,
                                                2)
    return joined | {name: round(float(np.median([process[name] for process in good])), 2) for name in MEMORY}


def _times(part: str, row: Row, fresh: Row, medians: list[float]) -> Row:
    """One part's columns over the samples of all processes."""
    name = f"{part}latency"
    samples = [*row[f"{name}_samples_ms"], *fresh[f"{name}_samples_ms"]]
    middle = float(np.median(medians))
    low, high = (float(value) for value in np.quantile(samples, [0.2, 0.8]))
    return {  # with few samples of very different processes the percentiles may leave out the median of medians
        f"{name}_ms": round(middle, 4), f"{name}_ms_p20": round(min(low, middle), 4),
        f"{name}_ms_p80": round(max(high, middle), 4), f"{name}_samples_ms": samples,
        f"{part}n_samples": len(samples),
    }


def skipped(blocker: Row, case: Case) -> Row:
    batch = "" if blocker["batch_size"] == case.batch_size else f" x {blocker['batch_size']}"
    reason = f"not attempted: {blocker['seq_len']}{batch} tokens already ended in {blocker['status']}"
    return {**case._asdict(), "status": "skipped", "reason": reason, "processes": []}


def fit_rows(rows: list[Row]) -> dict[str, Any]:
    """`fits`, `alpha`, `beta`, their intervals, `alpha_upper` and `longest_ok` from the rows whose status is ok."""
    fits: dict[str, dict[str, Any]] = {}
    longest: dict[str, int | None] = {}
    for attention in dict.fromkeys(row["attention"] for row in rows):
        mine = [row for row in rows if row["attention"] == attention and row["status"] == "ok"]
        longest[attention] = max((row["seq_len"] for row in mine), default=None)
        fits[attention] = {name: fit_observations(_observed(mine, key)) for name, key in MEASURES.items()}
    chosen = {"alpha": fits.get("lsh", {}).get("train_latency"), "beta": fits.get("lsh", {}).get("memory")}
    result: dict[str, Any] = {"fits": fits, "longest_ok": longest}
    for name, fit in chosen.items():
        result[name] = fit["exponent"] if fit else None
        result[f"{name}_interval"] = [fit["low"], fit["high"]] if fit and fit["low"] is not None else None
    decade = chosen["alpha"] and chosen["alpha"]["ranges"]["longest_decade"]
    return {**result, "alpha_upper": decade["upper"] if decade else None}


def _observed(rows: list[Row], key: str) -> list[Observation]:
    """One column by length: of one sequence, so that a batch that shrinks with length shows the same exponent.

    Memory below the resolution is left out, as is a column that a row has not.
    """
    observed = []
    for row in rows:
        processes = [process[key] for process in row["processes"] if process["status"] == "ok" and key in process]
        if not processes or (key == "activation_mb" and min(processes) <= RESOLUTION_MB):
            continue
        samples = row.get(f"{key.removesuffix('_ms')}_samples_ms", [])
        observed.append(Observation(row["seq_len"], *(tuple(value / row["batch_size"] for value in values)
                                                      for values in (processes, samples))))
    return observed


def describe(row: Row) -> str:
    """One line of the log."""
    batch = f" x {row['batch_size']}" if row["batch_size"] > 1 else ""
    what = f"{row['attention']:>6} {row['seq_len']:>7,}{batch} tokens: "
    if row["status"] != "ok":
        return f"{what}{row['status']}: {row['reason']}"
    alone = row.get("attention_train_latency_ms")
    attention = "" if alone is None else f" (attention alone {alone:,.1f} ms)"
    again = f", {len(row['processes'])} processes" if len(row["processes"]) > 1 else ""
    return (f"{what}forward {row['latency_ms']:,.1f} ms, with backward {row['train_latency_ms']:,.1f} ms{attention}, "
            f"activations {row['activation_mb']:,.0f} MB{again}")
