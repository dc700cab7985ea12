"""Which documents are used, and on which side: seeded, by document, without copies across the split.

Every choice is a hash of (seed, purpose, document name), so it depends neither on the order nor on the number of files.
Left out: near-duplicates. Only documents that are equal byte by byte are dropped.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np

from lshv2.data.corpus import Corpus, character_start
from lshv2.errors import UserError

LOOK_BACK = 1 << 16  # bytes searched for a paragraph's end before a cut, at most


@dataclass(frozen=True)
class Split:
    """Train and eval documents, in seeded order; the counts say what was left out."""

    train: Corpus
    eval: Corpus
    duplicates: int
    beyond_cap: int
    cut: str | None  # the document that was shortened or divided, and how


def split_corpus(corpus: Corpus, *, eval_fraction: float, max_bytes: int | None, seed: int) -> Split:
    """Drop copies, put the documents in seeded order, apply the cap, divide them.

    max_bytes: whole documents in seeded order up to this much text. The one that crosses the cap is left out, or
    cut at a line's end where more than half the cap would go unused (a single large file, for instance).
    A corpus of one document is divided at a paragraph's or line's end into a train head and an eval tail.
    Raises UserError where one side would stay empty.
    """
    first = np.sort(np.unique(corpus.digest, return_index=True)[1])
    kept = corpus.take(first)
    duplicates = len(corpus) - len(kept)
    kept = kept.take(np.argsort(_unit_hashes(kept, seed, "order"), kind="stable"))
    kept, beyond_cap, cut = _cap(kept, max_bytes)
    if len(kept) == 1:
        train, held_out, cut_here = _divide(kept, eval_fraction)
        return Split(train, held_out, duplicates, beyond_cap, "; ".join(filter(None, (cut, cut_here))))
    is_eval = _unit_hashes(kept, seed, "split") < eval_fraction
    if is_eval.all() or not is_eval.any():
        is_eval[:] = False
        is_eval[np.abs(kept.length - eval_fraction * kept.length.sum()).argmin()] = True
    return Split(kept.take(np.flatnonzero(~is_eval)), kept.take(np.flatnonzero(is_eval)), duplicates, beyond_cap, cut)


def _unit_hashes(corpus: Corpus, seed: int, purpose: str) -> np.ndarray:
    """[documents] float64 in [0, 1), a function of (seed, purpose, document name) alone."""
    start = hashlib.blake2b(f"{seed}/{purpose}/".encode(), digest_size=8)
    hashes = np.empty(len(corpus), np.uint64)
    for row in range(len(corpus)):
        one = start.copy()
        one.update(corpus.name(row).encode("utf-8", "surrogateescape"))
        hashes[row] = int.from_bytes(one.digest(), "little")
    return (hashes >> np.uint64(11)) / 2.0**53


def _cap(corpus: Corpus, max_bytes: int | None) -> tuple[Corpus, int, str | None]:
    """(documents up to the cap, how many are beyond it, the cut in words)"""
    ends = np.cumsum(corpus.length)
    if max_bytes is None or ends[-1] <= max_bytes:
        return corpus, 0, None
    whole = int(np.searchsorted(ends, max_bytes, side="right"))
    used = int(ends[whole - 1]) if whole else 0
    kept = corpus.take(np.arange(whole))
    if used >= max_bytes / 2:
        return kept, len(corpus) - whole, None
    end = _boundary(corpus, whole, max_bytes - used)
    if not end:
        raise UserError(f"data.max_bytes={max_bytes} is less than one character of {corpus.name(whole)}: raise it")
    head = corpus.part(whole, 0, end)
    words = f"{corpus.name(whole)}: its first {end} of {corpus.length[whole]} bytes (data.max_bytes)"
    return _join(kept, head), len(corpus) - whole - 1, words


def _divide(corpus: Corpus, eval_fraction: float) -> tuple[Corpus, Corpus, str]:
    length = int(corpus.length[0])
    cut = _boundary(corpus, 0, max(1, int(length * (1 - eval_fraction))))
    if not 0 < cut < length:
        raise UserError(f"{corpus.name(0)} is the only document and its {length} byte(s) cannot be divided: add text")
    words = f"{corpus.name(0)}: the only document: its first {cut} bytes are train, its last {length - cut} eval"
    return corpus.part(0, 0, cut), corpus.part(0, cut, length), words


def _boundary(corpus: Corpus, row: int, limit: int) -> int:
    """The last paragraph's end, else line's end, else character's end at or a little before byte `limit` of a text."""
    low = limit - min(LOOK_BACK, max(4, limit // 10), limit)
    block = corpus.text(row, low, limit + 1)
    head = block[: limit - low]
    for end in (b"\n\n", b"\n"):
        if end in head:
            return low + head.rfind(end) + len(end)
    return low + character_start(block, len(block) - 1)


def _join(first: Corpus, second: Corpus) -> Corpus:
    columns = ("file", "line", "start", "size", "skip", "length", "digest")
    joined = {name: np.concatenate([getattr(first, name), getattr(second, name)]) for name in columns}
    return Corpus(first.sources, **joined, skipped=first.skipped)
