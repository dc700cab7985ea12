"""The quality curve: what is had for how many keys a query, over rounds x bucket size x cells.

    jobs = [job_of(point, "mqar", seed=0) for point in POINTS]

Every point trains models of its own, which differ in nothing else; where the task's own training is long, a lighter
one (`recipes.LIGHTER`). The dense level is the arena's own twin. Points of one line in the picture have the same
rounds; the window twins see as many keys, all of them the most recent. `make sweep` runs them through the notebook
`quality_point.ipynb`, one papermill execution each; `python -m lshv2.arena OUT --sweep` side by side on GPUs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from lshv2.arena.recipes import LIGHTER, Attention
from lshv2.arena.registry import get_task
from lshv2.arena.study import Job, plan, recipe_of
from lshv2.arena_results import LIGHTER_DENSE


@dataclass(frozen=True)
class Point:
    """One shape of attention. cells: in multiples of what the task's recipe has without its `lsh`. Dense attention has
    no shape."""

    attention: Attention
    rounds: int = 4
    bucket_size: int = 64
    cells: float = 1.0
    window: int = 64

    @property
    def label(self) -> str:
        """What its rows call it."""
        if self.attention == "dense":
            return ""
        if self.attention == "window":
            return f"window {self.window}"
        return f"R {self.rounds}, W {self.bucket_size}, cells x {self.cells:g}"


# 64, 128, 256 and 512 found keys beside a window of 64; the same numbers of keys, all recent; finer and coarser cells
POINTS: tuple[Point, ...] = (
    Point("dense"),
    *(Point("lsh", rounds, 64) for rounds in (4, 1, 2, 8)),
    *(Point("lsh", 4, size) for size in (16, 32, 128)), Point("lsh", 8, 32), Point("lsh", 1, 256),
    *(Point("lsh", cells=cells) for cells in (0.25, 4.0)),
    *(Point("window", window=64 + keys) for keys in (0, 64, 128, 256, 512)),
)
TASKS = ("mqar", "duplication", "bytes")


def job_of(
    point: Point, task: str, seed: int, lengths: Sequence[int] | None = None, small: bool = False,
    changes: dict[str, Any] | None = None, plugins: Sequence[str] = (),
) -> Job:
    """The point's model on a task; lengths: judged ones (None: the recipe's). changes, plugins: see `study.plan`."""
    if small:  # windows and buckets of a quarter, as the small recipes have them
        point = replace(point, bucket_size=point.bucket_size // 4, window=point.window // 4)
    lighter = LIGHTER.get(task, {}) if not small else {}
    label = point.label or (LIGHTER_DENSE if lighter else "")
    changed = {**lighter, **(changes or {})}
    job, = plan([task], (point.attention,), (seed,), lengths, small, plugins, changed, variants=False)
    own = replace(recipe_of(get_task(task), small), lsh={}).model(get_task(task).vocab_size, "lsh", 1)
    shape = {"n_rounds": point.rounds, "bucket_size": point.bucket_size, "window": point.window,
             "n_buckets": max(2, int(own.resolved_n_buckets * point.cells))}
    settings = {**job.recipe.settings, **(shape if point.label else {})}
    how = replace(job.recipe, settings=settings, lsh={})
    return replace(job, recipe=how, settings=(("", ()),), label=label)


def sweep_jobs(
    tasks: Sequence[str], seeds: Sequence[int], lengths: Sequence[int] | None = None, small: bool = False,
    changes: dict[str, Any] | None = None, plugins: Sequence[str] = (),
) -> list[Job]:
    """All points of all tasks, seed by seed."""
    return [job_of(point, task, seed, lengths, small, changes, plugins)
            for seed in seeds for task in tasks for point in POINTS]
