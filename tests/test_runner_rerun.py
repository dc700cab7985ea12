"""A rerun does exactly what is no longer true, and says why."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from runner_notebooks import WRITE_A, pipeline, two_phases, write_notebook

from lshv2.errors import UserError
from lshv2.runner import hold
from lshv2.runner.imports import code_behind
from lshv2.runner.phases import Artifact, Phase, check_artifact
from lshv2.runs import repo_root, write_json


def say(job: object, capsys: pytest.CaptureFixture[str]) -> list[str]:
    """Run it; the lines it printed about phases."""
    assert job.run() == 0  # type: ignore[attr-defined]
    return [line for line in capsys.readouterr().out.splitlines() if line.startswith("0")]


def reasons(lines: list[str]) -> list[str]:
    said = [line for line in lines if ": ok" not in line]
    return [line.split(", ")[0] if "skipped" in line else line.split("because ")[-1] for line in said]


def test_a_rerun_names_what_changed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    job = two_phases(tmp_path)
    assert reasons(say(job, capsys)) == ["01_a: runs", "02_b: runs"]
    assert reasons(say(job, capsys)) == ["01_a: skipped", "02_b: skipped"]

    slower = replace(job, overrides={"train.learning_rate": 1e-5})
    assert reasons(say(slower, capsys)) == ["01_a: skipped", "train.learning_rate changed"]

    (tmp_path / "run" / "b.json").write_text("{}")
    assert reasons(say(slower, capsys)) == ["01_a: skipped", "b.json was changed"]

    (tmp_path / "run" / "a.json").unlink()  # 01_a writes the same again: what rests on it stays true
    assert reasons(say(slower, capsys)) == ["artifact a.json is missing", "02_b: skipped"]

    other_seed = replace(slower, seed=1)
    assert reasons(say(other_seed, capsys)) == ["seed changed", "the result of 01_a changed"]

    write_notebook(job.notebooks / "02_b.ipynb", WRITE_A.replace("a.json", "b.json"))
    assert reasons(say(other_seed, capsys)) == ["01_a: skipped", "notebooks/02_b.ipynb changed"]


def test_force_runs_the_chosen_phases_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    job = two_phases(tmp_path)
    say(job, capsys)
    forced = say(replace(job, force=True, chosen=("02_b",)), capsys)
    assert reasons(forced) == ["02_b: runs"]
    assert reasons(say(job, capsys)) == ["01_a: skipped", "02_b: skipped"]


def test_half_done_work_is_kept_only_for_the_same_results(tmp_path: Path) -> None:
    """A phase that appends to `steps` goes on after a failure, and starts over once done or under new settings."""
    count = (
        "from pathlib import Path\nsteps = Path(run_dir, 'steps')\n"
        "steps.write_text((steps.read_text() if steps.exists() else '') + '.')"
    )
    fail_once = "if steps.read_text() == '.':\n    raise OSError('power cut')"
    job = pipeline(tmp_path, count, fail_once, WRITE_A)
    job = replace(job, table=(replace(job.table[0], resumable=("steps",)),))
    steps = tmp_path / "run" / "steps"
    assert job.run() == 1 and steps.read_text() == "."
    assert job.run() == 0 and steps.read_text() == "..", "it did not go on where it was"
    assert replace(job, force=True).run() == 1 and steps.read_text() == ".", "a completed phase must start over"
    assert replace(job, seed=1).run() == 1 and steps.read_text() == ".", "another seed's half-done work was kept"


def test_a_phase_of_keyed_lines_keeps_them_under_other_settings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And those that others added; not what other code made, nor what was changed, nor what a person wants anew."""
    add = ("from pathlib import Path\nlines = Path(run_dir, 'lines')\nlines.open('a').write(f'{seed}\\n')\n"
           "Path(run_dir, 'weights').touch()")
    table = (Phase("01_a", ("seed",), (), (Artifact("lines"),), resumable=("lines", "weights"), keyed="lines"),)
    job = pipeline(tmp_path, add, table=table)
    lines = tmp_path / "run" / "lines"

    def after(**changes: object) -> str:
        assert replace(job, **changes).run() == 0  # type: ignore[arg-type]
        return lines.read_text().replace("\n", " ")

    assert after() == "0 " and after() == "0 "
    assert after(seed=1) == "0 1 ", "another seed's lines were taken away"
    lines.write_text(lines.read_text() + "added\n")
    assert after(seed=1) == "0 1 added 1 ", "what another command added was taken away"
    lines.write_text(lines.read_text().replace("0", "9"))
    assert after(seed=2) == "2 ", "a changed line was kept"
    assert after(seed=2, force=True) == "2 " and after(seed=3) == "2 3 "
    (tmp_path / "run" / "01_a.OK").unlink()
    assert after(seed=4) == "4 ", "deleting a marker asks for everything"
    write_notebook(tmp_path / "notebooks" / "01_a.ipynb", add, "if seed == 6:\n    raise OSError('power cut')")
    assert after(seed=5) == "5 ", "what other code made was kept"
    assert replace(job, seed=6).run() == 1
    assert after(seed=7) == "5 6 7 ", "half-done work for other settings was taken away"
    assert replace(job, seed=6).run() == 1
    assert after(seed=8, force=True) == "8 ", "what is asked for anew went on"

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    assert after(seed=9) == "8 9 ", "another GPU is no reason to begin anew"
    lines.write_text("8 \n9")
    (tmp_path / "run" / "01_a.OK").write_text((tmp_path / "run" / "01_a.OK").read_text().replace(
        hashlib.sha256(b"8\n9\n").hexdigest(), hashlib.sha256(b"8 \n9").hexdigest()))
    lines.write_text("8 \n9\n")
    assert after(seed=10).split() == ["8", "9", "10"], "a torn line that was ended since is another file"

    write_notebook(tmp_path / "notebooks" / "01_a.ipynb", add, "if seed == 11:\n    raise OSError('power cut')")
    assert after(seed=5) == "5 " and replace(job, seed=11).run() == 1
    write_notebook(tmp_path / "notebooks" / "01_a.ipynb", add)
    assert after(seed=12) == "12 ", "what other code made was kept for other settings"


