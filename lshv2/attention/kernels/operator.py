"""The kernels in order: tables, forward, backward. Called by autograd, by torch.compile's operators and by recordings.

Both functions take and return tuples of tensors that do not alias: what a recording copies, and what an operator of
torch.compile may return.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from lshv2.attention.kernels.backward_queries import far_queries, local_queries, row_products
from lshv2.attention.kernels.common import Packing
from lshv2.attention.kernels.far_keys import far_keys
from lshv2.attention.kernels.forward import far_forward, local_forward
from lshv2.attention.kernels.local_keys import local_keys
from lshv2.attention.kernels.tables import build_tables, tables_in
from lshv2.profiling import region

SHORT = 1 << 15  # up to this many tokens in all, one launch serves all rounds: launching costs more than idle tests


def _per_launch(q: Tensor, rounds: int) -> int:
    """Rounds a launch: its tests for earlier rounds are compiled for the last of them."""
    return rounds if q.shape[0] * q.shape[2] <= SHORT else 1


def _rows(x: Tensor) -> Tensor:
    """The kernels take any strides but the last, which must be one."""
    return x if x.stride(-1) == 1 else x.contiguous()


def attention_forward(
    tensors: Sequence[Tensor], packing: Packing | None, n_buckets: int, bucket_size: int, window: int, n_global: int
) -> tuple[Tensor, ...]:
    """q [B,H,T,D], k, v [B,K,T,D], buckets [B,H,R·P,T] and [B,K,R,T], R or P 1 -> out [B,H,T,D], lse float32 [B,H,T] of
    base 2, and unless R is 0 the tables' buffer."""
    q, k, v, q_buckets, k_buckets = tensors
    q, k, v = _rows(q), _rows(k), _rows(v)
    rounds = k_buckets.shape[2]
    if not rounds:
        with region("global"):
            return local_forward(q, k, v, None, None, packing, window, n_global)
    with region("hashing"):
        tables = build_tables(
            q_buckets, k_buckets, packing, n_buckets=n_buckets, bucket_size=bucket_size, window=window,
            n_global=n_global,
        )
    with region("bucket_attn"):
        part, part_lse = far_forward(q, k, v, tables, _per_launch(q, rounds))
    with region("global"):
        return *local_forward(q, k, v, part, part_lse, packing, window, n_global), tables.buffer


def attention_backward(
    tensors: Sequence[Tensor], packing: Packing | None, rounds: int, probes: int, bucket_size: int, window: int,
    n_global: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradient of out [B,H,T,D], q, k, v, then what the forward returned, of R rounds and P probes -> dq, dk, dv."""
    grad, q, k, v, out, lse, *buffer = tensors
    q, k, v, grad = _rows(q), _rows(k), _rows(v), _rows(grad)
    per_launch = _per_launch(q, rounds)
    with region("global"):
        delta = row_products(out, grad)
    part = parts = None
    if buffer:
        batch, n_heads, length, _ = q.shape
        queries = n_heads // k.shape[1] * probes * length
        tables = tables_in(buffer[0], batch * k.shape[1], rounds, length, queries, bucket_size, probes)
        with region("bucket_attn"):
            part, sorted_lse, sorted_delta = far_queries(q, k, v, grad, lse, delta, tables, per_launch)
    with region("global"):
        dq, sinks = local_queries(q, k, v, grad, lse, delta, part, packing, window, n_global)
    del part
    if buffer:
        with region("bucket_attn"):
            parts = far_keys(q, k, v, grad, sorted_lse, sorted_delta, tables, per_launch)
    with region("global"):
        dk, dv = local_keys(q, k, v, grad, lse, delta, parts, sinks, packing, window)
    return dq, dk, dv
