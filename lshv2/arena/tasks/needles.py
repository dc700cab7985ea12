"""Needles: one thing to be found again, judged at ten depths of the haystack (0 is the start, 1 right before the end)
and learned at any.

    passkey   .. .. M 7 0 3 9 4 .. .. .. .. .. .. .. M 7 0 3 9 4        M: the marker; scored: the last five
    kv        a b x  c d y  e f z  g h u  ..  e f z  a b x  ..          nothing but needles; scored: values at the end
    uuid      .. M a b x1 … x16 .. .. M c d y1 … y16 .. M a b x1 … x16  four of them; scored: the last sixteen
"""

from __future__ import annotations

import math

import numpy as np

from lshv2.arena.task import ArenaTask, Examples, fits, register
from lshv2.data.jsonl import IGNORED

DEPTHS = 10


def depths(task: ArenaTask, generator: np.random.Generator, n: int) -> np.ndarray:
    """float [n] in [0, 1]: 0, 1/9 … 1 in turn; while a model learns any, since a step may be a single sequence."""
    return generator.random(n) if task.split == "train" else np.arange(n) % DEPTHS / (DEPTHS - 1)


def _labels(depth: np.ndarray) -> np.ndarray:
    return np.array([f"{d:.3g}" for d in depth.ravel()]).reshape(depth.shape)


def _ending(ids: np.ndarray, scored: int) -> np.ndarray:
    """Labels of which the last `scored` tokens count."""
    labels = np.full_like(ids, IGNORED)
    labels[:, -scored:] = ids[:, -scored:]
    return labels


@register
class Passkey(ArenaTask):
    """Five digits after a marker, in noise of 245 words and the ten digits; right when all five are.

        length 16, the needle 3 1 4 1 5     w w 7 w * 3 1 4 1 5 * 3 1 4 1 5
                                            . . . . . . . . . . . 3 1 4 1 5

    Ids: 0 the marker, 1 … 10 the digits, 11 … 255 the words. Chance 10^-5.
    """

    name, vocab_size, exact, version = "passkey", 256, True, 2  # 2: learned at any depth
    DIGITS = 5

    def draw(self, generator: np.random.Generator, n: int, length: int) -> Examples:
        fits(self, length)
        size = 1 + self.DIGITS
        needle = np.concatenate([np.zeros((n, 1), np.int64), generator.integers(1, 11, size=(n, self.DIGITS))], axis=1)
        ids = generator.integers(1, self.vocab_size, size=(n, length))
        depth = depths(self, generator, n)
        at = np.rint(depth * (length - 2 * size)).astype(np.int64)[:, None]
        ids[np.arange(n)[:, None], at + np.arange(size)] = needle
        ids[:, -size:] = needle
        return Examples(ids, _ending(ids, self.DIGITS), {"depth": _labels(depth)})

    min_length = 2 * (1 + DIGITS)

    def chance(self, length: int) -> float:
        return 10.0**-self.DIGITS

    def shortcuts(self, examples: Examples) -> dict[str, float]:
        """The first five digits in a row, blind to the marker: noise has them rarely."""
        before = examples.input_ids[:, : -1 - self.DIGITS]
        digits = (before >= 1) & (before <= 10)
        rows = np.lib.stride_tricks.sliding_window_view(digits, self.DIGITS, axis=1).all(-1)
        at = rows.argmax(1)[:, None] + np.arange(self.DIGITS)
        right = (np.take_along_axis(before, at, 1) == examples.input_ids[:, -self.DIGITS :]).all(1)
        return {f"the first {self.DIGITS} digits in a row": float(right.mean())}


