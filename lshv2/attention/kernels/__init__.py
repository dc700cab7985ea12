"""LSH attention as Triton kernels: forward and backward, without host synchronisation and without atomics.

q, k, v never leave their dtype; products and the softmax accumulate in float32. Kept for the backward: out, one
log-sum-exp, and a few integer tables. Source of the scheme: FlashAttention-2 (Dao 2023) for the recomputing backward;
the sparse walk is `lshv2.attention.intervals`'.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lshv2.attention.kernels.common import packing_of
from lshv2.attention.kernels.operator import attention_backward, attention_forward
from lshv2.attention.kernels.replay import replayed


class _KernelAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, q_buckets: Tensor, k_buckets: Tensor, cu_seqlens: Tensor | None,
        n_buckets: int, bucket_size: int, window: int, n_global: int,
    ) -> Tensor:
        """q [B,H,T,D], k, v [B,K,T,D] -> out [B,H,T,D]."""
        packing, rounds = packing_of(cu_seqlens, q.shape[2], q.device), k_buckets.shape[2]
        kept = replayed(
            attention_forward, (q, k, v, q_buckets, k_buckets), packing, n_buckets, bucket_size, window, n_global
        )
        ctx.save_for_backward(q, k, v, *kept)  # the tables too: what is on ctx itself, checkpointing keeps
        ctx.rest = packing, rounds, q_buckets.shape[2] // max(1, rounds), bucket_size, window, n_global
        return kept[0]

    @staticmethod
    @once_differentiable  # out and lse are constants to it: a second derivative would be silently wrong
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        gradients = replayed(attention_backward, (*grads, *ctx.saved_tensors), *ctx.rest)
        return *gradients, None, None, None, None, None, None, None


def lsh_attention_triton(
    q: Tensor, k: Tensor, v: Tensor, q_buckets: Tensor, k_buckets: Tensor, *, n_buckets: int, bucket_size: int,
    window: int, n_global: int = 0, cu_seqlens: Tensor | None = None,
) -> Tensor:
    """q [B,H,T,D], k, v [B,K,T,D], buckets [B,H,R,T] and [B,K,R or 1,T] -> out [B,H,T,D] in q's dtype."""
    k, v = k.to(q.dtype), v.to(q.dtype)
    sizes = (n_buckets, bucket_size, window, n_global)
    if torch.compiler.is_compiling():
        from lshv2.attention.kernels import compiled  # noqa: F401  (registers the operator)

        whole: Tensor = torch.ops.lshv2.attention(q, k, v, q_buckets, k_buckets, cu_seqlens, *sizes)[0]
        return whole
    out: Tensor = _KernelAttention.apply(q, k, v, q_buckets, k_buckets, cu_seqlens, *sizes)
    return out
