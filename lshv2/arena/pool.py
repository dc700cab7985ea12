"""Jobs side by side, in processes of their own: several a GPU, since small models leave it waiting."""

from __future__ import annotations

import math
import multiprocessing
import os
import queue
import signal
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from contextlib import suppress
from pathlib import Path
from typing import Any

from lshv2.arena.job import run_job, shown
from lshv2.arena.registry import get_task
from lshv2.arena.study import Job, Row, missing, rows_of
from lshv2.stopping import end_with_parent

INTERRUPTED = 130
_working = False  # in a process of a slot: whether it has a job


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
    called after each that ended, well or not. What failed beside other jobs, as for want of memory, is tried once more
    alone on its GPU.
    """
    began = time.time()
    deadline = began + time_limit
    _pass(jobs, folder, gpus, deadline, command, on_done)
    alone = list(dict.fromkeys(gpus))
    if len(alone) < len(gpus) and time.time() < deadline:
        rows = rows_of(folder)
        _pass([job for job in jobs if missing(job, rows, began)], folder, alone, deadline, command)
    rows = rows_of(folder)
    return sum(bool(missing(job, rows, began)) for job in jobs)


def _pass(
    jobs: list[Job], folder: Path, gpus: list[str], deadline: float, command: str,
    on_done: Callable[[Job], None] = lambda job: None,
) -> None:
    """Each slot is a thread here with a process of its own, so that one that dies takes no other's job with it."""
    rows = rows_of(folder)
    slots: queue.Queue[_Slot] = queue.Queue()
    for gpu in gpus:
        slots.put(_Slot(gpu, shared=gpus.count(gpu) > 1))

    def run(job: Job) -> str:
        slot = slots.get()
        try:
            return slot.run(_work, job, folder, deadline, command, slot.shared)
        finally:
            slots.put(slot)

    pool = ThreadPoolExecutor(len(gpus))
    futures = {pool.submit(run, job): job for job in in_order([job for job in jobs if missing(job, rows)])}
    try:
        for future in as_completed(futures):
            job = futures[future]
            try:
                print(future.result(), flush=True)
            except Exception as error:
                print(f"FAILED {job.task} {job.model} seed {job.seed}: {type(error).__name__}: {error}", flush=True)
            on_done(job)
    except KeyboardInterrupt:  # a terminal's reaches the processes by itself, a `kill` does not
        for process in multiprocessing.active_children():
            with suppress(ProcessLookupError):
                os.kill(process.pid or 0, signal.SIGINT)
        raise
    finally:  # after an interrupt nothing that waits begins
        pool.shutdown(cancel_futures=True)
        while not slots.empty():
            slots.get().end()


class _Slot:
    """A process with one GPU to see, made anew after a failure: an error of CUDA's stays with the process it met."""

    def __init__(self, gpu: str, shared: bool) -> None:
        self.gpu, self.shared = gpu, shared
        self.process: ProcessPoolExecutor | None = None

    def run(self, work: Callable[..., str], *arguments: Any) -> str:
        if self.process is None:
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # of this thread, and so of what it starts
            self.process = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), _choose_gpu, (self.gpu,))
        try:
            return self.process.submit(_do, work, *arguments).result()
        except SystemExit as error:  # which would end the command, not the job
            self.end()
            raise RuntimeError("a signal ended its process") from error
        except Exception:
            self.end()
            raise

    def end(self) -> None:
        if self.process is not None:
            self.process.shutdown()
        self.process = None


def in_order(jobs: list[Job]) -> list[Job]:
    """All of a seed before the next seed's; of a seed the longest (tokens trained, times layers) first, so that the
    last ones end together."""
    return sorted(jobs, key=lambda job: (job.seed, -job.recipe.steps * job.recipe.tokens * job.config.n_layers))


def _choose_gpu(gpu: str) -> None:
    """How a process begins. An interrupt ends it without a word: at once while nothing is done, else as an exception,
    so that what the job started ends too."""
    os.environ["CUDA_VISIBLE_DEVICES"] = gpu
    heard = signal.getsignal(signal.SIGINT) is not signal.SIG_IGN  # else started to go on all the same, as by nohup
    signal.signal(signal.SIGINT, _leave if heard else signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    signal.signal(signal.SIGTERM, _leave)
    end_with_parent()


def _leave(*_: Any) -> None:
    if not _working:  # else concurrent.futures would take it for a failure of sending a result, and wait for more
        os._exit(INTERRUPTED)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    sys.exit(INTERRUPTED)


def _do(work: Callable[..., str], *arguments: Any) -> str:
    global _working
    _working = True
    try:
        return work(*arguments)
    finally:
        _working = False


def _work(job: Job, folder: Path, deadline: float, command: str, shared: bool) -> str:
    label = f"{job.task} {job.model} seed {job.seed}"
    if time.time() > deadline:
        return f"{label}: not started, the time is up"
    print(f"{label}: begins, {job.recipe.steps:,} steps to train or what is left of them", flush=True)
    began, values, losses = time.monotonic(), list[str](), list[float]()
    run_job(job, folder, lambda row: values.append(_told(row)), command,
            lambda step, loss: losses.append(loss), shared)
    curve = " ".join(f"{loss:.4f}" for loss in losses[:: max(1, len(losses) // 8)])
    values_at = f"{get_task(job.task).metric} at {', '.join(values)}"
    return f"{label}, {values_at}  ({time.monotonic() - began:.0f} s; losses on the way {curve})"


def _told(row: Row) -> str:
    """`1,024: 0.9990`, or `1,024 (rounds=1): 0.9500` of what was asked otherwise than it was trained."""
    setting = f" ({row['setting']})" if row["setting"] else ""
    return f"{row['seq_len']:,}{setting}: {shown(row)}"
