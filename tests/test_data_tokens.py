"""Tokenizer and packed streams: exact round trips, disjoint windows, resumable order, broken files named."""

import os
import pickle
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lshv2.data.corpus import find_files
from lshv2.data.packing import (
    PackedDataset,
    docs_path,
    epoch_order,
    read_stream,
    token_dtype,
    window_starts,
    write_stream,
)
from lshv2.data.scan import scan
from lshv2.data.tokenizer import bytes_per_token, decode, encode, read_tokenizer, train_tokenizer
from lshv2.errors import UserError

SAMPLE = ["def add(a, b):\n    return a + b\n" * 20, "The café serves naïve 日本 text.\r\n\t\t" * 20]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    train_tokenizer(SAMPLE, 400).save(str(path))
    return read_tokenizer(path)


def ids_of(tokenizer, text):
    return next(encode(tokenizer, [text]))


@settings(max_examples=300, deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"])) | st.text(" \t\r\n\u00a0<|endoftext|>'s\U0001f600\u0301"))
def test_any_text_comes_back_exactly(tokenizer, text):
    ids = ids_of(tokenizer, text)
    assert decode(tokenizer, ids) == text
    assert bytes_per_token(tokenizer)[ids].sum() == len(text.encode())


def test_the_special_token_spelled_out_is_text(tokenizer):
    text = "before <|endoftext|> after"
    ids = ids_of(tokenizer, text)
    assert 0 not in ids and decode(tokenizer, ids) == text
    assert tokenizer.token_to_id("<|endoftext|>") == 0 and bytes_per_token(tokenizer)[0] == 0


def test_every_byte_has_a_token(tokenizer):
    lengths = bytes_per_token(tokenizer)
    assert (lengths == 1).sum() == 256 and lengths.min() == 0 and (lengths == 0).sum() == 1


def test_training_is_deterministic():
    assert train_tokenizer(SAMPLE, 400).to_str() == train_tokenizer(SAMPLE, 400).to_str()


def test_a_small_text_gives_a_smaller_vocabulary():
    assert train_tokenizer(["aa"], 32_000).get_vocab_size() == 258


def test_too_small_a_vocabulary_is_refused():
    with pytest.raises(UserError, match=r"model.vocab_size=256 is too small.*at least 257"):
        train_tokenizer(SAMPLE, 256)
    assert train_tokenizer(SAMPLE, 257).get_vocab_size() == 257


@pytest.mark.parametrize("content", ["{", "{}", None])
def test_a_broken_tokenizer_file_is_named(tmp_path, content):
    path = tmp_path / "tokenizer.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError, match="tokenizer.json is (broken|missing)"):
        read_tokenizer(path)


def test_a_forked_process_can_encode(tokenizer):
    """With the library's threads left on after a parallel batch, the child would wait for ever."""
    list(encode(tokenizer, ["some text"] * 500))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # forking with threads about is what is tried here
        child = os.fork()
    if not child:
        import signal

        signal.alarm(10)
        tokenizer.encode_batch(["some text"] * 500)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0


@pytest.fixture
def stream(tmp_path, tokenizer):
    """Forty documents packed: (path, corpus, vocabulary)."""
    for i in range(40):
        (tmp_path / f"{i:02}.txt").write_text(f"document {i} <|endoftext|> {'word ' * (i * 7 + 1)}")
    corpus = scan(find_files(str(tmp_path)))
    path = tmp_path / "train.bin"
    assert write_stream(path, corpus, tokenizer) * 2 == path.stat().st_size
    return path, corpus, tokenizer.get_vocab_size()


def test_documents_lie_in_the_stream_each_followed_by_its_end(stream, tokenizer, monkeypatch):
    path, corpus, vocab_size = stream
    tokens, starts = read_stream(path, vocab_size), np.load(docs_path(path))
    for row in range(len(corpus)):
        document = tokens[starts[row] : starts[row + 1]]
        assert decode(tokenizer, document) == "".join(corpus.pieces(row)) + "<|endoftext|>"
        assert (document == 0).sum() == 1 and document[-1] == 0
    before = path.read_bytes()
    monkeypatch.setattr("lshv2.data.packing.BATCH_BYTES", 50)
    write_stream(path, corpus, tokenizer)
    assert path.read_bytes() == before, "the size of a batch changed the stream"


@pytest.mark.parametrize(("vocab_size", "dtype"), [(65_536, "<u2"), (65_537, "<u4")])
def test_ids_are_stored_in_as_few_bytes_as_they_need(vocab_size, dtype):
    assert token_dtype(vocab_size) == np.dtype(dtype)


@settings(max_examples=200, deadline=None)
@given(n_tokens=st.integers(1, 400), seq_length=st.integers(1, 40), n=st.integers(1, 60), seed=st.integers(0, 9))
def test_windows_are_disjoint_and_inside(n_tokens, seq_length, n, seed):
    for split in ("train", "eval"):
        if n_tokens < seq_length:
            with pytest.raises(UserError, match=f"holds {n_tokens} tokens.*train.seq_length={seq_length}"):
                window_starts("x.bin", n_tokens, seq_length, n, seed, split)
            continue
        starts, passes = window_starts("x.bin", n_tokens, seq_length, n, seed, split)
        assert starts.min() >= 0 and starts.max() + seq_length <= n_tokens
        room = n_tokens // seq_length
        assert len(starts) == (n if split == "train" else min(n, room))
        assert passes == 1 or n > room
        first = np.sort(starts[:room])
        assert (np.diff(first) >= seq_length).all()
        if passes == 1 and len(starts) > 1 and split == "eval":
            assert starts[0] == 0 and starts[-1] == n_tokens - seq_length and np.ptp(np.diff(starts)) <= 1


def test_rereading_starts_elsewhere():
    starts, passes = window_starts("x.bin", 1000, 100, 35, seed=0, split="train")
    assert passes >= 4 and len({int(start) % 100 for start in starts}) == passes


def test_a_dataset_is_a_function_of_its_seed(stream):
    path, _, vocab_size = stream
    make = lambda seed: PackedDataset(  # noqa: E731
        path, vocab_size=vocab_size, seq_length=32, n_sequences=20, seed=seed, split="train"
    )
    one, same, other = make(0), make(0), make(1)
    tokens = np.fromfile(path, "<u2")
    for i in range(len(one)):
        ids, labels = one[i]
        assert ids.dtype == torch.int64 and ids.shape == (32,) and torch.equal(ids, labels)
        assert torch.equal(ids, same[i][0])
        assert (ids.numpy() == tokens[one.starts[i] : one.starts[i] + 32]).all()
    assert (one.starts != other.starts).any()


def test_a_dataset_travels_to_a_worker_without_its_tokens(stream):
    path, _, vocab_size = stream
    dataset = PackedDataset(path, vocab_size=vocab_size, seq_length=8, n_sequences=5, seed=0, split="train")
    sent = pickle.dumps(dataset)
    assert len(sent) < 2000 < path.stat().st_size
    assert torch.equal(pickle.loads(sent)[3][0], dataset[3][0])


def test_the_order_is_resumable_from_epoch_and_index():
    whole = [epoch_order(100, epoch, seed=3) for epoch in range(3)]
    assert (epoch_order(100, 2, seed=3)[41:] == whole[2][41:]).all()
    assert all(sorted(order) == list(range(100)) for order in whole)
    assert (whole[0] != whole[1]).any() and (whole[0] != epoch_order(100, 0, seed=4)).any()


def corrupt_odd(path):
    with open(path, "ab") as file:
        file.write(b"\0")


def corrupt_truncated(path):
    os.truncate(path, path.stat().st_size - 20)


def corrupt_id(path):
    tokens = np.memmap(path, "<u2", mode="r+")
    tokens[77] = 60_000


def corrupt_docs(path):
    docs_path(path).write_bytes(b"\x93NUMPY")


@pytest.mark.parametrize(
    ("corrupt", "message"),
    [
        (corrupt_odd, r"train\.bin has \d+ bytes where \d+ tokens"),
        (corrupt_truncated, r"train\.bin has \d+ bytes where \d+ tokens"),
        (corrupt_id, r"train\.bin: token 77 \(byte 154\) is 60000, outside the vocabulary of"),
        (corrupt_docs, r"train_docs\.npy is broken"),
        (lambda path: path.unlink(), r"train\.bin is missing"),
        (lambda path: docs_path(path).unlink(), r"train_docs\.npy is missing"),
    ],
)
def test_a_broken_stream_is_named(stream, corrupt, message):
    path, _, vocab_size = stream
    corrupt(path)
    with pytest.raises(UserError, match=message) as caught:
        PackedDataset(path, vocab_size=vocab_size, seq_length=8, n_sequences=5, seed=0, split="train")
    assert "\n" not in str(caught.value) and "run phase 02_data" in str(caught.value)
