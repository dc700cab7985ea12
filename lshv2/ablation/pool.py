"""Jobs on every GPU at once: one process a GPU or several (one on a machine without), a finished job is one line of
a file.

`results.jsonl` is all the state there is: killed at any moment, a study loses the jobs that were running and no others,
and goes on from that file, on another machine too. The process that was started is its only writer. A worker that dies
or a job that fails is one line in `failures.jsonl`; the next start tries it again.

This module needs no torch; each worker imports it after its GPU has been chosen.
"""

from __future__ import annotations

import multiprocessing
import os
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection, wait
from pathlib import Path
from statistics import median
from typing import Any

from lshv2.ablation.variants import VARIANTS, Job
from lshv2.errors import UserError
from lshv2.runs import append_jsonl, read_jsonl

RESULTS, FAILURES = "results.jsonl", "failures.jsonl"
START_SECONDS = 15.0  # of a first job: importing torch, the context, kernels being compiled
# Seconds a step by kind, until a job of the kind has finished: measured through a dense mask on one H200 at 32,768
# tokens a step (dense 0.024, LSH 0.056), and guessed from there; recall's models are a fraction of that,
# depth's apply their blocks up to eight times instead of four.
FIRST_GUESS = {"dense": 0.025, "window": 0.03, "lsh": 0.06, "two_way": 0.12, "depth": 0.15}
RECALL_PART = 0.4


@dataclass
class _Worker:
    process: multiprocessing.process.BaseProcess
    pipe: Connection
    gpu: str | None
    job: Job | None = None
    finished: int = 0


def finished_rows(out: Path) -> list[dict[str, Any]]:
    """The rows of `results.jsonl`: of two of one variant, task and seed the later one; variants no longer known go."""
    rows, problem = read_jsonl(out / RESULTS)
    if problem and rows:
        print(problem)
    known = [row for row in rows if row["variant"] in VARIANTS]
    return list({(row["variant"], row["task"], row["seed"]): row for row in known}.values())


def check_settings(tiers: list[list[Job]], rows: list[dict[str, Any]]) -> None:
    """Raises UserError where rows of a planned task were measured with other settings: their means would be mixed."""
    for job in {job.task: job for tier in tiers for job in tier}.values():
        base = job.base()
        for row in (row for row in rows if row["task"] == job.task):
            full = replace(job, variant=row["variant"]).overrides()
            own, was = [key for key in full if full[key] != base.get(key, ...)], row["settings"]
            other = sorted(key for key in {*base, *was} - {*own} if base.get(key, ...) != was.get(key, ...))
            if other:
                raise UserError(
                    f"{RESULTS} has {row['variant']} on {row['task']} measured with {other[0]}={was.get(other[0])!r} "
                    f"instead of {base.get(other[0])!r}: give this study another folder, or the same settings"
                )


def is_done(job: Job, rows: list[dict[str, Any]]) -> bool:
    """Whether a row is of this job: the same variant, task and seed, with the same settings."""
    same = [row for row in rows if (row["variant"], row["task"], row["seed"]) == job.key]
    return any(row["settings"] == job.overrides() for row in same)


def estimate(job: Job, rows: list[dict[str, Any]]) -> float:
    """Seconds that the job will take: the median of those like it, by the step, else a first guess."""
    rates: dict[bool, list[float]] = {True: [], False: []}
    for row in rows:
        done = Job(row["variant"], row["task"], row["seed"], row["steps"])
        if (done.task, done.kind) == (job.task, job.kind):
            rates[done.variant == job.variant].append(row["seconds"] / row["steps"])
    best = rates[True] or rates[False]
    if best:
        return median(best) * job.steps
    return FIRST_GUESS[job.kind] * (RECALL_PART if job.task.startswith("recall") else 1.0) * job.steps


class _Queue:
    """What to run next: tiers in order, the longest job of a tier first, only what would end before the deadline."""

    def __init__(self, tiers: list[list[Job]], rows: list[dict[str, Any]], deadline: float) -> None:
        self.tiers = [[job for job in tier if not is_done(job, rows)] for tier in tiers]
        self.rows, self.deadline = rows, deadline

    def take(self, first: bool) -> Job | None:
        """The next job, or None; first: the worker has yet to start up."""
        left = self.deadline - time.monotonic() - (START_SECONDS if first else 0.0)
        for tier in self.tiers:
            fitting = [job for job in tier if estimate(job, self.rows) <= left]
            if fitting:
                job = max(fitting, key=lambda job: estimate(job, self.rows))  # of equal ones the first in the list
                tier.remove(job)
                return job
        return None


