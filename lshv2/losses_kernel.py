"""Cross-entropy of rows of logits and, in their place, its gradient: one Triton kernel, a row a program."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lshv2.launch import launch, power_of_two

BLOCK = 8192  # logits of a row in registers at once
WARPS = 16  # so that the rows in flight, which are read twice, stay in the L2 cache


@triton.jit
def _row_losses(
    logits, labels, scale, nats, V, IGNORE: tl.constexpr, LEARNING: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    logits += row * V
    label = tl.load(labels + row)
    c = tl.arange(0, BLOCK)
    largest = float("-inf")
    total = 0.0
    chosen = tl.zeros([BLOCK], tl.float32)  # the label's logit: by itself it could be read after it is overwritten
    for first in range(0, V, BLOCK):
        x = tl.load(logits + first + c, mask=first + c < V, other=float("-inf")).to(tl.float32)
        higher = tl.maximum(largest, tl.max(x, axis=0))
        total = total * tl.exp(largest - higher) + tl.sum(tl.exp(x - higher), axis=0)
        chosen += tl.where(first + c == label, x, 0.0)
        largest = higher
    lse = largest + tl.log(total)
    tl.store(nats + row, tl.where(label == IGNORE, 0.0, lse - tl.sum(chosen, axis=0)))
    if LEARNING:
        factor = tl.where(label == IGNORE, 0.0, tl.load(scale + row))
        for first in range(0, V, BLOCK):
            x = tl.load(logits + first + c, mask=first + c < V, other=float("-inf")).to(tl.float32)
            gradient = (tl.exp(x - lse) - tl.where(first + c == label, 1.0, 0.0)) * factor
            tl.store(logits + first + c, gradient.to(logits.dtype.element_ty), mask=first + c < V)


def row_losses_triton(logits: Tensor, labels: Tensor, scale: Tensor | None, ignore: int) -> Tensor:
    """`lshv2.losses.row_losses` of contiguous logits [M,V] in float16, bfloat16 or float32: float32 [M]."""
    rows, size = logits.shape
    nats = torch.empty(rows, dtype=torch.float32, device=logits.device)
    if rows:
        launch(
            _row_losses, (rows, 1, 1),
            (logits, labels.contiguous(), nats if scale is None else scale.contiguous(), nats), (size,),
            IGNORE=ignore, LEARNING=scale is not None, BLOCK=min(BLOCK, power_of_two(size)), num_warps=WARPS,
        )
    return nats
