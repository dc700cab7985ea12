"""A run that was killed or stopped anywhere ends where an uninterrupted one ends, bit for bit. Real processes."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from forked_training import Forks

from lshv2.checkpoint import (
    find_checkpoint,
    forget_newer,
    listed_checkpoints,
    lowest,
    read_checkpoint,
    save_checkpoint,
)
from lshv2.errors import UserError
from lshv2.metrics import columns, standing
from lshv2.presets import make_settings
from lshv2.runs import Run, open_run, read_jsonl
from lshv2.stopping import Stopped, StopRequest

SETTINGS = {
    "train.num_train_sequences": 32, "train.num_epochs": 2, "train.num_eval_sequences": 2, "train.log_every": 3,
    "train.checkpoint_every": 5, "train.eval_every": 8, "train.keep_every": 16,
    "train.ponder_from": 0.2, "train.ponder_to": 0.8,  # a share that differs from step to step
}
TASKS = ("language_model", "recall")
KILLED, STOPPED = -signal.SIGKILL, 128 + signal.SIGTERM
CHAIN = (  # place, its n-th time in the process, how the process ends
    ("SIGTERM in an evaluation", 1, STOPPED),
    ("between two steps", 3, KILLED),  # that evaluation is made, and no checkpoint since: the next makes it once more
    ("a checkpoint half written", 2, KILLED),
    ("a line half written", 5, KILLED),
    ("a checkpoint not listed", 2, KILLED),
    ("SIGTERM in a step", 4, STOPPED),  # and its checkpoint is damaged afterwards
    ("a checkpoint listed, the old one not deleted", 3, KILLED),  # the first strikes the damaged one
    ("SIGTERM in an evaluation", 1, STOPPED),  # the last: after the last step
    ("between two steps", 6, KILLED),  # of the second task
    (None, 0, 0),
)


@pytest.fixture(scope="module")
def forks() -> Iterator[Forks]:
    forks = Forks()
    yield forks
    forks.process.communicate(timeout=10)


@pytest.fixture(scope="module")
def whole(forks: Forks, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """An uninterrupted run of 32 steps in two epochs."""
    run = open_run(tmp_path_factory.mktemp("runs") / "whole", preset="test", overrides=SETTINGS)
    status, said = forks.train(run)
    assert status == 0, said
    return run


def twin(whole: Run, path: Path, **changes: Any) -> Run:
    """Another run of the same data, not yet trained."""
    run = open_run(path, preset="test", overrides={**SETTINGS, **changes})
    shutil.copytree(whole.data, run.data)
    return run


def assert_same(run: Run, whole: Run) -> None:
    """Every kept checkpoint (weights, moments, codebooks, generators, position) and every figure but clock times."""
    for task in TASKS:
        mine, other = (listed_checkpoints(r.checkpoints / task) for r in (run, whole))
        assert [(e["step"], e["loss_eval"]) for e in mine] == [(e["step"], e["loss_eval"]) for e in other]
        for entry in other:
            (tensors, state), (expected, known) = (
                read_checkpoint(r.checkpoints / task / entry["file"]) for r in (run, whole)
            )
            differing = [name for name in expected if not torch.equal(tensors[name], expected[name])]
            assert tensors.keys() == expected.keys() and not differing, (entry["file"], differing[:5])
            for clock in (state, known):
                clock.pop("seconds"), clock.pop("profiles"), clock["window"].pop()
            assert state == known
        figures, expected_figures = (columns(standing(read_jsonl(r.metrics)[0], task)) for r in (run, whole))
        for clock in ("tokens_per_sec", "tokens_per_sec_median"):
            figures.pop(clock), expected_figures.pop(clock)
        assert figures == expected_figures


def test_killed_and_stopped_anywhere_it_ends_bit_for_bit_the_same(forks: Forks, whole: Run, tmp_path: Path) -> None:
    """One run through every place in turn, its data read by two workers: the uninterrupted one had none."""
    run = twin(whole, tmp_path / "killed", **{"train.num_workers": 2})
    folder = run.checkpoints / "language_model"
    reached = []
    for place, n, expected in CHAIN:
        status, said = forks.train(run, place, n)
        assert status == expected, f"{place}: {said}"
        known = json.loads(run.file("training_metrics.json").read_text())
        assert known["state"] == ("running" if status else "done") and known["environment"] and known["parameters"]
        if status == STOPPED:
            line = re.findall(r"^language_model: stopped at step (\d+) on SIGTERM: run the same command again$", said,
                              re.M)
            path = find_checkpoint(folder)[0]
            assert line and path and read_checkpoint(path)[1]["step"] == int(line[-1]), f"{place}: {said}"
            assert path.stem.endswith("_unevaluated") == ("evaluation" in str(place)), path
            reached.append(int(line[-1]))
        if place == "SIGTERM in a step":
            path.write_bytes(path.read_bytes()[:-100])
        if place == "a checkpoint listed, the old one not deleted":
            assert "step_00000019.safetensors is damaged: falling back to the one before" in said, said
        if place == "a checkpoint half written":
            assert list(folder.glob(".step_*.tmp")), "killed, but not while a checkpoint was written"
    assert reached == [0, 19, 32]
    assert not list(folder.glob(".step_*.tmp"))
    best = lowest(listed_checkpoints(folder))
    assert best and {e["step"] for e in listed_checkpoints(folder)} == {16, 30, 32, best["step"]}
    assert_same(run, whole)
    resumed = [r["task"] for r in read_jsonl(run.metrics)[0] if r["event"] == "resume"]
    assert resumed == [TASKS[0]] * 7 + [TASKS[1]], "not resumed where it should be"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_with_deterministic_algorithms_too(forks: Forks, whole: Run, tmp_path: Path) -> None:
    """The processes of this file ask for them where there is a GPU; the CPU's proof is the chain above."""
    run = twin(whole, tmp_path / "killed")
    assert forks.train(run, "between two steps", 13)[0] == KILLED
    assert forks.train(run)[0] == 0
    assert_same(run, whole)


