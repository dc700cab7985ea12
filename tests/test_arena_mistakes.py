"""A person's mistakes around the arena: one line, before anything is trained."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import BrokenExecutor, ThreadPoolExecutor
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from project_files import ROOT

from lshv2.__main__ import _given_settings
from lshv2.__main__ import main as lab
from lshv2.arena.__main__ import main
from lshv2.arena.job import run_job
from lshv2.arena.phase import run_arena
from lshv2.arena.pool import _Slot
from lshv2.arena.registry import get_task, load_plugins, task_names
from lshv2.arena.study import ARENA, missing, plan, rows_of
from lshv2.arena.sweep import Point
from lshv2.arena.task import REGISTERED
from lshv2.arena.trial import try_draws
from lshv2.errors import UserError
from lshv2.runner.sweep import run_sweep
from lshv2.runs import append_jsonl, hold, open_run, read_jsonl

SMALL = ("--small", "--seeds", "0", "--attentions", "lsh", "--steps", "2", "--sequences", "4")


@pytest.fixture(autouse=True)
def _only_known_tasks() -> Iterator[None]:
    before = dict(REGISTERED)
    yield
    REGISTERED.clear()
    REGISTERED.update(before)


def arena(*arguments: str | Path, monkeypatch: pytest.MonkeyPatch) -> int | str | None:
    """The command line in this process; what it exits with."""
    monkeypatch.setattr(sys, "argv", ["arena", *map(str, arguments)])
    try:
        main()
    except SystemExit as leaving:
        return leaving.code
    return 0


OUT = {"a file": "file", "below a file": "file/out", "where nothing can be made": "/proc/none"}


@pytest.mark.parametrize("case", OUT)
def test_an_unusable_folder_is_one_line(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    said = arena(tmp_path / OUT[case], *SMALL, "--tasks", "induction", monkeypatch=monkeypatch)
    assert str(said).startswith("error: ") and "nothing can be written there" in str(said) and "\n" not in str(said)


@pytest.mark.parametrize("option, value", [("--steps", "-1"), ("--steps", "0"), ("--sequences", "-2"),
                                           ("--sequences", "0"), ("--asked", "-1"), ("--seeds", "-1"),
                                           ("--lengths", "0")])
def test_a_number_out_of_range_is_refused(
    option: str, value: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert arena(tmp_path, *SMALL, "--tasks", "induction", option, value, monkeypatch=monkeypatch) == 2
    assert f"argument {option}: '{value}' is not a whole number of" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_help_lists_every_task(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert arena("--help", monkeypatch=monkeypatch) == 0
    said = capsys.readouterr().out.split("tasks: ")[-1]
    assert said.replace(",", "").split() == task_names()


def test_two_commands_do_not_write_one_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with hold(tmp_path, "another one"):
        said = arena(tmp_path, *SMALL, "--tasks", "induction", monkeypatch=monkeypatch)
    assert f"is being written by process {os.getpid()}" in str(said) and "(another one)" in str(said)
    assert not (tmp_path / ARENA).exists()


HEAD = "import numpy as np\nfrom lshv2.arena.task import ArenaTask, Examples, register\n"
NO_TASKS = {
    "nothing": ("x = 1\n", "registers no task: put @register above its class"),
    "no draw": (HEAD + "@register\nclass A(ArenaTask):\n    name, vocab_size = 'a', 4\n",
                "class A .* needs a method draw"),
    "no name": (HEAD + "@register\nclass A(ArenaTask):\n    vocab_size = 4\n    def draw(self, *_): ...\n",
                "class A .* needs a name"),
    "a path as its name": (HEAD + "@register\nclass A(ArenaTask):\n    name, vocab_size = 'a/b', 4\n"
                           "    def draw(self, *_): ...\n", "class A .* needs a name of letters"),
    "no size": (HEAD + "@register\nclass A(ArenaTask):\n    name = 'a'\n    def draw(self, *_): ...\n",
                "class A .* needs a vocab_size of 1 or more"),
}


@pytest.mark.parametrize("case", NO_TASKS)
def test_a_plugin_without_a_whole_task_is_refused(case: str, tmp_path: Path) -> None:
    content, expected = NO_TASKS[case]
    (tmp_path / "mine.py").write_text(content)
    with pytest.raises(UserError, match=f"arena.plugins: .*mine.py:? {expected}"):
        load_plugins([str(tmp_path / "mine.py")])


def test_a_plugin_is_run_once_as_it_stands(tmp_path: Path) -> None:
    """A second run would make other classes, and one of which nothing is new would be taken for one without a task."""
    plugin = tmp_path / "mine.py"
    text = "from lshv2.arena.task import register\nfrom lshv2.arena.tasks.text import Text\n@register\n"
    plugin.write_text(text + "class Mine(Text):\n    name, source = 'mine', 'books'\n")
    load_plugins([str(plugin)])
    first = REGISTERED["mine"]
    assert first.source == str(tmp_path / "books"), "seen from its file, wherever the process runs"
    load_plugins([str(plugin)])
    assert REGISTERED["mine"] is first
    plugin.write_text(text + "class Mine(Text):\n    name, source, version = 'mine', '/books', 9\n")
    load_plugins([str(plugin)])
    assert (get_task("mine").version, get_task("mine").source) == (9, "/books")


DRAWS = HEAD + """
@register
class Mine(ArenaTask):
    name, vocab_size = "mine", 8
    def draw(self, generator, n, length):
        ids = generator.integers(8, size=(n, length))
        labels, groups = np.full_like(ids, -100), dict()
        labels[:, -1] = ids[:, -1]
        {wrong}
        return Examples(ids, labels, groups)