def test_a_kill_while_a_phase_begins_takes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    add = ("from pathlib import Path\nlines = Path(run_dir, 'lines')\nlines.open('a').write(f'{seed}\\n')")
    table = (Phase("01_a", ("seed",), (), (Artifact("lines"),), resumable=("lines",), keyed="lines"),)
    job = pipeline(tmp_path, add, table=table)
    assert job.run() == 0
    for written in (False, True):
        def cut(path: Path, content: object, written: bool = written) -> None:
            if written:
                write_json(path, content)
            raise OSError("power cut")

        with monkeypatch.context() as killed:
            killed.setattr("lshv2.runner.markers.write_json", cut)
            with pytest.raises(OSError, match="power cut"):
                replace(job, seed=1).run()
    assert replace(job, seed=1).run() == 0 and (tmp_path / "run" / "lines").read_text() == "0\n1\n"


CHILD = """
import sys
sys.path.insert(0, {tests!r})
from pathlib import Path
from runner_notebooks import pipeline
sys.exit(pipeline(Path({root!r})).run())
"""
SLOW = (
    "import os, subprocess, time\nfrom pathlib import Path\nmark = Path(run_dir, 'pids')\n"
    "if not mark.exists():\n"
    "    child = subprocess.Popen(['sleep', '60'])\n    mark.write_text(f'{os.getpid()} {child.pid}')\n"
    "    time.sleep(60)"
)


def start_slow(root: Path) -> tuple[subprocess.Popen[str], list[psutil.Process]]:
    """A runner in its own process, in the middle of its phase; its kernel and the kernel's child."""
    write_notebook(root / "notebooks" / "01_a.ipynb", SLOW, WRITE_A)
    code = CHILD.format(tests=str(Path(__file__).parent), root=str(root))
    runner = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=repo_root())
    pids, until = root / "run" / "pids", time.monotonic() + 60
    while not (pids.exists() and len(pids.read_text().split()) == 2):
        assert time.monotonic() < until and runner.poll() is None, "the phase did not start"
        time.sleep(0.05)
    return runner, [psutil.Process(int(pid)) for pid in pids.read_text().split()]


def all_gone(processes: list[psutil.Process]) -> bool:
    """Ended, or a zombie that waits for a parent outside this test."""
    _, alive = psutil.wait_procs(processes, timeout=3)
    return all(process.status() == psutil.STATUS_ZOMBIE for process in alive)


