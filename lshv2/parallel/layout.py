"""How many processes share a sequence, and how many have sequences of their own. Needs no torch: asked before any work.

    layout = plan(4, batch_size=2, length=131_072, config=settings.model)     # data 2 x sequence 2
"""

from __future__ import annotations

import math
from typing import NamedTuple

from lshv2.config import ModelConfig, Settings
from lshv2.errors import UserError


class Layout(NamedTuple):
    """Size of the mesh: `data` processes with different sequences, times `sequence` that share each."""

    data: int
    sequence: int


WHOLE = Layout(1, 1)  # of one process


def plan(world: int, *, batch_size: int, length: int, config: ModelConfig, sequence: int | None = None) -> Layout:
    """The mesh for `world` processes; batch_size: sequences of a step, over all processes; length: tokens of each.

    sequence None: as few as the batch allows. Raises UserError where sequences or heads do not come out even.
    """
    chosen = sequence or world // math.gcd(world, batch_size)
    told = f"parallel.sequence={chosen}" if sequence else f"{world} processes for batches of {batch_size}: {chosen}"
    if world % chosen:
        raise UserError(f"{told} does not divide the {world} processes: set another number of them (NPROC)")
    data = world // chosen
    if batch_size % data:
        raise UserError(
            f"{told} leaves {data} parts of a batch, and batch_size={batch_size} is not a multiple of {data}: "
            "set a larger parallel.sequence or another batch_size"
        )
    for name, value in (("n_kv_heads", config.n_kv_heads), ("n_heads", config.n_heads), ("seq_length", length)):
        if value % chosen:
            raise UserError(
                f"{told} processes would share each sequence, and {name}={value} is not a multiple of {chosen}: "
                "set another number of processes (NPROC), or a batch_size that is a multiple of it"
            )
    if length // chosen < config.tokens_before:
        raise UserError(
            f"{told} processes would have {length // chosen} tokens each of a sequence of {length}, and a key is made "
            f"of {config.tokens_before} earlier ones (short_conv={config.short_conv}): set fewer processes (NPROC)"
        )
    return Layout(data, chosen)


def language_layout(settings: Settings, world: int) -> Layout:
    """The language model's mesh, as the run's settings say."""
    train = settings.train
    return plan(
        world, batch_size=train.batch_size, length=train.seq_length, config=settings.model,
        sequence=settings.parallel.sequence,
    )


def recall_layout(settings: Settings, world: int) -> Layout:
    """The recall probe's: its sequences are short, so that as few processes as its batch allows share one."""
    recall = settings.recall
    return plan(world, batch_size=recall.batch_size, length=recall.seq_length, config=settings.recall_model)


def check_parallel(settings: Settings) -> None:
    """Raises UserError where `parallel.nproc` processes could not train this run."""
    for layout in (language_layout, recall_layout):
        layout(settings, settings.parallel.nproc)
