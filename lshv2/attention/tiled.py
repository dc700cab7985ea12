"""LSH attention in plain torch: linear memory, any device, its own recomputing backward.

Forward keeps only out and one merged log-sum-exp; the backward rebuilds each tile's weights from them.
Everything is computed in float32 (float64 stays float64).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lshv2.attention.far import FarTiles, far_backward, far_forward
from lshv2.attention.intervals import Intervals, build_intervals
from lshv2.attention.local import local_backward, local_forward
from lshv2.precision import full_precision
from lshv2.profiling import region


def _flat_queries(x: Tensor) -> Tensor:
    """[N,G,T,...] -> [N*G*T + 1, ...]: the last row is a dummy that padded tile rows read and write."""
    flat = x.flatten(0, 2)
    return torch.cat([flat, flat.new_zeros(1, *flat.shape[1:])])


class _TiledAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, tables: Intervals, window: int, n_global: int) -> Tensor:
        """q [N,G,T,D], k, v [N,T,D] -> out [N,G,T,D]."""
        work = torch.promote_types(q.dtype, torch.float32)
        q_w, k_w, v_w = (x.to(work) for x in (q, k, v))
        with region("global"), full_precision(q):
            out, lse = local_forward(q_w, k_w, v_w, window, n_global)
        with region("bucket_attn"), full_precision(q):
            flat_out, flat_lse = _flat_queries(out), _flat_queries(lse)
            far_forward(_flat_queries(q_w), k_w.flatten(0, 1), v_w.flatten(0, 1), FarTiles(tables), flat_out, flat_lse)
            out, lse = flat_out[:-1].view_as(out), flat_lse[:-1].view_as(lse)
        # the tables too: what is on ctx itself, checkpointing keeps
        ctx.save_for_backward(q, k, v, out, lse, *vars(tables).values())
        ctx.window, ctx.n_global = window, n_global
        return out.to(q.dtype)

    @staticmethod
    @once_differentiable  # out and lse are constants to it: a second derivative would be silently wrong
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse, *kept = ctx.saved_tensors
        work = out.dtype
        q_w, k_w, v_w, grad = (x.to(work) for x in (q, k, v, grads[0]))
        with region("global"), full_precision(q):
            delta = (grad * out).sum(-1)
            dq, dk, dv = local_backward(q_w, k_w, v_w, ctx.window, ctx.n_global, grad, lse, delta)
        with region("bucket_attn"), full_precision(q):
            flat_dq = _flat_queries(dq)
            far_backward(
                _flat_queries(q_w), k_w.flatten(0, 1), v_w.flatten(0, 1), FarTiles(Intervals(*kept)),
                _flat_queries(grad), _flat_queries(lse), _flat_queries(delta),
                flat_dq, dk.view(-1, dk.shape[-1]), dv.view(-1, dv.shape[-1]),
            )
            dq = flat_dq[:-1].view_as(dq)
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), None, None, None


def lsh_attention_tiled(
    q: Tensor, k: Tensor, v: Tensor, q_buckets: Tensor, k_buckets: Tensor, *, n_buckets: int, bucket_size: int,
    window: int, n_global: int = 0, cu_seqlens: Tensor | None = None,
) -> Tensor:
    """q [B,H,T,D], k, v [B,K,T,D], buckets [B,H,R,T] and [B,K,R or 1,T] -> out [B,H,T,D] in q's dtype."""
    if cu_seqlens is not None:  # documents see nothing of each other: each is its own call
        bounds = cu_seqlens.tolist()
        outs = [
            lsh_attention_tiled(
                q[:, :, a:b], k[:, :, a:b], v[:, :, a:b], q_buckets[..., a:b], k_buckets[..., a:b],
                n_buckets=n_buckets, bucket_size=bucket_size, window=window, n_global=n_global,
            )
            for a, b in zip(bounds, bounds[1:], strict=False) if b > a
        ]
        return torch.cat(outs, dim=2)
    batch, n_heads, length, dim = q.shape
    n_kv = k.shape[1]
    with region("hashing"):
        tables = build_intervals(
            q_buckets, k_buckets, bucket_size=bucket_size, window=window, n_global=n_global
        )
    out = _TiledAttention.apply(
        q.reshape(batch * n_kv, n_heads // n_kv, length, dim), k.reshape(-1, length, dim), v.reshape(-1, length, dim),
        tables, window, n_global,
    )
    return out.view(batch, n_heads, length, dim)
