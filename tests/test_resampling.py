"""Exponents of synthetic benchmarks whose exponent, fixed cost and noise are known, and whether intervals hold them."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from lshv2.resampling import Observation, draw, fit_observations
from lshv2.scaling import fit_fixed_part, fit_power

LENGTHS = [1024 * 2**i for i in range(8)]  # 1,024 to 131,072
TRIALS = 300


def benchmark(
    rng: np.random.Generator, cost: Callable[[float], float], *, processes: int = 3, samples: int = 5,
    between: float = 0.03, within: float = 0.02, lengths: list[int] = LENGTHS,
) -> list[Observation]:
    """Processes differ by `between`, the samples of one by `within` of their cost, both log-normal."""
    observed = []
    for n in lengths:
        level = cost(n) * np.exp(between * rng.standard_normal(processes))
        taken = level[:, None] * np.exp(within * rng.standard_normal((processes, samples)))
        observed.append(Observation(n, tuple(np.median(taken, axis=1)), tuple(taken[0])))
    return observed


def coverage(ends: list[tuple[float, float]], truth: float) -> float:
    return sum(low <= truth <= high for low, high in ends) / len(ends)


@pytest.mark.parametrize("truth", [1.1, 2.0])
def test_both_intervals_hold_the_true_exponent_as_often_as_they_say(truth: float) -> None:
    rng, by_t, by_bootstrap = np.random.default_rng(1), [], []
    for _ in range(TRIALS):
        found = fit_observations(benchmark(rng, lambda n: 1e-3 * n**truth))
        assert found and found["resampled"] == "processes"
        whole = found["ranges"]["all"]
        by_t.append((whole["low"], whole["high"]))
        by_bootstrap.append((whole["bootstrap_low"], whole["bootstrap_high"]))
        assert whole["upper"] == max(whole["high"], whole["bootstrap_high"])
    assert 0.90 <= coverage(by_t, truth) <= 0.99, coverage(by_t, truth)
    assert 0.90 <= coverage(by_bootstrap, truth) <= 0.99, coverage(by_bootstrap, truth)


def test_a_fixed_cost_biases_the_plain_fit_and_not_the_one_beside_it() -> None:
    rng, plain, beside, ends = np.random.default_rng(2), [], [], []
    for _ in range(TRIALS):
        found = fit_observations(benchmark(rng, lambda n: 100 + 0.02 * n**1.1, between=0.02, within=0.01))
        assert found and found["fixed_part"]
        plain.append((found["ranges"]["all"]["bootstrap_low"], found["ranges"]["all"]["bootstrap_high"]))
        beside.append(found["fixed_part"])
        ends.append((found["fixed_part"]["low"], found["fixed_part"]["high"]))
    assert coverage(plain, 1.1) == 0.0, "a fixed cost that the plain fit sees through is none"
    assert np.mean([fit["exponent"] for fit in beside]) == pytest.approx(1.1, abs=0.01)
    assert np.mean([fit["fixed"] for fit in beside]) == pytest.approx(100, rel=0.03)
    assert 0.90 <= coverage(ends, 1.1) <= 0.99, coverage(ends, 1.1)


@pytest.mark.parametrize(("fixed", "factor", "exponent"), [(50, 0.02, 1.0), (300, 0.004, 1.37), (7, 1e-6, 2.0)])
def test_without_noise_the_three_parameters_come_back(fixed: float, factor: float, exponent: float) -> None:
    fit = fit_fixed_part(LENGTHS, [fixed + factor * n**exponent for n in LENGTHS])
    assert fit and (fit.n, fit.min_seq_len, fit.max_seq_len) == (8, 1024, 131_072)
    assert fit.exponent == pytest.approx(exponent, abs=1e-3) and fit.fixed == pytest.approx(fixed, rel=1e-2)
    assert fit.factor == pytest.approx(factor, rel=2e-2) and fit.error < 1e-3


def test_no_part_is_below_zero() -> None:
    """A curve that steepens as if it began below zero has no fixed part, not a negative one."""
    fit = fit_fixed_part(LENGTHS, [0.01 * n**1.2 - 30 for n in LENGTHS])
    assert fit and fit.fixed == 0.0 and fit.factor > 0 and fit.exponent > 1.2


def test_what_does_not_grow_or_is_too_short_has_no_exponent_beside_a_fixed_part() -> None:
    assert fit_fixed_part(LENGTHS, [7.0] * 8) is None
    assert fit_fixed_part(LENGTHS[:3], [1, 2, 4]) is None, "three points fit three parameters whatever they are"


def test_a_quadratic_is_seen_as_one_behind_a_large_linear_and_fixed_cost() -> None:
    found = fit_observations(benchmark(np.random.default_rng(3), lambda n: 40 + 0.01 * n + 2e-6 * n**2))
    assert found
    whole, long, last = found["ranges"]["all"], found["ranges"]["from_16k"], found["doublings"][-1]
    assert whole["high"] < 1.8, "short lengths flatter"
    assert long["exponent"] > 1.8 and long["upper"] > 1.9 and long["bootstrap_low"] > 1.7
    assert last["seq_len"] == 131_072 and last["low"] <= 131_072**2 / 65_536**2 * 0.99 <= last["high"] + 0.3
    assert last["low"] > 3


def test_ranges_take_the_lengths_they_name() -> None:
    found = fit_observations(benchmark(np.random.default_rng(4), lambda n: n))
    assert found
    spans = {name: (fit["n"], fit["min_seq_len"], fit["max_seq_len"]) for name, fit in found["ranges"].items()}
    assert spans == {"all": (8, 1024, 131_072), "from_16k": (4, 16_384, 131_072),
                     "longest_decade": (4, 16_384, 131_072)}
    assert found["exponent"] == found["ranges"]["from_16k"]["exponent"]
    quick = fit_observations(benchmark(np.random.default_rng(4), lambda n: n, lengths=LENGTHS[:5]))
    assert quick and quick["ranges"]["from_16k"] is None and quick["n"] == 5
    assert quick["ranges"]["longest_decade"]["min_seq_len"] == 2048


def test_every_doubling_has_its_ratio_and_gaps_have_none() -> None:
    observed = [Observation(n, (2.0 * n, 2.2 * n, 2.1 * n)) for n in (1024, 2048, 6000, 8192, 16_384)]
    found = fit_observations(observed[::-1])
    assert found
    assert [(d["seq_len"], d["ratio"]) for d in found["doublings"]] == [(2048, 2.0), (16_384, 2.0)]
    assert all(d["low"] == pytest.approx(2.0 / 1.1) and d["high"] == pytest.approx(2.2) for d in found["doublings"])


def test_what_was_drawn_again_is_said() -> None:
    one = [Observation(n, (float(n),), (0.9 * n, 1.0 * n, 1.1 * n)) for n in LENGTHS[:4]]
    several = [Observation(n, (0.9 * n, 1.0 * n, 1.1 * n)) for n in LENGTHS[4:]]

    def said(observed: list[Observation]) -> tuple[str | None, bool]:
        found = fit_observations(observed)
        assert found
        whole = found["ranges"]["all"]
        return whole["resampled"], whole["bootstrap_low"] is not None

    assert said(one) == ("samples", True) and said(several) == ("processes", True)
    assert said(one + several) == ("processes and samples", True)
    single = [Observation(n, (float(n),), (float(n),)) for n in LENGTHS[:4]]
    assert said(single) == (None, False), "one value a length: nothing to draw"
    assert said([*single[:1], *one[1:]]) == (None, False), "a length that cannot vary would narrow the interval"


def test_samples_are_not_drawn_where_there_are_processes() -> None:
    """Many samples of one process must not pass for many processes."""
    steady = tuple([1.0] * 50)
    assert draw([Observation(1024, (1.0, 2.0, 3.0), steady)]).values.std() > 0.4
    assert draw([Observation(1024, (1.0,), steady)]).values.std() == 0.0


def test_two_lengths_give_no_upper_end_and_one_gives_nothing() -> None:
    two = fit_observations([Observation(n, (1.0 * n, 1.1 * n)) for n in LENGTHS[:2]])
    assert two and two["upper"] is None and two["low"] is None and two["fixed_part"] is None
    assert fit_observations([Observation(1024, (1.0, 2.0))]) is None and fit_observations([]) is None


def test_the_point_is_the_plain_fit_of_the_medians_and_the_seed_decides_the_draws() -> None:
    observed = benchmark(np.random.default_rng(5), lambda n: 3 * n, lengths=LENGTHS[:5])
    found = fit_observations(observed)
    assert found == fit_observations(observed) and found
    assert fit_observations(observed, seed=1) != found
    plain = fit_power(LENGTHS[:5], [one.value for one in observed])
    assert {key: found[key] for key in vars(plain)} == vars(plain)