"""
WRONG = {
    "ids[0, 3] = 8": "learn by: input_ids go from 0 to 8, beyond 0 to 7 (vocab_size)",
    "labels[0, 3] = -1": "learn by: labels go from -1 to",
    "labels[:, 1:] = -100": "learn by: no answers: every label after the first is -100",
    "labels = labels[:, 1:]": "learn by: labels are int64 [8, 63], not a numpy array of whole numbers [8, 64]",
    "ids = ids.tolist()": "learn by: input_ids are list, not a numpy array of whole numbers [8, 64]",
    "return ids, labels": "learn by: draw gave tuple, not Examples(input_ids, labels, groups)",
    "raise ValueError('low >= high')": "learn by: draw raised ValueError: low >= high",
    "labels[0, -2] = 1": "judge by: 1 to 2 answers a sequence; all need as many",
    "groups['depth'] = np.zeros(3)": "judge by: group 'depth' is [3], not [4] (sequences) or [4, 1] (answers)",
    "self.headline = 'depth', '0'": "judge by: headline is of a group 'depth'; there are: none",
}


def tried(wrong: str, folder: Path) -> None:
    (folder / "mine.py").write_text(DRAWS.format(wrong=wrong))
    try_draws(plan(["mine"], ("lsh",), (0,), (64,), True, [str(folder / "mine.py")], {"sequences": 4}), None)


@pytest.mark.parametrize("wrong", WRONG)
def test_what_cannot_be_learnt_from_or_judged_is_said_at_once(wrong: str, tmp_path: Path) -> None:
    tried("pass", tmp_path)
    with pytest.raises(UserError) as said:
        tried(wrong, tmp_path)
    head = r"arena: mine, [48] sequences of 64 tokens to "
    assert re.match(head + re.escape(WRONG[wrong]), str(said.value)), said.value


def test_a_length_that_a_task_cannot_have_is_said_before_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = arena(tmp_path, *SMALL, "--tasks", "duplication", "--lengths", "64", "65", monkeypatch=monkeypatch)
    assert str(said).startswith("error: arena: duplication, 4 sequences of 65 tokens to judge by: ")
    assert not (tmp_path / "arena").exists() and not (tmp_path / ARENA).exists()


TREES = """
from lshv2.arena.task import register
from lshv2.arena.tasks.listops import ListOps

