"""Multi-query associative recall (Arora et al. 2023, Zoology): keys and values first, each key asked once, later.

    k1 v1 k2 v2 | .. k2 v2 .. .. .. .. .. k1 v1 ..        dots: filler; scored: the v after the bar
"""

from __future__ import annotations

import numpy as np

from lshv2.arena.task import ArenaTask, Examples, fits, octave, register
from lshv2.data.synthetic import n_values, recall

PAIRS = 64
MOST_PAIRS = 2048


@register
class Mqar(ArenaTask):
    """64 pairs, in sequences below 256 tokens a quarter of their length. gap: from a pair to its question.

    Keys 1 … 4095, values 4096 … 8191, P(gap of g pairs) ∝ (g + 1)^-0.99, filler of all ids but the keys in play;
    `lshv2.data.synthetic.recall` draws a worked example. Chance 1/4096.
    """

    name, vocab_size = "mqar", 8192
    min_length = 16

    def pairs(self, length: int) -> int:
        return min(PAIRS, length // 4)

    def draw(self, generator: np.random.Generator, n: int, length: int) -> Examples:
        fits(self, length)
        pairs = self.pairs(length)
        batch = recall(generator, n, length, pairs, self.vocab_size)
        questions = 2 * pairs + 2 * batch["gaps"]
        distance = questions - 2 * np.arange(pairs)
        in_order = np.take_along_axis(distance, questions.argsort(1), 1)
        return Examples(batch["input_ids"], batch["labels"], {"gap": octave(in_order)})

    def chance(self, length: int) -> float:
        return 1 / n_values(self.vocab_size)

    def shortcuts(self, examples: Examples) -> dict[str, float]:
        pairs = examples.answers().shape[1]  # no value stands for two keys, and each is asked once
        return {"one of the values not asked yet": float((1 / np.arange(1, pairs + 1)).mean())}


@register
class MqarDense(Mqar):
    """As many pairs as a 64th of the length, up to 2,048; in sequences below 1,024 tokens as many as fit, up to 16."""

    name = "mqar_dense_pairs"

    def pairs(self, length: int) -> int:
        return min(length // 4, 16) if length < 1024 else min(length // 64, MOST_PAIRS)
