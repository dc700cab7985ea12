"""Needles: one thing to be found again, at ten depths of the haystack (depth 0 is the start, 1 right before the end).

    passkey   .. .. M 7 0 3 9 4 .. .. .. .. .. .. .. M 7 0 3 9 4        M: the marker; scored: the last five
    kv        a b x  c d y  e f z  g h u  ..  e f z                     nothing but needles; scored: the last token
    uuid      .. M a b x1 … x16 .. .. M c d y1 … y16 .. M a b x1 … x16  four of them; scored: the last sixteen
"""

from __future__ import annotations

import numpy as np

from lshv2.arena.task import ArenaTask, Examples, fits, register
from lshv2.data.jsonl import IGNORED

DEPTHS = 10


def depths(n: int) -> np.ndarray:
    """Depths 0, 1/9 … 1 in turn, float [n]."""
    return np.arange(n) % DEPTHS / (DEPTHS - 1)


def _labels(depth: np.ndarray) -> np.ndarray:
    return np.array([f"{d:.3g}" for d in depth])


def _ending(ids: np.ndarray, scored: int) -> np.ndarray:
    """Labels of which the last `scored` tokens count."""
    labels = np.full_like(ids, IGNORED)
    labels[:, -scored:] = ids[:, -scored:]
    return labels


@register
class Passkey(ArenaTask):
    """Five digits after a marker, in noise of 245 words and the ten digits; right when all five are.

    Ids: 0 the marker, 1 … 10 the digits, 11 … 255 the words. Chance 10^-5.
    """

    name, vocab_size, exact = "passkey", 256, True
    DIGITS = 5

    def draw(self, generator: np.random.Generator, n: int, length: int) -> Examples:
        fits(self, length)
        size = 1 + self.DIGITS
        needle = np.concatenate([np.zeros((n, 1), np.int64), generator.integers(1, 11, size=(n, self.DIGITS))], axis=1)
        ids = generator.integers(1, self.vocab_size, size=(n, length))
        depth = depths(n)
        at = np.rint(depth * (length - 2 * size)).astype(np.int64)[:, None]
        ids[np.arange(n)[:, None], at + np.arange(size)] = needle
        ids[:, -size:] = needle
        return Examples(ids, _ending(ids, self.DIGITS), {"depth": _labels(depth)})

    min_length = 2 * (1 + DIGITS)

    def chance(self, length: int) -> float:
        return 10.0**-self.DIGITS


@register
class KeyValueNeedle(ArenaTask):
    """A haystack of needles: keys of two symbols out of 512 with a value of one, no key twice, one of them asked.

        length 12      a b x  c d y  e f z  c d y

    What does not fill a whole needle is symbol 0, at the start. Keys 1 … 511, values 512 … 1023, chance 1/512.
    """

    name, vocab_size = "kv_needle", 1024
    HALF = 512

    def draw(self, generator: np.random.Generator, n: int, length: int) -> Examples:
        fits(self, length)
        needles, rest = divmod(length - 3, 3)
        keys = np.stack([generator.choice((self.HALF - 1) ** 2, needles, replace=False) for _ in range(n)])
        first, second = np.divmod(keys, self.HALF - 1)
        values = generator.integers(self.HALF, self.vocab_size, size=(n, needles))
        hay = np.stack([first + 1, second + 1, values], axis=-1)
        depth = depths(n)
        asked = hay[np.arange(n), np.rint(depth * (needles - 1)).astype(np.int64)]
        ids = np.concatenate([np.zeros((n, rest), np.int64), hay.reshape(n, -1), asked], axis=1)
        return Examples(ids, _ending(ids, 1), {"depth": _labels(depth)})

    def chance(self, length: int) -> float:
        return 1 / self.HALF

    def shortcuts(self, examples: Examples) -> dict[str, float]:
        """The first needle whose second key symbol is the asked one: blind to the first symbol."""
        hits = []
        for row in examples.input_ids[:64]:
            body, end = row[:-3], len(row) - 3
            second = np.arange(end % 3 + 1, end, 3)
            hits.append(body[second[body[second] == row[-2]][0] + 1] == row[-1])
        return {"half of the key": float(np.mean(hits))}


@register
class UuidNeedle(ArenaTask):
    """Four needles of a two-byte key and the sixteen bytes of a UUID, in noise of bytes; right when all sixteen are.

        M a b x1 … x16        ids: 0 … 255 the bytes, 256 the marker

    One is asked; the other three stand anywhere that is free. Chance 256^-16.
    """

    name, vocab_size, exact = "uuid_needle", 257, True
    SIZE, VALUE, NEEDLES = 19, 16, 4
    min_length = 8 * SIZE

    def draw(self, generator: np.random.Generator, n: int, length: int) -> Examples:
        fits(self, length)
        marker = self.vocab_size - 1
        ids = generator.integers(marker, size=(n, length))
        depth = depths(n)
        slots = (length - self.SIZE) // self.SIZE  # needles begin at multiples of their size, so that none overlap
        asked = np.rint(depth * (slots - 1)).astype(np.int64)
        others = np.stack([generator.permutation(slots - 1)[: self.NEEDLES - 1] for _ in range(n)])
        others += others >= asked[:, None]  # any slot but the asked one's
        at = np.concatenate([asked[:, None], others], axis=1) * self.SIZE
        needles = generator.integers(marker, size=(n, self.NEEDLES, self.SIZE))
        needles[:, :, 0] = marker
        # keys differ: the second symbol of each is another one
        needles[:, :, 2] = (needles[:, :1, 2] + np.arange(self.NEEDLES)) % marker
        ids[np.arange(n)[:, None, None], at[:, :, None] + np.arange(self.SIZE)] = needles
        ids[:, -self.SIZE :] = needles[:, 0]
        return Examples(ids, _ending(ids, self.VALUE), {"depth": _labels(depth)})

    def chance(self, length: int) -> float:
        return 256.0**-self.VALUE

    def shortcuts(self, examples: Examples) -> dict[str, float]:
        return {"one of the needles": 1 / self.NEEDLES}
