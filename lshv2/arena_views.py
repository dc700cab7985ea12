"""An arena as pictures, dashboard and README show it: which results join to a line, what needs no model, the wording.

    for name, line in lines(arena.of("mqar")).items(): plot([s.seq_len for s in line], [s.mean for s in line], name)
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from lshv2.arena_results import (
    ACCURACY,
    BITS,
    LIGHTER_DENSE,
    MODELS,
    TASKS,
    Arena,
    Summary,
    label_place,
    mean,
    place,
)
from lshv2.tolerant import NAN


def trained_to(summaries: Sequence[Summary], longest: float = math.inf) -> list[Summary]:
    """Those of the longest trained length up to `longest`; of an unknown one only where any will do."""
    known = {s.trained_len for s in summaries if s.trained_len <= longest}
    if known:
        return [s for s in summaries if s.trained_len == max(known)]
    return list(summaries) if longest == math.inf else []


def lines(summaries: Sequence[Summary]) -> dict[str, list[Summary]]:
    """Name -> what one line joins, by length: a line a model, and a trained length where there are several."""
    several = len({s.trained_len for s in summaries if math.isfinite(s.trained_len)}) > 1
    found: dict[str, list[Summary]] = {}
    for s in sorted(summaries, key=lambda s: (place(MODELS, s.model), s.seq_len)):
        trained = f", trained at {s.trained_len:,.0f}" if several and math.isfinite(s.trained_len) else ""
        found.setdefault(MODELS.get(s.model, s.model) + trained, []).append(s)
    return found


# Groups that other trainings and askings are shown by too: controls tell why long chains fail, and only a model that
# ponders has ponder steps.
BY_SETTING = ("hops", "ponder_step")


def grouped(summaries: Sequence[Summary], name: str) -> dict[str, Summary]:
    """Of one length: name -> what has this grouping, a model a line; of `BY_SETTING` a setting too."""
    found = {}
    for s in sorted(trained_to(summaries), key=lambda s: (s.setting != "", place(MODELS, s.model))):
        if s.by.get(name) and (not s.setting or name in BY_SETTING):
            found[MODELS.get(s.model, s.model) + (f", {s.setting}" if s.setting else "")] = s
    return found


def group_labels(summaries: Iterable[Summary], name: str) -> list[str]:
    """All labels of one grouping, in order: one model may lack what another has."""
    return sorted({label for s in summaries for label in s.by.get(name, {})}, key=label_place)


@dataclass(frozen=True)
class Level:
    """What needs no model at one length: guessing, and the strongest shortcut."""

    seq_len: int
    chance: float
    name: str
    shortcut: float


def levels(summaries: Sequence[Summary]) -> list[Level]:
    """Of one task by length, over all its models and settings."""
    found = []
    for length in sorted({s.seq_len for s in summaries}):
        here = [s for s in summaries if s.seq_len == length]
        best = min if here[0].metric == BITS else max
        known = [s.shortcut for s in here if s.shortcuts]
        name, shortcut = best(known, key=lambda item: item[1], default=("", NAN))
        found.append(Level(length, mean(s.chance for s in here), name, shortcut))
    return found


def quality_lengths(summaries: Sequence[Summary]) -> list[int]:
    """Lengths of one task at which LSH was evaluated with different numbers of keys a query."""
    seen: dict[int, set[float]] = {}
    for s in summaries:
        if s.model == "lsh" and s.seeds and s.get("keys_a_query") > 0:
            seen.setdefault(s.seq_len, set()).add(s.get("keys_a_query"))
    return sorted(length for length, keys in seen.items() if len(keys) > 1)


def quality_lines(summaries: Sequence[Summary]) -> dict[str, list[Summary]]:
    """Of LSH at one length: name -> what one line joins, by keys a query: a line a number of rounds, and of cells.

    Where shapes of attention were trained each for itself, those alone: what one model does when asked with other
    rounds than it was trained with is another question.
    """
    lsh = [s for s in summaries if s.model == "lsh" and s.seeds and s.get("keys_a_query") > 0]
    lsh = [s for s in lsh if s.setting.startswith("R ")] or lsh
    cells = [s.get("n_buckets") for s in lsh]
    usual = max(set(cells), key=cells.count, default=NAN)
    found: dict[str, list[Summary]] = {}
    for s in sorted(lsh, key=lambda s: (s.get("rounds"), s.get("n_buckets"), s.get("keys_a_query"))):
        other = s.get("n_buckets") != usual and math.isfinite(s.get("n_buckets"))
        name = f"LSH, rounds {s.get('rounds'):g}" + (f", {s.get('n_buckets'):,.0f} cells" if other else "")
        found.setdefault(name, []).append(s)
    return found


def quality_twins(summaries: Sequence[Summary]) -> dict[str, list[Summary]]:
    """What LSH's lines are compared with, by model: of each the twins that were trained for the curve, where there are
    any; none that was trained for more or fewer steps than its points."""
    steps = {s.get("steps") for line in quality_lines(summaries).values() for s in line}
    alike = [s for s in summaries if s.get("steps") in steps or not math.isfinite(s.get("steps"))]
    twins = [s for s in alike if s.model != "lsh"]
    own = [s for s in twins if s.setting.startswith("window ") or s.setting == LIGHTER_DENSE]
    swept = {s.model for s in own}
    return lines([s for s in twins if (s in own if s.model in swept else not s.setting)])


def shown_score(value: float, metric: str) -> str:
    """`99.1 %`, or `1.234` of bits per byte; "" where not measured. Nothing below 100 % is rounded to it."""
    if not math.isfinite(value):
        return ""
    if metric != ACCURACY:
        return f"{value:.3f}"
    percent = 100 * value
    if 99 <= percent < 100:
        return f"{math.floor(round(100 * percent, 6)) / 100:.2f} %"
    digits = "2g" if percent < 1 else "0f" if percent == 100 else "1f"
    return f"{percent:.{digits}} %"


def counted(seeds: int) -> str:
    return f"{seeds} seed{'' if seeds == 1 else 's'}"


def seed_range(summaries: Iterable[Summary]) -> str:
    """`3`, or `3 to 6` where not all have as many."""
    return span(s.seeds for s in summaries)


def span(counts: Iterable[int]) -> str:
    """`3`, or `3 to 6`; zeros are left out."""
    seen = sorted(set(counts) - {0} or {0})
    return f"{seen[0]} to {seen[-1]}" if len(seen) > 1 else str(seen[0])


def spread(summary: Summary) -> str:
    """`99.1 % (98.2 % to 99.9 %)`: mean, lowest and highest seed; without the range where it shows nothing."""
    middle, low, high = (shown_score(value, summary.metric) for value in (summary.mean, summary.low, summary.high))
    return middle if low == high else f"{middle} ({low.removesuffix(' %')} to {high})"


def score_table(arena: Arena) -> list[list[str]]:
    """Cells with their heading: a line a task and model as trained, a column a length, chance and best shortcut."""
    as_trained = [s for s in arena.summaries if not s.setting]
    asked = {length: {s.task for s in as_trained if s.seq_len == length} for length in {s.seq_len for s in as_trained}}
    # a length of one task alone has no column where others have: it stands in the nearest one's, named
    shared = sorted(length for length, tasks in asked.items() if len(tasks) > 1)
    lengths = shared or sorted(asked)
    columns = [f"{length:,}" for length in lengths]
    table = [["task", "model", "seeds", "keys a query", *columns, "chance", "best shortcut"]]
    for task in arena.tasks:
        mine = arena.of(task)
        for n, (name, line) in enumerate(lines(mine).items()):
            told: dict[int, list[str]] = {}
            for s in line:
                column = min(lengths, key=lambda n: abs(n - s.seq_len))
                own = "" if column == s.seq_len else f" at {s.seq_len:,}"
                told.setdefault(column, []).append((spread(s) or s.status) + own)
            cells = {column: "; ".join(values) for column, values in told.items()}
            table.append(["" if n else task_named(mine), name, seed_range(line), keys_shown(line[0]),
                          *(cells.get(length, "–") for length in lengths), *(("", "") if n else _extremes(mine))])
    return table


def cost_table(arena: Arena) -> list[list[str]]:
    """Cells with their heading: what a forward pass of one sequence costs each model, as trained, at the longest length
    at which LSH was timed; [] where nothing was."""
    table = [["task", "tokens", "model", "keys a query", "seeds", "ms", "MB beyond the weights"]]
    for task in arena.tasks:
        timed = [s for s in trained_to(arena.of(task, None)) if math.isfinite(s.get("forward_ms"))
                 and s.setting in ("", "sequences 1")]  # whatever it was asked, as trained
        longest = max((s.seq_len for s in timed if s.model == "lsh"), default=0)
        here = [line[0] for line in lines([s for s in timed if s.seq_len == longest]).values()]
        for n, s in enumerate(here):
            memory, times = s.get("forward_mb"), _times(arena, s)
            low, high = (f"{bound:,.4g}" for bound in (min(times), max(times)))
            table.append(["" if n else TASKS.get(task, task), "" if n else f"{longest:,}", MODELS.get(s.model, s.model),
                          keys_shown(s), str(len(times)),
                          f"{mean(times):,.4g}" + (f" ({low} to {high})" if low != high else ""),
                          f"{memory:,.4g}" if math.isfinite(memory) else "not measured"])
    return table if len(table) > 1 else []


def _times(arena: Arena, summary: Summary) -> list[float]:
    """Milliseconds of a forward pass, of each seed that was timed."""
    what = (summary.task, summary.model, summary.trained_len, summary.seq_len, summary.setting)
    rows = [row for row in arena.rows if (row.task, row.model, row.trained_len, row.seq_len, row.setting) == what]
    return [ms for row in rows if math.isfinite(ms := row.values.get("forward_ms", NAN))]


def keys_shown(summary: Summary) -> str:
    """What a query sees at most: accuracy is bought with it."""
    keys = summary.get("keys_a_query")
    return f"{keys:,.0f}" if math.isfinite(keys) else "all" if summary.model.startswith("dense") else "–"


def task_named(task: Sequence[Summary]) -> str:
    """`MQAR, 64 pairs, trained at 2,048`."""
    name = TASKS.get(task[0].task, task[0].task)
    trained = {s.trained_len for s in task if math.isfinite(s.trained_len)}
    ends = any(s.by.get("part") for s in task)  # of windows that end alike
    about = ["bits per byte" + " of the last 512" * ends] * (task[0].metric == BITS)
    about += [f"trained at {length:,.0f}" for length in trained if len(trained) == 1]
    return ", ".join([name, *about])


def _extremes(task: Sequence[Summary]) -> tuple[str, str]:
    """Chance and shortcut at the length where they reach most; of one length alone, every rule."""
    found, metric = levels(task), task[0].metric
    best = min if metric == BITS else max
    chances = [level.chance for level in found if math.isfinite(level.chance)]
    shortcuts = [(level.shortcut, level.name) for level in found if level.name]
    value, name = best(shortcuts, default=(NAN, ""))
    chance = shown_score(best(chances), metric) if chances else "–"
    if len(found) == 1:  # as ListOps is judged: each rule says how much of it is a lookup
        rules = sorted(task[0].shortcuts.items(), key=lambda rule: rule[1], reverse=best is max)
        return chance, ", ".join(f"{shown_score(rule[1], metric)} ({rule[0]})" for rule in rules) or "–"
    return chance, f"{shown_score(value, metric)} ({name})" if name else "–"
