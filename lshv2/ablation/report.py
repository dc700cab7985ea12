"""A study's files, drawn anew from its rows: `ablation.json`, `ablation.md`, `ablation.png`, and `ablation_depth.png`
where depths were compared.

    write_report(out)           # what `python -m lshv2.ablation OUT --report` does

Needs no torch. `ablation.json` is what the README's table is drawn from.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from lshv2.ablation import depth_summary
from lshv2.ablation.pool import finished_rows
from lshv2.ablation.summary import Rows, best_dense, layer_table, measures, statements, summarise, table
from lshv2.ablation.variants import VARIANTS
from lshv2.errors import UserError
from lshv2.plots import COLOURS, MARKERS, OTHER
from lshv2.runs import atomic_path, read_json, write_json

NAME = "ablation"
LEGEND = (
    "Mean over seeds (lowest to highest). Bits per byte of held-out text: lower is better; accuracy of recall: higher. "
    "*Mass* is the part of the softmax over all past keys that the visible ones hold, *top 32 far keys found* the part "
    "of the 32 heaviest keys outside the window that is visible: mean over layers and seeds (worst to best layer). "
    "Step times are left out where attention went through a T×T mask."
)


def write_report(out: Path, environment: dict[str, Any] | None = None) -> str:
    """Write the files from `out/results.jsonl`; returns the page. environment: of the machine that measured,
    None keeps what `ablation.json` says. Raises UserError where no job has finished."""
    rows = finished_rows(out)
    if not rows:
        raise UserError(f"{out} holds no finished job: run python -m lshv2.ablation {out} first")
    tasks = sorted({row["task"] for row in rows}, key=lambda task: (task.split("-")[0], int(task.split("-")[1])))
    summaries = {task: summarise(rows, task) for task in tasks}
    before = read_json(out / f"{NAME}.json")[0]
    if environment is None and isinstance(before, dict):
        environment = before.get("environment")
    slim = [{key: value for key, value in row.items() if key != "settings"} for row in rows]
    said = {task: statements(rows, task) for task in tasks}
    write_json(out / f"{NAME}.json", {
        "schema": 2, "environment": environment, "summaries": summaries, "statements": said, "rows": slim,
        "settings": {task: _shared(rows, task) for task in tasks},
        "variants": {name: vars(variant) for name, variant in VARIANTS.items()},
    })
    parts = [f"# Which attention?\n\n{LEGEND}"]
    for task in tasks:
        steps = sorted({row["steps"] for row in rows if row["task"] == task})
        backends = sorted({row["backend"] for row in rows if row["task"] == task})
        head = f"## {task}\n\n{', '.join(f'{n:,}' for n in steps)} steps; attention by {', '.join(backends)}."
        parts += [head, table(summaries[task], task), "\n".join(f"- {line}" for line in said[task])]
        if not task.startswith("depth"):
            parts += [f"What limits it on {task}, by layer (worst to best head):", layer_table(rows, task)]
    page = "\n\n".join(parts) + "\n"
    with atomic_path(out / f"{NAME}.md") as temporary:
        temporary.write_text(page, encoding="utf-8")
    depths = [task for task in tasks if task.startswith("depth")]
    figures = {NAME: draw(rows, tasks), **({f"{NAME}_depth": depth_summary.draw(rows, depths)} if depths else {})}
    for name, figure in figures.items():
        with atomic_path(out / f"{name}.png") as temporary:
            figure.savefig(temporary, format="png", dpi=110, metadata={"Software": None})
    return page


def _shared(rows: Rows, task: str) -> dict[str, Any]:
    """The settings that all rows of the task have in common; what differs is the variant's."""
    first, *others = [row["settings"] for row in rows if row["task"] == task]
    return {key: value for key, value in first.items() if all(other.get(key, ...) == value for other in others)}


def draw(rows: Rows, tasks: list[str]) -> Figure:
    """A panel a task: a point a seed, a line a variant with the best on top, the best dense twin's mean as a line."""
    panels = [(task, column) for task in tasks for column in _shown(task)]
    most = max(len({row["variant"] for row in rows if row["task"] == task}) for task in tasks)
    figure = Figure(figsize=(5.2 * len(panels), 1.3 + 0.28 * most), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle("One point a seed; the line is the best dense twin's mean", fontsize=10, color="#333333")
    for i, (task, column) in enumerate(panels):
        _panel(figure.add_subplot(1, len(panels), i + 1), rows, task, column)
    return figure


def _shown(task: str) -> tuple[str, ...]:
    return ("accuracy_1x", "accuracy_8x") if task.startswith("recall") else ("bits_per_byte",)


def _panel(axis: Axes, rows: Rows, task: str, column: str) -> None:
    summary = summarise(rows, task)
    names = [name for name in summary if column in summary[name]]
    for place, name in enumerate(names):
        values = [row[column] for row in rows if (row["task"], row["variant"]) == (task, name)]
        kind = VARIANTS[name].attention
        axis.plot(values, [place] * len(values), MARKERS.get(kind, "o"), color=COLOURS.get(kind, OTHER), markersize=5)
    dense = best_dense(summary)
    if dense is not None and math.isfinite(summary[dense].get(column, math.nan)):
        axis.axvline(summary[dense][column], color=COLOURS["dense"], linewidth=1, linestyle="--")
    axis.set_yticks(range(len(names)), names, fontsize=8)
    axis.invert_yaxis()
    axis.set_title(f"{task}: {column.replace('_', ' ')} ({measures(task)[column]})", fontsize=9)
    axis.grid(True, axis="x", color="#E5E5E5", linewidth=0.7)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)