@register
class Lra(ListOps):
    name, like, source, in_processes = "lra", "listops", "trees.tsv", False
"""


def test_a_published_file_that_is_mended_is_asked_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Too few trees for every length: nothing is trained. Too long for one length: its row and the screen say so."""
    plugin, trees, out = tmp_path / "mine.py", tmp_path / "trees.tsv", tmp_path / "out"
    plugin.write_text(TREES)
    trees.write_text("Source\tTarget\n")
    job, = plan(["lra"], ("lsh",), (0,), (6, 64), True, [str(plugin)], {"steps": 1, "sequences": 2})
    with pytest.raises(UserError, match="2 sequences of 6 tokens to judge by: .*trees.tsv has 0 trees"):
        try_draws([job], out / "arena")
    trees.write_text("Source\tTarget\n[MAX 1 2 ]\t2\n[MIN 3 4 5 6 ]\t3\n")
    try_draws([job], out / "arena")
    began = time.time()
    assert run_job(job, out) == 2
    assert re.search(r"lra lsh seed 0  6: accuracy - \(not run: .* 2 trees of up to 8 tokens", capsys.readouterr().out)
    assert missing(job, rows_of(out)) == [("", 6)], "a later call asks again"
    assert missing(job, rows_of(out), began) == [], "this one does not"
    trees.write_text("Source\tTarget\n[MAX 1 2 ]\t2\n[MIN 3 4 ]\t3\n")
    assert run_job(job, out) == 1 and missing(job, rows_of(out)) == []


def test_lines_and_weights_that_are_torn_cost_their_own_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job, = plan(["induction"], ("lsh",), (0,), (64,), True, changes={"steps": 1, "sequences": 2})
    run_job(job, tmp_path)
    whole = read_jsonl(tmp_path / ARENA)[0][0]
    append_jsonl(tmp_path / ARENA, {"task": "induction", "trained_as": job.trained_as})
    assert missing(job, rows_of(tmp_path)) == []
    weights = tmp_path / "arena" / "induction-lsh-0.pt"
    (tmp_path / ARENA).unlink()
    whole_file = weights.read_bytes()
    for content in (whole_file[:3000], whole_file[:20_000], b"1", b""):
        weights.write_bytes(content)
        assert run_job(job, tmp_path) == 1
        assert "induction-lsh-0.pt is unreadable" in capsys.readouterr().out
        again = read_jsonl(tmp_path / ARENA)[0][0]
        assert again["value"] == whole["value"], "trained anew"
        (tmp_path / ARENA).unlink()
    torch.save([1], weights)
    assert run_job(job, tmp_path) == 1 and "not an arena model" in capsys.readouterr().out


def test_pictures_lie_beside_what_the_command_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And what a plugin's sweep trains knows its file; no summary of a benchmark is made where none was run."""
    (tmp_path / "mine.py").write_text(DRAWS.format(wrong="pass"))
    some = ("--sweep", "--plugins", tmp_path / "mine.py", "--tasks", "mine", "--lengths", "64")
    monkeypatch.setattr("lshv2.arena.sweep.POINTS", (Point("dense"), Point("window")))
    assert arena(tmp_path / "out", *SMALL, *some, monkeypatch=monkeypatch) == 0
    assert {row["task"] for row in rows_of(tmp_path / "out").values()} == {"mine"}
    assert len(rows_of(tmp_path / "out")) == 2
    names = {path.name for path in (tmp_path / "out").iterdir() if not path.name.startswith(".")}
    assert names == {ARENA, "arena", "arena.png"}


