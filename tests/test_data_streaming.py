"""The stream: what each reader reads, on which side of the split, in which order."""

import itertools
import json
import shutil

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from streams import SEQ, TEXTS, find, first_pass, make, one_reader, take, text_of, token_stream, write_shards

from lshv2.data.corpus import PIECE, find_files
from lshv2.data.packing import write_stream
from lshv2.data.scan import scan
from lshv2.data.shards import Position, share
from lshv2.data.tokenizer import decode, read_tokenizer


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(source, the path of a tokenizer)"""
    return make(tmp_path_factory.mktemp("stream"))


# What is read


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".txt"])
def test_the_tokens_are_those_that_packing_would_write(tmp_path, made, suffix):
    """Documents of several pieces included, their ends, and whole files as well as lines."""
    long = ["é" * PIECE + "\n" + "line\n" * 30_000, "short", "a" * (2 * PIECE)]
    texts = long[:1] if suffix == ".txt" else [*long, *TEXTS]
    (tmp_path / "plain").mkdir()
    if suffix == ".txt":
        (tmp_path / "plain/a.txt").write_text(texts[0])
        source = str(tmp_path / "plain/a.txt")
    else:
        write_shards(tmp_path / "plain", texts, 1)
        source = write_shards(tmp_path / "streamed", texts, 1, suffix)
    n = write_stream(tmp_path / "a.bin", scan(find_files(str(tmp_path / "plain"))), read_tokenizer(made[1]))
    reader = one_reader(source, made[1], seq_length=1000)
    windows = [window for _, window in itertools.islice(reader.windows(0, Position()), n // 1000)]
    assert np.array_equal(np.concatenate(windows), np.fromfile(tmp_path / "a.bin", "<u2")[: n // 1000 * 1000])


def test_batches_have_the_shape_and_the_labels_of_prepared_data(made):
    stream = token_stream(made)
    ids, labels = next(stream.batches(3))
    assert ids.shape == (3, SEQ) and ids.dtype == torch.int64 and torch.equal(ids, labels) and len(stream) == 100


@given(n_shards=st.integers(1, 60), parts=st.integers(1, 40))
def test_every_document_belongs_to_exactly_one_reader(n_shards, parts):
    shares = [share(n_shards, part, parts) for part in range(parts)]
    for shard in range(n_shards):
        readers = [(number, of) for own in shares for s, number, of in own if s == shard]
        assert sorted(readers) == [(number, len(readers)) for number in range(len(readers))], (shard, readers)
    weights = [sum(1 / of for _, _, of in own) for own in shares]
    assert max(weights) - min(weights) < 1 and all(sum(of > 1 for _, _, of in own) <= 1 for own in shares)


@pytest.mark.parametrize(("n_shards", "parts"), [(1, 6), (2, 3), (5, 2), (7, 3), (3, 3)])
def test_the_readers_together_read_every_document_once_a_pass(tmp_path, n_shards, parts):
    shards = find(write_shards(tmp_path / "s", TEXTS, n_shards))
    read = [text_of(d) for part in range(parts) for d in first_pass(shards.documents(part=part, parts=parts))]
    assert sorted(read) == sorted(TEXTS)


def test_every_rank_has_batches_without_end(tmp_path, made):
    """Even where one rank has 19 times the text: it is only in an earlier pass."""
    source = write_shards(tmp_path / "s", TEXTS[:2], 2)
    (tmp_path / "s/001.jsonl").write_text("\n".join(json.dumps(text) for text in TEXTS[:40]))
    states = [json.loads(take(token_stream((source, made[1]), rank=rank, ranks=2, eval_fraction=0.0), 40)[-1][1])
              for rank in (0, 1)]
    assert [state["batches"] for state in states] == [40, 40]
    assert states[0]["places"][0][0][0] > states[1]["places"][0][0][0] > 0  # passes


# Held-out documents


@pytest.mark.parametrize("seed", [0, 1])
def test_held_out_documents_never_reach_training(made, seed):
    shards = find(made[0], eval_fraction=0.2, seed=seed)
    held_out = {text_of(d) for d in first_pass(shards.documents(held_out=True))}
    train = {text_of(d) for part in range(3) for d in first_pass(shards.documents(part=part, parts=3, held_out=False))}
    assert held_out | train == set(TEXTS) and not held_out & train
    assert 20 <= len(held_out) <= 60, f"{len(held_out)} of 200 where 40 are due: 3.5 standard deviations are 20"
    stream = token_stream(made, workers=0, buffer=3, eval_fraction=0.2, seed=seed)
    tokenizer = read_tokenizer(made[1])
    seen = "".join(decode(tokenizer, row) + "\n" for ids, _ in take(stream, 250, 2) for row in ids)
    numbers = [{text.split(">")[0] + ">" for text in texts} for texts in (train, held_out)]
    assert sum(n in seen for n in numbers[0]) > 0.9 * len(train), "the marks of documents are to be seen at all"
    assert not [n for n in numbers[1] if n in seen]


def test_copies_of_a_document_are_on_one_side(tmp_path):
    write_shards(tmp_path / "s", TEXTS, 3)
    write_shards(tmp_path / "s", TEXTS[::-1], 2, ".copy.jsonl")
    shards = find(str(tmp_path / "s"), eval_fraction=0.3)
    sides = [sorted(text_of(d) for d in first_pass(shards.documents(held_out=side))) for side in (True, False)]
    assert not set(sides[0]) & set(sides[1]) and sides[0][::2] == sides[0][1::2] and len(sides[0] + sides[1]) == 400


# Order


def test_shuffling_moves_windows_within_blocks_and_loses_none(made):
    reader = one_reader(*made)
    plain = [window.tobytes() for _, window in itertools.islice(reader.windows(0, Position()), 300)]
    mixed = [window.tobytes() for window, _ in itertools.islice(reader.shuffled(0), 7 * 42)]
    at, orders = 0, []
    for size in (1, 2, 4, *[7] * 41):
        came, left = plain[at : at + size], mixed[at : at + size]
        assert sorted(came) == sorted(left), f"block at {at}"
        orders.append(tuple(came.index(window) for window in left))
        at += size
    assert len(set(orders[3:])) > 35, "41 draws of 5,040 orders"
    again, other = (
        [w.tobytes() for w, _ in itertools.islice(one_reader(*made, seed=s).shuffled(0), 50)] for s in (0, 1)
    )
    assert again == mixed[:50] != other


def test_each_pass_takes_the_shards_in_another_order(made):
    documents = itertools.islice(find(made[0]).documents(), 5 * len(TEXTS))
    orders = [list(dict.fromkeys(d.name.split(": ")[0] for d in group))
              for _, group in itertools.groupby(documents, key=lambda d: d.position.epoch)]
    assert len(orders) == 5 and len({tuple(order) for order in orders}) > 1
    assert all(sorted(order) == sorted(orders[0]) and len(order) == 5 for order in orders)


def test_a_glob_names_its_matches_wherever_they_lie(tmp_path):
    write_shards(tmp_path / "a", TEXTS, 2)
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    (tmp_path / "b/notes.doc").write_text("not read")
    assert find(str(tmp_path / "*/0*.jsonl")).names == ("a/000.jsonl", "a/001.jsonl", "b/000.jsonl", "b/001.jsonl")
    assert find(str(tmp_path / "**/*")).names == find(str(tmp_path / "*/*")).names
