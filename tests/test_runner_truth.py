"""No phase gets an `OK` that it has not earned: the ways in which papermill reports success for a failure."""

from __future__ import annotations

import json
from pathlib import Path

import nbformat
import pytest
from runner_notebooks import PARAMETERS, WRITE_A, pipeline

from lshv2.presets import make_settings
from lshv2.progress import Progress
from lshv2.runner import terminal
from lshv2.runs import Run, write_json

THREAD = (
    "import threading\ndef work():\n    raise ValueError('lost in a thread')\n"
    "thread = threading.Thread(target=work)\nthread.start()\nthread.join()"
)
BROKEN_JSON = "from pathlib import Path\nPath(run_dir, 'a.json').write_text('{\"a\": 1')"
NO_ARTIFACT = "print('I forgot to write it')"

CASES = {
    "raising cell": ([WRITE_A, "1 / 0"], PARAMETERS, "ZeroDivisionError: division by zero"),
    "sys.exit(0)": ([WRITE_A, "import sys\nsys.exit(0)", "print('never')"], PARAMETERS, "ended early (sys.exit()"),
    "sys.exit(0) in the last cell": ([WRITE_A + "\nimport sys\nsys.exit(0)"], PARAMETERS, "ended early (sys.exit()"),
    "os._exit(0)": ([WRITE_A, "import os\nos._exit(0)"], PARAMETERS, "the kernel died"),
    "failing !command": ([WRITE_A, "!false"], PARAMETERS, "Command 'false' returned non-zero exit status 1"),
    "failing x = !command": ([WRITE_A, "x = !exit 3"], PARAMETERS, "'exit 3' returned non-zero exit status 3"),
    "exception in a thread": ([WRITE_A, THREAD], PARAMETERS, "ValueError: lost in a thread"),
    "misspelt parameter": ([WRITE_A], PARAMETERS.replace("preset", "presett"), "does not know the parameter preset"),
    "no parameters": ([WRITE_A], "pass", "none (no cell is tagged parameters)"),
    "missing artifact": ([NO_ARTIFACT], PARAMETERS, "artifact a.json is missing"),
    "unreadable artifact": ([BROKEN_JSON], PARAMETERS, "artifact a.json is unreadable: JSONDecodeError"),
}


@pytest.mark.parametrize("case", CASES)
def test_no_ok_without_the_work(case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cells, parameters, reason = CASES[case]
    code = pipeline(tmp_path, *cells, parameters=parameters).run()
    said = capsys.readouterr().out
    failed = json.loads((tmp_path / "run" / "01_a.FAILED").read_text())
    assert code == 1, said
    assert not (tmp_path / "run" / "01_a.OK").exists()
    assert reason in failed["error"], failed["error"]
    assert failed["error"] in said
    assert "logs/01_a.log" in said and "notebooks/01_a.ipynb" in said and "to go on: make again" in said
    assert failed["error"] in (tmp_path / "run" / "logs" / "01_a.log").read_text()


def test_a_true_run_gets_ok_and_a_clean_notebook(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    seen = "import os\nprint(type(overrides).__name__, overrides, data, preset, os.environ['LSHV2_RUNNER'])"
    job = pipeline(tmp_path, WRITE_A, "!true", seen, "", overrides={"train.learning_rate": 3e-4}, seed=7)
    assert job.run() == 0
    marker = json.loads((tmp_path / "run" / "01_a.OK").read_text())
    assert marker["state"] == "ok" and set(marker["outputs"]) == {"a.json"}
    assert json.loads((tmp_path / "run" / "a.json").read_text()) == {"seed": 7}
    log = (tmp_path / "run" / "logs" / "01_a.log").read_text()
    assert "dict {'train.learning_rate': 0.0003} None test 1" in log, log
    executed = nbformat.read(tmp_path / "run" / "notebooks" / "01_a.ipynb", as_version=4)
    assert not any("lshv2.runner" in cell.source for cell in executed.cells), "the runner's own cells stayed"
    assert [p.name for p in (tmp_path / "run" / "notebooks").iterdir()] == ["01_a.ipynb"]
    assert "01_a: ok, " in capsys.readouterr().out


def test_a_persons_mistake_is_one_line_and_code_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mistake = "from lshv2.errors import UserError\nraise UserError('notes.txt line 3 is not UTF-8: save it as UTF-8')"
    assert pipeline(tmp_path, mistake).run() == 2
    said = capsys.readouterr().out.splitlines()
    assert "    notes.txt line 3 is not UTF-8: save it as UTF-8" in said
    assert not any("Traceback" in line or "--->" in line for line in said), said


def test_the_excerpt_shows_where_without_colours(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert pipeline(tmp_path, "numbers = []\nnumbers[3]").run() == 1
    said = capsys.readouterr().out
    assert "----> 2 numbers[3]" in said and "IndexError: list index out of range" in said
    assert "\x1b" not in said


def test_a_failure_stops_the_phases_after_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from runner_notebooks import two_phases, write_notebook

    job = two_phases(tmp_path)
    write_notebook(job.notebooks / "01_a.ipynb", "1 / 0")
    assert job.run() == 1
    assert not (tmp_path / "run" / "b.json").exists()
    assert "02_b" not in capsys.readouterr().out


def test_every_real_phase_is_in_the_table_in_order() -> None:
    from lshv2.runner.phases import PHASE_TABLE
    from lshv2.runs import PHASES

    assert tuple(phase.name for phase in PHASE_TABLE) == PHASES
    for phase in PHASE_TABLE:
        assert set(phase.after) <= set(PHASES[: PHASES.index(phase.name)])


def test_a_long_step_is_seen_to_go_on(tmp_path: Path, capsys: pytest.CaptureFixture[str],
                                      monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(terminal, "LINE_EVERY", 0.0)
    run = Run(tmp_path, make_settings("test"))
    with terminal.Watcher(run, "03_train") as watcher, Progress(run, "03_train", "language model", 5, unit="step"):
        state = json.loads(run.progress.read_text())
        write_json(run.progress, {**state, "time": state["time"] + 1})  # written after the phase began
        monkeypatch.setattr(terminal.time, "time", lambda: state["time"] + 41)
        watcher.tick()
    assert capsys.readouterr().out == "03_train: language model 0/5 step, 40 s\n"
