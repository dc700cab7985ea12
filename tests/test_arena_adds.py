"""A run folder that has an arena already: what is added, what is trained anew, what is taken out."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from arena_plugins import DRAWS, only_known_tasks

from lshv2.__main__ import main as lab
from lshv2.arena.job import run_job
from lshv2.arena.phase import run_arena
from lshv2.arena.study import ARENA, plan
from lshv2.arena.trial import try_draws
from lshv2.runs import open_run, read_jsonl

__all__ = ["only_known_tasks"]  # around every test here


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
        lines = capsys.readouterr().out.splitlines()
        assert any(line.startswith("arena:   mine: LSH ") for line in lines), "what came out, skipped or not"
        return lines[0], {row["task"]: row["time"] for row in rows}

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


PREPARES = DRAWS.format(wrong="ids[:] = self.value; labels[:, -1] = self.value") + """
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
