"""`OK` markers: what a phase's results rest on, and the reason why it must run again.

A marker holds the hashes of the phase's inputs and outputs. Inputs are its settings, the results of the phases it
reads, the text in `data.source`, the arena's plugins, its notebook, the files of `lshv2` behind it (`imports`),
Python, torch and the visible GPUs. `STARTED` holds the same from before the phase, so that a phase that can resume does
so only towards the results it was started for.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
import platform
import shutil
from importlib import metadata
from pathlib import Path
from typing import Any

from lshv2.runner.imports import code_behind
from lshv2.runner.phases import PHASE_TABLE, Phase, check_artifact, find_artifacts, hash_outputs
from lshv2.runs import Run, now, read_json, repo_root, sha256, write_json

Inputs = dict[str, dict[str, str]]  # group -> name -> value or hash
DECIDING = ("settings", "results")  # the groups that a half-done phase must share to go on
BEYOND = ("results", "code", "environment")  # what lines do not say of themselves


def describe_inputs(phase: Phase, run: Run, notebook: Path, table: tuple[Phase, ...] = PHASE_TABLE) -> Inputs:
    """Everything that determines the phase's results, the most telling group first."""
    results = {f"the result of {other.name}": _hash_result(other, run) for other in table if other.name in phase.after}
    if "data" in phase.settings:
        results["the text in data.source"] = _describe_source(run.settings.data.source)
    root = repo_root()
    plugins = run.settings.arena.plugins if "arena" in phase.settings else ()
    return {
        "settings": _settings(phase, run),
        "results": results,
        "plugins": {path: sha256(Path(path)) if Path(path).is_file() else "missing" for path in plugins},
        "code": {f"notebooks/{notebook.name}": _hash_notebook(notebook)}
        | {str(path.relative_to(root)): sha256(path) for path in code_behind(notebook)},
        "environment": {
            "the Python version": platform.python_version(),
            "the torch version": metadata.version("torch"),
            "CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES", "not set"),
        },
    }


def reason_to_run(phase: Phase, run: Run, inputs: Inputs) -> str | None:
    """One phrase why the phase must run, or None when its marker still tells the truth. Never done: `not done yet`."""
    marker, problem = read_json(run.marker(phase.name))
    if not run.marker(phase.name).exists():
        return "not done yet"
    if problem or not isinstance(marker, dict) or not {"inputs", "outputs", "finished", "seconds"} <= marker.keys():
        return f"its marker {phase.name}.OK is unreadable"
    if changed := _differences(marker["inputs"], inputs):
        return f"{changed[0]} changed" + (f" (and {len(changed) - 1} more)" if len(changed) > 1 else "")
    missing = find_artifacts(phase, run)[1]
    if missing:
        return missing[0]
    outputs = hash_outputs(phase, run)
    return next((f"{n} was changed" for n, digest in marker["outputs"].items() if outputs.get(n) != digest), None)


def begin(phase: Phase, run: Run, inputs: Inputs, force: bool = False) -> None:
    """Remove half-done work, unless it was for the same results, and withdraw the old markers.

    In this order, so that a kill on the way leaves what a later start can judge by.
    """
    marker, started = read_json(run.marker(phase.name))[0], run.path / f"{phase.name}.STARTED"
    before = read_json(started)[0]
    if isinstance(before, dict):  # else nothing is known of what lies there: it stays
        done = run.marker(phase.name).exists() or before.get("finished")
        stays = _adds_to(phase, run, marker, inputs) if done else _goes_on(phase, before, inputs)
        if force or not stays:
            for name in phase.resumable:
                _remove(run.path / name)
    write_json(started, {"phase": phase.name, "started": now(), "finished": None, "inputs": inputs})
    for state in ("OK", "FAILED"):
        (run.path / f"{phase.name}.{state}").unlink(missing_ok=True)


def _goes_on(phase: Phase, before: dict[str, Any], inputs: Inputs) -> bool:
    """Whether half-done work is for these results too: the same ones, or more lines by the same code."""
    earlier = before.get("inputs", {})
    if all(earlier.get(group) == inputs[group] for group in DECIDING):
        return True
    return bool(phase.keyed) and _made_alike(earlier, inputs)


