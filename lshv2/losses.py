"""Cross-entropy of a language-model head without ever storing all logits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import cross_entropy

IGNORE = -100  # a label that is not scored
# Logits alive at once. On a CPU 4 MB in float32, so that no benchmark's memory is this buffer; a GPU takes 512 MB, or
# its host could not keep up with the kernels of many small chunks.
CHUNK_ELEMENTS = {"cpu": 1 << 20, "cuda": 1 << 27}
MIN_ROWS = 512  # or this many rows of them: smaller products waste the hardware


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Chunks of rows, recomputed in the backward. Not torch.utils.checkpoint: that imports torch._dynamo, a second."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, rows: int) -> Tensor:
        kind = hidden.device.type
        # backward runs without autocast: what it chooses here is kept
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype
        ctx.rows, ctx.dtype = rows, dtype
        ctx.save_for_backward(hidden, weight, labels)
        head = weight.to(dtype).T
        pieces = zip(hidden.split(rows), labels.split(rows), strict=True)
        return torch.cat([
            cross_entropy((h.to(dtype) @ head).float(), y, ignore_index=IGNORE, reduction="none") for h, y in pieces
        ])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, labels = ctx.saved_tensors
        head = weight.to(ctx.dtype)
        d_hidden, d_weight = torch.empty_like(hidden), torch.zeros_like(weight)
        for at in range(0, hidden.shape[0], ctx.rows):
            where = slice(at, at + ctx.rows)
            h, y = hidden[where].to(ctx.dtype), labels[where]
            d_logits = (h @ head.T).float().softmax(-1)  # d CE / d logits = softmax − one-hot
            d_logits.scatter_add_(1, y.clamp_min(0)[:, None], d_logits.new_full((len(y), 1), -1.0))
            d_logits *= torch.where(y == IGNORE, 0.0, grads[0][where])[:, None]
            d_logits = d_logits.to(ctx.dtype)
            d_hidden[where] = d_logits @ head
            d_weight += d_logits.T @ h
        return d_hidden, d_weight, None, None


def token_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Nats of each token: hidden [M,d], weight [V,d], labels int64 [M] -> [M], zero where labels are IGNORE.

    Memory is O(CHUNK_ELEMENTS + MIN_ROWS·V), not M·V. Under autocast the products run in its dtype.
    """
    rows = max(MIN_ROWS, CHUNK_ELEMENTS["cuda" if hidden.is_cuda else "cpu"] // weight.shape[0])
    return _ChunkedCrossEntropy.apply(hidden, weight, labels, rows)
