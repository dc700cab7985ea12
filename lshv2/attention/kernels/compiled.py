"""The kernels as operators that torch.compile keeps whole: opaque to it, with shapes and a backward of their own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lshv2.attention.kernels import operator
from lshv2.attention.kernels.common import packing_of
from lshv2.attention.kernels.tables import empty_tables

SIZES = "int n_buckets, int bucket_size, int window, int n_global"


@torch.library.custom_op(
    "lshv2::attention", mutates_args=(),
    schema=f"(Tensor q, Tensor k, Tensor v, Tensor q_buckets, Tensor k_buckets, Tensor? cu_seqlens, {SIZES})"
    " -> Tensor[]",
)
def attention(
    q: Tensor, k: Tensor, v: Tensor, q_buckets: Tensor, k_buckets: Tensor, cu_seqlens: Tensor | None, n_buckets: int,
    bucket_size: int, window: int, n_global: int,
) -> list[Tensor]:
    """out [B,H,T,D], lse float32 [B,H,T], and with rounds the tables' buffer: what is returned may not alias."""
    packing = packing_of(cu_seqlens, q.shape[2], q.device)
    tensors = q, k, v, q_buckets, k_buckets
    return list(operator.attention_forward(tensors, packing, n_buckets, bucket_size, window, n_global))


@attention.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, q_buckets: Tensor, k_buckets: Tensor, cu_seqlens: Tensor | None, *sizes: int
) -> list[Tensor]:
    batch, n_heads, length, dim = q.shape
    groups, rounds = batch * k.shape[1], k_buckets.shape[2]
    out = q.new_empty(batch, length, n_heads, dim).transpose(1, 2)
    lse = q.new_empty(batch, n_heads, length, dtype=torch.float32)
    if not rounds:
        return [out, lse]
    queries = batch * n_heads * q_buckets.shape[2] * length // (groups * rounds)
    return [out, lse, empty_tables(groups, rounds, length, queries, q.device)]


@torch.library.custom_op(
    "lshv2::attention_backward", mutates_args=(),
    schema=f"(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor[] saved, Tensor? cu_seqlens, int n_rounds,"
    f" int n_probes, {SIZES}) -> (Tensor, Tensor, Tensor)",
)
def attention_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, saved: list[Tensor], cu_seqlens: Tensor | None, n_rounds: int,
    n_probes: int, n_buckets: int, bucket_size: int, window: int, n_global: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv; saved: what `attention` returned, of n_rounds tables and n_probes buckets a query and table."""
    packing = packing_of(cu_seqlens, q.shape[2], q.device)
    sizes = n_rounds, n_probes, bucket_size, window, n_global
    return operator.attention_backward((grad, q, k, v, *saved), packing, *sizes)


@attention_backward.register_fake
def _(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def _save(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    q, k, v, q_buckets, k_buckets, cu_seqlens, *sizes = inputs
    rounds = k_buckets.shape[2]
    ctx.save_for_backward(q, k, v, cu_seqlens, *output)
    ctx.sizes = (rounds, q_buckets.shape[2] // max(1, rounds), *sizes)


def _differentiate(ctx: Any, grads: list[Tensor]) -> tuple[Tensor | None, ...]:
    q, k, v, cu_seqlens, *saved = ctx.saved_tensors
    dq, dk, dv = torch.ops.lshv2.attention_backward(grads[0], q, k, v, saved, cu_seqlens, *ctx.sizes)
    return dq, dk, dv, None, None, None, None, None, None, None


attention.register_autograd(_differentiate, setup_context=_save)
