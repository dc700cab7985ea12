"""What the parity task's runs say, as a table and a picture: `python -m lshv2.parity` writes it, the README shows it.

    content, problems = read_object(folder, "parity.json")
    table(content["runs"]); draw(content["runs"]).savefig("parity.png")
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from statistics import mean
from typing import Any

from matplotlib.figure import Figure

from lshv2.plots import EVAL, TRAIN, label, new_figure

NAME = "parity"
SHOWN = 5  # numbers of non-zero elements whose steps are told
Runs = Sequence[dict[str, Any]]


def by_task(runs: Runs) -> dict[str, list[dict[str, Any]]]:
    """Runs that differ in their seed alone, by what they are: the task, its size, the network, the device; numbered
    where others have the same name."""
    alike: dict[str, list[dict[str, Any]]] = {}
    for run in runs:
        how = {key: value for key, value in run["settings"].items() if key != "seed"}
        alike.setdefault(json.dumps([how, run["device"]], sort_keys=True), []).append(run)
    found: dict[str, list[dict[str, Any]]] = {}
    for mine in alike.values():
        how = mine[0]["settings"]
        network = f"reads {how['look']} elements a step" if how["look"] else "sees all elements"
        varied = ", steps vary" if how["vary_steps"] else ""
        name = f"{how['task']}, {how['size']} elements; {network}{varied}; {mine[0]['device']}"
        others = sum(other.startswith(name) for other in found)
        found[f"{name} ({others + 1})" if others else name] = mine
    return found


def table(runs: Runs) -> list[list[str]]:
    """Cells with their heading: a line a task and network. Accuracies are rounded down: only 1 is shown as 1."""
    cells = [["task; network; device", "seeds", "accuracy where tested", "non-zero elements: mean ponder steps"]]
    for name, mine in by_task(runs).items():
        tested = [run["tested"]["accuracy"] for run in mine]
        counts = [row["nonzero"] for row in mine[0]["by_nonzero"]]
        told = [counts[n * (len(counts) - 1) // (SHOWN - 1)] for n in range(SHOWN)]
        steps = [f"{k}: {mean(run['by_nonzero'][counts.index(k)]['steps'] for run in mine):.1f}" for k in told]
        three = (mean(tested), min(tested), max(tested))
        middle, low, high = (f"{math.floor(1e4 * value) / 1e4:.4f}" for value in three)
        told_accuracy = f"{middle} ({low} to {high})" if len(mine) > 1 else middle
        cells.append([name, str(len(mine)), told_accuracy, ", ".join(steps)])
    return cells


def draw(runs: Runs) -> Figure:
    """A column a task and network: accuracy above, ponder steps below, a line a seed; shaded: what training had."""
    groups = by_task(runs)
    figure, axes = new_figure(len(groups), "PonderNet's parity task: a line a seed; shaded: where trained", rows=2)
    for column, (name, mine) in enumerate(groups.items()):
        for row, (key, words, colour) in enumerate((("accuracy", "accuracy", TRAIN), ("steps", "ponder steps", EVAL))):
            axis = axes[row * len(groups) + column]
            for run in mine:
                axis.plot([one["nonzero"] for one in run["by_nonzero"]], [one[key] for one in run["by_nonzero"]],
                          color=colour, linewidth=1, alpha=0.7)
            how = mine[0]["settings"]
            axis.axvspan(1, how["size"] // 2 if how["task"] == "extrapolation" else how["size"], color="#EEEEEE")
            axis.set_ylim(bottom=0)
            label(axis, name if row == 0 else "", "non-zero elements", words)
    return figure
