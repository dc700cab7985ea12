"""Synthetic sequences have certain answers, and files of them are read record by record."""

import json

import numpy as np
import pytest
import torch

from lshv2.data.jsonl import JsonlDataset
from lshv2.data.synthetic import chance, copy, generator_for, needle, recall, write_synthetic
from lshv2.errors import UserError
from lshv2.presets import make_settings

SIZE = {"seq_length": 64, "vocab_size": 64}
SHAPES = {"recall": {**SIZE, "n_pairs": 6}, "copy": SIZE, "needle": SIZE}
MAKERS = {"recall": recall, "copy": copy, "needle": needle}


def make(task, n=300, split="train", seed=0, **shape):
    return MAKERS[task](generator_for(seed, task, split), n, **(SHAPES[task] | shape))


def answer_by_lookup(tokens, t):
    """What followed the token before t, the last time it was seen."""
    earlier = [s for s in range(t - 1) if tokens[s] == tokens[t - 1]]
    return tokens[earlier[-1] + 1]


ORACLES = {
    "recall": answer_by_lookup,
    "copy": lambda tokens, t: tokens[t - len(tokens) // 2],
    "needle": answer_by_lookup,
}


@pytest.mark.parametrize("task", MAKERS)
def test_the_sequence_alone_decides_every_answer(task):
    batch = make(task)
    scored = 0
    for tokens, labels in zip(batch["input_ids"], batch["labels"], strict=True):
        for t in np.flatnonzero(labels != -100):
            assert ORACLES[task](tokens[:t].tolist() + [None] * (len(tokens) - t), t) == labels[t] == tokens[t]
            scored += 1
    assert scored == 300 * {"recall": 6, "copy": 31, "needle": 1}[task]


@pytest.mark.parametrize(("n_pairs", "seq_length", "vocab_size"), [(6, 64, 64), (2, 8, 8), (3, 13, 9), (31, 124, 64)])
def test_recall_is_laid_out_as_documented(n_pairs, seq_length, vocab_size):
    batch = make("recall", n_pairs=n_pairs, seq_length=seq_length, vocab_size=vocab_size)
    half, start = vocab_size // 2, 2 * n_pairs
    for tokens, labels, gaps in zip(*batch.values(), strict=True):
        keys, values = tokens[0:start:2], tokens[1:start:2]
        assert len(set(keys)) == len(set(values)) == len(set(gaps)) == n_pairs
        assert keys.min() >= 1 and keys.max() < half <= values.min() and values.max() < vocab_size
        assert gaps.min() >= 0 and start + 2 * gaps.max() + 1 < seq_length
        assert (tokens[start + 2 * gaps] == keys).all() and (tokens[start + 2 * gaps + 1] == values).all()
        expected = np.full(seq_length, -100)
        expected[start + 2 * gaps + 1] = values
        assert (labels == expected).all()
        filler = np.ones(seq_length, bool)
        filler[:start] = False
        filler[start + 2 * gaps] = filler[start + 2 * gaps + 1] = False
        assert not np.isin(tokens[filler], keys).any()


def test_recall_filler_is_uniform_over_the_other_ids():
    batch = make("recall", n=4000)
    counts = np.bincount(batch["input_ids"][:, -1][batch["labels"][:, -1] == -100], minlength=64)
    assert (counts > 0).all() and counts.max() < 2 * counts.mean()


def test_recall_gaps_follow_the_power_law():
    """The gap of the first draw is P(g) ∝ (g + 1)^-0.99 exactly; 26 slots, 20,000 draws."""
    first = make("recall", n=20_000)["gaps"][:, 0]
    expected = np.arange(1, 27) ** -0.99
    expected /= expected.sum()
    observed = np.bincount(first, minlength=26) / len(first)
    assert np.abs(observed - expected).max() < 0.012, (observed, expected)


def test_copy_is_laid_out_as_documented():
    batch = make("copy")
    first, second = batch["input_ids"][:, :32], batch["input_ids"][:, 32:]
    assert (first == second).all() and (first[:, 0] == 0).all() and first[:, 1:].min() == 1 and first.max() == 63
    assert (batch["labels"][:, :33] == -100).all() and (batch["labels"][:, 33:] == first[:, 1:]).all()


def test_needles_lie_at_their_depth_and_nowhere_else():
    batch = make("needle")
    for tokens, depth in zip(batch["input_ids"], batch["depth"], strict=True):
        assert np.flatnonzero(tokens == tokens[-2]).tolist() == [round(depth * 60), 62]
        assert 1 <= tokens[-2] < 32 <= tokens[-1] < 64
    assert sorted(set(batch["depth"])) == pytest.approx(np.arange(10) / 9)


@pytest.mark.parametrize("task", MAKERS)
def test_train_and_eval_share_no_sequence_and_the_seed_decides(task):
    rows = lambda **how: {tuple(row) for row in make(task, **how)["input_ids"].tolist()}  # noqa: E731
    train = rows()
    assert len(train) == 300 and not train & rows(split="eval") and not train & rows(seed=1)
    assert train == rows()


def test_tasks_have_streams_of_their_own():
    draws = {generator_for(seed, task, split).integers(2**62)
             for seed in range(20) for task in MAKERS for split in ("train", "eval")}
    assert len(draws) == 120


def test_chance_is_what_guessing_reaches():
    assert chance("recall", 8192) == 1 / 4096 and chance("needle", 9) == 1 / 5 and chance("copy", 9) == 1 / 8
    generator = np.random.default_rng(0)
    batch = make("recall", n=20_000)
    answers = batch["labels"][batch["labels"] != -100]
    guessed = (generator.integers(32, 64, len(answers)) == answers).mean()
    assert guessed == pytest.approx(chance("recall", 64), rel=0.05)


@pytest.mark.parametrize(
    ("task", "shape"),
    [("recall", {"n_pairs": 17}), ("recall", {"vocab_size": 12}), ("copy", {"seq_length": 63}),
     ("copy", {"seq_length": 2}), ("needle", {"seq_length": 3})],
)
def test_impossible_shapes_are_named(task, shape):
    with pytest.raises(UserError, match="seq_length|n_pairs"):
        make(task, n=1, **shape)


def test_files_hold_what_the_settings_ask_for(tmp_path):
    settings = make_settings("test", seed=5)
    write_synthetic(tmp_path / "a", settings)
    write_synthetic(tmp_path / "b", settings)
    sizes = {"recall_train": 32, "recall_eval": 8, "copy_train": 4, "copy_eval": 2, "needle_train": 4, "needle_eval": 2}
    assert sorted(path.stem for path in (tmp_path / "a").iterdir()) == sorted(sizes)
    for name, size in sizes.items():
        path = tmp_path / "a" / f"{name}.jsonl"
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()
        dataset = JsonlDataset(path, vocab_size=32)
        assert len(dataset) == size
        assert [dataset.record(i) for i in range(size)] == [json.loads(line) for line in path.read_text().splitlines()]
        ids, labels = dataset[size - 1]
        assert ids.dtype == labels.dtype == torch.int64 and len(ids) == (32 if "recall" in name else 64)
        assert ids.tolist() == dataset.record(size - 1)["input_ids"]
    assert {"task", "gaps"} < JsonlDataset(tmp_path / "a/recall_eval.jsonl", 32).record(0).keys()


GOOD = '{"input_ids": [1, 2, 3], "labels": [-100, 2, 3]}'


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"input_ids": [1, 2', "broken JSON"),
        ("[1, 2, 3]", "not an object"),
        ('{"input_ids": [1, 2, 3]}', "not an object with"),
        ('{"input_ids": [1, 2], "labels": [1]}', "of one length"),
        ('{"input_ids": [], "labels": []}', "lists of integers"),
        ('{"input_ids": [1, 2.5], "labels": [1, 2]}', "lists of integers"),
        ('{"input_ids": ["a"], "labels": [1]}', "lists of integers"),
        ('{"input_ids": [[1]], "labels": [[1]]}', "lists of integers"),
        ('{"input_ids": [1, 32], "labels": [1, 2]}', "input_ids holds 32, outside the vocabulary of 32"),
        ('{"input_ids": [1, -1], "labels": [1, 2]}', "input_ids holds -1, outside"),
        ('{"input_ids": [1, 2], "labels": [1, -99]}', "labels holds -99, outside"),
        ('{"input_ids": [1, 99999999999999999999999], "labels": [1, 2]}', "lists of integers"),
        (b'{"input_ids": "\xff"}', "byte 15 is not UTF-8"),
    ],
)
def test_a_broken_record_is_named_with_file_and_line(tmp_path, line, message):
    path = tmp_path / "rows.jsonl"
    line = line if isinstance(line, bytes) else line.encode()
    path.write_bytes(b"\n".join([GOOD.encode(), b"", line, GOOD.encode()]))
    with pytest.raises(UserError, match=rf"rows\.jsonl: line 3: .*{message}") as caught:
        JsonlDataset(path, vocab_size=32)
    assert "\n" not in str(caught.value)


def test_blank_lines_between_records_are_passed_over(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(f"\n{GOOD}\n\n  \n" + GOOD.replace("3", "4"))
    dataset = JsonlDataset(path, vocab_size=32)
    assert [dataset[i][0].tolist() for i in range(len(dataset))] == [[1, 2, 3], [1, 2, 4]]


def test_a_missing_or_empty_file_is_named(tmp_path):
    with pytest.raises(UserError, match="none.jsonl cannot be read"):
        JsonlDataset(tmp_path / "none.jsonl", 32)
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(UserError, match="empty.jsonl holds no record"):
        JsonlDataset(tmp_path / "empty.jsonl", 32)
