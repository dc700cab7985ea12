"""The sparse pattern as intervals: three integer tables describe everything that LSH attention visits.

Sort the keys of one (key head, round) by (bucket, position); a key's place is its *rank*. The bucket part of what
query t sees, without what Local and Global already cover, is then the interval `lo <= rank < hi`:

    lo = max(rank of the bucket's first key past the sinks, rank after its last key at a position <= t, minus W)
    hi = rank after the bucket's last key at a position <= t - window

because within a bucket ranks follow positions: local keys are the bucket's tail, sinks its head. So the fast paths
test one interval a round, and "an earlier round found this key already" is one interval test for each earlier round.
One table that is probed R times is sorted once; its buckets are disjoint, so that a probe finds what another found only
if both name the same bucket: of equal ones, all but the first get an empty interval.

Legend: N = B·K groups, M = G·T queries of a group (head-major), R rounds or probes, tables R or 1, T keys.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Intervals:
    """order [N,tables,T]: key position at each rank; rank: its inverse; lo, hi int32, query_code int64 [N,R,M]."""

    order: Tensor
    rank: Tensor
    lo: Tensor
    hi: Tensor
    query_code: Tensor

    def table(self, r: int) -> int:
        """In which table round r looks."""
        return r % self.order.shape[1]


@torch.no_grad()
def build_intervals(
    q_buckets: Tensor, k_buckets: Tensor, *, bucket_size: int, window: int, n_global: int
) -> Intervals:
    """q_buckets [B,H,R,T], k_buckets [B,K,R or 1,T], one document a row -> the tables. O(R·T·log T), no n_buckets term.
    """
    batch, n_heads, rounds, length = q_buckets.shape
    n_kv, n_tables = k_buckets.shape[1:3]
    position = torch.arange(length, device=q_buckets.device)
    key_bucket = k_buckets.reshape(batch * n_kv, n_tables, length)
    order = key_bucket.argsort(dim=-1, stable=True)  # stable: positions ascend within a bucket
    codes = key_bucket.gather(-1, order).long() * length + order  # ascending (bucket, position) pairs
    rank = torch.empty_like(order).scatter_(-1, order, position.expand_as(order))

    grouped = q_buckets.reshape(batch, n_kv, n_heads // n_kv, rounds, length)
    first = grouped.transpose(2, 3).long() * length  # [B,K,R,G,T]
    query_code = (first + position).flatten(3).flatten(0, 1).contiguous()  # [N,R,M]
    first = first.flatten(3).flatten(0, 1).contiguous()  # [N,R,M]: where the bucket of each query begins
    here = position.repeat(n_heads // n_kv)

    def place(code: Tensor, right: bool) -> Tensor:
        """Rank, in its table, of the first key not before `code` [N,R,M] (right: behind it)."""
        by_table = code.view(len(codes), n_tables, -1) if n_tables else code
        return torch.searchsorted(codes, by_table, right=right).view_as(code)

    start = place(first + n_global if n_global else first, False)  # sinks never lie in an interval
    lo = torch.maximum(start, place(query_code, True) - bucket_size)
    hi = torch.maximum(place(first + (here - window).clamp_min(-1), True), lo)
    for r in range(1, rounds if n_tables < rounds else 0):
        repeated = (first[:, :r] == first[:, r, None]).any(1)
        hi[:, r] = torch.where(repeated, lo[:, r], hi[:, r])
    return Intervals(order, rank.int(), lo.int(), hi.int(), query_code)
