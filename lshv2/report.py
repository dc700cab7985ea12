"""Phase 5: plots, the manifest with its flags and verdict, the package.

    manifest = write_report(run)           # phase 5's one call

Nothing is measured here, besides the held-out loss of the packed weights. What a run lacks is left out and said;
`lshv2.flags` judges what is there.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lshv2.errors import UserError
from lshv2.flags import success_flags, verdict
from lshv2.machine import environment
from lshv2.package import make_package
from lshv2.plots import DRAWERS, plot_png
from lshv2.runs import PHASES, SCHEMA, Run, atomic_path, read_json, sha256, write_json

MANIFEST = "pipeline_results.json"


def write_report(run: Run) -> dict[str, Any]:
    """Write the plots of the metrics files that exist, the manifest and the package; returns the manifest.

    The package holds the manifest as it was before it could list the package.
    """
    for name in DRAWERS:
        try:
            picture = plot_png(run.path, name)
        except UserError as error:
            print(error)
            continue
        with atomic_path(run.file(f"{name}.png")) as temporary:
            temporary.write_bytes(picture)
    write_manifest(run)
    package = make_package(run)
    print(f"{package.name}: {package.stat().st_size / 2**20:,.1f} MB")
    return write_manifest(run)


def write_manifest(run: Run, phases: list[dict[str, Any]] | None = None) -> dict[str, Any]:
    """Write `pipeline_results.json` and return its content; a missing or broken file is a flag not measured.

    phases: the runner's final states, see `runs/README.md`; None reads them from the `.OK` and `.FAILED` markers.
    """
    phases = phase_states(run) if phases is None else phases
    states = {phase["state"] for phase in phases}
    flags = success_flags(run.path)
    content = {
        "schema": SCHEMA, "run": run.name, "preset": run.settings.preset, "seed": run.settings.seed,
        "state": "failed" if "failed" in states else "ok" if states <= {"ok", "skipped"} else "incomplete",
        "phases": phases, "flags": flags, "verdict": verdict(flags), "environment": environment(),
        "artifacts": artifacts(run, phases), "settings": run.settings.model_dump(mode="json"),
    }
    write_json(run.file(MANIFEST), content)
    return content


def phase_states(run: Run) -> list[dict[str, Any]]:
    """Each phase's state as its markers tell; a phase without one has not run, or is running."""
    states = []
    for name in PHASES:
        done, _ = read_json(run.marker(name))
        failed, _ = read_json(run.path / f"{name}.FAILED")
        marker = next((m for m in (failed, done) if isinstance(m, dict)), {})
        states.append({
            "phase": name, "state": "failed" if failed else "ok" if done else "not run",
            "seconds": marker.get("seconds"), "notebook": f"notebooks/{name}.ipynb", "log": f"logs/{name}.log",
            "error": marker.get("error"),
        })
    return states


def artifacts(run: Run, phases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Every file of the run with its sha256, but markers, progress and what an unfinished phase still writes."""
    changing = {MANIFEST, "progress.json"}
    changing |= {phase[key] for phase in phases if phase["state"] == "not run" for key in ("log", "notebook")}
    listed = []
    for path in sorted(p for p in run.path.rglob("*") if p.is_file() and not p.is_symlink()):
        name = path.relative_to(run.path).as_posix()
        hidden = any(part.startswith(".") for part in Path(name).parts)
        if not hidden and name not in changing and path.suffix not in (".OK", ".FAILED", ".STARTED"):
            listed.append({"path": name, "bytes": path.stat().st_size, "sha256": sha256(path)})
    return listed
