"""The pictures beside an `arena.jsonl`, as PNG: scores by length and group, by keys a query, needles' heat maps.

    write_pictures(run_path)          # arena.png; where there are shapes arena_curve.png, and depths arena_needles.png

Same manner and colours as `lshv2.plots`; nothing is measured or fitted here.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from itertools import product
from pathlib import Path
from textwrap import wrap

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from lshv2.arena_panels import GROUPS, SHARED, draw_group, draw_lengths, draw_map, draw_quality
from lshv2.arena_results import CURVE, MODELS, NEEDLES, PICTURE, TASKS, Arena, Summary, place, read_arena
from lshv2.arena_views import grouped, lines, quality_lengths, trained_to
from lshv2.errors import UserError
from lshv2.runs import atomic_path

COLUMNS = 3
WIDTH = 4.9  # of a panel, in inches
TITLE_LETTERS = 12  # of the title's size, an inch
def write_pictures(run: Path) -> list[Path]:
    """The pictures that were written. Raises UserError where the folder has no usable `arena.jsonl`."""
    arena, problems = read_arena(run)
    if arena is None:
        raise UserError(f"{run}: no plot: {problems[0]}")
    figures = {PICTURE: draw_arena(arena), CURVE: draw_curve(arena), NEEDLES: draw_needles(arena)}
    written = []
    for name, figure in figures.items():
        if figure is None or not figure.axes:
            continue
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=110, metadata={"Software": None})
        with atomic_path(run / name) as temporary:
            temporary.write_bytes(buffer.getvalue())
        written.append(run / name)
    return written


def draw_arena(arena: Arena) -> Figure:
    """A panel a task by length, then hops and positions at the longest length."""
    panels: list[tuple[Callable[[Axes, list[Summary], str], None], list[Summary], str]] = []
    for task in arena.tasks:
        if as_trained := [s for s in arena.of(task) if s.seeds]:
            panels.append((draw_lengths, as_trained, TASKS.get(task, task)))
    for task in arena.tasks:
        for name in GROUPS:
            known = [s for s in arena.of(task, None) if s.by.get(name)]
            longest = [s for s in known if s.seq_len == max(s.seq_len for s in known)]
            if grouped(longest, name):
                panels.append((draw_group, longest, name))
    columns = min(COLUMNS, max(1, len(panels)))
    figure, axes = _grid(len(panels), columns)
    for axis, (draw, summaries, words) in zip(axes, panels, strict=True):
        draw(axis, summaries, words)
    drawn = {name: line for axis in axes
             for line, name in zip(*axis.get_legend_handles_labels(), strict=True) if name in SHARED}
    names = sorted(drawn, key=SHARED.index)
    figure.legend([drawn[name] for name in names], names, title=_wrapped(_about(arena), columns), title_fontsize=10,
                  loc="outside upper center", edgecolor="none", ncols=max(2, 2 * columns - 1))
    return figure


def draw_curve(arena: Arena) -> Figure | None:
    """The quality curve: a panel a task, scores by keys a query. None where LSH has no other shapes."""
    panels = []
    for task in arena.tasks:
        everything = trained_to(arena.of(task, None))
        if swept := quality_lengths(everything):
            here = [s for s in everything if s.seq_len == swept[-1] and s.seeds]
            panels.append((here, TASKS.get(task, task)))
    if not panels:
        return None
    origin = ", ".join(part for name in ("device", "dtype") for part in arena.origins(name))
    figure, axes = _grid(len(panels), len(panels), 4.4)
    figure.suptitle(_wrapped(f"{origin}; bars and bands: lowest to highest seed", len(panels)), fontsize=10)
    for axis, (here, words) in zip(axes, panels, strict=True):
        draw_quality(axis, here, words)
    return figure


def _about(arena: Arena) -> str:
    seeds = {s.seeds for s in arena.summaries if s.seeds and not s.setting}
    fewest, most = min(seeds, default=0), max(seeds, default=0)
    told = f"{fewest} to {most} seeds" if fewest < most else "one seed" if most == 1 else f"{most} seeds"
    origin = ", ".join(part for name in ("device", "dtype") for part in arena.origins(name))
    return f"{origin}; means over {told}, bands and bars: lowest to highest; dotted: chance, best shortcut"


def _wrapped(title: str, columns: int) -> str:
    return "\n".join(wrap(title, int(TITLE_LETTERS * WIDTH * columns)))


def _grid(panels: int, columns: int, height: float = 3.5) -> tuple[Figure, list[Axes]]:
    """Panels row by row; height: of one, in inches."""
    rows = max(1, math.ceil(panels / columns))
    figure = Figure(figsize=(WIDTH * columns, height * rows + 0.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = [figure.add_subplot(rows, columns, n + 1) for n in range(panels)]
    for axis in axes:
        axis.grid(True, color="#E5E5E5", linewidth=0.7)
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes


def draw_needles(arena: Arena) -> Figure | None:
    """A row a task with depths, a column a model; depth down, length across. None without any."""
    found = {task: {name: line for name, line in lines(trained_to(arena.of(task))).items()
                    if any("depth" in s.by for s in line)} for task in arena.tasks}
    rows = {task: maps for task, maps in found.items() if maps}
    present = {name: line[0].model for maps in rows.values() for name, line in maps.items()}
    models = sorted(present, key=lambda name: place(MODELS, present[name]))
    if not rows:
        return None
    figure, axes = _grid(len(rows) * len(models), len(models), 4.0)
    figure.suptitle(_wrapped(", ".join(arena.origins("device")) + "; % right by depth", len(models)), fontsize=10)
    for axis, (task, name) in zip(axes, product(rows, models), strict=True):
        words = f"{TASKS.get(task, task)}, {name}"
        if name in rows[task]:
            draw_map(axis, rows[task][name], words)
        else:
            axis.set_axis_off()
            axis.text(0.5, 0.5, f"{words}: not measured", ha="center", va="center", color="#555555")
    return figure


