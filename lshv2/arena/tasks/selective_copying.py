"""Selective copying (Jing et al. 2019; Gu & Dao 2023): the few tokens that count, in order, out of blanks.

    . . b . . a . . . b . | b a b        dots: blanks; bar: the marker; scored: what follows it
"""

from __future__ import annotations

import numpy as np

from lshv2.arena.task import ArenaTask, Examples, fits, most_common, register
from lshv2.data.jsonl import IGNORED

BLANK, MARKER, FIRST, SYMBOLS = 0, 1, 2, 16


@register
class SelectiveCopying(ArenaTask):
    """16 tokens out of 16 symbols, at places drawn without replacement. Accuracy is by token.

        length 12, 3 tokens      0 0 9 0 0 4 0 9 1 9 4 9        (the last place before the marker held the second 9)

    The answers stand in the sequence, as in ordinary text; Mamba's version asks for all of them at once, after markers
    that tell nothing. Chance 1/16.
    """

    name, vocab_size = "selective_copying", FIRST + SYMBOLS
    min_length = 34

    def copies(self, length: int) -> int:
        return 16

    def draw(self, generator: np.random.Generator, n: int, length: int) -> Examples:
        fits(self, length)
        m = self.copies(length)
        body = length - 1 - m
        places = np.sort(generator.random((n, body)).argpartition(m, axis=1)[:, :m], axis=1)
        word = generator.integers(FIRST, FIRST + SYMBOLS, size=(n, m))
        ids = np.full((n, length), BLANK)
        ids[np.arange(n)[:, None], places], ids[:, body], ids[:, body + 1 :] = word, MARKER, word
        labels = np.full_like(ids, IGNORED)
        labels[:, body + 1 :] = word
        return Examples(ids, labels)

    def chance(self, length: int) -> float:
        return 1 / SYMBOLS

    def shortcuts(self, examples: Examples) -> dict[str, float]:
        answers = examples.answers() - FIRST
        hits = [most_common(answers[:, at:], SYMBOLS) == answers[:, at] for at in range(answers.shape[1])]
        return {"the most frequent of those left": float(np.mean(hits))}


@register
class SelectiveCopyingDense(SelectiveCopying):
    """As many tokens as a 64th of the length; in sequences below 1,024 tokens 16."""

    name = "selective_copying_dense"

    def copies(self, length: int) -> int:
        return max(16, length // 64)
