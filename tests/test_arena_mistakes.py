"""A person's mistakes around the arena: one line, before anything is trained."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from lshv2.arena.job import run_job
from lshv2.arena.registry import get_task, load_plugins
from lshv2.arena.study import ARENA, missing, plan, rows_of
from lshv2.arena.task import REGISTERED
from lshv2.errors import UserError
from lshv2.runs import append_jsonl, read_jsonl



@pytest.fixture(autouse=True)
def _only_known_tasks() -> Iterator[None]:
    before = dict(REGISTERED)
    yield
    REGISTERED.clear()
    REGISTERED.update(before)


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
    for content in (weights.read_bytes()[:3000], b"1", b""):
        weights.write_bytes(content)
        assert run_job(job, tmp_path) == 1
        assert "induction-lsh-0.pt is unreadable" in capsys.readouterr().out
        again = read_jsonl(tmp_path / ARENA)[0][0]
        assert again["value"] == whole["value"], "trained anew"
        (tmp_path / ARENA).unlink()
    torch.save([1], weights)
    assert run_job(job, tmp_path) == 1 and "not an arena model" in capsys.readouterr().out
