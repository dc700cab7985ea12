"""What a run is doing, from its markers, its runner's process id, progress and logs; no phase is imported.

    for entry in find_runs(runs_root()): print(entry.key, run_status(entry.path).state)

States: `running` (a sign of life from a phase that has not ended), `failed` (a `.FAILED` marker), `done` (the report
is there) and `partial` (everything else: phases left out, or a process that went away).
"""

from __future__ import annotations

import os
import re
import time
from dataclasses import dataclass
from pathlib import Path

import psutil

from lshv2.readers import read_manifest
from lshv2.runs import PHASES
from lshv2.tolerant import ANSI, NAN, Problem, Problems, mapping, number, read_object, refusal, text

SILENCE_S = 60.0  # a notebook run by hand: no sign of life for this long, and for three usual paces, is not running
GONE_S = 10.0  # the same when the runner's process is not on this machine: dead, or at work elsewhere
CONTRACT = ("config.json", "progress.json", "metrics.jsonl", "training_metrics.json", "component_profiles.json",
            "benchmark_summary.json", "pipeline_results.json", "model_summary.json")
TRAINING = "03_train", "training_metrics.json"
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


@dataclass(frozen=True)
class Entry:
    """A run folder in the list: `key` is its path below the runs folder, such as `quick` or `reference-h200/full`."""

    key: str
    path: Path
    reference: bool
    changed: float  # Unix seconds of its newest contract file


def find_runs(root: Path) -> tuple[list[Entry], Problems]:
    """Run folders below `root`, newest first, then the references; folders left out are named in the problems.

    References lie one level deeper, in `reference-*/`. A link that leads out of `root` is not followed.
    """
    found: list[Entry] = []
    problems: Problems = ()
    for folder in _folders(root):
        reference = folder.name.startswith("reference-")
        for path in [folder, *(_folders(folder) if reference else [])]:
            changed = _changed(path)
            if changed is None:
                continue
            key = path.relative_to(root).as_posix()
            if not all(NAME.fullmatch(part) for part in key.split("/")):
                problems += (Problem(text(key, 80), "is not a run name: left out"),)
            elif not path.resolve().is_relative_to(root.resolve()):
                problems += (Problem(key, "is a link out of the runs folder: not followed"),)
            else:
                found.append(Entry(key, path, reference, changed))
    return sorted(found, key=lambda entry: (entry.reference, -entry.changed, entry.key)), problems


def _folders(root: Path) -> list[Path]:
    try:
        with os.scandir(root) as items:
            return sorted(Path(item.path) for item in items if item.is_dir())
    except OSError:
        return []


def _changed(path: Path) -> float | None:
    times = [_mtime(path / name) for name in CONTRACT]
    known = [when for when in times if when is not None]
    return max(known) if known else None


def _mtime(path: Path) -> float | None:
    try:
        return path.stat().st_mtime
    except (OSError, ValueError):
        return None


@dataclass(frozen=True)
class Bar:
    """The progress bar of what is running, `progress.json`."""

    phase: str
    label: str
    done: float
    total: float
    unit: str
    elapsed_s: float
    eta_s: float
    figures: dict[str, str]
    time: float

    @property
    def fraction(self) -> float:
        ratio = self.done / self.total if self.total > 0 else NAN
        return min(1.0, max(0.0, ratio)) if ratio == ratio else 0.0


@dataclass(frozen=True)
class Phase:
    """`state` is `ok`, `running`, `failed`, `skipped`, `stopped` or `not run`; seconds NaN: not known."""

    name: str
    state: str
    seconds: float
    finished: str
    detail: str


@dataclass(frozen=True)
class Failure:
    phase: str
    error: str
    excerpt: str
    resume: str


@dataclass(frozen=True)
class Status:
    state: str
    detail: str
    bar: Bar | None
    phases: tuple[Phase, ...]
    failures: tuple[Failure, ...]
    problems: Problems


def run_status(run: Path, now: float | None = None) -> Status:
    """The state of one run at `now` (Unix seconds; default: this moment)."""
    now = time.time() if now is None else now
    bar, problems = read_bar(run)
    manifest, _ = read_manifest(run)
    listed = {text(item.get("phase"), 60): item for item in manifest.phases} if manifest else {}
    runner = _runner_alive(run)
    phases, failures = [], []
    for name in PHASES:
        phase, failure, more = _phase(run, name, bar, listed.get(name, {}), now, runner)
        phases.append(phase)
        failures += [failure] if failure else []
        problems += more
    states = [phase.state for phase in phases]
    current = next((phase for phase in phases if phase.state == "running"), None)
    ended = phases[-1].state == "ok" or (manifest is not None and "not run" not in states and "stopped" not in states)
    if current:
        state, detail = "running", current.name
    elif failures:
        state, detail = "failed", f"{failures[0].phase}: {failures[0].error}"
    elif ended and "failed" not in states:
        state, detail = "done", ""
    else:
        gone = next((phase for phase in phases if phase.state == "stopped"), None)
        state = "partial"
        detail = f"{gone.name} {gone.detail}" if gone else f"{states.count('ok')} of {len(PHASES)} phases done"
    return Status(state, detail, bar if current else None, tuple(phases), tuple(failures), problems)