RUNNER = """
import sys
from pathlib import Path
from lshv2.runner import Pipeline
settings = {settings!r}
sys.exit(Pipeline(Path(sys.argv[1]), preset="test", overrides=settings, chosen=("03_train",), resume="make x").run())
"""


def test_a_signal_to_the_runner_ends_in_a_checkpoint_and_no_marker(tmp_path: Path) -> None:
    pytest.importorskip("papermill")  # not on every machine with a GPU
    longer = {**SETTINGS, "train.num_epochs": 200, "train.checkpoint_every": 10_000, "train.eval_every": 10_000,
              "train.keep_every": None}
    run = Run(tmp_path / "run", make_settings("test", longer))
    code = RUNNER.format(settings=longer)
    runner = subprocess.Popen([sys.executable, "-c", code, str(run.path)], stdout=subprocess.PIPE, text=True)
    until = time.monotonic() + 60
    while len(read_jsonl(run.metrics)[0]) < 4:
        assert runner.poll() is None and time.monotonic() < until
        time.sleep(0.05)
    runner.terminate()
    said = runner.communicate(timeout=40)[0]
    assert runner.returncode == 128 + signal.SIGTERM and "to go on: make x" in said, said
    path, notes = find_checkpoint(run.checkpoints / "language_model")
    assert path is not None and not notes, "no checkpoint was written"
    step = read_checkpoint(path)[1]["step"]
    assert f"language_model: stopped at step {step} on SIGINT" in run.log("03_train").read_text()
    assert step % 10_000 and not list(run.path.glob("*.OK")) and not list(run.path.glob("*.FAILED"))


