"""Several processes train as one does: real processes, gloo on the CPU, float64 so that no bucket id is a near tie."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ranks_at_work import STEPS, Ranks

from lshv2.checkpoint import find_checkpoint, read_checkpoint
from lshv2.config import ModelConfig
from lshv2.errors import UserError
from lshv2.parallel.layout import Layout, plan

INVERTED = {"hashing": "inverted_file"}
MEANS = {"hashing": "inverted_file", "centroids": "mean", "hash_positions": True}
CODEBOOKS = {"hashing": "codebooks", "checkpoint": True}
PONDER = {"hashing": "inverted_file", "use_ponder": True, "n_layers": 4, "checkpoint": "block"}
CASES = {"inverted_file": INVERTED, "means": MEANS, "codebooks": CODEBOOKS, "ponder": PONDER}
LOSS, NORM, TABLE = 2e-6, 1e-9, 1e-6  # losses and what codebooks catch are summed in float32


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    with Ranks() as ranks:
        yield ranks


@pytest.fixture(scope="module")
def alone(ranks: Ranks) -> dict[str, Any]:
    """What one process computes, by case."""
    return {str(case): ranks.run(1, "train", **case)[0] for case in CASES.values()}


def furthest(a: list[float], b: list[float]) -> float:
    assert len(a) == len(b)
    return max(abs(x - y) for x, y in zip(a, b, strict=True))


def check(got: list[dict[str, Any]], expected: dict[str, Any]) -> None:
    for rank in got:
        for what, tolerance in (("losses", LOSS), ("norms", NORM)):
            off = furthest(rank[what], expected[what])
            assert off < tolerance, f"{what} off by {off:.1e}: {rank[what]} for {expected[what]}"
        assert rank["tables"] == got[0]["tables"], "hash tables differ between processes"
    off = max(furthest(got[0]["tables"][name], table) for name, table in expected["tables"].items())
    assert off < TABLE, f"hash tables off by {off:.1e}"


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize(("world", "sequence"), [(2, 1), (2, 2), (4, 2)], ids=["data 2", "sequence 2", "2 x 2"])
def test_losses_gradients_and_tables_are_those_of_one_process(
    ranks: Ranks, alone: dict[str, Any], case: dict[str, Any], world: int, sequence: int
) -> None:
    got = ranks.run(world, "train", sequence=sequence, **case)
    check(got, alone[str(case)])
    whole = alone[str(case)]["held"]
    assert all(rank["held"] <= whole / world * 1.1 for rank in got) and sum(r["held"] for r in got) == whole


@pytest.mark.parametrize("changes", [dict(attention="dense"), dict(attention="window"), dict(short_conv=3)], ids=str)
def test_other_models_share_sequences_too(ranks: Ranks, changes: dict[str, Any]) -> None:
    expected = ranks.run(1, "train", steps=2, **changes)[0]
    for rank in ranks.run(2, "train", sequence=2, steps=2, **changes):
        assert furthest(rank["norms"], expected["norms"]) < NORM


def test_compiled_blocks_share_sequences_too(ranks: Ranks) -> None:
    small = {"steps": 1, "n_layers": 1, "weight_tied_layers": 1, "batch": 1, "length": 64}
    expected = ranks.run(1, "train", **small)[0]
    for rank in ranks.run(2, "train", compiled=True, **small):
        assert furthest(rank["norms"], expected["norms"]) < NORM


def test_a_checkpoint_of_four_is_continued_by_two_then_by_one_and_by_four(
    ranks: Ranks, alone: dict[str, Any], tmp_path: Path
) -> None:
    expected = alone[str(PONDER)]
    parts = [ranks.run(n, "train", folder=str(tmp_path), steps=1, **PONDER) for n in (4, 2, 1, 4)]
    assert len(parts) == STEPS
    for step, part in enumerate(parts):
        for rank in part:
            assert abs(rank["norms"][0] - expected["norms"][step]) < NORM, f"step {step}: {rank['norms']}"
    names = sorted(p.name for p in tmp_path.glob("step_*"))
    assert names == ["step_00000003.safetensors", "step_00000004.pieces"], names
    assert not list(tmp_path.glob(".*")), "something temporary is left"


def test_a_damaged_folder_falls_back_to_the_one_before(ranks: Ranks, tmp_path: Path) -> None:
    for _ in range(2):
        ranks.run(2, "train", folder=str(tmp_path), steps=1, **INVERTED)
    newest, notes = find_checkpoint(tmp_path)
    assert newest and newest.name == "step_00000002.pieces" and not notes
    piece = sorted(newest.glob("*.safetensors"))[-1]
    content = bytearray(piece.read_bytes())
    content[-1] ^= 1
    piece.write_bytes(content)
    before, notes = find_checkpoint(tmp_path)
    assert before and before.name == "step_00000001.pieces" and "step_00000002.pieces is damaged" in notes[0]
    assert read_checkpoint(before)[1]["step"] == 1
    shutil.rmtree(before)
    with pytest.raises(UserError, match="no sound checkpoint"):
        find_checkpoint(tmp_path)


SHAPE = {"n_heads": 12, "n_kv_heads": 4}


@pytest.mark.parametrize(
    ("world", "batch", "sequence", "layout"),
    [(1, 1, None, (1, 1)), (4, 1, None, (1, 4)), (4, 2, None, (2, 2)), (4, 64, None, (4, 1)), (4, 64, 2, (2, 2))],
)
def test_the_mesh_follows_from_the_batch(world: int, batch: int, sequence: int | None, layout: tuple[int, int]) -> None:
    config = ModelConfig(**SHAPE)
    assert plan(world, batch_size=batch, length=4096, config=config, sequence=sequence) == Layout(*layout)


@pytest.mark.parametrize(
    ("world", "batch", "sequence", "length", "said"),
    [
        (8, 1, None, 4096, "n_kv_heads=4 is not a multiple of 8"),
        (2, 1, None, 4095, "seq_length=4095 is not a multiple of 2"),
        (4, 4, 3, 4096, "parallel.sequence=3 does not divide the 4 processes"),
        (4, 1, 2, 4096, "batch_size=1 is not a multiple of 2"),
        (4, 1, None, 12, r"3 tokens each of a sequence of 12, and a key is made of 4 earlier ones \(short_conv=3\)"),
    ],
)
def test_what_does_not_come_out_even_is_one_line(
    world: int, batch: int, sequence: int | None, length: int, said: str
) -> None:
    with pytest.raises(UserError, match=said) as caught:
        plan(world, batch_size=batch, length=length, config=ModelConfig(**SHAPE, short_conv=3), sequence=sequence)
    assert "\n" not in str(caught.value)
