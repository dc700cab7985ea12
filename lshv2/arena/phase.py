"""Phase 04_arena: the study that a run's settings ask for."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lshv2.arena.job import run_job
from lshv2.arena.pool import run_pool, visible_gpus
from lshv2.arena.recipes import ATTENTIONS, Attention
from lshv2.arena.registry import load_plugins, task_names
from lshv2.arena.study import ARENA, Job, Row, missing, named, plan, rows_of, unfinished
from lshv2.arena.sweep import Point, job_of
from lshv2.arena.trial import try_draws
from lshv2.arena_plots import write_pictures
from lshv2.arena_results import summarise
from lshv2.config import Settings
from lshv2.errors import UserError
from lshv2.progress import Progress
from lshv2.runs import Run, atomic_path, read_json, read_jsonl, write_json

SUMMARY = "benchmark_summary.json"


def jobs_of(settings: Settings, attentions: Sequence[Attention] | None = None) -> list[Job]:
    """The study's jobs, or those of other attentions. Raises UserError for an unknown task, before anything is trained.
    """
    arena = settings.arena
    load_plugins(arena.plugins)
    seeds = range(settings.seed, settings.seed + arena.seeds)
    tasks, changes = arena.tasks or task_names(), _changes(settings)
    return plan(tasks, attentions or arena.attentions, seeds, arena.lengths, arena.small, arena.plugins, changes)


def check_arena(settings: Settings) -> list[Job]:
    """What will be trained. Raises UserError for what the settings ask and cannot be had, before any phase; sources are
    read in the phase."""
    jobs = jobs_of(settings)
    try_draws(jobs, None)
    return jobs


def _changes(settings: Settings) -> dict[str, Any]:
    """What the settings change in every recipe."""
    return {name: value for name in ("sequences", "steps") if (value := getattr(settings.arena, name)) is not None}


def run_arena(run: Run) -> list[dict[str, Any]]:
    """Train and judge what is missing; returns the rows, averaged over seeds (`lshv2.arena_results.summarise`).

    On GPUs jobs run side by side in processes of their own, else one after the other. Raises UserError when one failed.
    """
    began, jobs = time.time(), jobs_of(run.settings)
    _forget_replaced(run)
    todo = unfinished(jobs, run.path)
    if len(todo) < len(jobs):
        print(f"{len(jobs) - len(todo)} of {len(jobs)} models are trained and judged already")
    try_draws(todo, run.path / "arena")
    with Progress(run, "04_arena", "arena", sum(job.recipe.steps for job in todo), unit="step") as bar:
        if gpus := visible_gpus():
            run_pool(todo, run.path, gpus * run.settings.arena.jobs_a_gpu, command="make arena",
                     on_done=lambda job: bar.update(job.recipe.steps))
        else:
            for job in todo:
                _alone(run, job, bar)
    left = [job for job in jobs if missing(job, rows_of(run.path), began)]
    publish(run.path)
    if left:
        raise UserError(f"{len(left)} of {len(jobs)} models of the arena failed, see above: run the same command again")
    return summarise(list(rows_of(run.path).values()))


def _forget_replaced(run: Run) -> None:
    """Take out the lines of models that these settings train otherwise, of all seeds and twins of a task and trained
    length: beside the new ones they would be a second answer to one question. What else there is stays."""
    now = {(job.task, job.model, named(job, name), max(job.recipe.lengths)): job.trained_by
           for job in jobs_of(run.settings, ATTENTIONS) for name, _ in job.settings}
    kept, gone = list[Row](), list[Row]()
    for row in read_jsonl(run.path / ARENA)[0]:
        trained_by = row.get("trained_by")
        (kept if trained_by == now.get(_question(row), trained_by) else gone).append(row)
    if gone:
        with atomic_path(run.path / ARENA) as temporary:
            temporary.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")
        tasks = ", ".join(sorted({row["task"] for row in gone}))
        print(f"{len(gone)} lines of {tasks} are taken out: their models are trained otherwise now")


def _question(row: Row) -> tuple[Any, ...]:
    """What a line answers, whichever the sequences."""
    setting = re.sub(r"(^|, )sequences \d+$", "", str(row.get("setting")))
    return row.get("task"), row.get("model"), setting, row.get("trained_len")


def _alone(run: Run, job: Job, bar: Progress) -> None:
    done = 0

    def on_step(step: int, loss: float) -> None:
        nonlocal done
        bar.update(step - done, model=f"{job.task} {job.model}", loss=round(loss, 4))
        done = step

    run_job(job, run.path, command="make arena", on_step=on_step)
    bar.update(job.recipe.steps - done)


def job_of_point(settings: Settings, task: str, point: Point, seed: int) -> Job:
    """A point of the quality curve, at the run's lengths and sizes."""
    arena = settings.arena
    return job_of(point, task, seed, arena.lengths, arena.small, _changes(settings), arena.plugins)


def run_point(run: Run, task: str, point: Point, seed: int) -> list[dict[str, Any]]:
    """One point of the quality curve: its rows. What is there is not computed again."""
    job = job_of_point(run.settings, task, point, seed)
    if missing(job, rows_of(run.path)):
        try_draws([job], run.path / "arena")
    with Progress(run, "quality_point", point.label or point.attention, job.recipe.steps, unit="step") as bar:
        _alone(run, job, bar)
    publish(run.path)
    return [row for row in rows_of(run.path).values() if row.get("trained_as") == job.trained_as]


def publish(folder: Path) -> None:
    """Draw the pictures, and put the averages into the benchmark's summary where there is one."""
    if not (folder / ARENA).exists():
        return
    write_pictures(folder)
    summary = read_json(folder / SUMMARY)[0]
    if isinstance(summary, dict):
        write_json(folder / SUMMARY, {**summary, "arena": summarise(list(rows_of(folder).values()))})
