"""Jobs side by side, in processes of their own: several a GPU, since small models leave it waiting."""

from __future__ import annotations

import math
import multiprocessing
import os
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

from lshv2.arena.study import Job, missing, rows_of, run_job


def visible_gpus() -> list[str]:
    """A CUDA_VISIBLE_DEVICES for each GPU that this process may use."""
    import torch

    count = torch.cuda.device_count()
    return (os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(count)))).split(",")[:count]


def run_pool(
    jobs: list[Job], folder: Path, gpus: list[str], time_limit: float = math.inf, command: str = "",
    on_done: Callable[[Job], None] = lambda job: None,
) -> int:
    """Run what is missing; returns how many jobs are left. gpus: one entry a process, "" for one on the CPU.

    time_limit: seconds after which no job is started. A job that fails is said and left; the others go on. on_done:
    called after each that ended, well or not.
    """
    rows = rows_of(folder)
    todo = in_order([job for job in jobs if missing(job, rows)])
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    for gpu in gpus:
        queue.put(gpu)
    deadline = time.time() + time_limit
    with ProcessPoolExecutor(len(gpus), context, _choose_gpu, (queue,)) as pool:
        futures = {pool.submit(_work, job, folder, deadline, command): job for job in todo}
        for future in as_completed(futures):
            job = futures[future]
            try:
                print(future.result(), flush=True)
            except Exception as error:
                print(f"FAILED {job.task} {job.model} seed {job.seed}: {type(error).__name__}: {error}", flush=True)
            on_done(job)
    rows = rows_of(folder)
    return sum(bool(missing(job, rows)) for job in jobs)


def in_order(jobs: list[Job]) -> list[Job]:
    """All of a seed before the next seed's; of a seed the longest (tokens trained, times layers) first, so that the
    last ones end together."""
    return sorted(jobs, key=lambda job: (job.seed, -job.recipe.steps * job.recipe.tokens * job.config.n_layers))


def _choose_gpu(queue: multiprocessing.Queue[str]) -> None:
    os.environ["CUDA_VISIBLE_DEVICES"] = queue.get()


def _work(job: Job, folder: Path, deadline: float, command: str) -> str:
    label = f"{job.task} {job.model} seed {job.seed}"
    if time.time() > deadline:
        return f"{label}: not started, the time is up"
    began, values, losses = time.monotonic(), list[str](), list[float]()
    run_job(job, folder, lambda line: values.append(line.rsplit(" ", 1)[1]), command,
            lambda step, loss: losses.append(loss))
    shown = " ".join(f"{loss:.4f}" for loss in losses[:: max(1, len(losses) // 8)])
    return f"{label}: {' '.join(values)}  ({time.monotonic() - began:.0f} s; losses on the way {shown})"