def test_a_run_adds_to_its_arena_and_trains_anew_what_is_trained_otherwise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A plugin is found from where it is typed; its change is seen, and takes nothing from other tasks."""
    pytest.importorskip("nbformat", reason="notebooks are executed")
    monkeypatch.setenv("LSHV2_RUNS", str(tmp_path / "runs"))
    monkeypatch.chdir(tmp_path)
    plugin = tmp_path / "mine.py"
    plugin.write_text(DRAWS.format(wrong="pass"))

    def after(tasks: str, more: str = "arena.steps=2") -> tuple[str, dict[str, float]]:
        """What the phase says first, and when each task was judged."""
        some = f"SET=arena.plugins=mine.py arena.tasks={tasks} arena.lengths=[64] {more}"
        assert lab(["arena", "RUN=mine", "PRESET=test", some]) == 0
        rows = read_jsonl(tmp_path / "runs" / "mine" / ARENA)[0]
        assert len(rows) == len({(row["task"], row["model"]) for row in rows}), "two answers to one question"
        return capsys.readouterr().out.splitlines()[0], {row["task"]: row["time"] for row in rows}

    said, first = after("mine")
    assert said == "04_arena: runs" and set(first) == {"mine"}
    assert after("mine")[0].startswith("04_arena: skipped")
    said, second = after("mine,induction")
    assert said == "04_arena: runs again, because arena.tasks changed"
    assert set(second) == {"mine", "induction"} and second["mine"] == first["mine"], "what was judged is judged again"
    plugin.write_text(plugin.read_text() + "    # now otherwise\n")
    said, third = after("mine,induction")
    assert said == f"04_arena: runs again, because {plugin} changed"
    assert third["mine"] > second["mine"] and third["induction"] == second["induction"]
    fourth = after("mine", "arena.steps=3")[1]
    assert fourth["mine"] > third["mine"] and fourth["induction"] == third["induction"]
    log = tmp_path / "runs" / "mine" / "logs" / "04_arena.log"
    assert "2 lines of mine are taken out: their models are trained otherwise now" in log.read_text()


def test_twins_and_seeds_in_a_run_are_trained_alike_or_taken_out(tmp_path: Path) -> None:
    """What `python -m lshv2.arena` added too, its other sequences, and not what is of another trained length."""
    def rows() -> list[tuple[str, int, int, str, int]]:
        found = read_jsonl(tmp_path / ARENA)[0]
        return sorted((row["model"], row["seed"], row["steps"], row["setting"], row["trained_len"]) for row in found)

    def run(seed: int = 0, **arena: Any) -> None:
        changes = {"tasks": ("induction",), "lengths": (64,), "sequences": 2, **arena}
        run_arena(open_run(tmp_path, preset="test", overrides={f"arena.{k}": v for k, v in changes.items()}, seed=seed))

    run(attentions=("lsh", "dense"), steps=1)
    length = rows()[0][-1]
    other, = plan(["induction"], ("lsh",), (0,), (64,), True, changes={"sequences": 2, "steps": 1, "lengths": (32,)})
    same, = plan(["induction"], ("lsh",), (0,), (64,), True, changes={"sequences": 2, "steps": 1})
    run_job(other, tmp_path)
    run_job(replace(same, asked=1), tmp_path)
    lsh, dense, asked = (("lsh", 0, 1, "", length), ("dense", 0, 1, "", length), ("lsh", 0, 1, "sequences 1", length))
    assert rows() == sorted([lsh, dense, asked, ("lsh", 0, 1, "", 32)])
    run(attentions=("lsh",), seed=1, steps=1)
    assert rows() == sorted([lsh, dense, asked, ("lsh", 0, 1, "", 32), ("lsh", 1, 1, "", length)])
    run(attentions=("lsh",), steps=2)
    assert rows() == sorted([("lsh", 0, 2, "", length), ("lsh", 0, 1, "", 32)])


PREPARES = DRAWS.format(wrong="ids[:] = self.value") + """
    def prepare(self, folder):
        made = folder / "made"
        if not made.exists():
            made.write_text("1")
        self.value = int(made.read_text())