def read_bar(run: Path) -> tuple[Bar | None, Problems]:
    """`progress.json`; that there is none is no problem."""
    content, problems = read_object(run, "progress.json")
    if problems:
        return None, () if problems[0].missing else problems
    figures = content.get("figures")
    shown = {text(k, 40): f"{v:.4g}" if isinstance(v, float) else text(v, 40)
             for k, v in (figures.items() if isinstance(figures, dict) else ())}
    phase, label, unit = (text(content.get(key), 80) for key in ("phase", "label", "unit"))
    done, total, elapsed, eta, when = (number(content.get(k)) for k in ("done", "total", "elapsed_s", "eta_s", "time"))
    return Bar(phase, label, done, total, unit, elapsed, eta, shown, when), ()


def _phase(run: Path, name: str, bar: Bar | None, listed: dict[str, object], now: float, runner: bool | None
           ) -> tuple[Phase, Failure | None, Problems]:
    """One phase from its markers, else from signs of life, else from what the manifest lists."""
    marker = next((m for m in ("FAILED", "OK") if (run / f"{name}.{m}").is_file()), None)
    mine = bar if bar and bar.phase == name else None
    again = mine is not None and mine.time > (_mtime(run / f"{name}.{marker}") or 0.0) + 0.5  # the bar moved since
    if marker and not (again and _alive(run, name, mine, now, runner)):
        content, problems = read_object(run, f"{name}.{marker}")
        seconds, finished = number(content.get("seconds")), text(content.get("finished"), 40)
        if marker == "OK":
            return Phase(name, "ok", seconds, finished, ""), None, problems
        error = text(content.get("error"), 300) or "failed"
        failure = Failure(name, error, text(content.get("excerpt"), 20_000), text(content.get("resume"), 300))
        return Phase(name, "failed", seconds, finished, error), failure, problems
    if _alive(run, name, mine, now, runner):
        return Phase(name, "running", mine.elapsed_s if mine else NAN, "", mine.label if mine else "starting"), None, ()
    state = text(listed.get("state"), 20)
    if not state and name == TRAINING[0] and (mine is None or mine.done >= mine.total):
        content, _ = read_object(run, TRAINING[1])
        if content.get("state") == "done":  # by `python -m lshv2.train` or torchrun, which leave no marker
            recall = mapping(content, "recall")
            return Phase(name, "ok", number(content.get("seconds")) + number(recall.get("seconds")), "", ""), None, ()
    if state:
        return Phase(name, state, number(listed.get("seconds")), "", text(listed.get("error"), 300)), None, ()
    if mine:
        left = f"stopped at {mine.done:,.0f} of {mine.total:,.0f} {mine.unit}s ({mine.label})"
        return Phase(name, "stopped", mine.elapsed_s, "", left), None, ()
    return Phase(name, "not run", NAN, "", ""), None, ()


def _runner_alive(run: Path) -> bool | None:
    """Whether the process in `.holder.json` lives (and is not a later one of that number); None: no runner holds it."""
    content, problems = read_object(run, ".holder.json")
    if problems:
        return None
    try:
        started = psutil.Process(content.get("pid")).create_time()
    except (psutil.Error, TypeError, ValueError, OverflowError):
        return False
    return started <= (_mtime(run / ".holder.json") or 0.0) + 1.0


def _alive(run: Path, name: str, bar: Bar | None, now: float, runner: bool | None) -> bool:
    """The runner has begun it, or its bar or its log moved lately, by this phase's own pace."""
    if runner:
        started, problems = read_object(run, f"{name}.STARTED")
        return not problems and started.get("finished") is None
    pace = bar.elapsed_s / bar.done if bar and bar.done > 0 else 0.0
    signs = [bar.time if bar else NAN, _mtime(run / "logs" / f"{name}.log") or NAN]
    silence = GONE_S if runner is False else max(SILENCE_S, 3 * pace)
    return any(abs(now - sign) < silence for sign in signs if sign == sign)


def log_tail(run: Path, phase: str, lines: int = 200, max_bytes: int = 256 << 10) -> tuple[str, int, Problems]:
    """The last `lines` lines of a phase's log (read from its end, at most `max_bytes`), and its size in bytes."""
    name = f"logs/{phase}.log"
    if problem := refusal(run, name):
        return "", 0, (problem,)
    try:
        with open(run / name, "rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - max_bytes))
            raw = file.read(max_bytes)
    except OSError as error:
        return "", 0, (Problem(name, f"is unreadable: {error.__class__.__name__}"),)
    shown = ANSI.sub("", raw.decode("utf-8", "replace")).replace("\r\n", "\n")
    parts = [line.rsplit("\r", 1)[-1] for line in shown.split("\n")]  # \r: a bar that was drawn over itself
    kept = parts[1 if size > max_bytes else 0 : -1 if parts[-1] == "" else None]
    return "\n".join(text(line, 2000) for line in kept[-lines:]), size, ()
