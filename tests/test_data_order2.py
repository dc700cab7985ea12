"""The order-2 byte model against its formula written out with dictionaries."""

import math
from collections import Counter, defaultdict

import numpy as np
import pytest

from lshv2.data.order2 import fit_order2, order2_bits_per_byte

TRAIN = [b"the cat sat on the mat; the rat ran at the cat. " * 3, b"that hat, this cat: those rats!", b"", b"x"]
EVAL = [b"the hat sat on a rat", b"\xff\x00 the end", b"q"]


def brute_force_bits(train, held_out):
    """Interpolated modified Kneser-Ney, entry by entry."""
    trigrams, pairs_after, firsts = Counter(), defaultdict(set), defaultdict(set)
    for text in train:
        padded = b"\0\0" + text
        for i in range(len(text)):
            trigrams[padded[i : i + 3]] += 1
    for t in trigrams:
        pairs_after[t[1:]].add(t[0])
    pairs = Counter({pair: len(before) for pair, before in pairs_after.items()})
    for pair in pairs:
        firsts[pair[1]].add(pair[0])
    singles = {byte: len(before) for byte, before in firsts.items()}

    def discounts(counts):
        n = [max(sum(c == k for c in counts.values()), 1) for k in (1, 2, 3, 4)]
        y = n[0] / (n[0] + 2 * n[1])
        return [0.0] + [min(max(k - (k + 1) * y * n[k] / n[k - 1], 0.1), k) for k in (1, 2, 3)]

    d3, d2 = discounts(trigrams), discounts(pairs)

    def level(counts, d, context, byte, lower):
        seen = {t: c for t, c in counts.items() if t[:-1] == context}
        total = sum(seen.values())
        if not total:
            return lower
        taken = sum(d[min(c, 3)] for c in seen.values())
        count = counts.get(context + bytes([byte]), 0)
        return (count - d[min(count, 3)]) / total + taken / total * lower

    bits = n_bytes = 0
    for text in held_out:
        padded = b"\0\0" + text
        for i in range(len(text)):
            a_b, byte = padded[i : i + 2], padded[i + 2]
            unigram = (singles.get(byte, 0) + 0.5) / (sum(singles.values()) + 128)
            bits -= math.log2(level(trigrams, d3, a_b, byte, level(pairs, d2, a_b[1:], byte, unigram)))
            n_bytes += 1
    return bits / n_bytes


def test_equals_the_formula_written_out():
    assert order2_bits_per_byte(TRAIN, EVAL) == pytest.approx(brute_force_bits(TRAIN, EVAL), rel=1e-12)


@pytest.mark.parametrize("context", [b"th", b"\0\0", b"zz", b" q", b"e "])
def test_probabilities_of_a_context_sum_to_one(context):
    model = fit_order2(TRAIN)
    trigrams = (context[0] << 16) + (context[1] << 8) + np.arange(256)
    p = model.probability(trigrams)
    assert p.min() > 0 and p.sum() == pytest.approx(1, abs=1e-12)


def test_known_entropies():
    generator = np.random.default_rng(0)
    noise = [generator.integers(0, 16, 400_000, dtype=np.uint8).tobytes() for _ in range(2)]
    assert order2_bits_per_byte(noise[:1], noise[1:]) == pytest.approx(4, abs=0.02)
    assert order2_bits_per_byte([b"abc" * 10_000], [b"abc" * 1000]) < 0.01


def test_the_order_of_texts_and_the_chunk_size_do_not_matter(monkeypatch):
    expected = order2_bits_per_byte(TRAIN, EVAL)
    monkeypatch.setattr("lshv2.data.order2.CHUNK", 7)
    assert order2_bits_per_byte(TRAIN[::-1], EVAL[::-1]) == pytest.approx(expected, rel=1e-12)


def test_no_text_is_an_error():
    with pytest.raises(ValueError, match="no training text"):
        order2_bits_per_byte([], EVAL)
    with pytest.raises(ValueError, match="no eval text"):
        order2_bits_per_byte(TRAIN, [])
