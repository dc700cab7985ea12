"""Readers of a run folder's files: JSON of any quality in, typed and clean values out. Used by report and dashboard.

    profile, problems = read_profile(run_path)

Every reader returns `(content, problems)` and never raises on what a file holds: a missing, torn, broken or
foreign file gives None or the readable part of it, and one `Problem` a defect, which names the file. Needs neither
torch nor pandas. The benchmark has its own module, `lshv2.benchmark_results`, as have training curves, `lshv2.curves`,
and the state of a run, `lshv2.run_state`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lshv2.tolerant import NAN, Problem, Problems, mapping, number, objects, read_object, text


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