def run_pool(tiers: list[list[Job]], out: Path, data: Path, gpus: list[str | None], time_limit: float) -> int:
    """Run what is not done yet; returns how many jobs are left. Rows go to `out`, prepared data to `data`.

    gpus: a CUDA_VISIBLE_DEVICES for each worker, None for a worker on the CPU; where one stands twice, step times are
    not noted. time_limit: no job is started that would not end within so many seconds of the call.
    """
    rows = finished_rows(out)
    check_settings(tiers, rows)
    queue = _Queue(tiers, rows, time.monotonic() + time_limit)
    left = sum(map(len, queue.tiers))
    print(f"{left} jobs to run on {len(gpus)} worker(s), {len(queue.rows)} rows there", flush=True)
    alone = len(set(gpus)) == len(gpus)
    workers = [_start(gpu, data, alone) for gpu in gpus[:left]]
    _prepare(queue, data)  # while the workers import torch
    try:
        while workers:
            for worker in [worker for worker in workers if worker.job is None]:
                worker.job = queue.take(first=not worker.finished)
                if worker.job is None:
                    workers.remove(worker)
                    _stop(worker)
                else:
                    worker.pipe.send(worker.job)
            for worker in _answering(workers):
                if not _collect(worker, queue.rows, out):
                    workers[workers.index(worker)] = _start(worker.gpu, data, alone)
                    _stop(worker)
    finally:
        for worker in workers:
            _stop(worker)
    return sum(not is_done(job, queue.rows) for tier in tiers for job in tier)


def _prepare(queue: _Queue, data: Path) -> None:
    from lshv2.ablation.material import prepare

    for job in {job.task: job for tier in queue.tiers for job in tier}.values():
        prepare(data, job)


def _answering(workers: list[_Worker]) -> Iterator[_Worker]:
    """Workers that have an answer or have died; waits for the first."""
    ready = wait([worker.pipe for worker in workers]) if workers else []
    yield from [worker for worker in workers if worker.pipe in ready]


def _collect(worker: _Worker, rows: list[dict[str, Any]], out: Path) -> bool:
    """Write down what a worker answers; False when it is not there any more."""
    job, worker.job = worker.job, None
    assert job is not None
    name = f"{job.task} {job.variant} seed {job.seed}"
    try:
        row: dict[str, Any] = worker.pipe.recv()
    except (EOFError, OSError):
        worker.process.join()
        row = {"failed": f"the worker died with exit code {worker.process.exitcode}"}
    worker.finished += 1
    if "failed" in row:
        variant, task, seed = job.key
        append_jsonl(out / FAILURES, {"variant": variant, "task": task, "seed": seed, "time": time.time(), **row})
        print(f"FAILED {name}: {row['failed'].splitlines()[-1]}", flush=True)
        return "died" not in row["failed"]
    rows.append(row)
    append_jsonl(out / RESULTS, row)
    figures = {key: row[key] for key in ("bits_per_byte", "accuracy_1x", "accuracy_8x", "step_ms") if key in row}
    shown = "  ".join(f"{key} {value:.4g}" for key, value in figures.items() if value is not None)
    print(f"{name}: {shown}  backend {row['backend']}  {row['seconds']:.0f} s", flush=True)
    return True


def _start(gpu: str | None, data: Path, alone: bool) -> _Worker:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_work, args=(theirs, gpu, data, alone), daemon=True)
    process.start()
    theirs.close()  # else its end would never be seen
    return _Worker(process, ours, gpu)


def _stop(worker: _Worker) -> None:
    """Close the pipe, on which an idle worker ends, and end one that is busy."""
    worker.pipe.close()
    if worker.job is not None:
        worker.process.terminate()
    worker.process.join()


def _work(pipe: Connection, gpu: str | None, data: Path, alone: bool) -> None:
    os.environ["CUDA_VISIBLE_DEVICES"] = "" if gpu is None else gpu
    threading.Thread(target=_end_with_parent, daemon=True).start()
    from lshv2.ablation.job import run_job

    while True:
        try:
            job = pipe.recv()
        except EOFError:
            return
        try:
            answer = run_job(job, data, alone)
        except Exception as error:
            import traceback

            answer = {"failed": f"{traceback.format_exc()[-2000:]}\n{type(error).__name__}: {str(error)[:300]}"}
        pipe.send(answer)


def _end_with_parent() -> None:
    """A killed parent's workers would go on computing what nobody writes down."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
