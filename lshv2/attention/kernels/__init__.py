"""LSH attention as Triton kernels: forward and backward, without host synchronisation and without atomics.

q, k, v never leave their dtype; products and the softmax accumulate in float32. Kept for the backward: out, one
log-sum-exp, and four integer tables. Source of the scheme: FlashAttention-2 (Dao 2023) for the recomputing backward;
the sparse walk is `lshv2.attention.intervals`'.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lshv2.attention.kernels.backward_keys import far_keys, local_keys
from lshv2.attention.kernels.backward_queries import far_queries, local_queries, row_products
from lshv2.attention.kernels.forward import far_forward, local_forward
from lshv2.attention.kernels.tables import Packing, Tables, build_tables, packing_of
from lshv2.profiling import region

SHORT = 1 << 15  # up to this many tokens in all, one launch serves all rounds: launching costs more than idle tests


def _per_launch(q: Tensor, rounds: int) -> int:
    """Rounds a launch: its tests for earlier rounds are compiled for the last of them."""
    return rounds if q.shape[0] * q.shape[2] <= SHORT else 1


def _rows(x: Tensor) -> Tensor:
    """The kernels take any strides but the last, which must be one."""
    return x if x.stride(-1) == 1 else x.contiguous()


class _KernelAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, tables: Tables | None, packing: Packing | None, window: int,
        n_global: int,
    ) -> Tensor:
        """q [B,H,T,D], k, v [B,K,T,D] -> out [B,H,T,D]."""
        q, k, v = _rows(q), _rows(k), _rows(v)
        part = part_lse = None
        if tables is not None:
            with region("bucket_attn"):
                part, part_lse = far_forward(q, k, v, tables, _per_launch(q, tables.order.shape[1]))
        with region("global"):
            out, lse = local_forward(q, k, v, part, part_lse, packing, window, n_global)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.tables, ctx.packing, ctx.window, ctx.n_global = tables, packing, window, n_global
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        tables, packing, window, n_global = ctx.tables, ctx.packing, ctx.window, ctx.n_global
        grad = _rows(grads[0])
        per_launch = 0 if tables is None else _per_launch(q, tables.order.shape[1])
        with region("global"):
            delta = row_products(out, grad)
        part = parts = None
        if tables is not None:
            with region("bucket_attn"):
                part, sorted_lse, sorted_delta = far_queries(q, k, v, grad, lse, delta, tables, per_launch)
        with region("global"):
            dq, sinks = local_queries(q, k, v, grad, lse, delta, part, packing, window, n_global)
        del part
        if tables is not None:
            with region("bucket_attn"):
                parts = far_keys(q, k, v, grad, sorted_lse, sorted_delta, tables, per_launch)
        with region("global"):
            dk, dv = local_keys(q, k, v, grad, lse, delta, parts, sinks, packing, window)
        return dq, dk, dv, None, None, None, None


def lsh_attention_triton(
    q: Tensor, k: Tensor, v: Tensor, q_buckets: Tensor, k_buckets: Tensor, *, n_buckets: int, bucket_size: int,
    window: int, n_global: int = 0, cu_seqlens: Tensor | None = None,
) -> Tensor:
    """q [B,H,T,D], k, v [B,K,T,D] of one dtype, buckets [B,H,R,T] and [B,K,R,T] -> out [B,H,T,D]."""
    with region("hashing"):
        packing = packing_of(cu_seqlens, q.shape[2], q.device)
        tables = None
        if q_buckets.shape[2]:
            tables = build_tables(
                q_buckets, k_buckets, packing, n_buckets=n_buckets, bucket_size=bucket_size, window=window,
                n_global=n_global,
            )
    out: Tensor = _KernelAttention.apply(q, k.to(q.dtype), v.to(q.dtype), tables, packing, window, n_global)
    return out
