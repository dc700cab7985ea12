"""The processes of one training, as torchrun started them; one process is `ALONE`.

    with join() as ranks:                  # RANK, WORLD_SIZE and LOCAL_RANK from torchrun; none of them: one process
        if ranks.first: ...                # writes what there must be one of
        total = ranks.total([nats, tokens])

What the host says (a stop request, figures of a log line) travels by gloo, so that no GPU has to be waited for.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from lshv2.errors import UserError

PATIENCE = timedelta(minutes=30)  # a rank may prepare data or write a checkpoint while the others wait


@dataclass(frozen=True)
class Ranks:
    """This process among `world`; `local`: its number on this machine, and that of its GPU."""

    rank: int = 0
    world: int = 1
    local: int = 0

    @property
    def first(self) -> bool:
        return self.rank == 0

    @property
    def device(self) -> torch.device:
        """This process's GPU if there are any, else the CPU: the one place that asks."""
        if not torch.cuda.is_available():
            return torch.device("cpu")
        return torch.device("cuda", self.local) if self.world > 1 else torch.device("cuda")

    def total(self, numbers: Sequence[float]) -> list[float]:
        """Sums over all processes, in float64; every process must call it."""
        if self.world == 1:
            return list(numbers)
        sums = torch.tensor(numbers, dtype=torch.float64)
        dist.all_reduce(sums)
        return sums.tolist()

    def most(self, number: float) -> float:
        """The largest number that a process gives; every process must call it."""
        if self.world == 1:
            return number
        largest = torch.tensor(number, dtype=torch.float64)
        dist.all_reduce(largest, dist.ReduceOp.MAX)
        return largest.item()

    def gathered(self, item: Any) -> list[Any]:
        """What every process gives, by rank; small things that can be pickled. Every process must call it."""
        if self.world == 1:
            return [item]
        items: list[Any] = [None] * self.world
        dist.all_gather_object(items, item, group=None)
        return items

    def wait(self) -> None:
        """Until every process is here."""
        self.total([0])


ALONE = Ranks()


@contextmanager
def join() -> Iterator[Ranks]:
    """Joins the other processes of torchrun and leaves them in the end; without torchrun there are none.

    Raises UserError when its environment is incomplete, or there are more processes here than GPUs.
    """
    if "RANK" not in os.environ and "WORLD_SIZE" not in os.environ:
        yield ALONE
        return
    ranks = _from_environment()
    gpus = torch.cuda.device_count()
    if gpus and ranks.local >= gpus:
        raise UserError(f"process {ranks.local} of this machine has no GPU, there are {gpus}: NPROC={gpus} at most")
    if ranks.world == 1:
        yield ranks
        return
    if gpus:
        torch.cuda.set_device(ranks.device)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if gpus else "gloo", timeout=PATIENCE, device_id=ranks.device if gpus else None
    )
    try:
        yield ranks
    finally:
        dist.destroy_process_group()


def _from_environment() -> Ranks:
    values = {}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        text = os.environ.get(name, "")
        if not text.isdecimal():
            raise UserError(f"{name}={text!r} in the environment is no number: start with torchrun --nproc_per_node=N")
        values[name] = int(text)
    if values["RANK"] >= values["WORLD_SIZE"]:
        raise UserError(f"RANK={values['RANK']} is not below WORLD_SIZE={values['WORLD_SIZE']} in the environment")
    return Ranks(values["RANK"], values["WORLD_SIZE"], values["LOCAL_RANK"])
