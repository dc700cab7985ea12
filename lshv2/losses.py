"""Cross-entropy of a language-model head without ever storing all logits, nor computing them twice.

    loss, nats = linear_cross_entropy(hidden, weight, labels, scale)     # Σ scale · nats, and the nats of each token

A chunk of rows goes through the head; while its logits are there, they become their own gradient (in one kernel on a
GPU, `lshv2.losses_kernel`) and pass on to hidden and weight, in the forward. So every token's weight in the loss is
`scale`, an argument: the backward only multiplies by the gradient of the sum. The idea is Liger-Kernel's (Hsu et al.
2024), which weighs all tokens alike; Ponder's exits weigh each by its halting probability, which learns by it too.
torch's own `linear_cross_entropy` begins with 2.13, and has no such weights either.
Legend: M tokens, d model width, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lshv2.hashing import has_triton
from lshv2.precision import product_dtype

IGNORE = -100  # a label that is not scored
# Logits alive at once. On a CPU 4 MB in float32, so that no benchmark's memory is this buffer; a GPU takes 256 MB in
# bfloat16, or its host could not keep up with the kernels of many small chunks.
CHUNK_ELEMENTS = {"cpu": 1 << 20, "cuda": 1 << 27}
MIN_ROWS = 512  # or this many rows of them: smaller products waste the hardware


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, scale: Tensor, rows: int, learning: bool
    ) -> tuple[Tensor, Tensor]:
        dtype = product_dtype(hidden)
        head, nats = weight.to(dtype), scale.new_empty(scale.shape)
        if learning:
            d_hidden, d_weight = hidden.new_empty(hidden.shape, dtype=dtype), torch.zeros_like(weight)
            ctx.save_for_backward(d_hidden, d_weight, nats)
            ctx.dtype = hidden.dtype
        for at in range(0, len(hidden), rows):
            where = slice(at, at + rows)
            h = hidden[where].to(dtype)
            logits = h @ head.T
            nats[where] = row_losses(logits, labels[where], scale[where] if learning else None)
            if learning:
                torch.mm(logits, head, out=d_hidden[where])
                d_weight += logits.T @ h
        ctx.mark_non_differentiable(nats)
        return (nats * scale).sum(), nats

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # once_differentiable would let a gradient's gradient pass as zero
            raise RuntimeError("linear_cross_entropy is differentiable once: its gradients are constants")
        d_hidden, d_weight, nats = ctx.saved_tensors
        grad = grads[0].reshape(1)  # a dimension, so that the product of bfloat16 with it is float32
        return (d_hidden * grad).to(ctx.dtype), (d_weight * grad).to(d_weight.dtype), None, nats * grad, None, None


def linear_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Σ scale · nats (scalar) of predicting labels by hidden @ weight.T, and nats [M], zero where labels are IGNORE.

    hidden [M,d], weight [V,d], labels int64 [M], scale [M] in float32 or float64, as are the results. Differentiable
    once, in hidden, weight and scale; nats are constants. Under autocast the products run in its dtype.
    Memory beside the gradients: O(CHUNK_ELEMENTS + MIN_ROWS·V), not M·V.
    """
    rows = max(MIN_ROWS, CHUNK_ELEMENTS["cuda" if hidden.is_cuda else "cpu"] // weight.shape[0] // MIN_ROWS * MIN_ROWS)
    learning = torch.is_grad_enabled() and any(x.requires_grad for x in (hidden, weight, scale))
    loss, nats = _LinearCrossEntropy.apply(hidden, weight, labels, scale, rows, learning)
    return loss, nats


def row_losses(logits: Tensor, labels: Tensor, scale: Tensor | None) -> Tensor:
    """Nats [M] of labels int64 [M] by logits [M,V], in float32 or float64; zero where labels are IGNORE.

    With scale [M] the logits are overwritten by the gradient of Σ scale · nats.
    """
    if logits.is_cuda and logits.dtype != torch.float64 and has_triton():
        from lshv2.losses_kernel import row_losses_triton

        return row_losses_triton(logits, labels, scale, IGNORE)
    work = logits.to(torch.promote_types(logits.dtype, torch.float32))
    scored, label = labels != IGNORE, labels.clamp_min(0)[:, None]
    lse = work.logsumexp(-1, keepdim=True)
    nats = (lse - work.gather(1, label)).squeeze(1) * scored
    if scale is not None:
        d_logits = work.sub_(lse).exp_()  # softmax − one-hot; in the logits' own place where that is their dtype
        d_logits.scatter_add_(1, label, d_logits.new_full(label.shape, -1.0))
        d_logits *= (scale * scored)[:, None]
        logits.copy_(d_logits)
    return nats
