"""Which shape of LSH attention: the quality curve of all its tasks side by side, and what follows from it.

    for shape in shapes(arena): shape.label, shape.keys, shape.scores["mqar"], shape.advised

A shape is a number of rounds, a bucket size and a fineness of the cells, of which `lshv2.arena.sweep` trained models of
their own on every task. What is advised is a trade: where something has to be found a shape must come within a point of
the best one; of those that do each is advised that has fewer bits per byte than all with as many keys a query or fewer.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from lshv2.arena_results import ACCURACY, BITS, MODELS, TASKS, Arena, Summary, place
from lshv2.arena_targets import SEEDS
from lshv2.arena_views import counted, quality_lengths, quality_lines, quality_twins, spread, trained_to

WITHIN = 0.01  # of the best shape's accuracy
ABOUT = (  # what readers of the table have to know
    "R: rounds, W: bucket size, cells: in multiples of the curve's own number on a task (n_buckets in its rows); all "
    "see a window of 64 too, and have nothing else that a task's recipe gives to LSH alone (its cells and centroids). "
    "On duplication and text all have half of the steps of the models above, on duplication a shorter convolution too. "
    "Advised: within a point of the best shape where something is to be found, and fewer bits per byte than any such "
    "shape with as many keys or fewer; a lead where a task has fewer than three seeds. "
    "The package's default, four rounds with buckets of 128, is the usage guide's."
)


@dataclass(frozen=True)
class Shape:
    """label: as the rows' `setting`, or a twin's name. keys: that a query sees at most (inf: all). scores: by task."""

    label: str
    model: str
    keys: float
    scores: dict[str, Summary]
    advised: bool = False

    @property
    def seeds(self) -> int:
        """Of the task that has the fewest."""
        return min(s.seeds for s in self.scores.values())


def shapes(arena: Arena) -> list[Shape]:
    """LSH's shapes and their twins by keys a query, each at the longest length that its task's curve was judged at."""
    found: dict[tuple[str, str], dict[str, Summary]] = {}
    for task in swept(arena):
        here = _points(arena, task)
        for lines in (quality_lines(here), quality_twins(here)):
            for name, line in lines.items():
                for s in line:
                    label = s.setting if s.model in ("lsh", "window") else name
                    found.setdefault((s.model, label or name), {})[task] = s
    every = [Shape(label, model, _keys(scores), scores) for (model, label), scores in found.items()]
    advised = {shape.label for shape in _advised([shape for shape in every if shape.model == "lsh"])}
    order = sorted(every, key=lambda shape: (place(MODELS, shape.model), shape.keys, shape.label))
    return [replace(shape, advised=shape.label in advised) for shape in order]


def _keys(scores: dict[str, Summary]) -> float:
    keys = next(iter(scores.values())).get("keys_a_query")
    return keys if math.isfinite(keys) else math.inf


def swept(arena: Arena) -> list[str]:
    """Tasks with a quality curve of shapes that were trained each for itself."""
    return [task for task in arena.tasks if quality_lengths(_shaped(arena, task))]


def _shaped(arena: Arena, task: str) -> list[Summary]:
    return [s for s in trained_to(arena.of(task, None)) if s.setting.startswith("R ")]


def _points(arena: Arena, task: str) -> list[Summary]:
    longest = quality_lengths(_shaped(arena, task))[-1]
    return [s for s in trained_to(arena.of(task, None)) if s.seq_len == longest and s.seeds]


def _advised(lsh: Sequence[Shape]) -> list[Shape]:
    """Of shapes measured on every task: see the module. Without text the one with the fewest keys."""
    tasks = {task: s.metric for shape in lsh for task, s in shape.scores.items()}
    sure = [shape for shape in lsh if shape.scores.keys() == tasks.keys()]
    for task in (task for task, metric in tasks.items() if metric == ACCURACY):
        best = max((shape.scores[task].mean for shape in sure), default=0.0)
        sure = [shape for shape in sure if shape.scores[task].mean >= best - WITHIN]
    text = [task for task, metric in tasks.items() if metric == BITS]
    chosen: list[Shape] = []
    for shape in sorted(sure, key=lambda shape: (shape.keys, *(shape.scores[task].mean for task in text))):
        if not chosen or any(shape.scores[task].mean < min(c.scores[task].mean for c in chosen) for task in text):
            chosen.append(shape)
    return chosen


def shape_table(arena: Arena) -> list[list[str]]:
    """Cells with their heading: a line a shape, a column a task; [] without a quality curve."""
    tasks = swept(arena)
    if not tasks:
        return []
    every = shapes(arena)
    heads, usual = [], dict[str, int]()
    for task in tasks:
        of = [shape.scores[task] for shape in every if task in shape.scores]
        usual[task] = max({s.seeds for s in of}, key=[s.seeds for s in of].count)
        unit = "bits per byte, " if of[0].metric == BITS else ""
        heads.append(f"{TASKS.get(task, task)}: {unit}{of[0].seq_len:,} tokens, {counted(usual[task])}")
    table = [["shape", "advised", "keys a query", *heads]]
    for shape in every:
        name = f"LSH, {shape.label}" if shape.model == "lsh" else shape.label
        keys = f"{shape.keys:,.0f}" if math.isfinite(shape.keys) else "all"
        cells = [_cell(shape.scores.get(task), usual[task]) for task in tasks]
        table.append([name, ("yes" if shape.seeds >= SEEDS else "a lead") if shape.advised else "", keys, *cells])
    return table


def _cell(summary: Summary | None, usual: int) -> str:
    if summary is None:
        return "–"
    return spread(summary) + (f", {counted(summary.seeds)}" if summary.seeds != usual else "")
