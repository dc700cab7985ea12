"""The numbers to reach, judged from an arena and from the benchmark of the same run.

    for target in arena_targets(arena.summaries, benchmark): target.name, target.value, verdict(target), target.detail

Accuracies are means over seeds, in %, as the model was trained (nothing changed at evaluation but for duplication's
rounds); `detail` names the seeds and the lowest of them. Met is said only of what was measured as far as the target
goes, on three seeds and fifty sequences a seed at least; missed as soon as one measured value misses it. What is not
there is not measured, with the reason.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import replace

from lshv2.arena_results import MODELS, TASKS, Summary, label_place
from lshv2.arena_views import counted, trained_to
from lshv2.benchmark_results import Benchmark, Fit
from lshv2.operator_results import Target
from lshv2.tolerant import NAN

LONGEST = 131_072
LENGTHS = tuple(1 << e for e in range(10, 18))  # "every length": 1,024 to LONGEST
DEPTHS, SEEDS, SEQUENCES, PROCESSES = 10, 3, 50, 3
LISTOPS = 2001  # tokens: the Long Range Arena's trees, all of them
DENSE = ("dense", "dense_scaled")
HOPPER = ("cuda (NVIDIA H200)", "cuda (NVIDIA H100 80GB HBM3)")  # one chip, with more and faster memory or less
NEEDLES = ("passkey", "kv_needle", "uuid_needle")
OTHERS = re.compile(r"(^|, )sequences 1$")  # what a row's `setting` says of `--asked 1`
ROUNDS = {1: (90, 99), 2: (99, 100), 4: (99.9, 100), 8: (100, 100)}  # duplication: at least, stretch
PUBLISHED = {  # by others, with models and trainings of their own: for orientation
    "mqar": "dense 100 % to 512 tokens (Arora et al. 2023)",
    "induction": "trained at 256: Mamba 100 % to 1,048,576 tokens; attention at best 67.6 % at 512 (Gu & Dao 2023)",
    "selective_copying": "Mamba 99.8 % at 4,096 tokens (Gu & Dao 2023)",
    "listops": "Transformer 36.4 %, Reformer 37.3 % (Tay et al. 2021), S4 59.6 % (Gu et al. 2022), "
               "Mega 63.1 % (Ma et al. 2023)",
}
Summaries = Sequence[Summary]


def arena_targets(summaries: Summaries, benchmark: Benchmark | None) -> list[Target]:
    """In the order of the list of targets; a target on a family of tasks is judged for each of them.

    What other sequences gave (`--asked 1`), which no recipe was chosen by, is told beside it: `detail`.
    """
    targets = _targets(summaries, benchmark)
    others = [replace(s, setting=OTHERS.sub("", s.setting)) for s in summaries if OTHERS.search(s.setting)]
    return [_with(target, other) for target, other in zip(targets, _targets(others, None), strict=True)]


def _with(target: Target, other: Target) -> Target:
    """The target, and in its detail what the other sequences gave where they were asked."""
    if math.isnan(other.value):
        return target
    unit = f" {other.unit}".rstrip()
    return replace(target, detail=f"{target.detail}; by other sequences {other.value:.4g}{unit}: {other.detail}")


def _targets(summaries: Summaries, benchmark: Benchmark | None) -> list[Target]:
    plain = [s for s in summaries if not s.setting]
    found = [_against_dense(plain, task) for task in ("mqar", "mqar_dense_pairs")]
    found += [_reached(plain, task, LONGEST, 95, 99, f"trained to 2,048 at most, at {LONGEST:,}", longest_trained=2048)
              for task in ("mqar", "mqar_dense_pairs")]
    found.append(_reached(plain, "induction", LONGEST, 95, 100, f"trained at 256, at {LONGEST:,}", longest_trained=256))
    found += [_reached(plain, task, 4096, 99, 99.9, "at 4,096")
              for task in ("selective_copying", "selective_copying_dense")]
    found += [_needle(plain, task) for task in NEEDLES]
    found.append(_reached(plain, "listops", LISTOPS, 50, 60, ""))
    found += [_duplication(summaries, rounds) for rounds in ROUNDS]
    return [*found, *_scaling(benchmark)]


def _lengths(summaries: Summaries, task: str, model: str, longest_trained: float = math.inf) -> dict[int, Summary]:
    mine = trained_to([s for s in summaries if (s.task, s.model) == (task, model)], longest_trained)
    return {s.seq_len: s for s in mine}


def _judge(name: str, sign: str, least: float, stretch: float, value: float, unit: str, detail: str,
           complete: bool = True) -> Target:
    """`complete`: measured as far as the target goes, so that it can be met and not only missed."""
    def passed(bound: float) -> bool | None:
        if math.isnan(value):
            return None
        good = value >= bound if sign == "≥" else value <= bound
        return good if complete or not good else None

    at_least, at_best = (f"{sign} {bound:g} {unit}".rstrip() for bound in (least, stretch))
    return Target(name, at_least, at_best, value, unit, passed(least), passed(stretch), detail)


def _percent(value: float) -> float:
    """Rounded down, so that nothing below 100 % is shown as it."""
    return NAN if math.isnan(value) else math.floor(round(100 * value, 6) * 100) / 100


def _counted(seeds: int) -> str:
    return counted(seeds) + ("" if seeds >= SEEDS else f" of {SEEDS} wanted")


def _seeds(summary: Summary) -> str:
    seeds = _counted(summary.seeds)
    return f"{seeds}, the lowest {_percent(summary.low):g} %" if summary.seeds > 1 else seeds


def _missing(summary: Summary | None) -> str:
    return summary.status if summary is not None else "not run"


def _asked(summary: Summary) -> tuple[bool, str]:
    """Whether enough sequences were, of each seed, and what to say of them."""
    sequences, answers = summary.get("sequences"), summary.get("scored")
    said = f"; {answers:,.0f} answers a seed" if math.isfinite(answers) else ""
    enough = sequences >= SEQUENCES
    counted = f"{sequences:,.0f}" if math.isfinite(sequences) else "an unknown number of"
    return enough, said if enough else f"; {counted} sequences a seed of {SEQUENCES} wanted"


def _reached(summaries: Summaries, task: str, length: int, least: float, stretch: float, where: str,
             longest_trained: float = math.inf) -> Target:
    """LSH's accuracy at this length."""
    found = _lengths(summaries, task, "lsh", longest_trained).get(length)
    name = f"{TASKS[task]}, {where}" if where else TASKS[task]
    if found is None or not found.seeds:
        return _judge(name, "≥", least, stretch, NAN, "%", _missing(found))
    enough, said = _asked(found)
    detail = _seeds(found) + said
    rule, reached = found.shortcut
    detail += f"; a rule without a model has {_percent(reached):g} %: {rule}" if reached > found.mean else ""
    return _judge(name, "≥", least, stretch, _percent(found.mean), "%", detail,
                  found.seeds >= SEEDS and enough)


