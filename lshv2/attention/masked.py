"""LSH attention through SDPA with the visible set as a mask: O(T²), but one kernel, so it wins on short sequences.

The mask comes from the interval tables, hence from the same pattern code as the linear path; `reference` does not.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from lshv2.attention.intervals import build_intervals
from lshv2.attention.reference import document_starts
from lshv2.precision import full_precision
from lshv2.profiling import region


@torch.no_grad()
def interval_mask(
    q_buckets: Tensor, k_buckets: Tensor, *, n_buckets: int, bucket_size: int, window: int, n_global: int,
    cu_seqlens: Tensor | None,
) -> Tensor:
    """S(t) as bool [B,H,T,T]; q_buckets [B,H,R,T], k_buckets [B,K,R or 1,T]."""
    batch, n_heads, rounds, length = q_buckets.shape
    start = document_starts(length, cu_seqlens, q_buckets.device)
    if cu_seqlens is not None:  # a bucket of a document is a bucket of its own
        document = torch.nn.functional.pad((start[1:] != start[:-1]).cumsum(0), (1, 0))
        q_buckets, k_buckets = (x.long() + n_buckets * document for x in (q_buckets, k_buckets))
    tables = build_intervals(q_buckets, k_buckets, bucket_size=bucket_size, window=window, n_global=0)
    position = torch.arange(length, device=q_buckets.device)
    distance = position[:, None] - position
    near = (distance >= 0) & ((distance < window) | (position - start < n_global)) & (start[:, None] == start)
    visible = near.expand(tables.lo.shape[0], n_heads // k_buckets.shape[1], length, length).flatten(1, 2).clone()
    for r in range(rounds):
        rank = tables.rank[:, tables.table(r), None]
        lo, hi = tables.lo[:, r, :, None], tables.hi[:, r, :, None]
        visible |= (rank >= lo) & (rank < hi)
    return visible.view(batch, n_heads, length, length)


def lsh_attention_masked(
    q: Tensor, k: Tensor, v: Tensor, q_buckets: Tensor, k_buckets: Tensor, *, n_buckets: int, bucket_size: int,
    window: int, n_global: int = 0, cu_seqlens: Tensor | None = None,
) -> Tensor:
    """q [B,H,T,D], k, v [B,K,T,D], buckets [B,H,R,T] and [B,K,R or 1,T] -> out [B,H,T,D]."""
    with region("hashing"):
        mask = interval_mask(
            q_buckets, k_buckets, n_buckets=n_buckets, bucket_size=bucket_size, window=window, n_global=n_global,
            cu_seqlens=cu_seqlens,
        )
    with region("bucket_attn"), full_precision(q):
        groups = q.shape[1] // k.shape[1]
        k, v = (x.to(q.dtype).repeat_interleave(groups, 1) for x in (k, v))
        return scaled_dot_product_attention(q, k, v, attn_mask=mask)
