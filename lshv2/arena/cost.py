"""What one sequence costs a trained model: a forward pass's time and memory, beside what is right after it.

    row |= cost(model, task, 131_072, device)

Eager, batch 1, as `judge` asks: the hash and its buckets are those that the training left, on the task's own sequences.
Up to some thousand tokens these small models wait for their launches. `lshv2.benchmark` measures a large model with
processes of its own, and its exponents.
"""

from __future__ import annotations

import time
from contextlib import nullcontext

import numpy as np
import torch
from torch.nn.attention import sdpa_kernel

from lshv2.arena.judge import asked
from lshv2.arena.learn import autocast, to_device
from lshv2.arena.task import ArenaTask
from lshv2.benchmark.meter import Meter
from lshv2.benchmark.worker import FASTEST
from lshv2.model import LSHModel

FEWEST, SAMPLES, SECONDS = 3, 9, 0.5  # at most so many or so long, whichever ends first


@torch.no_grad()
def cost(model: LSHModel, task: ArenaTask, length: int, device: torch.device) -> dict[str, float]:
    """`forward_ms forward_ms_p20 forward_ms_p80` (median, 20 and 80 % of the samples, milliseconds), on a GPU
    `forward_mb` (peak beyond what lay there before, MB), of one sequence.

    A first pass is a warm-up; on a GPU samples are device events, with an L2 cache that holds nothing of theirs, and
    dense attention gets the fastest of torch's backends that takes it.
    """
    model.eval()
    examples = asked(task, length, 1)
    ids, labels = (to_device(x, device) for x in (examples.input_ids, examples.labels))
    dense = model.config.attention == "dense" and device.type == "cuda"

    def forward() -> None:
        with autocast(device):
            model(ids, labels=labels)

    meter, samples = Meter(device), list[float]()
    with sdpa_kernel(FASTEST, set_priority=True) if dense else nullcontext():
        forward()
        before = torch.cuda.memory_allocated() if meter.cuda else 0
        meter.reset_peak()
        began = time.perf_counter()
        while len(samples) < FEWEST or (len(samples) < SAMPLES and time.perf_counter() - began < SECONDS):
            samples.append(meter.milliseconds(forward))
    low, middle, high = (round(float(x), 4) for x in np.percentile(samples, (20, 50, 80)))
    found = {"forward_ms": middle, "forward_ms_p20": low, "forward_ms_p80": high}
    if meter.cuda:
        found["forward_mb"] = round((torch.cuda.max_memory_allocated() - before) / 2**20, 2)
    return found