def save(folder: Path, losses: dict[int, float | None], keep: int = 2, every: int | None = None) -> None:
    model = torch.nn.Linear(2, 2)
    for step, loss in losses.items():
        save_checkpoint(folder, step, model, torch.optim.SGD(model.parameters()), {}, keep, every=every, loss_eval=loss)


def steps(folder: Path) -> list[int]:
    return sorted(int(path.stem.split("_")[1]) for path in folder.glob("step_*"))


def test_the_number_of_files_is_bounded(tmp_path: Path) -> None:
    save(tmp_path, {step: 1 / step if step < 12 else 1.0 for step in range(1, 41)})
    assert steps(tmp_path) == [11, 39, 40]
    save(tmp_path / "nth", {step: None for step in range(1, 41)}, every=15)
    assert steps(tmp_path / "nth") == [15, 30, 39, 40]


def test_a_damaged_best_checkpoint_falls_back_to_the_next_best_and_says_so(tmp_path: Path) -> None:
    save(tmp_path, {1: 0.5, 2: 0.4, 3: 0.7, 4: 0.6, 5: None}, keep=9)
    best, notes = find_checkpoint(tmp_path, best=True)
    assert best and best.name == "step_00000002.safetensors" and not notes
    best.write_bytes(best.read_bytes()[:-1])
    second, notes = find_checkpoint(tmp_path, best=True)
    assert second and second.name == "step_00000001.safetensors"
    assert len(notes) == 1 and f"{best} is damaged: falling back to the next best" in notes[0]
    for path in tmp_path.glob("step_*"):
        path.write_bytes(b"")
    with pytest.raises(UserError, match="no sound checkpoint is left"):
        find_checkpoint(tmp_path, best=True)
    assert find_checkpoint(tmp_path / "none", best=True) == (None, [])


def test_what_was_passed_over_as_damaged_is_no_longer_listed(tmp_path: Path) -> None:
    """Else it would hold a place among the newest, or as the best, for as long as nothing takes it."""
    save(tmp_path, {1: 0.5, 2: 0.6, 3: 0.1}, keep=3)
    (tmp_path / "step_00000003.safetensors").write_bytes(b"torn")
    path, notes = find_checkpoint(tmp_path)
    assert path and path.name == "step_00000002.safetensors" and "falling back to the one before" in notes[0]
    forget_newer(tmp_path, path)
    assert [e["step"] for e in listed_checkpoints(tmp_path)] == [1, 2]
    last = json.loads((tmp_path / "last.json").read_text())
    assert last["step"] == 2 and last["best"]["step"] == 1
    save(tmp_path, {4: 0.7})
    assert steps(tmp_path) == [1, 2, 4]


@pytest.fixture
def _interruptible() -> Iterator[None]:
    """Python's own SIGINT, also where a shell started the tests in its background, which ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("_interruptible")
def test_handlers_stand_only_inside_and_a_late_signal_is_passed_on() -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(Stopped), StopRequest() as stop:
        assert not stop.requested
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGINT)
        assert stop.number == signal.SIGTERM
        raise Stopped("stopped", stop.number)
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before
    with pytest.raises(KeyboardInterrupt), StopRequest():
        signal.raise_signal(signal.SIGINT)
    with pytest.raises(Stopped), StopRequest() as stop:
        signal.raise_signal(signal.SIGTERM)
        stop._since -= 2
        signal.raise_signal(signal.SIGTERM)  # a supervisor that repeats itself must not tear the checkpoint
        raise Stopped("stopped", signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt), StopRequest() as stop:
        signal.raise_signal(signal.SIGINT)
        stop._since -= 2  # a person's second Ctrl-C, two seconds later
        signal.raise_signal(signal.SIGINT)
        pytest.fail("the second one did nothing")
    assert signal.getsignal(signal.SIGINT) is before[0]


def test_in_another_thread_no_handler_is_set() -> None:
    found: list[object] = []

    def work() -> None:
        with StopRequest():
            found.append(signal.getsignal(signal.SIGTERM))

    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [before]
