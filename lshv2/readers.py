"""Readers of a run folder's files: JSON of any quality in, typed and clean values out. Used by report and dashboard.

    benchmark, problems = read_benchmark(run_path)

Every reader returns `(content, problems)` and never raises on what a file holds: a missing, torn, broken or
foreign file gives None or the readable part of it, and one `Problem` a defect, which names the file. Needs neither
torch nor pandas. Training curves have their own module, `lshv2.curves`; the state of a run, `lshv2.run_state`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lshv2.tolerant import NAN, Problem, Problems, mapping, number, objects, read_object, text

ATTENTIONS = ("lsh", "dense", "window")
MEASURES = ("latency", "train_latency", "memory")


def read_settings(run: Path) -> tuple[dict[str, str], Problems]:
    """`config.json` flattened to `section.key` -> value as JSON text; nothing is validated here."""
    content, problems = read_object(run, "config.json")
    settings = mapping(content, "settings")
    if not problems and not settings:
        problems = (Problem("config.json", "has no settings"),)
    flat: dict[str, str] = {}
    for section, values in settings.items():
        pairs = {f"{section}.{k}": v for k, v in values.items()} if isinstance(values, dict) else {section: values}
        flat.update({text(k, 80): text("null" if v is None else v, 200) for k, v in pairs.items()})
    return flat, problems


@dataclass(frozen=True)
class Profile:
    """Milliseconds of one training step by exclusive component, `component_profiles.json`."""

    device: str
    dtype: str
    seq_length: float
    batch_size: float
    n_steps: float
    step_ms: float
    components_ms: dict[str, float]

    @property
    def sum_ms(self) -> float:
        return sum(self.components_ms.values())

    @property
    def coverage(self) -> float:
        return self.sum_ms / self.step_ms if self.step_ms > 0 else NAN


def read_profile(run: Path) -> tuple[Profile | None, Problems]:
    name = "component_profiles.json"
    content, problems = read_object(run, name)
    if problems:
        return None, problems
    parts = {text(k, 80): number(v) for k, v in mapping(content, "components_ms").items()}
    wrong = [k for k, v in parts.items() if not v >= 0]
    if wrong:
        problems += (Problem(name, f"components_ms: no time in {', '.join(wrong[:5])}"),)
    parts = {k: v for k, v in parts.items() if v >= 0}
    if not parts:
        return None, (*problems, Problem(name, "has no components_ms"))
    step = number(content.get("step_ms"))
    if not step > 0:
        problems += (Problem(name, "has no step_ms: shares are of the components' sum"),)
        step = sum(parts.values())
    profile = Profile(
        text(content.get("device")), text(content.get("dtype")), number(content.get("seq_length")),
        number(content.get("batch_size")), number(content.get("n_steps")), step, parts,
    )
    return profile, problems


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
    """A power law by log-log least squares: exponent with its 95 % interval, over [min_seq_len, max_seq_len]."""

    exponent: float
    low: float
    high: float
    n: float
    r2: float
    min_seq_len: float
    max_seq_len: float
    last_doubling: float


@dataclass(frozen=True)
class Benchmark:
    device: str
    dtype: str
    state: str
    rows: tuple[Row, ...]
    fits: dict[tuple[str, str], Fit] = field(default_factory=dict)  # (attention, measure)


def read_benchmark(run: Path) -> tuple[Benchmark | None, Problems]:
    name = "benchmark_summary.json"
    content, problems = read_object(run, name)
    if problems:
        return None, problems
    raw, more = objects(content, "rows", name)
    problems += more
    rows = []
    for item in raw:
        length = number(item.get("seq_len"))
        if not length >= 1 or item.get("attention") not in ATTENTIONS:
            problems += (Problem(name, f"rows: {text(item, 80)} has no attention or seq_len"),)
            continue
        values = {k: number(v) for k, v in item.items() if isinstance(v, int | float)}
        status = text(item.get("status") or "error", 40)
        rows.append(Row(item["attention"], int(length), status, text(item.get("reason")), values))
    rows.sort(key=lambda row: (row.attention, row.seq_len))
    fits = {}
    for attention in ATTENTIONS:
        for measure in MEASURES:
            entry = mapping(mapping(mapping(content, "fits"), attention), measure)
            fit = Fit(*(number(entry.get(key)) for key in Fit.__dataclass_fields__))
            if math.isfinite(fit.exponent):
                fits[attention, measure] = fit
    device, dtype, state = (text(content.get(key), 120) for key in ("device", "dtype", "state"))
    return Benchmark(device, dtype, state, tuple(rows), fits), problems


@dataclass(frozen=True)
class Flag:
    """A success flag; `passed` None means not measured in this run."""

    name: str
    target: str
    value: str
    passed: bool | None
    source: str
    detail: str


@dataclass(frozen=True)
class Manifest:
    state: str
    verdict: str
    flags: tuple[Flag, ...]
    phases: tuple[dict[str, Any], ...]  # as written: phase, state, seconds, error
    environment: dict[str, str]


def read_manifest(run: Path) -> tuple[Manifest | None, Problems]:
    """`pipeline_results.json`."""
    name = "pipeline_results.json"
    content, problems = read_object(run, name)
    if problems:
        return None, problems
    raw_flags, more = objects(content, "flags", name)
    raw_phases, also = objects(content, "phases", name)
    flags = tuple(
        Flag(
            text(item.get("name"), 120), text(item.get("target"), 120), _shown(item.get("value")),
            item.get("passed") if isinstance(item.get("passed"), bool) else None, text(item.get("source"), 120),
            text(item.get("detail")),
        )
        for item in raw_flags
    )
    environment = {text(k, 60): _listed(v) for k, v in mapping(content, "environment").items()}
    manifest = Manifest(text(content.get("state"), 40), text(content.get("verdict"), 1000), flags,
                        tuple(raw_phases), environment)
    return manifest, (*problems, *more, *also)


def _listed(value: object) -> str:
    """A list of names as `a, a, b`, everything else as text."""
    names = isinstance(value, list) and all(isinstance(name, str) for name in value)
    return text(", ".join(value) if names and isinstance(value, list) else value, 200)


def _shown(value: object) -> str:
    """A flag's value: numbers to four digits, large ones whole, yes or no, '' for not measured."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return (f"{value:,.0f}" if abs(value) >= 1e3 else f"{value:.4g}") if math.isfinite(value) else ""
    return f"{value:,}" if isinstance(value, int) else text(value, 120)
