"""The runner: executes phases in order and is the only writer of `OK` markers.

    Pipeline(run_dir=..., preset="quick", chosen=("01_model", "02_data")).run() -> exit code

A phase is skipped when its marker still tells the truth (`markers`), else executed (`execute`), and marked done only
when every cell completed and every artifact is there and readable (`phases`). The first failure ends the run.
Left out: phases side by side, and retries; a phase that can go on from where it was (training) does so by itself.
"""

from __future__ import annotations

import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lshv2.arena_digest import told
from lshv2.arena_results import read_arena
from lshv2.config import Settings
from lshv2.parallel.layout import check_parallel
from lshv2.presets import make_settings
from lshv2.runner.markers import Inputs, begin, complete, describe_inputs, reason_to_run
from lshv2.runner.phases import PHASE_TABLE, Phase
from lshv2.runs import PHASES, Run, hold, now, open_run, read_json, repo_root, write_json


class Interrupted(BaseException):
    """Ctrl-C or SIGTERM; `args[0]` is the signal's number."""


@dataclass(frozen=True)
class Pipeline:
    """What is to be run, where. resume: the command that goes on after a failure, shown to the person.

    before_work(settings, phases that are due) may raise `UserError` while nothing is written yet. table and notebooks
    name the phases and the folder of their notebooks; report is the module whose `write_manifest(run, phases)` is
    called after the phases (None: no manifest).
    """

    run_dir: Path
    preset: str = "quick"
    overrides: dict[str, Any] = field(default_factory=dict)
    seed: int = 0
    data: str | None = None
    force: bool = False
    chosen: tuple[str, ...] = PHASES
    resume: str = "make quick"
    table: tuple[Phase, ...] = PHASE_TABLE
    notebooks: Path = field(default_factory=lambda: repo_root() / "notebooks")
    report: str | None = "lshv2.report"
    before_work: Callable[[Settings, list[str]], None] | None = None

    def run(self) -> int:
        """Exit code: 0 done, 1 a phase failed, 2 the person can mend it, 128 + signal when interrupted.

        Raises `UserError` before anything is written when settings, data or the run folder's state forbid a start.
        """
        settings = self._settings()
        if self.before_work:
            run = Run(self.run_dir.resolve(), settings)
            due = [p.name for p in self._todo() if self.force or reason_to_run(p, run, self._inputs(p, run))]
            self.before_work(settings, due)
        self.run_dir.mkdir(parents=True, exist_ok=True)
        with hold(self.run_dir, self.resume):
            run = open_run(self.run_dir, **self._parameters())
            for leftover in run.path.glob("notebooks/.*"):  # of a killed runner
                shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
            if self.force:
                for name in self.chosen:
                    run.marker(name).unlink(missing_ok=True)
            with signals_raise():
                return self._run_phases(run)

    def _todo(self) -> list[Phase]:
        return [phase for phase in self.table if phase.name in self.chosen]

    def _settings(self) -> Settings:
        settings = make_settings(self.preset, self.overrides, seed=self.seed, data=self.data)
        check_parallel(settings)
        return settings

    def _parameters(self) -> dict[str, Any]:
        return {"preset": self.preset, "overrides": self.overrides, "seed": self.seed, "data": self.data}

    def _run_phases(self, run: Run) -> int:
        reports = {phase.name: self._unchosen(phase, run) for phase in self.table}
        code, ran = 0, False
        for phase in self._todo():
            inputs = self._inputs(phase, run)
            reason = reason_to_run(phase, run, inputs)
            if reason is None:
                done = read_json(run.marker(phase.name))[0]
                when = f"done {done['finished']} and nothing it depends on has changed"
                print(f"{phase.name}: skipped, {when}", flush=True)
                reports[phase.name] = _report(phase.name, "skipped", done["seconds"])
                continue
            print(f"{phase.name}: runs{'' if reason == 'not done yet' else f' again, because {reason}'}", flush=True)
            ran = True
            code, reports[phase.name] = self._run_phase(phase, run, inputs)
            if code:
                break
        if code < 128:
            self._finish(run, list(reports.values()), ran)
        return code

    def _unchosen(self, phase: Phase, run: Run) -> dict[str, Any]:
        """A phase that this command leaves out, or does not reach: an earlier result stands if it was not chosen."""
        done = read_json(run.marker(phase.name))[0]
        if phase.name not in self.chosen and isinstance(done, dict):
            return _report(phase.name, "skipped", done.get("seconds"))
        return _report(phase.name, "not run")

    def _inputs(self, phase: Phase, run: Run) -> Inputs:
        return describe_inputs(phase, run, self.notebooks / f"{phase.name}.ipynb", self.table)

    def _run_phase(self, phase: Phase, run: Run, inputs: Inputs) -> tuple[int, dict[str, Any]]:
        from lshv2.runner.execute import Failure, execute
        from lshv2.runner.terminal import Watcher

        begin(phase, run, inputs, self.force)
        began = time.monotonic()
        notebook = self.notebooks / f"{phase.name}.ipynb"
        with open(run.log(phase.name), "w", encoding="utf-8") as log, Watcher(run, phase.name) as watcher:
            print(f"{now()} {notebook}", file=log, flush=True)
            try:
                parameters = {"run_dir": str(run.path), **self._parameters()}
                failure = execute(notebook, parameters, run.notebook(phase.name), log, watcher.tick)
                if failure is None and (problem := complete(phase, run, inputs, time.monotonic() - began)):
                    failure = Failure(problem)
            except Interrupted as signalled:
                seconds = time.monotonic() - began
                print(f"\n{phase.name}: interrupted after {seconds:.0f} s; to go on: {self.resume}", flush=True)
                return 128 + signalled.args[0], _report(phase.name, "not run", seconds)
            if failure:
                print(f"{failure.excerpt}\n{failure.error}", file=log)
        seconds = time.monotonic() - began
        if failure is None:
            print(f"{phase.name}: ok, {seconds:.0f} s", flush=True)
            return 0, _report(phase.name, "ok", seconds)
        content = {"error": failure.error, "excerpt": failure.excerpt, "log": str(run.log(phase.name)),
                   "notebook": str(run.notebook(phase.name)), "resume": self.resume, "finished": now()}
        write_json(run.path / f"{phase.name}.FAILED", {"phase": phase.name, **content})
        _say_failed(phase.name, seconds, content)
        return 2 if failure.user_error else 1, _report(phase.name, "failed", seconds, failure.error)

    def _finish(self, run: Run, phases: list[dict[str, Any]], ran: bool) -> None:
        """Write the manifest when it may have changed; say where the results lie, the verdict and what comes next."""
        manifest = run.file("pipeline_results.json")
        markers = [run.marker(phase.name) for phase in self.table if run.marker(phase.name).exists()]
        stale = not manifest.exists() or any(m.stat().st_mtime > manifest.stat().st_mtime for m in markers)
        if self.report and (ran or stale):
            import importlib

            importlib.import_module(self.report).write_manifest(run, phases)
        if any(phase["state"] == "failed" for phase in phases):
            return
        if "04_arena" in self.chosen and any(
            phase["phase"] == "04_arena" and phase["state"] in ("ok", "skipped") for phase in phases
        ):
            arena = read_arena(run.path)[0]
            for line in told(arena) if arena else ():
                print(f"arena:   {line}")
        content = read_json(manifest)[0]
        verdict = content.get("verdict") if isinstance(content, dict) else None
        print(f"results: {_short(run.path)}")
        print(f"verdict: {verdict}" if verdict else "verdict: none yet (05_report has not run)")
        print("next:    make dashboard", flush=True)


@contextmanager
def signals_raise() -> Iterator[None]:
    """SIGINT and SIGTERM raise `Interrupted` once; what comes during the clean-up is ignored."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def handle(number: int, _: Any) -> None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise Interrupted(number)

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _report(name: str, state: str, seconds: float | None = None, error: str | None = None) -> dict[str, Any]:
    """One phase for `pipeline_results.json`; paths are relative to the run folder."""
    return {
        "phase": name, "state": state, "seconds": None if seconds is None else round(seconds, 1),
        "notebook": f"notebooks/{name}.ipynb", "log": f"logs/{name}.log", "error": error,
    }


def _say_failed(name: str, seconds: float, content: dict[str, str]) -> None:
    print(f"{name}: FAILED after {seconds:.0f} s")
    if content["excerpt"]:
        print("\n".join(f"    {line}" for line in content["excerpt"].splitlines()))
    else:
        print(f"    {content['error']}")
    print(f"  log:      {_short(Path(content['log']))}\n  notebook: {_short(Path(content['notebook']))}")
    print(f"  to go on: {content['resume']}", flush=True)


def _short(path: Path) -> str:
    """Relative to the current folder where that is shorter."""
    relative = os.path.relpath(path)
    return relative if not relative.startswith("..") else str(path)