def _against_dense(summaries: Summaries, task: str) -> Target:
    """The largest lead of the better dense twin over LSH, in points, over every length where one has a value."""
    name = f"{TASKS[task]}, dense − LSH, every length where dense fits"
    of_task = [s for s in summaries if s.task == task]
    trained = [{s.trained_len for s in of_task if s.model in models} for models in (("lsh",), DENSE)]
    alike = trained_to([s for s in of_task if s.trained_len in trained[0] & trained[1]])
    alike = sorted((s for s in alike if s.seeds), key=lambda s: s.mean)  # of two the one with the higher mean counts
    lsh, dense = ({s.seq_len: s for s in alike if s.model in models} for models in (("lsh",), DENSE))
    leads = {length: round(100 * (dense[length].mean - lsh[length].mean), 6) for length in dense if length in lsh}
    if not leads:
        return _judge(name, "≤", 1, 0, NAN, "points", "no length with both")
    worst = max(leads, key=lambda length: (leads[length], length))
    left = sorted(dense.keys() - lsh.keys())
    detail = f"worst at {worst:,} of {len(leads)} lengths: dense {_range(dense[worst])}, LSH {_range(lsh[worst])}"
    detail += f"; LSH has no value at {_named(left)}" if left else ""
    full = {s.seq_len for s in of_task if s.model in DENSE and s.status == "out of memory"}
    gaps = [n for n in LENGTHS if n not in dense and n not in full]
    detail += f"; not measured at {_named(gaps)}" if gaps else ""
    seeds = min(s[n].seeds for s in (lsh, dense) for n in leads)
    detail += f"; at some length {_counted(seeds)}" if seeds < SEEDS else ""
    absent = [MODELS[model] for model in DENSE if model not in {s.model for s in alike}]
    detail += f"; not measured: {', '.join(absent)}" if absent else f"; the better one: {MODELS[dense[worst].model]}"
    enough, said = _asked(min((lsh[n] for n in leads), key=lambda s: s.get("sequences")))
    detail += "" if enough else said
    complete = seeds >= SEEDS and enough and not left and not gaps and not absent
    return _judge(name, "≤", 1, 0, leads[worst], "points", detail, complete)


def _range(summary: Summary) -> str:
    low, high = (f"{_percent(value):g}" for value in (summary.low, summary.high))
    return (f"{low} %" if low == high else f"{low} to {high} %") + f" ({_counted(summary.seeds)})"


def _named(lengths: Sequence[int]) -> str:
    return ", ".join(f"{length:,}" for length in lengths)


