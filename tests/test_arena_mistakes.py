"""A person's mistakes around the arena: one line, before anything is trained."""

from __future__ import annotations

import os
import re
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from arena_plugins import DRAWS, HEAD, only_known_tasks

from lshv2.__main__ import _given_settings
from lshv2.arena.__main__ import main
from lshv2.arena.job import run_job
from lshv2.arena.recipes import RECIPES
from lshv2.arena.registry import get_task, load_plugins, task_names
from lshv2.arena.study import ARENA, missing, plan, rows_of
from lshv2.arena.sweep import Point
from lshv2.arena.task import REGISTERED
from lshv2.arena.trial import try_draws
from lshv2.errors import UserError
from lshv2.presets import make_settings
from lshv2.runner.sweep import run_sweep
from lshv2.runs import append_jsonl, hold, read_jsonl

__all__ = ["only_known_tasks"]  # around every test here
SMALL = ("--small", "--seeds", "0", "--attentions", "lsh", "--steps", "2", "--sequences", "4")


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


WRONG = {
    "ids[0, 3] = 8": "learn by: input_ids go from 0 to 8, beyond 0 to 7 (vocab_size)",
    "labels[0, 3] = -1": "learn by: labels go from -1 to",
    "labels[:, 1:] = -100": "learn by: no answers: every label after the first is -100",
    "labels = labels[:, 1:]": "learn by: labels are int64 [8, 63], not a numpy array of whole numbers [8, 64]",
    "ids = ids.tolist()": "learn by: input_ids are list, not a numpy array of whole numbers [8, 64]",
    "return ids, labels": "learn by: draw gave tuple, not Examples(input_ids, labels, groups)",
    "raise ValueError('low >= high')": "learn by: draw raised ValueError: low >= high",
    "labels[0, -2] = ids[0, -2]": "judge by: 1 to 2 answers a sequence; all need as many",
    "groups['depth'] = np.zeros(3)": "judge by: group 'depth' is [3], not [4] (sequences) or [4, 1] (answers)",
    "ids[:, -1] = (labels[:, -1] + 1) % 8": "judge by: 4 of 4 labels are not what stands there, first at [0, 63]: ",
    "type(self).chance = lambda self, n: 32": "judge by: chance is 32, no accuracy of 0 to 1",
    "type(self).chance = lambda self, n: '1/8'": "judge by: chance is '1/8', no accuracy of 0 to 1",
    "type(self).chance = lambda self, n: 1 / 0": "judge by: chance raised ZeroDivisionError: division by zero",
    "type(self).shortcuts = lambda self, e: {'most': 7}": "judge by: shortcut 'most' is 7, no accuracy of 0 to 1",
    "type(self).shortcuts = lambda self, e: e.ids": "judge by: shortcuts raised AttributeError: 'Examples' object",
    "type(self).chance = lambda self, n: float('nan')": "judge by: chance is nan, no accuracy of 0 to 1",
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


LACKS = HEAD + """
from lshv2.errors import UserError
@register
class Mine(ArenaTask):
    name, vocab_size, source = "mine", 8, "books"
    def draw(self, generator, n, length):
        if length < 100 and self.split == "eval":
            raise UserError("too short")
        ids = generator.integers(8, size=(n, length))
        labels = np.full_like(ids, -100)
        labels[:, -1] = ids[:, -1]
        return Examples(ids, labels, {"half": np.arange(n) % 2})
    def chance(self, length):
        return np.float32(1 / 8)
    def shortcuts(self, examples):
        return {"by half": np.float64(examples.groups["half"].mean()) SHORT}
"""


def test_shortcuts_are_tried_at_the_first_length_that_there_is_and_as_they_will_be_asked(tmp_path: Path) -> None:
    """With groups, and numbers that a line can hold, whatever kind they are."""
    plugin = tmp_path / "mine.py"
    plugin.write_text(LACKS.replace("SHORT", "/ 0"))
    changes = {"sequences": 4, "steps": 2}
    bad = r"128 tokens to judge by: shortcut 'by half' is np.float64\(inf\), no"
    with pytest.raises(UserError, match=bad), np.errstate(divide="ignore"):
        try_draws(plan(["mine"], ("lsh",), (0,), (64, 128, 256), True, [str(plugin)], changes), None)
    plugin.write_text(LACKS.replace("SHORT", ""))
    job, = plan(["mine"], ("lsh",), (0,), (64, 128), True, [str(plugin)], changes)
    try_draws([job], None)
    run_job(job, tmp_path)
    short, row = read_jsonl(tmp_path / ARENA)[0]
    assert short["status"] == "not run" and row["shortcuts"] == {"by half": 0.5}
    assert row["chance"] == pytest.approx(1 / 8) and set(row["by"]["half"]) == {"0", "1"}


def test_hours_on_a_cpu_are_said_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As `make arena` does; what is there already does not count, and --yes goes on."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    full = (tmp_path / "out", "--tasks", "uuid_needle", "--attentions", "lsh", "--seeds", "0")
    said = str(arena(*full, monkeypatch=monkeypatch))
    assert said.startswith("error: no GPU here, and training the arena's 1 models anew is ") and said.count("\n") == 0
    assert said.endswith("--attentions lsh --seeds 0 --yes; laptop sizes: --small")
    assert not list(tmp_path.iterdir())
    small = str(arena(*full, "--small", "--steps", "100000000", monkeypatch=monkeypatch))
    assert small.endswith("--small --steps 100000000 --yes"), "it has laptop sizes already"
    (tmp_path / "there").mkdir()
    job, = plan(["uuid_needle"], ("lsh",), (0,))
    for length in job.lengths:
        append_jsonl(tmp_path / "there" / ARENA, {"task": job.task, "model": job.model, "seed": 0, "setting": "",
                     "seq_len": length, "trained_as": job.trained_as, "sequences": job.recipe.sequences, "value": 1.0})
    assert arena(tmp_path / "there", *full[1:], monkeypatch=monkeypatch) == 0, "all of it is there"
    left = str(arena(*full, "--yes", "--time-limit", "0", "--lengths", "64", monkeypatch=monkeypatch))
    assert left.startswith("1 of 1 jobs are left")


def test_lengths_take_commas_as_tasks_do() -> None:
    for given, lengths in (("256,512", (256, 512)), ("64", (64,)), ("[64,128]", (64, 128)), ("null", None)):
        assert make_settings("quick", [f"arena.lengths={given}"]).arena.lengths == lengths
    for wrong in ("256,x", "-3", "0", "true"):
        with pytest.raises(UserError, match="arena.lengths"):
            make_settings("quick", [f"arena.lengths={wrong}"])


def test_a_plugin_s_recipe_is_its_author_s_at_laptop_sizes_too(tmp_path: Path) -> None:
    plugin = tmp_path / "mine.py"
    plugin.write_text(DRAWS.format(wrong="pass"))
    plain, = plan(["mine"], ("lsh",), (0,), None, True, [str(plugin)])
    assert (plain.recipe.lengths, plain.lengths) == ((64,), (256, 1024, 4096)), "as all tasks"
    plugin.write_text(DRAWS.format(wrong="pass") + "\nfrom lshv2.arena.recipes import RECIPES, Recipe\n"
                      "RECIPES['mine'] = Recipe((32, 96), 7, 512, judged=(128,))\n")
    try:
        own, = plan(["mine"], ("lsh",), (0,), None, True, [str(plugin)])
    finally:
        RECIPES.pop("mine", None)
    assert (own.recipe.lengths, own.recipe.steps, own.lengths) == ((32, 96), 7, (128,))


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


def test_paths_among_the_settings_begin_where_they_are_typed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "books").mkdir()
    (tmp_path / "books" / "one.txt").write_text("once")
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
