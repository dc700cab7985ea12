"""Duplication, `0 w 0 w` (Kitaev et al. 2020, Reformer): the second half repeats the first.

    input_ids   0  7  2  7  5  0  7  2  7  5
    labels      .  .  .  .  .  .  7  2  7  5
"""

from __future__ import annotations

import numpy as np

from lshv2.arena.task import ArenaTask, Examples, fits, register
from lshv2.data.synthetic import copy
from lshv2.errors import UserError


@register
class Duplication(ArenaTask):
    """w is uniform over 127 symbols and length / 2 - 1 long. Accuracy is by token."""

    name, vocab_size = "duplication", 128

    def draw(self, generator: np.random.Generator, n: int, length: int) -> Examples:
        fits(self, length)
        if length % 2:
            raise UserError(f"duplication: {length} tokens are an odd number, and 0 w 0 w has two halves")
        batch = copy(generator, n, length, self.vocab_size)
        return Examples(batch["input_ids"], batch["labels"])

    def chance(self, length: int) -> float:
        return 1 / (self.vocab_size - 1)

    def shortcuts(self, examples: Examples) -> dict[str, float]:
        """What followed the newest token when it was last seen: blind to everything before that token."""
        hits = []
        for row in examples.input_ids[:8]:
            half = len(row) // 2
            follower = dict(zip(row[:half].tolist(), row[1 : half + 1].tolist(), strict=True))
            hits += [follower.get(a) == b for a, b in zip(row[half:-1].tolist(), row[half + 1 :].tolist(), strict=True)]
        return {"what followed this token last": float(np.mean(hits))}
