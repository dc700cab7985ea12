"""Byte-level BPE: any text in, the same bytes out.

    tokenizer = train_tokenizer(texts, vocab_size=2048)
    ids = next(encode(tokenizer, ["def f():"]))

Id 0 is the one special token, `<|endoftext|>`, which follows every document in the packed streams; the 256 bytes come
next, then the merges. Text that spells `<|endoftext|>` out is encoded as those characters, never as the special token.
A small text may run out of pairs to merge: the vocabulary is then smaller than asked.

Left out: normalisation and prefix spaces, which lose bytes.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from lshv2.errors import UserError

END_OF_TEXT = "<|endoftext|>"
END_OF_TEXT_ID = 0
MIN_VOCAB = 257
SAMPLE_PER_ENTRY = 4_000  # bytes of train text to learn from, for each entry of the vocabulary
THREADS_ENV = "TOKENIZERS_PARALLELISM"


@contextmanager
def _threads(wanted: str = "true") -> Iterator[None]:
    """All cores inside, none after: a fork (a DataLoader's worker) that encodes with threads on would hang forever."""
    before = os.environ.get(THREADS_ENV)
    os.environ[THREADS_ENV] = wanted
    try:
        yield
    finally:
        os.environ[THREADS_ENV] = before or "false"


def check_vocab_size(vocab_size: int) -> None:
    if vocab_size < MIN_VOCAB:
        raise UserError(
            f"model.vocab_size={vocab_size} is too small: 256 bytes and {END_OF_TEXT} need at least {MIN_VOCAB}"
        )


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """A tokenizer of at most vocab_size entries. Deterministic: the same texts give the same file."""
    check_vocab_size(vocab_size)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.encode_special_tokens = True
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[END_OF_TEXT], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    with _threads():
        tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def read_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer in a tokenizer.json; raises UserError where it is missing or broken."""
    if not path.is_file():
        raise UserError(f"{path} is missing: run phase 02_data first")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises plain Exception
        raise UserError(f"{path} is broken ({str(error)[:80]}): run phase 02_data again (FORCE=1)") from None
    tokenizer.encode_special_tokens = True  # not kept in the file
    return tokenizer


def encode(tokenizer: Tokenizer, texts: list[str]) -> Iterator[list[int]]:
    """Token ids of each text in turn, computed on all cores."""
    with _threads():
        encoded = tokenizer.encode_batch_fast(texts, add_special_tokens=False)
    return (text.ids for text in encoded)  # a list of integers takes ten times the text: one at a time


def encode_here(tokenizer: Tokenizer, text: str) -> list[int]:
    """Token ids of one text, computed on this core alone: for a DataLoader's worker."""
    with _threads("false"):
        return tokenizer.encode_batch_fast([text], add_special_tokens=False)[0].ids


def decode(tokenizer: Tokenizer, ids: Iterable[int]) -> str:
    """The text of these ids, `<|endoftext|>` included as its name."""
    return tokenizer.decode([int(i) for i in ids], skip_special_tokens=False)


def bytes_per_token(tokenizer: Tokenizer) -> np.ndarray:
    """int32 [vocab]: bytes of text that each id stands for; 0 for `<|endoftext|>`, which is no text.

    Bits per byte = nats of the scored targets / ln 2 / sum of their bytes. Predicting where a document ends thus costs
    bits and earns no bytes: that can only raise a model's figure, never flatter it.
    """
    lengths = np.zeros(tokenizer.get_vocab_size(), np.int32)
    for token, index in tokenizer.get_vocab().items():
        lengths[index] = 0 if token == END_OF_TEXT else len(token)  # one character stands for one byte
    return lengths
