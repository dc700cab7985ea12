"""The arena's tasks against their definitions, read token by token: nothing here shares code with what draws them."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from lshv2.arena.registry import get_task, load_plugins, task_names
from lshv2.arena.task import Examples, octave
from lshv2.arena.tasks.listops import CLOSE, EQUALS, ListOps, read_tsv, upper, value_of
from lshv2.arena.tasks.text import Text
from lshv2.data.jsonl import IGNORED
from lshv2.data.order2 import fit_order2
from lshv2.errors import UserError

GENERATED = [name for name in task_names() if name != "bytes"]
LENGTHS = {"listops": (200, 2001), "listops_long": (2048, 4096)}


def drawn(name: str, length: int, n: int = 20, seed: int = 0, split: str = "eval") -> Examples:
    task = get_task(name)
    task.split = split
    return task.draw(np.random.default_rng(seed), n, length)


def scored(row: np.ndarray) -> list[int]:
    return np.flatnonzero(row != IGNORED).tolist()


@pytest.mark.parametrize("name", GENERATED)
def test_every_task_keeps_the_contract(name: str) -> None:
    task = get_task(name)
    for length in LENGTHS.get(name, (512, 1024)):
        one, again, other = drawn(name, length), drawn(name, length), drawn(name, length, seed=1)
        assert one.input_ids.shape == one.labels.shape == (20, length)
        assert np.array_equal(one.input_ids, again.input_ids) and not np.array_equal(one.input_ids, other.input_ids)
        assert one.input_ids.min() >= 0 and one.input_ids.max() < task.vocab_size
        where = one.labels != IGNORED
        assert where.any(1).all() and not where[:, 0].any(), "an answer at the start has no question"
        assert np.array_equal(one.labels[where], one.input_ids[where]), "an answer stands in the sequence"
        answers = one.answers()
        for group, labels in one.groups.items():
            assert labels.shape in ((20,), answers.shape), group
        chance = task.chance(length)
        assert chance is not None and 0 <= chance < 0.2
        most = 1 if name == "passkey" else 1 - 1e-9  # the one task that a rule solves, and that says so
        assert all(0 <= reached <= most for reached in task.shortcuts(one).values())
    with pytest.raises(UserError, match=f"{name}: {task.min_length - 1} tokens are too few"):
        task.draw(np.random.default_rng(0), 1, task.min_length - 1)


def test_a_passkey_is_the_first_five_digits_unless_noise_has_some() -> None:
    examples, task = drawn("passkey", 600), get_task("passkey")
    rule = "the first 5 digits in a row"
    assert task.shortcuts(examples) == {rule: 1.0}
    decoy = examples.input_ids.copy()
    decoy[1:6, :5] = [7, 7, 7, 7, 8]  # five of twenty have other digits before the needle
    assert task.shortcuts(Examples(decoy, examples.labels)) == {rule: 0.75}
    decoy[:, :-6] = 200  # the needles are gone
    assert task.shortcuts(Examples(decoy, examples.labels)) == {rule: 0.0}


def test_text_is_held_against_the_two_bytes_before() -> None:
    """Counted here symbol by symbol, of the scored bytes alone; the ends of documents are not asked."""
    task = Text()
    stream = np.random.default_rng(0).choice(256, 4000, p=np.arange(1, 257) / np.arange(1, 257).sum()).astype("<u2") + 1
    stream[::97] = 0
    task.streams = {"train": stream[:2000], "eval": stream[2000:]}
    task.split = "eval"
    examples = task.draw(np.random.default_rng(0), 5, 700)
    model = fit_order2([bytes(int(x) - 1 for x in stream[:2000] if x)])
    bits = []
    for row in examples.input_ids:
        for at in range(700 - 350, 700):
            if row[at]:
                first, second = (max(int(x), 1) - 1 for x in row[at - 2 : at])
                bits.append(-np.log2(model.probability(np.array([first << 16 | second << 8 | int(row[at]) - 1]))[0]))
    assert any(0 in row[-350:] for row in examples.input_ids), "an end is among what is scored"
    assert task.shortcuts(examples) == {"the two bytes before": pytest.approx(float(np.mean(bits)))}


@pytest.mark.parametrize(("name", "length", "pairs"), [("mqar", 512, 64), ("mqar_dense_pairs", 2048, 32)])
def test_recall_asks_every_pair_once(name: str, length: int, pairs: int) -> None:
    examples = drawn(name, length)
    for ids, labels, gaps in zip(examples.input_ids, examples.labels, examples.groups["gap"], strict=True):
        table = dict(ids[: 2 * pairs].reshape(-1, 2).tolist())
        assert len(table) == pairs and max(table) < 4096 <= min(table.values())
        asked = scored(labels)
        assert sorted(ids[t - 1] for t in asked) == sorted(table)
        assert all(labels[t] == table[ids[t - 1]] and t % 2 == 1 for t in asked)
        for t, gap in zip(asked, gaps, strict=True):
            low, high = map(int, gap.split("-"))
            assert low <= t - 1 - 2 * list(table).index(ids[t - 1]) <= high
        rest = [x for t, x in enumerate(ids[2 * pairs :], 2 * pairs) if t + 1 not in asked and t not in asked]
        assert not set(rest) & set(table), "filler asks or contradicts a pair"


def test_induction_has_two_special_tokens() -> None:
    for ids, labels in zip(*(getattr(drawn("induction", 100), x) for x in ("input_ids", "labels")), strict=True):
        first, second = np.flatnonzero(ids == 15)
        assert second == 98 and scored(labels) == [99] and ids[99] == ids[first + 1] != 15


@pytest.mark.parametrize(("name", "length", "copies"), [("selective_copying", 300, 16),
                                                        ("selective_copying_dense", 2048, 32)])
def test_selective_copying_copies_what_is_not_blank(name: str, length: int, copies: int) -> None:
    examples = drawn(name, length)
    for ids, labels in zip(examples.input_ids, examples.labels, strict=True):
        marker = length - copies - 1
        assert ids[marker] == 1 and scored(labels) == list(range(marker + 1, length))
        assert [x for x in ids[:marker] if x] == ids[marker + 1 :].tolist()
    starts = [np.flatnonzero(ids)[0] for ids in examples.input_ids]
    assert len(set(starts)) > 5, "places are not drawn"


def test_needles_stand_at_their_depths() -> None:
    examples = drawn("passkey", 600)
    for ids, depth in zip(examples.input_ids, examples.groups["depth"], strict=True):
        first, second = np.flatnonzero(ids == 0)
        assert abs(first - float(depth) * 588) < 1 and second == 594
        assert ids[first : first + 6].tolist() == ids[-6:].tolist() and set(ids[-5:]) <= set(range(1, 11))
    examples = drawn("kv_needle", 601)
    for ids, labels, depths in zip(examples.input_ids, examples.labels, examples.groups["depth"], strict=True):
        hay, asked = ids[1:-12].reshape(-1, 3), ids[-12:].reshape(-1, 3)
        keys = [tuple(key) for key in hay[:, :2].tolist()]
        assert len(set(keys)) == len(keys), "a key has two values"
        assert scored(labels) == [591, 594, 597, 600] and ids[0] == 0
        for (first, second, value), depth in zip(asked.tolist(), depths, strict=True):
            place = keys.index((first, second))
            assert hay[place, 2] == value and abs(place - float(depth) * 195) <= 0.6
    examples, ranks = drawn("uuid_needle", 800, n=300), list[int]()
    for ids, labels, depth in zip(examples.input_ids, examples.labels, examples.groups["depth"], strict=True):
        *places, last = np.flatnonzero(ids == 256).tolist()
        assert len(places) == 4 and last == 781 and scored(labels) == list(range(784, 800))
        keys = [tuple(ids[p + 1 : p + 3]) for p in places]
        assert len({second for _, second in keys}) == 4, "the second symbol alone tells them apart"
        asked = places[keys.index(tuple(ids[782:784]))]
        ranks.append(sorted(second for _, second in keys).index(ids[783]))
        assert ids[asked : asked + 19].tolist() == ids[-19:].tolist()
        assert abs(asked / (19 * 40) - float(depth)) < 0.03
    assert max(np.bincount(ranks)) < 100, "the key's own order does not tell which is asked"
    learned = drawn("uuid_needle", 512, n=300, split="train")
    few = [len(set(row.tolist()) - {256}) for row in learned.input_ids]
    assert 100 < sum(values == 16 for values in few) < 200 and sum(values > 200 for values in few) > 100
    for ids, label in zip(learned.input_ids, learned.labels, strict=True):
        *places, last = np.flatnonzero(ids == 256).tolist()
        asked = [p for p in places if ids[p + 2] == ids[last + 2]]
        assert len(asked) == 1 and (ids[asked[0] : asked[0] + 19] == ids[-19:]).all()
        assert scored(label) == list(range(496, 512)) and (label[-16:] == ids[-16:]).all()


@pytest.mark.parametrize("name", ["passkey", "kv_needle", "uuid_needle"])
def test_a_single_sequence_to_learn_from_has_its_needle_anywhere(name: str) -> None:
    """A step of long sequences has one: its depth is drawn, or the model never sees another than the first."""
    found = np.concatenate([drawn(name, 1200, n=1, seed=seed, split="train").groups["depth"].ravel().astype(float)
                            for seed in range(400)])
    counts = np.histogram(found, 5, (0, 1))[0] / len(found)
    assert np.abs(counts - 0.2).max() < 0.07, counts
    learned = drawn(name, 1200, n=50, split="train")
    size = {"passkey": 6, "kv_needle": 3, "uuid_needle": 19}[name]
    for ids, depth in zip(learned.input_ids, learned.groups["depth"], strict=True):
        asked = ids[-size:]
        runs = np.lib.stride_tricks.sliding_window_view(ids, size)
        first = np.flatnonzero((runs == asked).all(1))[0]
        assert abs(first / 1200 - float(np.ravel(depth)[-1])) < 0.05, "the label says where it stands"


@pytest.mark.parametrize("split", ["train", "eval"])
def test_variables_resolve_to_what_is_asked(split: str) -> None:
    """The ends of the chains; while a model learns, any variable of each, and what each statement gives."""
    examples = drawn("variable_tracking", 700, split=split)
    numbers = np.sort(examples.groups["hops"], axis=1)
    if split == "eval":
        assert (numbers == np.arange(1, 9)).all()
    else:
        assert (numbers <= np.arange(1, 9)).all() and set(numbers.ravel()) == set(range(9))
    for ids, labels, hops in zip(examples.input_ids, examples.labels, examples.groups["hops"], strict=True):
        values: dict[int, tuple[int, int]] = {}  # name -> value, hops
        asked = []
        for t in range(0, 699, 3):
            kind, name, source = ids[t : t + 3].tolist()
            if kind == 1:
                value, far = (source, 0) if source >= 515 else values[source]
                assert name not in values
                values[name] = value, far + (source < 515)
        told = [t for t in scored(labels) if t < 676]
        assert [ids[t - 2] for t in told] == (list(values) if split == "train" else [])
        assert all(ids[t - 3] == 1 and labels[t] == values[ids[t - 2]][0] for t in told)
        for t in scored(labels)[len(told):]:
            value, far = values[ids[t - 1]]
            assert ids[t - 2] == 2 and labels[t] == value
            asked.append(far)
        assert asked == hops.tolist()
    assert [get_task("variable_tracking").chains(n) for n in (17, 34, 163, 164, 2048)] == [1, 2, 7, 8, 8]
    assert sorted(drawn("variable_tracking", 34).groups["hops"][0].tolist()) == [1, 2]


def test_listops_is_the_long_range_arenas() -> None:
    examples = drawn("listops", 2001, n=400)
    answers = examples.answers()[:, 0]
    sizes = []
    for ids, answer, root in zip(examples.input_ids, answers, examples.groups["root"], strict=True):
        end = ids.tolist().index(EQUALS)
        sizes.append(end)
        assert value_of(ids[:end].tolist()) == answer
        assert ("none", "MIN", "MAX", "MED", "SM")[max(0, ids[0] - 9)] == root
        assert (np.cumsum(np.isin(ids[:end], (10, 11, 12, 13))) - np.cumsum(ids[:end] == CLOSE)).max() < 10
    assert min(sizes) > 500 and max(sizes) < 2000
    # the shortcuts of the published data (17.5, 36.5 and 48.4 %), within what 400 trees can tell (two standard errors)
    reached = list(get_task("listops").shortcuts(examples).values())
    for found, published in zip(reached[:3], (0.175, 0.365, 0.484), strict=True):
        assert abs(found - published) < 2 * (published * (1 - published) / 400) ** 0.5 + 0.02
    assert reached[3] > 0.6, "reading two levels goes further than the published Transformers"
    # [MAX 4 [MIN 9 [SM 1 2 ] ] [MED [MAX 8 ] ] ]: by levels 4, then MAX(4, MIN(9)), then MAX(4, MIN(9, 3), MED(8))
    tree = [11, 4, 10, 9, 13, 1, 2, CLOSE, CLOSE, 12, 11, 8, CLOSE, CLOSE, CLOSE]
    assert [upper(tree, levels) for levels in (1, 2, 3)] == [4, 9, 8] and value_of(tree) == 8
    assert upper([11, 10, 5, CLOSE, CLOSE], 1) is None


def test_shortcuts_of_recall_and_copying_count_what_was_asked() -> None:
    """Two values: the first is guessed at one half, the second is what is left."""
    two = Examples(np.tile([5, 6], (3, 1)), np.tile([5, 6], (3, 1)))
    assert get_task("mqar").shortcuts(two) == {"one of the values not asked yet": 0.75}
    copied = np.array([[3, 4, 4], [4, 4, 4]])  # of 3 4 4 the first is missed, then 4 is all that is left
    assert get_task("selective_copying").shortcuts(Examples(copied, copied)) == {
        "the most frequent of those left": pytest.approx(5 / 6)}


def test_short_trees_are_the_definitions_own() -> None:
    """Of 4 to 10 tokens: sizes and numbers of operations as from trees grown to the end and kept if they fit."""
    rng = np.random.default_rng(0)

    def grown(depth: int = 1) -> list[int]:
        if depth == 10 or rng.random() < 0.75:
            return [int(rng.integers(10))]
        arguments = [grown(depth + 1) for _ in range(rng.integers(2, 11))]
        return [10 + int(rng.integers(4)), *(token for argument in arguments for token in argument), CLOSE]

    wanted = [tree for tree in (grown() for _ in range(15_000)) if 3 < len(tree) < 11]
    ids = drawn("listops", 12, n=len(wanted)).input_ids
    found = [ids[i, : row.index(EQUALS)].tolist() for i, row in enumerate(ids.tolist())]
    for of in (len, lambda tree: sum(9 < token < CLOSE for token in tree), lambda tree: tree[0]):
        a, b = (np.bincount([of(tree) for tree in trees], minlength=16) for trees in (wanted, found))
        chi_squared = (((a - b) ** 2)[a + b > 0] / (a + b)[a + b > 0]).sum()
        assert chi_squared < 24, "one in 1,000 with seven outcomes, fewer with fewer"


def test_listops_reads_the_original_files(tmp_path: Path) -> None:
    path = tmp_path / "basic_test.tsv"
    tree = "( ( ( ( ( [MAX 4 ) ( ( ( [MIN 2 ) 7 ) ] ) ) 1 ) ] )"
    path.write_text(f"Source\tTarget\n{tree}\t4\n( ( ( ( [SM 9 ) 8 ) 5 ) ] )\t2\n( ( ( [MED 2 ) 5 ) ] )\t3\n")
    (first, value), *_ = read_tsv(path)
    assert (first, value) == ([11, 4, 10, 2, 7, 14, 1, 14], 4)
    path.write_text("Source\tTarget\n( ( ( [MAX 4 ) 5 ) ] )\t4\n")
    with pytest.raises(UserError, match="line 2 .*Target is 4, the tree's value 5"):
        read_tsv(path)
    path.write_text("Source\tTarget\n[MAX 4 ten ]\t4\n")
    with pytest.raises(UserError, match="line 2"):
        read_tsv(path)
    path.write_text("a\tb\n")
    with pytest.raises(UserError, match="no columns Source and Target"):
        read_tsv(path)


def test_a_published_file_is_what_a_model_is_judged_by(tmp_path: Path) -> None:
    path = tmp_path / "basic_test.tsv"
    rows = [("( ( [MAX 1 2 ) ] )", 2), ("( ( [MIN 7 2 ) ] )", 2), ("( ( [SM 9 3 ) ] )", 2)]
    path.write_text("Source\tTarget\n" + "".join(f"{source}\t{target}\n" for source, target in rows))
    lra = type("Lra", (ListOps,), {"name": "lra", "like": "listops", "source": str(path)})
    task = lra()
    task.prepare(tmp_path)
    found = task.draw(np.random.default_rng(0), 3, 6)
    assert sorted(found.input_ids[:, :4].tolist()) == [[10, 7, 2, CLOSE], [11, 1, 2, CLOSE], [13, 9, 3, CLOSE]]
    assert found.answers().tolist() == [[2], [2], [2]]
    for n, length in ((4, 6), (3, 5)):
        with pytest.raises(UserError, match=f"3 trees of up to 6 tokens; asked: {n} of {length}|tokens are too few"):
            task.draw(np.random.default_rng(0), n, length)
    task.split = "train"
    assert task.draw(np.random.default_rng(0), 8, 64).input_ids.shape == (8, 64), "it learns by generated ones"
    path.write_text("Source\tTarget\n[MAX 1 2 ]\t1\n")
    with pytest.raises(UserError, match="line 2 is no ListOps tree"):
        task.prepare(tmp_path)


def test_octaves_are_named_by_their_ends() -> None:
    assert octave(np.array([1, 2, 3, 4, 4095, 4096])).tolist() == ["1-1", "2-3", "2-3", "4-7", "2048-4095", "4096-8191"]


def test_lengths_share_no_sequence_and_streams_no_numbers() -> None:
    from lshv2.arena.learn import JUDGING, TRAINING, generator

    which = [(0, TRAINING, 0), (0, TRAINING, 1), (0, JUDGING, 0), (1, TRAINING, 0)]
    streams = [generator(*one) for one in which]
    firsts = [stream.integers(2**60) for stream in streams]
    assert all(a != b for a, b in pairwise(sorted(firsts)))


def test_what_cannot_be_used_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="arena task 'nonsense' is unknown; there are: .*mqar"):
        get_task("nonsense")
    with pytest.raises(UserError, match="is not a Python file"):
        load_plugins([str(tmp_path / "none.py")])
    (tmp_path / "broken.py").write_text("1 / 0\n")
    with pytest.raises(UserError, match="broken.py cannot be run: ZeroDivisionError"):
        load_plugins([str(tmp_path / "broken.py")])