"""


def test_what_another_version_of_a_plugin_prepared_is_not_read(tmp_path: Path) -> None:
    plugin, read = tmp_path / "mine.py", []
    for text in (PREPARES, PREPARES, PREPARES.replace('"1"', '"5"')):
        plugin.write_text(text)
        job, = plan(["mine"], ("lsh",), (0,), (64,), True, [str(plugin)], {"steps": 1, "sequences": 2})
        try_draws([job], tmp_path / "arena")
        folder, = (tmp_path / "arena").iterdir()
        read.append((folder / "made").read_text())
    assert read == ["1", "1", "5"]


def test_paths_among_the_settings_begin_where_they_are_typed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    given = dict.fromkeys(("SET", "NPROC", "SEED", "DATA"), "")
    for typed, key, expected in (
        ("arena.plugins=a.py,/b.py", "arena.plugins", [str(tmp_path / "a.py"), "/b.py"]),
        ('arena.plugins=["a.py"]', "arena.plugins", [str(tmp_path / "a.py")]),
        ("data.source=books/*.txt", "data.source", str(tmp_path / "books" / "*.txt")),
        ("data.source=null", "data.source", None), ("arena.tasks=a,b", "arena.tasks", "a,b"),
        ("data.source=", "data.source", ""), ("arena.plugins=a.py,", "arena.plugins", [str(tmp_path / "a.py")]),
    ):
        assert _given_settings(tmp_path / "run", "quick", {**given, "SET": typed})["overrides"] == {key: expected}
    for name, typed in (("SET", "data.source=~nobody-here/x"), ("DATA", "~nobody-here/x")):
        with pytest.raises(UserError, match="^~nobody-here/x: "):
            _given_settings(tmp_path / "run", "quick", {**given, name: typed})


def test_plugins_of_one_file_name_and_sources_of_their_parents_are_told_apart(tmp_path: Path) -> None:
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "tasks.py").write_text(
            "from lshv2.arena.task import register\nfrom lshv2.arena.tasks.text import Text\n\n\n"
            f"class Books(Text):\n    source = 'books'\n\n\n@register\nclass Mine(Books):\n    name = 'of-{folder}'\n")
    load_plugins([str(tmp_path / folder / "tasks.py") for folder in ("one", "two")])
    for folder in ("one", "two"):
        task = get_task(f"of-{folder}")
        assert task.source == str(tmp_path / folder / "books")
        assert getattr(sys.modules[type(task).__module__], "Mine") is type(task), "else it cannot be sent to a process"  # noqa: B009


def test_a_sweep_takes_the_tasks_and_plugins_it_is_told(tmp_path: Path) -> None:
    pytest.importorskip("nbformat", reason="notebooks are executed")
    (tmp_path / "mine.py").write_text(DRAWS.format(wrong="pass"))
    changed = {"arena.lengths": [64], "arena.steps": 2, "arena.tasks": "mine",
               "arena.plugins": [str(tmp_path / "mine.py")]}
    settings = {"preset": "test", "overrides": changed, "seed": 0, "data": None}
    assert run_sweep(tmp_path / "sweep", "make sweep", (Point("window"),), **settings) == 0
    assert [row["task"] for row in rows_of(tmp_path / "sweep").values()] == ["mine"]


@pytest.mark.parametrize("number, group", [
    (signal.SIGINT, True), (signal.SIGINT, False), (signal.SIGTERM, False), (signal.SIGKILL, False)])
def test_an_interrupt_is_one_line_and_leaves_no_process(number: int, group: bool, tmp_path: Path) -> None:
    """As a terminal sends it, to all processes, and as `kill` and `timeout` do, to one."""
    command = [sys.executable, "-m", "lshv2.arena", str(tmp_path / "out"), "--small", "--seeds", "0", "--attentions",
               "lsh", "dense", "--tasks", "listops", "--steps", "100000"]
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    job = subprocess.Popen(command, env=environment, start_new_session=True, stdout=subprocess.PIPE,
                           stderr=subprocess.PIPE, text=True)
    process, until = psutil.Process(job.pid), time.monotonic() + 60
    try:
        while not any(child.children() for child in process.children()):  # processes that draw, below one that trains
            assert time.monotonic() < until and job.poll() is None, "nothing was trained"
            time.sleep(0.1)
        time.sleep(3)
        started = process.children(recursive=True)
        (os.killpg if group else os.kill)(job.pid, number)
        out, err = job.communicate(timeout=60)
        said = "stopped; the same command goes on\n"
        assert (job.returncode, out, err) == ((-9, "", err) if number == signal.SIGKILL else (128 + number, "", said))
        assert not psutil.wait_procs(started, timeout=10)[1]
    finally:
        if job.poll() is None:
            os.killpg(job.pid, signal.SIGKILL)
            job.communicate()


def _interrupted_as_it_sends() -> int:
    """As a process that is interrupted when its result has arrived, before it knows."""
    send = Connection.send_bytes

    def send_and_interrupt(self: Connection, *arguments: Any) -> None:
        send(self, *arguments)
        os.kill(os.getpid(), signal.SIGINT)

    Connection.send_bytes = send_and_interrupt  # type: ignore[method-assign]
    return os.getpid()


@pytest.mark.parametrize("work", [os.getpid, _interrupted_as_it_sends])
def test_an_interrupted_process_that_waits_ends_without_a_word(
    work: Callable[[], int], capfd: pytest.CaptureFixture[str],
) -> None:
    """In a thread, as slots are, since it hears no interrupts afterwards."""
    slot = _Slot("", shared=False)
    with ThreadPoolExecutor(1) as thread:
        waiting = psutil.Process(thread.submit(slot.run, work).result(60))
        waiting.send_signal(signal.SIGINT)
        assert not psutil.wait_procs([waiting], timeout=30)[1]
        with pytest.raises(BrokenExecutor):
            thread.submit(slot.run, abs, -1).result(60)
        assert thread.submit(slot.run, abs, -1).result(60) == 1, "the slot was lost with its process"
        slot.end()
    assert capfd.readouterr().err == ""


def _leaves() -> str:
    os.kill(os.getpid(), signal.SIGTERM)
    return "unheard"


def test_a_job_whose_process_alone_was_sent_a_signal_has_failed_and_the_next_one_runs() -> None:
    slot = _Slot("", shared=False)
    with ThreadPoolExecutor(1) as thread:
        with pytest.raises(RuntimeError, match="a signal ended its process"):
            thread.submit(slot.run, _leaves).result(60)
        assert thread.submit(slot.run, abs, -1).result(60) == 1
        slot.end()


SLOW_TO_DRAW = DRAWS.format(wrong="__import__('time').sleep(4 if self.split == 'train' and n > 8 else 0)")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_processes_that_draw_for_a_while_end_with_the_command(number: int, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(SLOW_TO_DRAW + "    in_processes = True\n")
    command = [sys.executable, "-m", "lshv2.arena", str(tmp_path / "out"), "--small", "--seeds", "0", "--attentions",
               "lsh", "--plugins", str(tmp_path / "mine.py"), "--tasks", "mine", "--lengths", "64"]
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    job = subprocess.Popen(command, env=environment, start_new_session=True, stdout=subprocess.PIPE,
                           stderr=subprocess.PIPE, text=True)
    process, until = psutil.Process(job.pid), time.monotonic() + 60
    try:
        while not any(child.children() for child in process.children()):
            assert time.monotonic() < until and job.poll() is None, "nothing was drawn"
            time.sleep(0.1)
        time.sleep(3)
        started = process.children(recursive=True)
        os.kill(job.pid, number)
        job.communicate(timeout=100)
        assert not psutil.wait_procs(started, timeout=30)[1]
    finally:
        if job.poll() is None:
            os.killpg(job.pid, signal.SIGKILL)
            job.communicate()
