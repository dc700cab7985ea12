"""The pictures beside an `arena.jsonl`: scores by length, group and keys a query, and the needles' heat maps, as PNG.

    write_pictures(run_path)          # arena.png, and arena_needles.png where there are depths

Same manner and colours as `lshv2.plots`; nothing is measured or fitted here.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from itertools import product
from pathlib import Path
from textwrap import wrap
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from lshv2.arena_results import (
    ACCURACY,
    BITS,
    MODELS,
    NEEDLES,
    PICTURE,
    TASKS,
    Arena,
    Summary,
    label_place,
    place,
    read_arena,
)
from lshv2.arena_views import (
    group_labels,
    grouped,
    levels,
    lines,
    quality_lengths,
    quality_lines,
    quality_twins,
    shown_score,
    trained_to,
)
from lshv2.axes import short
from lshv2.errors import UserError
from lshv2.plots import COLOURS, MARKERS, REFERENCE, label, length_axis
from lshv2.runs import atomic_path

COLUMNS = 3
TITLE_LETTERS = 12  # of the title's size, an inch
GROUPS = {  # drawn at the longest length
    "hops": "hops", "position": "position, from (tokens)", "ponder_step": "ponder steps that the answer took",
}
STYLES = ("-", "--", ":")  # of a model as trained, and of what its settings change
SHORTCUT, OTHER, ROUNDS = "#CC79A7", "#AA3377", ("#0072B2", "#56B4E9", "#AA3377", "#E69F00", "#555555", "#CC79A7")


def write_pictures(run: Path) -> list[Path]:
    """The pictures that were written. Raises UserError where the folder has no usable `arena.jsonl`."""
    arena, problems = read_arena(run)
    if arena is None:
        raise UserError(f"{run}: no plot: {problems[0]}")
    figures = {PICTURE: draw_arena(arena), NEEDLES: draw_needles(arena)}
    written = []
    for name, figure in figures.items():
        if figure is None:
            continue
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=110, metadata={"Software": None})
        with atomic_path(run / name) as temporary:
            temporary.write_bytes(buffer.getvalue())
        written.append(run / name)
    return written


def draw_arena(arena: Arena) -> Figure:
    """A panel a task by length, then hops and positions at the longest length, then the quality curves."""
    panels: list[tuple[Callable[[Axes, list[Summary], str], None], list[Summary], str]] = []
    for task in arena.tasks:
        if as_trained := [s for s in arena.of(task) if s.seeds]:
            panels.append((_draw_lengths, as_trained, TASKS.get(task, task)))
    for task in arena.tasks:
        for name in GROUPS:
            known = [s for s in arena.of(task, None) if s.by.get(name)]
            longest = [s for s in known if s.seq_len == max(s.seq_len for s in known)]
            if grouped(longest, name):
                panels.append((_draw_group, longest, name))
    for task in arena.tasks:
        everything = arena.of(task, None)
        if swept := quality_lengths(everything):
            here = [s for s in trained_to(everything) if s.seq_len == swept[-1] and s.seeds]
            panels.append((_draw_quality, here, TASKS.get(task, task)))
    figure, axes = _grid(len(panels), min(COLUMNS, max(1, len(panels))), _about(arena))
    for axis, (draw, summaries, words) in zip(axes, panels, strict=True):
        draw(axis, summaries, words)
    return figure


def _about(arena: Arena) -> str:
    seeds = {s.seeds for s in arena.summaries if s.seeds and not s.setting}
    fewest, most = min(seeds, default=0), max(seeds, default=0)
    told = f"{fewest} to {most} seeds" if fewest < most else "one seed" if most == 1 else f"{most} seeds"
    origin = ", ".join(part for name in ("device", "dtype") for part in arena.origins(name))
    return f"{origin}; means over {told}, bands and bars: lowest to highest; dotted: chance, best shortcut"


def _grid(panels: int, columns: int, title: str, size: tuple[float, float] = (4.9, 3.5)) -> tuple[Figure, list[Axes]]:
    rows = max(1, math.ceil(panels / columns))
    figure = Figure(figsize=(size[0] * columns, size[1] * rows + 0.6), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle("\n".join(wrap(title, int(TITLE_LETTERS * size[0] * columns))), fontsize=10, color="#333333")
    axes = [figure.add_subplot(rows, columns, n + 1) for n in range(panels)]
    for axis in axes:
        axis.grid(True, color="#E5E5E5", linewidth=0.7)
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _unit(metric: str) -> tuple[float, str]:
    """What a value is multiplied with, and the words for it."""
    return (100, "% right") if metric == ACCURACY else (1, "bits per byte" if metric == BITS else metric)


def _style(s: Summary) -> dict[str, Any]:
    return {"color": COLOURS.get(s.model, OTHER), "marker": MARKERS.get(s.model, "D"), "markersize": 4}


def _draw_lengths(axis: Axes, task: list[Summary], title: str) -> None:
    times, unit = _unit(task[0].metric)
    for name, line in lines(task).items():
        x, middle, low, high = ([getattr(s, key) for s in line] for key in ("seq_len", "mean", "low", "high"))
        axis.plot(x, times * np.array(middle), linewidth=1.3, label=name, **_style(line[0]))
        axis.fill_between(x, times * np.array(low), times * np.array(high), color=COLOURS.get(line[0].model, OTHER),
                          alpha=0.15, linewidth=0)
    found = levels(task)
    x = [level.seq_len for level in found]
    chance, shortcut = ([times * getattr(level, key) for level in found] for key in ("chance", "shortcut"))
    if task[0].metric != BITS:
        axis.plot(x, chance, color=REFERENCE, linestyle=":", linewidth=1.4, label="chance")
    if task[0].metric == ACCURACY:
        axis.set_ylim(-3, 103)
    known = [value for value in shortcut if math.isfinite(value)]
    if known:
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
    label(axis, title + (f", trained at {', '.join(map(short, trained))} (dashed)" if trained else ""), "tokens", unit)


def _draw_group(axis: Axes, here: list[Summary], name: str) -> None:
    times, unit = _unit(here[0].metric)
    shown = grouped(here, name)
    ticks = group_labels(shown.values(), name)
    settings = ["", *dict.fromkeys(s.setting for s in shown.values() if s.setting)]
    for title, s in shown.items():
        groups = s.by[name]
        axis.plot([ticks.index(tick) for tick in groups], times * np.array(list(groups.values())), linewidth=1.3,
                  linestyle=STYLES[settings.index(s.setting) % len(STYLES)], label=title, **_style(s))
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
    label(axis, f"{TASKS.get(here[0].task, here[0].task)} at {here[0].seq_len:,} tokens", GROUPS[name], unit)


def _draw_quality(axis: Axes, here: list[Summary], title: str) -> None:
    """LSH by keys a query, a line a number of rounds; twins as levels, or as lines where they were swept too."""
    times, unit = _unit(here[0].metric)
    joined = [(name, line, ROUNDS[n % len(ROUNDS)]) for n, (name, line) in enumerate(quality_lines(here).items())]
    keys = sorted({s.get("keys_a_query") for _, line, _ in joined for s in line})
    for name, line in quality_twins(here).items():
        colour = COLOURS.get(line[0].model, OTHER)
        if len({s.get("keys_a_query") for s in line}) > 1:
            joined.append((name, sorted(line, key=lambda s: s.get("keys_a_query")), colour))
        else:
            axis.axhline(times * line[0].mean, color=colour, linestyle="--", linewidth=1.3, label=name)
            axis.axhspan(times * line[0].low, times * line[0].high, color=colour, alpha=0.12, linewidth=0)
    for name, line, colour in joined:
        middle = times * np.array([s.mean for s in line])
        spread = np.abs(times * np.array([[s.low for s in line], [s.high for s in line]]) - middle)
        axis.errorbar([s.get("keys_a_query") for s in line], middle, yerr=spread, color=colour, marker="o",
                      markersize=4, linewidth=1.3, capsize=2, label=name)
    axis.set_xscale("log", base=2)
    axis.set_xticks(keys, [f"{key:,.0f}" for key in keys])
    axis.set_xticks([], minor=True)
    label(axis, f"{title} at {here[0].seq_len:,} tokens", "keys a query", unit, beneath=True)


def draw_needles(arena: Arena) -> Figure | None:
    """A row a task with depths, a column a model; depth down, length across. None without any."""
    found = {task: {name: line for name, line in lines(trained_to(arena.of(task))).items()
                    if any("depth" in s.by for s in line)} for task in arena.tasks}
    rows = {task: maps for task, maps in found.items() if maps}
    present = {name: line[0].model for maps in rows.values() for name, line in maps.items()}
    models = sorted(present, key=lambda name: place(MODELS, present[name]))
    if not rows:
        return None
    title = ", ".join(arena.origins("device")) + "; % right by depth"
    figure, axes = _grid(len(rows) * len(models), len(models), title, (4.9, 4.0))
    for axis, (task, name) in zip(axes, product(rows, models), strict=True):
        words = f"{TASKS.get(task, task)}, {name}"
        if name in rows[task]:
            _draw_map(axis, rows[task][name], words)
        else:
            axis.set_axis_off()
            axis.text(0.5, 0.5, f"{words}: not measured", ha="center", va="center", color="#555555")
    return figure


def _draw_map(axis: Axes, line: list[Summary], title: str) -> None:
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
