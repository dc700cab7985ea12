"""What the quality curve advises: a trade between what is found, what text costs, and keys a query."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from example_arena import arena_rows, shape_rows, write_arena

from lshv2.arena_results import Arena, read_arena
from lshv2.arena_shapes import shape_table, shapes, swept
from lshv2.readme_parts import arena_part
from lshv2.runs import repo_root


def arena(folder: Path, *made: dict[str, Any]) -> Arena:
    content, problems = read_arena(write_arena(folder, list(made)))
    assert content is not None and not problems, problems
    return content


def advised(*args: Any) -> list[str]:
    return [shape.label for shape in shapes(arena(*args)) if shape.advised]


def test_advised_is_what_finds_everything_and_reads_text_better_for_more_keys(tmp_path: Path) -> None:
    everything = [*shape_rows("mqar", 1), *shape_rows("duplication", 2), *shape_rows("bytes", 3, "bits_per_byte")]
    assert advised(tmp_path / "a", *everything) == ["R 2, W 64, cells x 1", "R 4, W 64, cells x 1"], (
        "R 1 and R 8, W 32 copy too little; x 4 and R 8, W 64 read no better than R 4")
    assert advised(tmp_path / "b", *shape_rows("mqar", 1), *shape_rows("duplication", 2)) == ["R 2, W 64, cells x 1"]
    assert advised(tmp_path / "c", *shape_rows("bytes", 3, "bits_per_byte")) == [
        "R 1, W 64, cells x 1", "R 8, W 32, cells x 1"], "text alone: nothing has to be found"


def test_a_shape_that_was_not_measured_on_every_task_is_not_advised(tmp_path: Path) -> None:
    text = [row for row in shape_rows("bytes", 3, "bits_per_byte") if row["setting"] != "R 4, W 64, cells x 1"]
    assert advised(tmp_path, *shape_rows("mqar", 1), *shape_rows("duplication", 2), *text) == [
        "R 2, W 64, cells x 1", "R 4, W 64, cells x 4", "R 8, W 64, cells x 1"]


def test_the_table_has_twins_beside_the_shapes(tmp_path: Path) -> None:
    text = shape_rows("bytes", 3, "bits_per_byte", seeds=3)
    text[0]["value"] = 1.26
    cells = shape_table(arena(tmp_path, *shape_rows("mqar", 1), *text))
    assert cells[0] == ["shape", "advised", "keys a query", "MQAR, 64 pairs: 1,024 tokens, 2 seeds",
                        "bytes of real text: bits per byte, 1,024 tokens, 3 seeds"]
    assert [row[::2][:2] for row in cells[1:]] == [
        ["LSH, R 1, W 64, cells x 1", "132"], ["LSH, R 2, W 64, cells x 1", "196"],
        ["LSH, R 4, W 64, cells x 1", "324"], ["LSH, R 4, W 64, cells x 4", "324"],
        ["LSH, R 8, W 32, cells x 1", "324"], ["LSH, R 8, W 64, cells x 1", "580"], ["dense", "all"],
        ["window 128", "132"]]
    assert cells[1][1:] == ["a lead", "132", "100 %", "1.220 (1.200 to 1.260)"]
    assert cells[7][1:] == ["", "all", "90.0 %, 1 seed", "0.900, 1 seed"]
    sure = shape_table(arena(tmp_path / "b", *shape_rows("mqar", 1, seeds=3), *text))
    assert sure[1][1] == "yes"


def test_rounds_that_one_model_was_asked_with_are_no_shapes(tmp_path: Path) -> None:
    asked = arena(tmp_path, *arena_rows())
    assert swept(asked) == [] and shapes(asked) == [] and shape_table(asked) == []
    assert "quality curve" not in str(arena_part(tmp_path, "x"))


@pytest.mark.parametrize("task", ["mqar", "duplication", "bytes"])
def test_the_committed_curve_has_every_point(task: str) -> None:
    from lshv2.arena.sweep import POINTS as ALL

    content, _ = read_arena(repo_root() / "runs" / "reference-h200" / "arena")
    assert content is not None
    there = {shape.label: shape.scores[task].seeds for shape in shapes(content) if task in shape.scores}
    wanted = {point.label for point in ALL if point.label}
    assert wanted <= there.keys() and "dense" in there
    assert min(there[label] for label in wanted) >= (3 if task == "bytes" else 1)
