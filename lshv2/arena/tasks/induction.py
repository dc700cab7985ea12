"""Induction heads (Olsson et al. 2022; as Gu & Dao 2023, Mamba, table 2, train and test it).

    .. .. .. S a .. .. .. .. .. .. S a        S: the special token, twice; scored: the last a
"""

from __future__ import annotations

import numpy as np

from lshv2.arena.task import ArenaTask, Examples, fits, most_common, octave, register
from lshv2.data.jsonl import IGNORED


@register
class Induction(ArenaTask):
    """Vocabulary 16: fifteen ordinary symbols 0 … 14 and the special 15, which stands anywhere and at the end.

        length 10    3 0 15 7 7 2 11 4 15 7
                     . . .  . . . .  . .  7

    gap: from the first special token to the second. Chance 1/15.
    """

    name, vocab_size = "induction", 16
    SPECIAL = 15

    def draw(self, generator: np.random.Generator, n: int, length: int) -> Examples:
        fits(self, length)
        ids = generator.integers(self.SPECIAL, size=(n, length))
        at = generator.integers(length - 3, size=n)
        rows = np.arange(n)
        ids[rows, at] = ids[:, -2] = self.SPECIAL
        ids[:, -1] = ids[rows, at + 1]
        labels = np.full_like(ids, IGNORED)
        labels[:, -1] = ids[:, -1]
        return Examples(ids, labels, {"gap": octave(length - 2 - at)})

    def chance(self, length: int) -> float:
        return 1 / self.SPECIAL

    def shortcuts(self, examples: Examples) -> dict[str, float]:
        ids, answer = examples.input_ids, examples.labels[:, -1]
        guess = most_common(np.minimum(ids[:, :-2], self.SPECIAL - 1), self.SPECIAL)
        return {"the most frequent symbol": float((guess == answer).mean())}