def test_a_killed_runner_leaves_no_process_and_a_rerun_succeeds(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runner, processes = start_slow(tmp_path)
    with pytest.raises(UserError, match=rf"is being written by process {runner.pid} since .*RUN="):
        pipeline(tmp_path).run()
    runner.kill()
    runner.communicate(timeout=10)
    assert all_gone(processes), "the kernel or its child outlived the runner"
    assert not (tmp_path / "run" / "01_a.OK").exists()
    assert "01_a: ok" in "".join(say(pipeline(tmp_path), capsys))
    assert [path.name for path in (tmp_path / "run" / "notebooks").iterdir()] == ["01_a.ipynb"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_stops_the_kernel_and_leaves_no_marker(number: signal.Signals, tmp_path: Path) -> None:
    runner, processes = start_slow(tmp_path)
    runner.send_signal(number)
    said = runner.communicate(timeout=20)[0]
    assert runner.returncode == 128 + number, said
    assert "01_a: interrupted after" in said and "to go on: make again" in said
    assert all_gone(processes), "the kernel or its child outlived the interrupt"
    executed = (tmp_path / "run" / "notebooks" / "01_a.ipynb").read_text()
    assert "KeyboardInterrupt" in executed, "the cell was not interrupted: the kernel was lost instead"
    assert not list((tmp_path / "run").glob("*.OK")) and not list((tmp_path / "run").glob("*.FAILED"))


def test_one_runner_a_run_folder(tmp_path: Path) -> None:
    with hold(tmp_path, "make quick"), pytest.raises(UserError, match=rf"process {os.getpid()} .*make quick"), hold(
        tmp_path, "make quick"
    ):
        pass
    with hold(tmp_path, "make quick"):
        pass


def test_code_behind_follows_imports_strings_and_packages(tmp_path: Path) -> None:
    cells = ["%matplotlib inline\nfrom lshv2.runs import open_run", "worker = ['-m', 'lshv2.estimate']"]
    write_notebook(tmp_path / "n.ipynb", *cells)
    names = {str(path.relative_to(repo_root() / "lshv2")) for path in code_behind(tmp_path / "n.ipynb")}
    assert {"__init__.py", "runs.py", "presets.py", "sizes.py", "config.py", "estimate.py"} <= names
    assert "progress.py" not in names, "runs does not import progress: its change would rerun everything"


def test_the_supervision_is_behind_no_phase() -> None:
    """Else a better error message would retrain a model."""
    for notebook in sorted((repo_root() / "notebooks").glob("0*.ipynb")):
        names = {str(path.relative_to(repo_root() / "lshv2")) for path in code_behind(notebook)}
        assert not {n for n in names if n.startswith(("runner/", "environment", "estimate", "__main__"))}, notebook.name


def test_artifacts_are_read_not_only_found(tmp_path: Path) -> None:
    from lshv2.runs import sha256

    weights = tmp_path / "step_1.safetensors"
    weights.write_bytes(b"weights")
    good = {"file": weights.name, "sha256": sha256(weights), "step": 1}
    last = tmp_path / "last.json"
    last.write_text(json.dumps(good))
    assert check_artifact(last) is None
    weights.write_bytes(b"Weights")
    assert "another" in str(check_artifact(last))
    png = b"\x89PNG\r\n\x1a\nshort"
    for name, content in [("a.png", png), ("a.zip", b"PK"), ("a.jsonl", b"{}\nx\n{}\n"), ("a.bin", b"")]:
        (tmp_path / name).write_bytes(content)
        assert check_artifact(tmp_path / name), f"{name} passed"


def test_a_skip_imports_neither_torch_nor_papermill(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    say(pipeline(tmp_path, WRITE_A), capsys)
    code = CHILD.format(tests=str(Path(__file__).parent), root=str(tmp_path)).replace("sys.exit(", "print(")
    code += "print(sorted({'torch', 'papermill', 'jupyter_client'} & set(sys.modules)))"
    command = [sys.executable, "-c", code]
    out = subprocess.run(command, cwd=repo_root(), capture_output=True, text=True, check=True).stdout
    assert "01_a: skipped" in out and out.rstrip().endswith("[]"), out
