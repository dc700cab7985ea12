"""What a task is trained on and judged by, batch by batch.

Step n reads batch n of an order that follows from (seed, epoch) alone, or of a stream that knows where it stands, so
that a killed run goes on with exactly the batches that it would have read.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lshv2.config import Recompute
from lshv2.data import TokenStream, epoch_order
from lshv2.errors import UserError
from lshv2.evaluation import Batch
from lshv2.parallel.ranks import Ranks
from lshv2.stopping import ignore_signals


@dataclass(frozen=True)
class Task:
    """What to learn, and how. Datasets yield (input_ids [T], labels [T]); the model shifts labels itself."""

    name: str
    train: Dataset[Batch] | TokenStream
    evaluation: Dataset[Batch]
    batch_size: int
    epochs: int
    learning_rate: float
    eval_every: int
    token_bytes: Tensor | None = None
    profile: bool = False
    gradient_checkpoint: Recompute = False
    compile: bool = False

    @property
    def steps_per_epoch(self) -> int:
        """Batches that an epoch fills; raises UserError where it fills none."""
        count = len(self.train)  # type: ignore[arg-type]
        if count < self.batch_size:
            raise UserError(
                f"{self.name}: {count} sequences (num_train_sequences) do not fill one batch of {self.batch_size} "
                "(batch_size): raise the first or lower the second"
            )
        return count // self.batch_size


def training_batches(
    task: Task, step: int, *, seed: int, num_workers: int, pin_memory: bool, rows: slice
) -> Generator[Batch, None, None]:
    """Some rows of the batches from `step` to the task's last one. Closing it ends the workers.

    Of a stream come as many rows; which ones, it knows by itself.
    """
    size = task.batch_size
    left = task.steps_per_epoch * task.epochs - step
    if isinstance(task.train, TokenStream):
        stream = task.train.batches(len(range(size)[rows]), pin_memory=pin_memory, worker_init_fn=ignore_signals)
        with contextlib.closing(stream):
            yield from itertools.islice(stream, left)
        return
    while left:
        epoch, at = divmod(task.steps_per_epoch * task.epochs - left, task.steps_per_epoch)
        order = epoch_order(len(task.train), epoch, seed)  # type: ignore[arg-type]
        batches = [order[i * size : (i + 1) * size][rows].tolist() for i in range(at, task.steps_per_epoch)]
        left -= len(batches)
        yield from DataLoader(
            task.train, batch_sampler=batches, num_workers=min(num_workers, len(batches)), pin_memory=pin_memory,
            generator=torch.Generator().manual_seed(seed),  # else it draws from the global one
            worker_init_fn=ignore_signals,
        )


def evaluation_batches(task: Task, stopped: Callable[[], bool], ranks: Ranks) -> Iterator[Batch]:
    """The held-out sequences in order, every `world`-th of them; ends early when `stopped`."""
    mine = range(len(task.evaluation))[ranks.rank :: ranks.world]  # type: ignore[arg-type]
    size = -(-task.batch_size // ranks.world)
    for at in range(0, len(mine), size):
        if stopped():
            return
        rows = [task.evaluation[i] for i in mine[at : at + size]]
        yield torch.stack([row[0] for row in rows]), torch.stack([row[1] for row in rows])
