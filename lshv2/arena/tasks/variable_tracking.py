"""Variable tracking (after Hsieh et al. 2024, RULER): chains of assignments, whose end is asked for its value.

    = x 7  ..  = y x  ..  = z y  ..  ? z 7        three assignments: z is two hops from a variable with a value
"""

from __future__ import annotations

import numpy as np

from lshv2.arena.task import ArenaTask, Examples, fits, register
from lshv2.data.jsonl import IGNORED

NOISE, SET, ASK = 0, 1, 2
NAMES, VALUES = 512, 256
FIRST_NAME, FIRST_VALUE, FIRST_NOISE = 3, 3 + NAMES, 3 + NAMES + VALUES
NOISE_WORDS = 253
HOPS = 8


@register
class VariableTracking(ArenaTask):
    """Eight chains, of 1 to 8 hops, in one sequence; at the end each chain's last variable is asked, in any order.

        length 29, chains of 1 and 2 hops    = x 7 = u 9 . . . = y x = v u . . . = w v . . ? w 9 ? y 7
                                             . . . . . . . . . . . . . . . . . . . . . . . . . 9 . . 7

    A hop is an assignment from another variable. No name, and no value, is used twice. Statements stand in order within
    their chain, at multiples of three tokens anywhere before the questions; in between is noise of 253 words. hops: of
    each answer. Sequences below 164 tokens have as many chains as fit. Chance 1/256. While a model learns, any variable
    of a chain is asked, and at the end of each statement the value it gives: a hop is learned where one hop is what is
    missing.
    """

    name, vocab_size = "variable_tracking", FIRST_NOISE + NOISE_WORDS
    min_length, version = 17, 2  # 2: while a model learns, what each statement gives is asked too

    def chains(self, length: int) -> int:
        """Chains of 1, 2 … hops; the one of h hops has h + 1 statements and a question, of three tokens each."""
        return max(h for h in range(1, HOPS + 1) if 3 * (h * (h + 3) // 2 + h) + 8 <= length)

    def draw(self, generator: np.random.Generator, n: int, length: int) -> Examples:
        fits(self, length)
        chains = self.chains(length)
        chain = np.repeat(np.arange(chains), np.arange(2, chains + 2))  # which chain each statement is of
        ids = generator.integers(FIRST_NOISE, self.vocab_size, size=(n, length))
        slots = (length - 3 * chains) // 3
        names = np.stack([generator.permutation(NAMES)[: len(chain)] for _ in range(n)]) + FIRST_NAME
        values = np.stack([generator.permutation(VALUES)[:chains] for _ in range(n)]) + FIRST_VALUE
        starts = np.concatenate([[True], chain[1:] != chain[:-1]])
        # a chain's statements take its places in ascending order, the places of all chains being shuffled together
        places = np.stack([generator.permutation(slots)[: len(chain)] for _ in range(n)])
        order = np.lexsort((places, np.broadcast_to(chain, places.shape)), axis=1)
        places = np.take_along_axis(places, order, 1)
        source = np.roll(names, 1, axis=1)
        source[:, starts] = values
        statements = np.stack([np.full_like(names, SET), names, source], axis=-1)
        ids[np.arange(n)[:, None, None], 3 * places[:, :, None] + np.arange(3)] = statements
        asked = np.stack([generator.permutation(chains) for _ in range(n)])
        hops = asked + 1
        if self.split == "train":
            hops = generator.integers(hops + 1)
        row = np.arange(n)[:, None]
        variable = names[row, np.flatnonzero(starts)[asked] + hops]
        questions = np.stack([np.full_like(asked, ASK), variable, values[row, asked]], axis=-1)
        ids[:, -3 * chains :] = questions.reshape(n, -1)
        labels = np.full_like(ids, IGNORED)
        labels[:, -3 * chains + 2 :: 3] = questions[:, :, 2]
        if self.split == "train":  # what comes after a statement is predicted from its last token
            np.put_along_axis(labels, 3 * places + 3, values[:, chain], axis=1)
        return Examples(ids, labels, {"hops": hops})

    def chance(self, length: int) -> float:
        return 1 / VALUES

    def shortcuts(self, examples: Examples) -> dict[str, float]:
        chains = examples.answers().shape[1]
        return {"one of the values that were not asked yet": float(np.mean(1 / np.arange(1, chains + 1)))}
