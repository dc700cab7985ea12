"""One panel of an arena's pictures: scores by length or group, the quality curve, a needle's heat map.

What every panel has alike, the models and chance, is named once for the figure (`lshv2.arena_plots`); a panel's own
legend names the rest.
"""

from __future__ import annotations

import math
from itertools import cycle
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from lshv2.arena_results import ACCURACY, BITS, MODELS, TASKS, Summary, label_place
from lshv2.arena_views import (
    group_labels,
    grouped,
    levels,
    lines,
    quality_lines,
    quality_twins,
    shown_score,
)
from lshv2.axes import short
from lshv2.plots import COLOURS, MARKERS, REFERENCE, label, length_axis

GROUPS = {  # drawn at the longest length
    "hops": "hops", "position": "position, from (tokens)", "ponder_step": "ponder steps that the answer took",
}
RULES = (":", "--", "-.", (0, (1, 4)))  # of shortcuts
STYLES = ("-", "--", ":")  # of a model as trained, and of what its settings change
SHORTCUT, OTHER, ROUNDS = "#CC79A7", "#AA3377", ("#0072B2", "#56B4E9", "#AA3377", "#E69F00", "#555555", "#CC79A7")
SHARED = (*MODELS.values(), "chance")


def unit_of(metric: str) -> tuple[float, str]:
    """What a value is multiplied with, and the words for it."""
    return (100, "% right") if metric == ACCURACY else (1, "bits per byte" if metric == BITS else metric)


def style_of(s: Summary) -> dict[str, Any]:
    return {"color": COLOURS.get(s.model, OTHER), "marker": MARKERS.get(s.model, "D"), "markersize": 4}


def draw_lengths(axis: Axes, task: list[Summary], title: str) -> None:
    times, unit = unit_of(task[0].metric)
    for name, line in lines(task).items():
        x, middle, low, high = ([getattr(s, key) for s in line] for key in ("seq_len", "mean", "low", "high"))
        axis.plot(x, times * np.array(middle), linewidth=1.3, label=name, **style_of(line[0]))
        axis.fill_between(x, times * np.array(low), times * np.array(high), color=COLOURS.get(line[0].model, OTHER),
                          alpha=0.15, linewidth=0)
    found = levels(task)
    x = [level.seq_len for level in found]
    chance, shortcut = ([times * getattr(level, key) for level in found] for key in ("chance", "shortcut"))
    if len(x) == 1 and task[0].metric == ACCURACY:  # one length: room to say what each rule reaches
        rules = sorted(task[0].shortcuts.items(), key=lambda rule: -rule[1])
        for (rule, value), dashes in zip(rules, cycle(RULES)):
            axis.axhline(times * value, color=SHORTCUT, linestyle=dashes, linewidth=1.4,
                         label=f"{rule}: {shown_score(value, ACCURACY)}")
        axis.axhline(chance[0], color=REFERENCE, linestyle=":", linewidth=1.4, label="chance")
    elif task[0].metric != BITS:
        axis.plot(x, chance, color=REFERENCE, linestyle=":", linewidth=1.4, label="chance")
    if task[0].metric == ACCURACY:
        axis.set_ylim(-3, 103)
    known = [value for value in shortcut if math.isfinite(value)]
    if known and not (len(x) == 1 and task[0].metric == ACCURACY):
        names = {level.name for level in found if level.name}
        words = names.pop() if len(names) == 1 else "best shortcut"
        if task[0].metric == BITS:  # what knows next to nothing would press the models flat: said, not drawn to scale
            words += ": " + " to ".join(dict.fromkeys(shown_score(end(known), BITS) for end in (min, max)))
            bottom, top = axis.get_ylim()
            axis.set_ylim(min(bottom, min(known) - 0.02), top)  # one that beats them stays in sight
        axis.plot(x, shortcut, color=SHORTCUT, linestyle=":", linewidth=1.6, label=words)
    trained = sorted({int(s.trained_len) for s in task if s.trained_len > 0})
    for length in trained:
        axis.axvline(length, color=REFERENCE, linestyle="--", linewidth=0.9)
    length_axis(axis, [*x, *trained])
    label(axis, title + (f", trained at {', '.join(map(short, trained))} (dashed)" if trained else ""), "tokens", unit,
          elsewhere=SHARED)