@register
class KeyValueNeedle(ArenaTask):
    """A haystack of needles: keys of two symbols out of 255 with a value of one, no key twice; four of them are asked.

        length 21, two asked      a b x  c d y  e f z  g h u  i j v  e f z  a b x

    What does not fill a whole needle is symbol 0, at the start. Keys 1 … 255, values 256 … 511, chance 1/256. depth: of
    each answer; the four are judged a third of the scale apart, going round: 0, 1/3, 2/3 and 1, then 1/9, 4/9, 7/9 and
    0, and learned anywhere.
    """

    name, vocab_size, version = "kv_needle", 512, 2  # 2: learned at any depth
    SYMBOLS, VALUES, ASKED = 255, 256, 4
    min_length = 2 * 3 * ASKED

    def draw(self, generator: np.random.Generator, n: int, length: int) -> Examples:
        fits(self, length)
        needles, rest = divmod(length - 3 * self.ASKED, 3)
        keys = np.stack([generator.choice(self.SYMBOLS**2, needles, replace=False) for _ in range(n)])
        first, second = np.divmod(keys, self.SYMBOLS)
        values = generator.integers(self.VALUES, self.VALUES + 256, size=(n, needles))
        hay = np.stack([first + 1, second + 1, values], axis=-1)
        # 3 of the 10 depths apart, and all four of them other needles
        depth = (np.arange(n)[:, None] + 3 * np.arange(self.ASKED)) % DEPTHS / (DEPTHS - 1)
        place = np.rint(depth * (needles - 1)).astype(np.int64)
        if self.split == "train":
            place = np.stack([generator.permutation(needles)[: self.ASKED] for _ in range(n)])
            depth = place / (needles - 1)
        asked = hay[np.arange(n)[:, None], place].reshape(n, -1)
        ids = np.concatenate([np.zeros((n, rest), np.int64), hay.reshape(n, -1), asked], axis=1)
        labels = np.full_like(ids, IGNORED)
        labels[:, -3 * self.ASKED + 2 :: 3] = asked[:, 2::3]
        return Examples(ids, labels, {"depth": _labels(depth)})

    def chance(self, length: int) -> float:
        return 1 / 256

    def shortcuts(self, examples: Examples) -> dict[str, float]:
        """The first needle whose second key symbol is the asked one: blind to the first symbol."""
        hits = []
        for row in examples.input_ids[:64]:
            end = len(row) - 3 * self.ASKED
            second = np.arange(end % 3 + 1, end, 3)
            for at in range(end, len(row), 3):
                hits.append(row[second[row[second] == row[at + 1]][0] + 1] == row[at + 2])
        return {"half of the key": float(np.mean(hits))}


@register
class UuidNeedle(ArenaTask):
    """Four needles of a two-byte key and the sixteen bytes of a UUID, in noise of bytes; right when all sixteen are.

        length 57, two needles    M a b x1 … x16 M c d y1 … y16 M a b x1 … x16      ids: 0 … 255 the bytes,
                                  . . . .  …  .  . . . .  …  .  . . . x1 … x16      256 the marker

    One is asked; the others stand anywhere that is free. Sequences below 95 tokens have fewer. Chance 256^-16.

    What misleads is a *rival*, another place where the same last bytes stand: in 131,072 tokens the last two do twice
    for each byte, the last three once in eight answers. Every other training sequence therefore has bytes of so few
    values that runs recur in it as often (16 at 512 tokens), or nothing would teach to tell them apart.
    """

    name, vocab_size, exact, version = "uuid_needle", 257, True, 3  # 3: learned at any depth
    SIZE, VALUE, NEEDLES = 19, 16, 4
    min_length = 2 * SIZE

    def draw(self, generator: np.random.Generator, n: int, length: int) -> Examples:
        fits(self, length)
        marker = self.vocab_size - 1
        ids = generator.integers(marker, size=(n, length))
        depth = depths(self, generator, n)
        slots = (length - self.SIZE) // self.SIZE  # needles begin at multiples of their size, so that none overlap
        count = min(self.NEEDLES, slots)
        asked = np.rint(depth * (slots - 1)).astype(np.int64)
        others = np.stack([generator.permutation(slots - 1)[: count - 1] for _ in range(n)])
        others += others >= asked[:, None]  # any slot but the asked one's
        at = np.concatenate([asked[:, None], others], axis=1) * self.SIZE
        needles = generator.integers(marker, size=(n, count, self.SIZE))
        needles[:, :, 0] = marker
        # keys differ: the second symbol of each is another one, in no order
        needles[:, :, 2] = (needles[:, :1, 2] + generator.permuted(np.tile(np.arange(count), (n, 1)), axis=1)) % marker
        ids[np.arange(n)[:, None, None], at[:, :, None] + np.arange(self.SIZE)] = needles
        ids[:, -self.SIZE :] = needles[:, 0]
        if self.split == "train":
            ids = np.where(generator.random((n, 1)) < 0.5, self._of_few(generator, ids), ids)
        return Examples(ids, _ending(ids, self.VALUE), {"depth": _labels(depth)})

    def _of_few(self, generator: np.random.Generator, ids: np.ndarray) -> np.ndarray:
        """The same with bytes of few values, others in each sequence. Keys that differ go on doing so."""
        n, length = ids.shape
        values = max(self.NEEDLES, 1 << round(math.log2(length / 2) / 2))
        every = np.tile(np.arange(self.vocab_size - 1), (n, 1))
        few = generator.permuted(every, axis=1)[:, :values]
        return np.where(ids == self.vocab_size - 1, ids, np.take_along_axis(few, ids % values, axis=1))

    def chance(self, length: int) -> float:
        return 256.0**-self.VALUE

    def shortcuts(self, examples: Examples) -> dict[str, float]:
        return {"one of the needles": 1 / self.NEEDLES}
