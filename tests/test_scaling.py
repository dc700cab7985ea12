"""Fits against exponents that are known, and an interval that is as wide as it says."""

from __future__ import annotations

import math

import numpy as np
import pytest

from lshv2.scaling import fit_power, student_t_quantile

LENGTHS = [1024, 2048, 4096, 8192, 16384]


@pytest.mark.parametrize("exponent", [0.0, 0.5, 1.0, 1.2, 2.0])
def test_exact_powers_give_their_exponent_and_no_width(exponent: float) -> None:
    fit = fit_power(LENGTHS, [3.7 * n**exponent for n in LENGTHS])
    assert fit.exponent == pytest.approx(exponent, abs=1e-12)
    assert fit.low == pytest.approx(exponent, abs=1e-9) and fit.high == pytest.approx(exponent, abs=1e-9)
    assert fit.last_doubling == pytest.approx(2**exponent)
    assert (fit.n, fit.min_seq_len, fit.max_seq_len) == (5, 1024, 16384)
    assert fit.r2 == pytest.approx(1.0) and fit.predict(4096) == pytest.approx(3.7 * 4096**exponent)


def test_a_fixed_cost_flattens_the_exponent_until_it_is_subtracted() -> None:
    values = [500 + 0.05 * n for n in LENGTHS]
    assert fit_power(LENGTHS, values).exponent < 0.5
    assert fit_power(LENGTHS, values, subtract=500).exponent == pytest.approx(1.0, abs=1e-9)


def test_the_interval_holds_the_true_exponent_in_95_of_100_noisy_benchmarks() -> None:
    rng, hits, trials = np.random.default_rng(0), 0, 2000
    for _ in range(trials):
        noise = np.exp(0.1 * rng.standard_normal(len(LENGTHS)))
        fit = fit_power(LENGTHS, 0.2 * np.array(LENGTHS) ** 1.1 * noise)
        hits += fit.low <= 1.1 <= fit.high
    assert 0.935 <= hits / trials <= 0.965, f"coverage {hits / trials:.3f}"


def test_repeats_of_one_length_count_once_as_their_median() -> None:
    repeated = fit_power([1, 1, 1, 2, 4], [1.0, 1.1, 90.0, 2.0, 5.0])
    assert repeated == fit_power([1, 2, 4], [1.1, 2.0, 5.0]) and repeated.n == 3


def test_two_lengths_give_a_slope_without_an_interval() -> None:
    fit = fit_power([4096, 8192], [10, 40])
    assert fit.exponent == pytest.approx(2.0) and fit.low is None and fit.high is None and fit.n == 2


def test_last_doubling_is_only_given_for_a_measured_half() -> None:
    assert fit_power([1000, 3000], [1, 2]).last_doubling is None
    assert fit_power([1000, 1500, 3000], [1, 2, 5]).last_doubling == pytest.approx(2.5)


@pytest.mark.parametrize(
    ("lengths", "values", "subtract", "message"),
    [
        ([1, 2], [1, 0], 0, "value number 1 is 0"),
        ([1, 2], [5, 9], 5, "value number 0 is 0"),
        ([0, 2], [5, 9], 0, "length number 0"),
        ([1, 2], [5, math.nan], 0, "value number 1 is nan"),
        ([1, 2], [5, math.inf], 0, "value number 1 is inf"),
        ([7, 7, 7], [1, 2, 3], 0, "two different lengths, got 1"),
        ([], [], 0, "two different lengths, got 0"),
        ([1, 2, 3], [1, 2], 0, "3 lengths but 2 values"),
    ],
)
def test_points_that_have_no_logarithm_are_refused(
    lengths: list[float], values: list[float], subtract: float, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        fit_power(lengths, values, subtract)


@pytest.mark.parametrize(  # a printed table of Student's t, two-sided 95 %
    ("freedom", "expected"),
    [(1, 12.7062), (2, 4.3027), (3, 3.1824), (4, 2.7764), (5, 2.5706), (10, 2.2281), (60, 2.0003)],
)
def test_t_quantiles_are_the_printed_ones(freedom: int, expected: float) -> None:
    assert student_t_quantile(freedom) == pytest.approx(expected, abs=5e-5)