def _needle(summaries: Summaries, task: str) -> Target:
    """The lowest depth of any length; met only where it was measured at every length, at ten depths."""
    name = f"{TASKS[task]}, every depth and length to {LONGEST:,}"
    every = _lengths(summaries, task, "lsh")
    cells = {(length, depth): score for length, s in every.items() if length <= LONGEST
             for depth, score in s.by.get("depth", {}).items()}
    if not cells:
        return _judge(name, "≥", 98, 100, NAN, "%", "no accuracy by depth")
    length, depth = min(cells, key=lambda cell: (cells[cell], -cell[0], label_place(cell[1])))
    lengths = {length for length, _ in cells}
    gaps = [n for n in LENGTHS if sum(length == n for length, _ in cells) < DEPTHS]
    detail = f"worst at {length:,}, depth {depth}; {len(cells)} cells of {len(lengths)} lengths"
    sequences = every[length].get("sequences")
    detail += f", {sequences:g} sequences a length and seed" if math.isfinite(sequences) else ""
    detail += f"; fewer than {DEPTHS} depths at {_named(gaps)}" if gaps else ""
    seeds = min(every[n].seeds for n in lengths)
    detail += f"; {_counted(seeds)}"
    enough, said = _asked(min((every[n] for n in lengths), key=lambda s: s.get("sequences")))
    detail += "" if enough else said
    complete = not gaps and seeds >= SEEDS and enough
    return _judge(name, "≥", 98, 100, _percent(cells[length, depth]), "%", detail, complete)


def _duplication(summaries: Summaries, rounds: int) -> Target:
    """At 1,024 tokens, of a model trained with 4 rounds, by the rounds of the evaluation."""
    least, stretch = ROUNDS[rounds]
    name = f"{TASKS['duplication']}, 1,024 tokens, 4 rounds trained, {rounds} evaluated"
    mine = trained_to([s for s in summaries if (s.task, s.model, s.seq_len) == ("duplication", "lsh", 1024)])
    as_trained = [s for s in mine if not s.setting]
    if as_trained and as_trained[0].get("rounds") != 4:
        return _judge(name, "≥", least, stretch, NAN, "%", "not trained with 4 rounds")
    found = [s for s in mine if s.setting == f"rounds={rounds}"] or (as_trained if rounds == 4 else [])
    if not found or not found[0].seeds:
        return _judge(name, "≥", least, stretch, NAN, "%", _missing(found[0] if found else None))
    enough, said = _asked(found[0])
    return _judge(name, "≥", least, stretch, _percent(found[0].mean), "%", _seeds(found[0]) + said,
                  found[0].seeds >= SEEDS and enough)


def _scaling(benchmark: Benchmark | None) -> list[Target]:
    """The whole model's exponents, from the benchmark's own fits where those span 16,384 to LONGEST on a GPU of HOPPER.
    Of one sequence and of batches of fixed tokens, where both were measured, the worse is judged."""
    times, time_said = _fits(benchmark, "train_latency")
    sizes, size_said = _fits(benchmark, "memory")
    alpha = max((fit.upper for fit in times), default=NAN)
    beta = max((fit.exponent for fit in sizes), key=lambda exponent: abs(exponent - 1), default=NAN)
    least, stretch = (low <= beta <= high if sizes else None for low, high in ((0.95, 1.05), (0.98, 1.02)))
    return [
        _judge("whole model, α over 16k to 131k, upper 95 % bound", "≤", 1.15, 1.05, alpha, "", time_said),
        Target("whole model, β over 16k to 131k", "0.95 to 1.05", "0.98 to 1.02", beta, "", least, stretch, size_said),
    ]


def _fits(benchmark: Benchmark | None, measure: str) -> tuple[list[Fit], str]:
    """LSH's fits where they can be judged, and what to say of them."""
    fit = benchmark.fits.get(("lsh", measure)) if benchmark else None
    if benchmark is None or fit is None:
        return [], "no fit in this run's benchmark"
    if benchmark.device not in HOPPER:
        return [], f"measured on {benchmark.device}"
    tokens = benchmark.fixed_tokens
    full = tokens.fits.get(("lsh", measure)) if tokens else None
    if tokens and full is None:
        return [], "no fit at fixed tokens"
    fits = [fit, *([full] if full else [])]
    for each in fits:
        if each.min_seq_len < 16_384 or each.max_seq_len < LONGEST:
            return [], f"fitted over {each.min_seq_len:,.0f} to {each.max_seq_len:,.0f} tokens"
        if not math.isfinite(each.high):
            return [], "no interval: two lengths"
    said = f"{benchmark.device}: exponent {fit.exponent:.3f}, 95 % interval {fit.low:.3f} to {fit.high:.3f}"
    scaling = benchmark.scaling.get(("lsh", measure))
    part = scaling.fixed_part if scaling else None
    if part is not None:  # the other reading of the same points: what does not grow stands beside what does
        interval = f" ({part.low:.3f} to {part.high:.3f})" if math.isfinite(part.low) else ""
        said += f"; beside it, not judged: with a fixed part {part.exponent:.3f}{interval}"
    said += f"; the last doubling {fit.last_doubling:.2f} times"
    if tokens and full:  # where short lengths too fill the machine, no launch flatters
        said += f"; with up to {tokens.tokens:,.0f} tokens a batch " \
                f"{full.exponent:.3f} ({full.low:.3f} to {full.high:.3f})"
    rows = [row for one in (benchmark, tokens) if one for row in one.rows if row.attention == "lsh"]
    counts = [int(n) for row in rows if (n := row.get("n_processes")) > 0]
    if counts:  # three are what a claim should rest on
        said += f"; processes a case: {' to '.join(str(n) for n in dict.fromkeys((min(counts), max(counts))))}"
        said += f" of {PROCESSES} wanted" if min(counts) < PROCESSES else ""
    return fits, said
