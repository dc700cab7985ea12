"""Scaling exponents: how a cost grows with sequence length, with the uncertainty of the answer.

    fit = fit_power([1024, 2048, 4096], [10.1, 20.5, 39.8])
    fit.exponent, fit.low, fit.high        # 0.99, and its 95 % interval

The model is value = exp(intercept) · length^exponent, fitted by least squares on the logarithms, so that every
length weighs the same whatever its cost. Repeated measurements of one length share that length's systematic error
(cache sizes, tile counts), so they are no independent evidence about the exponent: a length enters once, as the
median of its values. Nothing is extrapolated and no point is dropped here; a caller that leaves lengths out says so.

A cost that does not grow (launches, an interpreter) bends that line and pulls its slope below the exponent.
`fit_fixed_part` therefore fits value = fixed + factor · length^exponent beside it, and `doublings` gives what no model
is in: the ratio of each length's cost to that of half of it. Intervals from repeated measurements are in
`lshv2.resampling`; the one here is Student's t from the points' scatter about the line.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

CONFIDENCE = 0.95
EXPONENTS = (0.05, 4.0)  # where a best exponent is looked for beside a fixed part; below, both parts are constants
FIXED_PART_LENGTHS = 4  # one more than parameters
Array = NDArray[np.float64]


@dataclass(frozen=True)
class Fit:
    """value ≈ exp(intercept) · length^exponent over [min_seq_len, max_seq_len]."""

    exponent: float
    low: float | None  # 95 % interval; None with two lengths, which leave nothing to judge the scatter by
    high: float | None
    n: int  # distinct lengths
    r2: float
    intercept: float
    min_seq_len: int
    max_seq_len: int
    last_doubling: float | None  # value at the longest over value at half of it; None if that was not measured

    def predict(self, length: float) -> float:
        """The fitted value; only meant for lengths between min_seq_len and max_seq_len."""
        return math.exp(self.intercept) * length**self.exponent


def fit_power(lengths: Sequence[float], values: Sequence[float], subtract: float = 0.0) -> Fit:
    """Fit values − subtract against lengths. lengths may repeat: each distinct one counts once, as its median.

    subtract: a fixed cost in the values' unit that does not depend on length, such as the memory of the weights.
    Raises ValueError on lists of different size, fewer than two distinct lengths, or a length or (value − subtract)
    that is not positive and finite: a logarithm of those would be an invented point.
    """
    if len(lengths) != len(values):
        raise ValueError(f"{len(lengths)} lengths but {len(values)} values")
    x, y = np.asarray(lengths, dtype=np.float64), np.asarray(values, dtype=np.float64) - subtract
    for name, array in (("length", x), ("value", y)):
        bad = np.flatnonzero(~(np.isfinite(array) & (array > 0)))
        if bad.size:
            raise ValueError(f"{name} number {bad[0]} is {array[bad[0]]:g} (after subtracting); it must be positive")
    distinct = np.unique(x)
    if distinct.size < 2:
        raise ValueError(f"an exponent needs at least two different lengths, got {distinct.size}")
    medians = np.array([np.median(y[x == length]) for length in distinct])

    log_x, log_y = np.log(distinct), np.log(medians)
    spread = log_x - log_x.mean()
    sxx = float(spread @ spread)
    exponent = float(spread @ log_y) / sxx
    intercept = float(log_y.mean() - exponent * log_x.mean())
    residual = log_y - intercept - exponent * log_x
    squares = float(residual @ residual)
    total = float(((log_y - log_y.mean()) ** 2).sum())
    half_width = None
    if distinct.size >= 3:
        freedom = int(distinct.size) - 2
        half_width = student_t_quantile(freedom) * math.sqrt(squares / freedom / sxx)
    half = np.flatnonzero(distinct == distinct[-1] / 2)
    return Fit(
        exponent=exponent,
        low=None if half_width is None else exponent - half_width,
        high=None if half_width is None else exponent + half_width,
        n=int(distinct.size),
        r2=1.0 if total == 0.0 else 1.0 - squares / total,
        intercept=intercept,
        min_seq_len=int(distinct[0]),
        max_seq_len=int(distinct[-1]),
        last_doubling=float(medians[-1] / medians[half[0]]) if half.size else None,
    )


@dataclass(frozen=True)
class FixedPartFit:
    """value ≈ fixed + factor · length^exponent over [min_seq_len, max_seq_len], both parts at least zero."""

    fixed: float
    factor: float
    exponent: float
    error: float  # root mean square of (fitted − value) / value
    n: int
    min_seq_len: int
    max_seq_len: int


def fit_fixed_part(lengths: Sequence[float], values: Sequence[float]) -> FixedPartFit | None:
    """Least squares on relative errors; lengths are distinct, both are positive.

    None where there is no exponent to find: fewer than FIXED_PART_LENGTHS lengths for three parameters, or a best
    exponent at the edge of EXPONENTS, as for a cost that does not grow.
    """
    x, y = np.asarray(lengths, dtype=np.float64), np.asarray(values, dtype=np.float64)
    if x.size < FIXED_PART_LENGTHS:
        return None
    exponent, fixed, factor, error = (float(found[0]) for found in fixed_part_fits(x, y[None]))
    if not EXPONENTS[0] + 0.01 < exponent < EXPONENTS[1] - 0.01:
        return None
    return FixedPartFit(fixed, factor, exponent, error, int(x.size), int(x.min()), int(x.max()))


def fixed_part_fits(lengths: Array, values: Array) -> tuple[Array, Array, Array, Array]:
    """lengths [L], values [D,L] -> exponent, fixed, factor and root mean square relative error [D] of D fits at once.

    At a given exponent the other two are linear, so that the error is a function of the exponent alone: its least on
    a grid over EXPONENTS, then on finer ones around that, to 1e-4.
    """
    scaled = np.log(lengths / lengths.max())  # powers stay within 0 to 1
    centre, reach, steps = np.full(len(values), sum(EXPONENTS) / 2), (EXPONENTS[1] - EXPONENTS[0]) / 2, 40
    rows = np.arange(len(values))
    while reach > 1e-4:
        tried = np.clip(centre[:, None] + np.linspace(-reach, reach, steps + 1), *EXPONENTS)
        errors = np.stack([_linear_parts(scaled, values, column)[2] for column in tried.T], axis=1)
        centre = tried[rows, errors.argmin(axis=1)]
        reach, steps = 2 * reach / steps, 12
    fixed, factor, error = _linear_parts(scaled, values, centre)
    return centre, fixed, factor * lengths.max() ** -centre, error


def _linear_parts(scaled: Array, values: Array, exponents: Array) -> tuple[Array, Array, Array]:
    """The best fixed and factor, neither below zero, at exponents [D] for values [D,L]; and their error [D].

    What is minimised, Σ (fixed · u + factor · w − 1)² with u = 1 / value and w = length^exponent / value, has its
    bounded optimum inside, or where one part is zero and the other alone is fitted.
    """
    u = 1 / values
    w = np.exp(exponents[:, None] * scaled) * u
    uu, uw, ww, su, sw = ((a * b).sum(axis=1) for a, b in ((u, u), (u, w), (w, w), (u, 1.0), (w, 1.0)))
    determinant = np.maximum(uu * ww - uw * uw, np.finfo(float).tiny)
    fixed, factor = (ww * su - uw * sw) / determinant, (uu * sw - uw * su) / determinant
    fixed, factor = (np.where(fixed < 0, 0.0, np.where(factor < 0, su / uu, fixed)),
                     np.where(fixed < 0, sw / ww, np.maximum(factor, 0.0)))
    residual = fixed[:, None] * u + factor[:, None] * w - 1
    return fixed, factor, np.sqrt((residual**2).mean(axis=1))


def doublings(lengths: Sequence[int]) -> list[tuple[int, int]]:
    """(index of n, index of 2n) for every n of which twice was measured, in the order of n; lengths are distinct."""
    place = {length: i for i, length in enumerate(lengths)}
    return [(place[length], place[2 * length]) for length in sorted(place) if 2 * length in place]


def student_t_quantile(freedom: int, confidence: float = CONFIDENCE) -> float:
    """The t with P(|T| <= t) = confidence at an integer number of degrees of freedom.

    P(|T| <= t) is a finite sum in the angle arctan(t / √freedom) (Abramowitz & Stegun, 26.7.3 and 26.7.4), which
    grows with the angle, so bisection inverts it to machine precision; no scipy for one number.
    """
    if freedom < 1 or not 0.0 < confidence < 1.0:
        raise ValueError(f"{freedom=} must be at least 1 and {confidence=} between 0 and 1")
    low, high = 0.0, math.pi / 2
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if _two_sided(middle, freedom) < confidence else (low, middle)
    return math.tan(low) * math.sqrt(freedom)


def _two_sided(angle: float, freedom: int) -> float:
    """P(|T| <= √freedom · tan(angle))."""
    sine, cosine = math.sin(angle), math.cos(angle)
    odd = freedom % 2
    if freedom == 1:
        return 2 * angle / math.pi
    term = total = cosine if odd else 1.0
    for k in range(3 if odd else 2, freedom - 1, 2):
        term *= cosine * cosine * (k - 1) / k
        total += term
    return 2 / math.pi * (angle + sine * total) if odd else sine * total
