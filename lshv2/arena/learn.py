"""Training one of the arena's models: AdamW, warm-up, cosine, clipping; sequences drawn while the device computes.

Step i's sequences follow from (seed, i) alone, so that a training which goes on from a checkpoint ends as if it had
never been stopped. What is drawn for one step is never drawn for another.
"""

from __future__ import annotations

import contextlib
import math
import multiprocessing
import os
import signal
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

from lshv2.arena.recipes import Recipe
from lshv2.arena.registry import load_plugins
from lshv2.arena.task import ArenaTask
from lshv2.config import TrainingConfig
from lshv2.evaluation import Batch
from lshv2.graphs import GraphedStep, rate_setter
from lshv2.model import LSHModel
from lshv2.optimizer import make_optimizer, scheduled
from lshv2.stopping import end_with_parent

Drawn = tuple[np.ndarray, np.ndarray]
AHEAD = 20  # steps drawn ahead
CHECK_EVERY = 100  # steps between looks at the loss, for which the device is waited for
SAVE_EVERY = 60.0  # seconds between checkpoints, at such a look
TRAINING, JUDGING = 0, 1  # streams of random numbers


def generator(seed: int, stream: int, *which: int) -> np.random.Generator:
    """The random stream of one step, or of one length: no two share one."""
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(7, stream, *which)))


def autocast(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """bfloat16 on a GPU."""
    return torch.autocast("cuda", torch.bfloat16) if device.type == "cuda" else contextlib.nullcontext()


def to_device(x: np.ndarray, device: torch.device) -> Tensor:
    """int64, without waiting for the device."""
    tensor = torch.from_numpy(np.ascontiguousarray(x, dtype=np.int64))
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


class _Steps:
    """Optimizer steps, as CUDA graphs on a GPU."""

    def __init__(self, model: LSHModel, recipe: Recipe, device: torch.device, kept: dict[str, Any] | None) -> None:
        self.model, self.recipe, self.device = model, recipe, device
        self.settings = TrainingConfig(learning_rate=recipe.learning_rate)
        self.optimizer = make_optimizer(model, self.settings, recipe.learning_rate)
        if kept:  # before the rate is set in a place of its own, and before anything is captured
            model.load_state_dict(kept["model"])
            self.optimizer.load_state_dict(kept["optimizer"])
        self.set_rate = rate_setter(self.optimizer, device)
        self.step = GraphedStep(self._eager, device)

    def __call__(self, step: int, ids: Tensor, labels: Tensor) -> Tensor:
        """Step number `step`, from 0; its loss, on the device."""
        self.set_rate(scheduled(step, self.recipe.steps, self.recipe.learning_rate, self.settings))
        return self.step(ids, labels)

    def _eager(self, ids: Tensor, labels: Tensor) -> Tensor:
        with autocast(self.device):
            loss = self.model(ids, labels=labels).loss
        assert loss is not None
        loss.backward()
        clip_grad_norm_(self.model.parameters(), self.settings.grad_clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.model.update_hash()
        return loss.detach()


def train(
    model: LSHModel, task: ArenaTask, recipe: Recipe, seed: int, device: torch.device,
    on_step: Callable[[int, float], None] = lambda step, loss: None, plugins: Sequence[str] = (),
    kept: dict[str, Any] | None = None, save: Callable[[dict[str, Any]], None] | None = None,
) -> dict[str, Any]:
    """Train in place: `steps train_seconds loss_train` (means over twenty parts).

    on_step: every CHECK_EVERY steps. plugins: files that define the task, for the processes that draw. save: takes a
    checkpoint every SAVE_EVERY seconds; kept: the last of them, to go on from.
    Raises FloatingPointError when the loss is not finite.
    """
    one = _Steps(model, recipe, device, kept)
    losses = list(kept["losses"].to(device)) if kept else list[Tensor]()
    model.train()
    began = time.perf_counter() - (kept["seconds"] if kept else 0.0)
    saved = time.perf_counter()
    for step, (ids, labels) in enumerate(_drawn(task, recipe, seed, device, plugins, len(losses)), len(losses) + 1):
        losses.append(one(step - 1, ids, labels))
        if step % CHECK_EVERY == 0 or step == recipe.steps:
            newest = torch.stack(losses[-CHECK_EVERY:]).mean().item()
            if not np.isfinite(newest):
                raise FloatingPointError(f"{task.name}: the loss is {newest} at step {step}")
            if save and step < recipe.steps and time.perf_counter() - saved >= SAVE_EVERY:
                save({"model": model.state_dict(), "optimizer": one.optimizer.state_dict(),
                      "losses": torch.stack(losses), "seconds": time.perf_counter() - began})
                saved = time.perf_counter()
            on_step(step, newest)
    curve = [part.mean().item() for part in torch.stack(losses).tensor_split(min(20, len(losses)))]
    return {"steps": recipe.steps, "train_seconds": round(time.perf_counter() - began, 2), "loss_train": curve}


def _drawn(
    task: ArenaTask, recipe: Recipe, seed: int, device: torch.device, plugins: Sequence[str] = (), first: int = 0
) -> Iterator[Batch]:
    """Batches of all steps from `first` on, drawn some steps ahead by others."""
    workers = min(16 if task.in_processes else 8, os.cpu_count() or 1)
    if task.in_processes:
        pool: Executor = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _begin, (plugins,))
    else:
        pool = ThreadPoolExecutor(workers)
    with pool:
        coming: deque[Future[Drawn]] = deque()
        try:
            for step in range(first, recipe.steps):
                while len(coming) < AHEAD and step + len(coming) < recipe.steps:
                    with _deaf_to_interrupts():
                        coming.append(pool.submit(_draw, task, recipe, seed, step + len(coming)))
                ids, labels = coming.popleft().result()
                yield to_device(ids, device), to_device(labels, device)
        finally:
            for future in coming:
                future.cancel()


def _begin(plugins: Sequence[str]) -> None:
    """How a process that draws begins: it hears no interrupts, and who trains may be killed."""
    end_with_parent()
    load_plugins(plugins)


@contextlib.contextmanager
def _deaf_to_interrupts() -> Iterator[None]:
    """For what is started here: an interrupt ends the process that trains, and its end those that draw for it."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _draw(task: ArenaTask, recipe: Recipe, seed: int, step: int) -> Drawn:
    """Short sequences first, where the window shows what is asked; all lengths from half of the training on."""
    stream = generator(seed, TRAINING, step)
    there = math.ceil(len(recipe.lengths) * min(1.0, 2 * (step + 1) / recipe.steps))
    length = sorted(recipe.lengths)[stream.integers(there)]
    examples = task.draw(stream, max(1, recipe.tokens // length), length)
    return examples.input_ids, examples.labels
