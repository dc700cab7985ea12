"""Token streams on disk, and fixed-length windows into them.

`<split>.bin` holds the documents of one split, each followed by `<|endoftext|>`, as little-endian uint16 (uint32 above
65,536 entries). `<split>_docs.npy` holds where each document starts, int64 [documents + 1]; its last entry is the
number of tokens. Both are memory-mapped: opening costs a scan, never a copy.

    dataset = PackedDataset(path, vocab_size=2048, seq_length=512, n_sequences=2000, seed=0, split="train")
    order = epoch_order(len(dataset), epoch=0, seed=0)
    input_ids, labels = dataset[order[17]]      # (epoch, 17) is all that a resume needs

Left out: padding, and windows that stop at document ends. A window may hold several documents.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from tokenizers import Tokenizer

from lshv2.data.corpus import Corpus
from lshv2.data.tokenizer import END_OF_TEXT_ID, encode
from lshv2.errors import UserError

BATCH_BYTES = 1 << 21  # text encoded at a time
SCAN = 1 << 22  # tokens checked at a time


def token_dtype(vocab_size: int) -> np.dtype:
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")


def docs_path(path: Path) -> Path:
    return path.with_name(f"{path.stem}_docs.npy")


def write_stream(
    path: Path, corpus: Corpus, tokenizer: Tokenizer, on_bytes: Callable[[int], None] = lambda n: None
) -> int:
    """Encode every document of the corpus into `path` and its `_docs.npy`; returns the number of tokens.

    on_bytes: called with the number of bytes of text just encoded.
    """
    dtype = token_dtype(tokenizer.get_vocab_size())
    starts = np.zeros(len(corpus) + 1, np.int64)
    total = documents = 0
    with open(path, "wb") as file:
        for texts in _batches(corpus):
            for text, ids in zip(texts, encode(tokenizer, texts), strict=True):
                tokens = np.array(ids if text else [END_OF_TEXT_ID], dtype)
                file.write(tokens.tobytes())
                total += len(tokens)
                if not text:
                    documents += 1
                    starts[documents] = total
            on_bytes(sum(len(text.encode()) for text in texts))
    np.save(docs_path(path), starts)
    return total


def _batches(corpus: Corpus) -> Iterator[list[str]]:
    """Pieces of the documents, about 2 MB at a time; an empty string ends each document."""
    texts: list[str] = []
    held = 0
    for row in range(len(corpus)):
        for text in itertools.chain(corpus.pieces(row), [""]):
            texts.append(text)
            held += len(text)
            if held >= BATCH_BYTES:
                yield texts
                texts, held = [], 0
    if texts:
        yield texts


def read_stream(path: Path, vocab_size: int) -> np.memmap:
    """The tokens of a stream [tokens], checked against its `_docs.npy` and the vocabulary. Raises UserError."""
    remedy = "run phase 02_data again (FORCE=1)"
    for part in (path, docs_path(path)):
        if not part.is_file():
            raise UserError(f"{part} is missing: {remedy}")
    dtype, size = token_dtype(vocab_size), path.stat().st_size
    try:
        expected = int(np.load(docs_path(path), mmap_mode="r")[-1])
    except (ValueError, IndexError, EOFError) as error:
        raise UserError(f"{docs_path(path)} is broken ({str(error)[:60]}): {remedy}") from None
    if size != expected * dtype.itemsize or not expected:
        raise UserError(
            f"{path} has {size} bytes where {expected} tokens of {dtype.itemsize} bytes are due "
            f"(byte {min(size, expected * dtype.itemsize)}): truncated or overwritten; {remedy}"
        )
    tokens = np.memmap(path, dtype, mode="r")
    for start in range(0, len(tokens), SCAN):
        wrong = np.flatnonzero(tokens[start : start + SCAN] >= vocab_size)
        if len(wrong):
            at = start + int(wrong[0])
            raise UserError(
                f"{path}: token {at} (byte {at * dtype.itemsize}) is {tokens[at]}, outside the vocabulary of "
                f"{vocab_size}: {remedy}"
            )
    return tokens


class PackedDataset(torch.utils.data.Dataset):
    """Windows of seq_length tokens: `dataset[i]` is (input_ids, labels), the same LongTensor [seq_length] twice,
    since the model shifts labels itself.

    split="train": exactly n_sequences windows. Within one pass over the stream they are disjoint, in seeded order;
    where the stream is too short for that, further passes start at other, seeded offsets (`passes`: how many).
    split="eval": at most n_sequences disjoint windows, evenly spread over the stream, as many as it holds.
    vocab_size: the tokenizer's real size, which the ids are checked against.
    Raises UserError where the stream is shorter than one window, or missing, truncated or out of range.
    """

    def __init__(
        self, path: Path, *, vocab_size: int, seq_length: int, n_sequences: int, seed: int,
        split: Literal["train", "eval"],
    ) -> None:
        self.path, self.vocab_size, self.seq_length = Path(path), vocab_size, seq_length
        self.tokens = read_stream(self.path, vocab_size)
        self.starts, self.passes = window_starts(self.path, len(self.tokens), seq_length, n_sequences, seed, split)

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        start = self.starts[index]
        window = torch.from_numpy(self.tokens[start : start + self.seq_length].astype(np.int64))
        return window, window

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "tokens": None}  # a pickled memmap would carry the whole file to each worker

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.tokens = np.memmap(self.path, token_dtype(self.vocab_size), mode="r")


def window_starts(
    path: Path, n_tokens: int, seq_length: int, n_sequences: int, seed: int, split: Literal["train", "eval"]
) -> tuple[np.ndarray, int]:
    """(first token of each window int64 [windows], passes over the stream); path is for the message."""
    if n_tokens < seq_length:
        raise UserError(
            f"{path} holds {n_tokens} tokens, less than one window of train.seq_length={seq_length}: "
            f"{SHORT[split]}, or lower train.seq_length"
        )
    room = n_tokens - seq_length
    if split == "eval":
        n = min(n_sequences, n_tokens // seq_length)
        return np.arange(n) * room // max(n - 1, 1), 1
    generator = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(0,)))
    passes: list[np.ndarray] = []
    while (missing := n_sequences - sum(map(len, passes))) > 0:
        slack = n_tokens % seq_length if not passes else min(seq_length - 1, room)  # the first pass keeps every window
        offset = int(generator.integers(slack + 1))
        n = (n_tokens - offset) // seq_length
        passes.append(offset + seq_length * generator.permutation(n)[:missing])
    return np.concatenate(passes), len(passes)


SHORT = {
    "train": "give more text by DATA=, or raise data.max_bytes",
    "eval": "give more text by DATA=, raise data.eval_fraction or data.max_bytes, or try another SEED",
}


def epoch_order(n: int, epoch: int, seed: int) -> np.ndarray:
    """The order of one epoch, int64 [n]: a permutation that (n, epoch, seed) alone decide."""
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(1, epoch))).permutation(n)
