"""What a length axis says, in matplotlib's pictures and in the dashboard's alike.

    length_ticks([1024, 32768, 49152, 65536])        # {1024: "1k", 32768: "32k", 65536: "64k"}
"""

from __future__ import annotations

from collections.abc import Iterable


def length_ticks(lengths: Iterable[int]) -> dict[int, str]:
    """Tick position -> label: the powers of two among the lengths; all of them where fewer than two are powers.

    On a logarithmic axis 48k, 64k, 96k and 128k lie so close that their labels run into one another; the points stay.
    """
    every = sorted(set(lengths))
    powers = [length for length in every if length > 0 and length & (length - 1) == 0]
    return {length: short(length) for length in (powers if len(powers) > 1 else every)}


def short(length: float) -> str:
    """1024 -> 1k, 131072 -> 128k, 1048576 -> 1M, 64 -> 64."""
    for size, letter in ((1 << 20, "M"), (1 << 10, "k")):
        if length >= size and length % (size // 4) == 0:
            return f"{length / size:g}{letter}"
    return f"{length:g}"
