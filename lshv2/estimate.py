"""Before a full run without a GPU: how long it would take here and what it needs, from arithmetic and one second.

Floating-point operations of training over this machine's measured float32 matrix product. An estimate from below:
no kernel of a training step is faster than the large matrix product it is measured against. The benchmark and the
small recall model are left out.
"""

from __future__ import annotations

import time

import psutil

from lshv2.config import Settings
from lshv2.errors import UserError
from lshv2.sizes import count_parameters

MATMUL_N = 1024  # large enough for full speed on a CPU, small enough for many repeats in a second
HOUR, SLOWEST = 3600, 1e9  # seconds; operations a second that any machine does
ADAM_BYTES = 16  # a float32 parameter with its gradient and AdamW's two moments


def training_flops(settings: Settings) -> float:
    """Forward and backward over all training tokens; the blocks' forward again when checkpointing gradients."""
    model, train = settings.model, settings.train
    tokens = train.num_train_sequences * train.seq_length * train.num_epochs
    embeddings = 2 * model.vocab_size * model.d_model
    blocks = (count_parameters(model) - embeddings) * model.n_ponder_steps  # a tied block works once a ponder step
    # the last ponder step answers throughout, the others from `ponder_from` on
    exits = 1 + (model.n_ponder_steps - 1) * (1 - train.ponder_from) if model.use_ponder else 1
    heads = model.vocab_size * model.d_model * exits
    visible = min(train.seq_length, model.window + model.n_global + model.n_rounds * model.bucket_size)
    attention = 4 * visible * model.d_model * model.n_layers  # q.k and p.v, a multiply and an add each
    forward = 2 * (blocks + heads) + attention
    again = {True: 2 * blocks, "block": 2 * blocks + attention}.get(train.gradient_checkpoint, 0)
    return tokens * (3 * forward + again)


def training_bytes(settings: Settings) -> float:
    """Weights with their optimizer, and one sequence's activations in float32 (all layers, or one and the inputs)."""
    model, train = settings.model, settings.train
    tokens = train.seq_length * train.batch_size
    one_layer = tokens * 4 * (6 * model.d_model + 3 * model.d_ff)
    inputs = tokens * 4 * model.d_model * model.n_layers
    attention = 2 * inputs * (1 + model.n_kv_heads / model.n_heads)  # q, k, v and its output
    kept = {True: inputs + attention + 2 * one_layer, "block": inputs + 2 * one_layer}.get(
        train.gradient_checkpoint, one_layer * model.n_layers)
    return ADAM_BYTES * count_parameters(model) + kept


def measure_flops_per_second(seconds: float = 1.0) -> float:
    """Operations a second of float32 products of 1024 x 1024 matrices, over about `seconds`."""
    import torch

    matrix = torch.ones(MATMUL_N, MATMUL_N)
    matrix @ matrix  # the first one starts the threads
    began, done = time.perf_counter(), 0
    while time.perf_counter() - began < seconds:
        matrix @ matrix
        done += 1
    return done * 2 * MATMUL_N**3 / (time.perf_counter() - began)


def check_full(settings: Settings, to_run: list[str], *, command: str) -> None:
    """Without a GPU: `UserError` with the estimate, unless neither training nor the benchmark is due."""
    import torch

    if not {"03_train", "04_benchmark"} & set(to_run) or torch.cuda.is_available():
        return
    speed = measure_flops_per_second()
    flops, needed, free = training_flops(settings), training_bytes(settings), psutil.virtual_memory().available
    print(
        f"no GPU here. Training the full configuration is {flops:.1e} operations; this machine does "
        f"{speed / 1e9:,.0f} GFLOP/s in float32: at least {duration(flops / speed)}.\n"
        f"It needs about {needed / 2**30:.0f} GiB of memory ({free / 2**30:.0f} GiB are free), and then the benchmark "
        f"up to {max(settings.benchmark.sequence_lengths):,} tokens."
    )
    raise UserError(f"to go on all the same: {command} YES=1; the same code in minutes: make quick")


def check_arena_time(
    flops: float, models: int, *, command: str, yes: str = "YES=1", small: str = "PRESET=quick"
) -> None:
    """Without a GPU: `UserError` with the estimate where training the arena's models takes an hour or more. yes, small:
    what the command takes to go on all the same, and for laptop sizes; "": it has those already."""
    import torch

    if flops < HOUR * SLOWEST or torch.cuda.is_available():
        return
    seconds = flops / measure_flops_per_second()
    if seconds >= HOUR:
        hint = f"; laptop sizes: {small}" if small else ""
        raise UserError(
            f"no GPU here, and training the arena's {models} models anew is {flops:.1e} operations: at least "
            f"{duration(seconds)}. To go on all the same: {command} {yes}{hint}"
        )


def duration(seconds: float) -> str:
    """`90 s`, `12 min`, `5.0 h`, `40 days`, `3.2 years`."""
    for limit, unit, size in ((120, "s", 1), (7200, "min", 60), (172_800, "h", 3600), (63_072_000, "days", 86_400)):
        if seconds < limit:
            return f"{seconds / size:.{1 if unit == 'h' else 0}f} {unit}"
    return f"{seconds / 31_536_000:.1f} years"
