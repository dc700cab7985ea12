"""Exponents from repeated measurements: a length's processes are drawn again, and everything is fitted anew.

    observed = [Observation(1024, (10.1, 10.4, 10.2)), Observation(2048, (20.5, 20.3, 20.9)), ...]
    found = fit_observations(observed)
    found["exponent"], found["low"], found["high"], found["bootstrap_low"], found["bootstrap_high"]

A length was measured in one or several fresh processes; its value is the median over their medians. Samples of one
process share its memory layout, clock and neighbours, so processes are what is drawn, with replacement, within each
length (a stratified bootstrap). Where a length has one process alone its samples are drawn in its stead, which knows
nothing of how processes differ: `resampled` says which it was.

Two intervals answer two questions. Student's t takes the points' scatter about the line, hence also that they follow
no line; the bootstrap takes what measuring again would change. An exponent is certain to neither better than the
wider one, and `upper` is the larger of both upper ends. With three processes a length the bootstrap covers a little
more than it says, with two less (their spread is half of it): three are the least that a claim should rest on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from lshv2.scaling import CONFIDENCE, EXPONENTS, Array, doublings, fit_fixed_part, fit_power, fixed_part_fits

DRAWS = 1000
FIT_FROM = 16_384  # below, launch overheads and cache sizes hide the exponent: used where three lengths remain
DECADE = 10
ENDS = [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2]


@dataclass(frozen=True)
class Observation:
    """One length: each process's own median, and the samples of the first, which count where it is the only one."""

    length: int
    processes: tuple[float, ...]
    samples: tuple[float, ...] = ()

    @property
    def value(self) -> float:
        return float(np.median(self.processes))

    @property
    def drawn(self) -> str:
        """What is drawn again: "processes", "samples", or "" when there is one value, of which nothing varies."""
        return "processes" if len(self.processes) > 1 else "samples" if len(self.samples) > 1 else ""


@dataclass(frozen=True)
class Draws:
    """values [draws, L]: what might have been measured at each of the L lengths; `drawn`: see `Observation`."""

    values: Array
    drawn: tuple[str, ...]

    def at(self, places: Sequence[int]) -> tuple[Array | None, str | None]:
        """The columns of these lengths and what was drawn for them; None if one of them could not vary."""
        kinds = {self.drawn[i] for i in places}
        if "" in kinds:
            return None, None
        return self.values[:, list(places)], " and ".join(sorted(kinds))


def draw(observed: Sequence[Observation], seed: int = 0) -> Draws:
    generator = np.random.default_rng(seed)
    columns = []
    for one in observed:
        pool = np.array(one.samples if one.drawn == "samples" else one.processes)
        picked = generator.integers(pool.size, size=(DRAWS, pool.size))
        columns.append(np.median(pool[picked], axis=1))
    return Draws(np.stack(columns, axis=1), tuple(one.drawn for one in observed))


def fit_observations(observed: Sequence[Observation], seed: int = 0) -> dict[str, Any] | None:
    """Every fit of one cost, as the run folder's contract has it; None with fewer than two lengths.

    At the top the fit from FIT_FROM on where there are three such lengths, else of all; `ranges` has the fits of all
    lengths, from FIT_FROM on and over the longest decade. Lengths are distinct, values positive.
    """
    observed = sorted(observed, key=lambda one: one.length)
    lengths, values = [one.length for one in observed], [one.value for one in observed]
    if len(observed) < 2:
        return None
    draws = draw(observed, seed)
    chosen = {
        "all": range(len(lengths)),
        "from_16k": [i for i, n in enumerate(lengths) if n >= FIT_FROM],
        "longest_decade": [i for i, n in enumerate(lengths) if n * DECADE >= lengths[-1]],
    }
    ranges = {name: _power(lengths, values, draws, places) for name, places in chosen.items()}
    main = ranges["from_16k" if len(chosen["from_16k"]) >= 3 else "all"]
    assert main is not None
    return {
        **main, "ranges": ranges, "fixed_part": _fixed_part(lengths, values, draws),
        "doublings": [_doubling(lengths, values, draws, pair) for pair in doublings(lengths)],
    }


def _power(lengths: list[int], values: list[float], draws: Draws, places: Sequence[int]) -> dict[str, Any] | None:
    """One power law with both intervals; None with fewer than two lengths."""
    if len(places) < 2:
        return None
    fit = fit_power([lengths[i] for i in places], [values[i] for i in places])
    again, kind = draws.at(places)
    slopes = None if again is None else np.polyfit(np.log([lengths[i] for i in places]), np.log(again).T, 1)[0]
    low, high = _ends(slopes)
    known = [end for end in (fit.high, high) if end is not None]
    # of two lengths nothing tells whether they lie on a line
    upper = max(known) if fit.high is not None else None
    return {**asdict(fit), "bootstrap_low": low, "bootstrap_high": high, "resampled": kind, "upper": upper}


def _fixed_part(lengths: list[int], values: list[float], draws: Draws) -> dict[str, Any] | None:
    fit = fit_fixed_part(lengths, values)
    if fit is None:
        return None
    again, kind = draws.at(range(len(lengths)))
    exponents = None if again is None else fixed_part_fits(np.array(lengths, dtype=np.float64), again)[0]
    low, high = _ends(exponents)
    # an end at the edge of what was searched is no end
    low = low if low is not None and low > EXPONENTS[0] + 0.01 else None
    high = high if high is not None and high < EXPONENTS[1] - 0.01 else None
    return {**asdict(fit), "low": low, "high": high, "resampled": kind}


def _doubling(lengths: list[int], values: list[float], draws: Draws, pair: tuple[int, int]) -> dict[str, Any]:
    """Cost at twice a length over cost at it, with the bootstrap's interval."""
    half, whole = pair
    again, _ = draws.at(pair)
    low, high = _ends(None if again is None else again[:, 1] / again[:, 0])
    return {"seq_len": lengths[whole], "ratio": values[whole] / values[half], "low": low, "high": high}


def _ends(estimates: Array | None) -> tuple[float | None, float | None]:
    if estimates is None:
        return None, None
    low, high = np.quantile(estimates, ENDS)
    return float(low), float(high)