def draw_group(axis: Axes, here: list[Summary], name: str) -> None:
    times, unit = unit_of(here[0].metric)
    shown = grouped(here, name)
    ticks = group_labels(shown.values(), name)
    settings = ["", *dict.fromkeys(s.setting for s in shown.values() if s.setting)]
    for title, s in shown.items():
        groups = s.by[name]
        axis.plot([ticks.index(tick) for tick in groups], times * np.array(list(groups.values())), linewidth=1.3,
                  linestyle=STYLES[settings.index(s.setting) % len(STYLES)], label=title, **style_of(s))
    chance = levels(here)[0].chance
    if here[0].metric == ACCURACY:
        axis.axhline(100 * chance, color=REFERENCE, linestyle=":", linewidth=1.4, label="chance")
        axis.set_ylim(-3, 103)
    if name == "position":  # an octave by where it begins
        begin = [label_place(tick)[0] for tick in ticks]
        ticks = [short(at) if math.isfinite(at) else tick for at, tick in zip(begin, ticks, strict=True)]
    axis.set_xticks(range(len(ticks)), ticks)
    crowded = len(ticks) > 10 or max(map(len, ticks), default=0) > 4
    axis.tick_params(axis="x", labelrotation=45 if crowded else 0)
    label(axis, f"{TASKS.get(here[0].task, here[0].task)} at {here[0].seq_len:,} tokens", GROUPS[name], unit,
          elsewhere=SHARED)


def draw_quality(axis: Axes, here: list[Summary], title: str) -> None:
    """LSH by keys a query, a line a number of rounds; twins as levels, or as lines where they were swept too."""
    times, unit = unit_of(here[0].metric)
    joined = [(name, line, ROUNDS[n % len(ROUNDS)]) for n, (name, line) in enumerate(quality_lines(here).items())]
    for name, line in quality_twins(here).items():
        colour = COLOURS.get(line[0].model, OTHER)
        if len({s.get("keys_a_query") for s in line}) > 1:
            joined.append((name, sorted(line, key=lambda s: s.get("keys_a_query")), colour))
        else:
            axis.axhline(times * line[0].mean, color=colour, linestyle="--", linewidth=1.3, label=name)
            axis.axhspan(times * line[0].low, times * line[0].high, color=colour, alpha=0.12, linewidth=0)
    keys = sorted({s.get("keys_a_query") for _, line, _ in joined for s in line})
    for name, line, colour in joined:
        middle = times * np.array([s.mean for s in line])
        spread = np.abs(times * np.array([[s.low for s in line], [s.high for s in line]]) - middle)
        axis.errorbar([s.get("keys_a_query") for s in line], middle, yerr=spread, color=colour, marker="o",
                      markersize=4, linewidth=1.3, capsize=2, label=name)
    axis.set_xscale("log", base=2)
    axis.set_xticks(keys, [f"{key:,.0f}" for key in keys])
    axis.set_xticks([], minor=True)
    label(axis, f"{title} at {here[0].seq_len:,} tokens", "keys a query", unit, beneath=True)


def draw_map(axis: Axes, line: list[Summary], title: str) -> None:
    """Grey: not measured."""
    depths = sorted({depth for s in line for depth in s.by.get("depth", {})}, key=label_place)
    cells = np.array([[s.by.get("depth", {}).get(depth, math.nan) for s in line] for depth in depths])
    metric = line[0].metric
    top = 1.0 if metric == ACCURACY else float(np.nanmax(cells))
    axis.imshow(cells, aspect="auto", cmap="Blues", vmin=0, vmax=top)
    for row, column in np.argwhere(np.isfinite(cells)):
        axis.text(column, row, shown_score(cells[row, column], metric).removesuffix(" %"), ha="center", va="center",
                  fontsize=7, color="white" if cells[row, column] > 0.55 * top else "#222222")
    axis.set_xticks(range(len(line)), [short(s.seq_len) for s in line])
    axis.set_yticks(range(len(depths)), depths)
    axis.set_facecolor("#CCCCCC")
    axis.grid(False)
    label(axis, title, "tokens", "depth of the needle")
