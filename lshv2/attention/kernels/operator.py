"""The kernels in order: tables, forward, backward. Called by autograd, and by torch.compile's operators."""

from __future__ import annotations

from torch import Tensor

from lshv2.attention.kernels.backward_queries import far_queries, local_queries, row_products
from lshv2.attention.kernels.common import Packing
from lshv2.attention.kernels.far_keys import far_keys
from lshv2.attention.kernels.forward import far_forward, local_forward
from lshv2.attention.kernels.local_keys import local_keys
from lshv2.attention.kernels.tables import Tables, build_tables
from lshv2.profiling import region

SHORT = 1 << 15  # up to this many tokens in all, one launch serves all rounds: launching costs more than idle tests


def _per_launch(q: Tensor, rounds: int) -> int:
    """Rounds a launch: its tests for earlier rounds are compiled for the last of them."""
    return rounds if q.shape[0] * q.shape[2] <= SHORT else 1


def _rows(x: Tensor) -> Tensor:
    """The kernels take any strides but the last, which must be one."""
    return x if x.stride(-1) == 1 else x.contiguous()


def attention_forward(
    q: Tensor, k: Tensor, v: Tensor, q_buckets: Tensor, k_buckets: Tensor, packing: Packing | None, n_buckets: int,
    bucket_size: int, window: int, n_global: int,
) -> tuple[Tensor, Tensor, Tables | None]:
    """q [B,H,T,D], k, v [B,K,T,D], buckets [B,H,R,T] and [B,K,R or 1,T] -> out [B,H,T,D], lse float32 [B,H,T] of base
    2, and the tables (None if R is 0)."""
    q, k, v = _rows(q), _rows(k), _rows(v)
    tables = part = part_lse = None
    rounds = k_buckets.shape[2]
    if rounds:
        with region("hashing"):
            tables = build_tables(
                q_buckets, k_buckets, packing, n_buckets=n_buckets, bucket_size=bucket_size, window=window,
                n_global=n_global,
            )
        with region("bucket_attn"):
            part, part_lse = far_forward(q, k, v, tables, _per_launch(q, rounds))
    with region("global"):
        out, lse = local_forward(q, k, v, part, part_lse, packing, window, n_global)
    return out, lse, tables


def attention_backward(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, grad: Tensor, tables: Tables | None,
    packing: Packing | None, window: int, n_global: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv, like q, k, v, from what the forward kept and grad [B,H,T,D]."""
    q, k, v, grad = _rows(q), _rows(k), _rows(v), _rows(grad)
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
    return dq, dk, dv