def _adds_to(phase: Phase, run: Run, marker: Any, inputs: Inputs) -> bool:
    """Whether a completed phase leaves what it has and adds what is missing: its lines are still there, whatever came
    behind them, and were made by what there is now."""
    if not (phase.keyed and isinstance(marker, dict) and {"inputs", "outputs"} <= marker.keys()):
        return False
    digest = marker["outputs"].get(phase.keyed)
    return _made_alike(marker["inputs"], inputs) and _begins_as(run.path / phase.keyed, digest)


def _made_alike(before: Inputs, after: Inputs) -> bool:
    """In all that lines do not say of themselves; which GPU is no matter."""
    made_by = ({group: of.get(group, {}) for group in BEYOND} for of in (before, after))
    return not set(_differences(*made_by)) - {"CUDA_VISIBLE_DEVICES"}


def _begins_as(path: Path, digest: str | None) -> bool:
    """Whether a file begins with the lines that had this sha256, of which the last may have been torn, and ended since.
    """
    read = hashlib.sha256()
    if not path.is_file():
        return False
    with open(path, "rb") as file:
        for line in file:
            torn = read.copy()
            torn.update(line.removesuffix(b"\n"))
            read.update(line)
            if digest in (read.hexdigest(), torn.hexdigest()):
                return True
    return False


def complete(phase: Phase, run: Run, inputs: Inputs, seconds: float) -> str | None:
    """Check every artifact, then write the marker; or say what is wrong and write nothing."""
    found, problems = find_artifacts(phase, run)
    for path in found:
        if problem := check_artifact(path):
            name = str(path.relative_to(run.path))
            problems.append(f"artifact {name} {problem.removeprefix(path.name).strip()}")
    if problems:
        return "; ".join(problems)
    content: dict[str, Any] = {"phase": phase.name, "state": "ok", "seconds": round(seconds, 1), "finished": now()}
    outputs = hash_outputs(phase, run)
    write_json(run.marker(phase.name), {**content, "inputs": inputs, "outputs": outputs})
    write_json(run.path / f"{phase.name}.STARTED", {**content, "inputs": inputs})
    return None


def _differences(before: Inputs, after: Inputs) -> list[str]:
    return [
        name
        for group in after
        for name in {**before.get(group, {}), **after[group]}
        if before.get(group, {}).get(name) != after[group].get(name)
    ]


def _settings(phase: Phase, run: Run) -> dict[str, str]:
    """`section.key` -> JSON value, for the settings that the phase reads."""
    values = run.settings.model_dump(mode="json")
    flat: dict[str, str] = {}
    for name in phase.settings:
        section, _, key = name.partition(".")
        value = values[section][key] if key else values[section]
        group = {f"{name}.{k}": v for k, v in value.items()} if isinstance(value, dict) else {name: value}
        flat |= {k: json.dumps(v) for k, v in group.items()}
    return flat


def _hash_result(phase: Phase, run: Run) -> str:
    """What later phases read of this one, from its marker; artifacts that hold clock times do not count."""
    marker = read_json(run.marker(phase.name))[0]
    if not isinstance(marker, dict):
        return "none"
    clocked = {artifact.path for artifact in phase.artifacts if not artifact.carries}
    return _digest({name: digest for name, digest in marker["outputs"].items() if name not in clocked})


def _hash_notebook(path: Path) -> str:
    """Cell types and sources alone: outputs and execution counts change nothing."""
    content, problem = read_json(path)
    cells = content.get("cells", []) if isinstance(content, dict) else []
    return problem or _digest([[cell.get("cell_type"), cell.get("source")] for cell in cells])


def _describe_source(source: str | None) -> str:
    """Names, sizes and times of change: a corpus may be too large to hash on every start."""
    if source is None:
        return "Python's standard library"
    root = Path(source)
    if root.is_dir():
        files = sorted(p for p in root.rglob("*") if p.is_file())
    else:
        files = [root] if root.exists() else sorted(map(Path, glob.glob(source, recursive=True)))
    stats = [(str(p), p.stat().st_size, p.stat().st_mtime_ns) for p in files if p.exists()]
    return _digest([source, stats])


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
