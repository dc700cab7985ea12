"""The success flags: what the guide and this project promise, judged from a run's own files, and the verdict.

    for flag in success_flags(run.path): print(flag["name"], flag["passed"], flag["detail"])

A flag has a name, a target, the measured value, `passed` (None: this run did not measure it), the file that it was
read from and a `detail` in words. A missing, torn or partial file leaves its flags not measured, with the reason.

How the two exponents are judged: an exponent is an estimate, so its 95 % interval decides, not the point alone.
  alpha  over the longest decade measured (from a tenth of the longest length on: overheads of short ones flatter), the
         upper end must be at most 1.2: growth faster than that is then unlikely. It is the larger one of two intervals,
         Student's t about the line and the bootstrap over processes.
  beta   "≈ 1.0" is two-sided, for an exponent well below one says that a fixed cost is still in the figures, not that
         memory is better than linear: the estimate must lie in 0.9 to 1.1 and its interval within 0.8 to 1.2, so that
         a lucky estimate from scattered points does not pass.
Both need an interval, hence three lengths, and one no wider than MAX_WIDTH: points that scatter more, as on a machine
that is busy with something else, have measured no exponent, whatever the interval's ends. The lengths behind them are
in `detail`: a pass says nothing about others.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lshv2.benchmark_results import Benchmark, Fit, Row, read_benchmark
from lshv2.curves import Training, read_training

ALPHA_MAX = 1.2
BETA_RANGE, BETA_INTERVAL = (0.9, 1.1), (0.8, 1.2)
MAX_WIDTH = 1.0
THROUGHPUT_MIN, THROUGHPUT_LENGTH = 10_000, 4_096
LONG = 65_536
LEARNED_RATIO = 0.85  # of the first eval's bits per byte
RECALL_MIN = 0.90
Judgement = tuple[float | bool | None, bool | None, str]  # value, passed, detail
Flag = dict[str, Any]


@dataclass(frozen=True)
class Target:
    """One promise. judge: from what the reader of `source` gives."""

    name: str
    target: str
    source: str
    judge: Callable[[Any], Judgement]


def _missing(detail: str) -> Judgement:
    return None, None, f"not measured: {detail}"


def _row(benchmark: Benchmark, seq_len: int) -> Row | None:
    return next((r for r in benchmark.rows if r.attention == "lsh" and r.seq_len == seq_len), None)


def _feasible(benchmark: Benchmark) -> Judgement:
    row = _row(benchmark, LONG)
    if row is None:
        longest = max((r.seq_len for r in benchmark.rows if r.attention == "lsh"), default=0)
        return _missing(f"the longest length benchmarked is {longest:,}")
    if row.status != "ok":
        return False, False, f"{row.status}: {row.reason}"
    return True, True, (f"{row.get('train_latency_ms'):,.0f} ms forward + backward, "
                        f"{row.get('rss_mb'):,.0f} MB on {benchmark.device}")


def _exponent(benchmark: Benchmark, fit: Fit | None, passes: Callable[[Fit], bool]) -> Judgement:
    if fit is None:
        done = benchmark.state == "done"
        return _missing("too few lengths succeeded" if done else "the benchmark is not done")
    span = f"{fit.n:g} lengths, {fit.min_seq_len:,.0f} to {fit.max_seq_len:,.0f} tokens, {benchmark.device}"
    if not math.isfinite(fit.low) or not math.isfinite(fit.high):
        return fit.exponent, None, f"not measured: no interval from {span}; three lengths are needed"
    doubling = f", last doubling x{fit.last_doubling:.2f}" if math.isfinite(fit.last_doubling) else ""
    interval = f"95 % interval {fit.low:.2f} to {fit.high:.2f}"
    if math.isfinite(fit.bootstrap_high):
        interval += f", bootstrap {fit.bootstrap_low:.2f} to {fit.bootstrap_high:.2f}"
    if fit.high - fit.low > MAX_WIDTH:
        scatter = f"its {interval} is too wide to judge ({span})"
        return fit.exponent, None, f"not measured: {scatter}; measure on an idle machine, or more lengths"
    return fit.exponent, passes(fit), f"{fit.exponent:.2f}, {interval} ({span}){doubling}"


def _alpha(benchmark: Benchmark) -> Judgement:
    key = ("lsh", "train_latency")
    if key in benchmark.fits and not benchmark.scaling[key].ranges:
        return _missing("this file was written before the longest decade was fitted: run the benchmark again")
    fit = benchmark.scaling[key].ranges.get("longest_decade") if key in benchmark.fits else None
    return _exponent(benchmark, fit, lambda fit: fit.upper <= ALPHA_MAX)


def _beta(benchmark: Benchmark) -> Judgement:
    fit = benchmark.fits.get(("lsh", "memory"))
    return _exponent(benchmark, fit, lambda fit: BETA_RANGE[0] <= fit.exponent <= BETA_RANGE[1]
                     and BETA_INTERVAL[0] <= fit.low and fit.high <= BETA_INTERVAL[1])


def _throughput(benchmark: Benchmark) -> Judgement:
    row = _row(benchmark, THROUGHPUT_LENGTH)
    if row is None:
        return _missing(f"{THROUGHPUT_LENGTH:,} tokens were not benchmarked")
    rate = row.get("tokens_per_sec")
    if row.status != "ok" or not math.isfinite(rate):
        return _missing(f"{THROUGHPUT_LENGTH:,} tokens ended in {row.status}: {row.reason}")
    parameters = row.get("parameters")
    size = f"{parameters / 1e6:,.1f} M parameters" if parameters > 0 else "size unknown"
    return rate, rate > THROUGHPUT_MIN, (f"{rate:,.0f} tokens/s on {benchmark.device}, {size}; forward + backward "
                                         f"{row.get('train_tokens_per_sec'):,.0f} tokens/s; the guide names an A100")


def _learns(training: Training) -> Judgement:
    values = training.language_model.eval["bits_per_byte"]
    values = values[np.isfinite(values)]
    order2 = training.order2_bits_per_byte
    if len(values) < 2:
        return _missing(f"{len(values)} evaluations of the language model")
    if not math.isfinite(order2):
        return float(values[-1]), None, "not measured: no order-2 byte model to compare with"
    first, last = float(values[0]), float(values[-1])
    return last, last <= LEARNED_RATIO * first and last < order2, (
        f"{last:.3f} bits per byte, {100 * (1 - last / first):.0f} % below the first eval's {first:.3f}; "
        f"order-2 byte model {order2:.3f}"
    )


def _recall(training: Training) -> Judgement:
    accuracy = training.recall.last("accuracy")
    if not math.isfinite(accuracy):
        return _missing("the recall task was not evaluated")
    chance = f"; chance {training.chance:.3f}" if math.isfinite(training.chance) else ""
    return accuracy, accuracy >= RECALL_MIN, f"{100 * accuracy:.1f} % of answers right{chance}"


BENCHMARK, TRAINING = "benchmark_summary.json", "training_metrics.json"
READERS: dict[str, Callable[[Path], tuple[Any, Any]]] = {BENCHMARK: read_benchmark, TRAINING: read_training}
TARGETS = (
    Target(f"{LONG}_feasible", f"{LONG:,} tokens forward + backward within the limits", BENCHMARK, _feasible),
    Target("alpha", f"<= {ALPHA_MAX}, upper end of the 95 % interval over the longest decade", BENCHMARK, _alpha),
    Target("beta", "0.9 to 1.1, interval within 0.8 to 1.2", BENCHMARK, _beta),
    Target("throughput", f"> {THROUGHPUT_MIN:,} tokens/s forward at {THROUGHPUT_LENGTH:,} tokens", BENCHMARK,
           _throughput),
    Target("learns", "eval bits per byte >= 15 % below the first eval, and below order 2", TRAINING, _learns),
    Target("recall", f">= {RECALL_MIN:.2f} accuracy at the training length", TRAINING, _recall),
)


def success_flags(run: Path) -> list[Flag]:
    """All flags in the order of TARGETS; see the module's docstring. Raises nothing for what the files hold."""
    contents = {source: read(run) for source, read in READERS.items()}
    flags = []
    for target in TARGETS:
        content, problems = contents[target.source]
        value, passed, detail = target.judge(content) if content else _missing(str(problems[0]))
        flags.append({"name": target.name, "target": target.target, "value": value, "passed": passed,
                      "source": target.source, "detail": detail})
    return flags


def verdict(flags: list[Flag]) -> str:
    """One sentence that follows from the flags alone: what was met, what was missed by how much, what is unknown."""
    met, missed, unknown = ([f for f in flags if f["passed"] is state] for state in (True, False, None))
    measured = len(met) + len(missed)
    if not measured:
        return f"Nothing of the {len(flags)} targets was measured in this run."
    parts = [f"{len(met)} of the {measured} targets measured are met ({_names(met)})" if met
             else f"None of the {measured} targets measured is met"]
    why = [f"{flag['name']} ({flag['detail']})" for flag in missed]
    parts += [f"missed: {'; '.join(why)}"] if missed else []
    parts += [f"not measured: {_names(unknown)}"] if unknown else []
    return "; ".join(parts) + "."


def _names(flags: list[Flag]) -> str:
    return ", ".join(flag["name"] for flag in flags)
