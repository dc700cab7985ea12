"""`make sweep`: the quality curve, one papermill execution of `quality_point.ipynb` for each point.

What is there already (`arena.jsonl`) is not computed again: a sweep that was killed goes on. The executed notebooks lie
in `notebooks/sweep/` of the run folder, the curve in `arena_curve.png`.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from lshv2.arena.phase import job_of_point
from lshv2.arena.study import missing, rows_of, training_flops, unfinished
from lshv2.arena.sweep import POINTS, TASKS, Point
from lshv2.arena.trial import try_draws
from lshv2.errors import UserError
from lshv2.estimate import check_arena_time
from lshv2.presets import make_settings
from lshv2.runner.execute import execute
from lshv2.runs import hold, open_run, repo_root

NOTEBOOK = "quality_point"


def run_sweep(
    run_dir: Path, command: str, points: tuple[Point, ...] = POINTS, yes: bool = False, **settings: Any
) -> int:
    """Execute what is missing, point by point; exit code. yes: however long it takes. settings: of `open_run`.

    Tasks are those of `arena.tasks` among the overrides; else laptop sizes have duplication alone, others all of
    `lshv2.arena.sweep.TASKS`. Raises UserError on bad settings, before anything is written.
    """
    planned = make_settings(**settings)
    given = planned.arena.tasks if "arena.tasks" in settings.get("overrides", {}) else ()  # a preset's are the arena's
    tasks = given or (("duplication",) if planned.arena.small else TASKS)
    every = [(task, point, seed) for seed in range(planned.seed, planned.seed + planned.arena.seeds)
             for task in tasks for point in points]
    jobs = [job_of_point(planned, *one) for one in every]
    try_draws(jobs, None)
    if not yes:
        todo = unfinished(jobs, run_dir)
        small = "" if planned.arena.small else "PRESET=quick"
        check_arena_time(training_flops(todo), len(todo), command=command, small=small)
    run = open_run(run_dir, **settings)
    with hold(run.path, command):
        (run.path / "notebooks" / "sweep").mkdir(parents=True, exist_ok=True)
        for number, (job, (task, point, seed)) in enumerate(zip(jobs, every, strict=True), 1):
            head = f"{number} of {len(every)}: {task}, {point.label or point.attention}, seed {seed}"
            if not missing(job, rows_of(run.path)):
                print(f"{head}: there", flush=True)
                continue
            parameters = {"run_dir": str(run.path), **settings, "seed": seed, "task": task, **asdict(point)}
            output = run.path / "notebooks" / "sweep" / f"{number:03d}-{task}-{seed}.ipynb"
            notebook = repo_root() / "notebooks" / f"{NOTEBOOK}.ipynb"
            with open(run.log("sweep"), "a", encoding="utf-8") as log:
                failure = execute(notebook, parameters, output, log, lambda: None)
            if failure and failure.user_error:
                raise UserError(failure.error)
            if failure:
                print(f"{head}: FAILED\n{failure.excerpt or failure.error}\n  to go on: {command}", flush=True)
                return 1
            print(f"{head}: ok", flush=True)
    print(f"the curve: {run.path / 'arena_curve.png'}; next: make dashboard")
    return 0
