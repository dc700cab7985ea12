"""The oracle: LSH attention as a dense masked softmax, word for word after its definition.

O(T²) time and memory: for tests and small shapes. Shares nothing with the fast paths (no sorting, no intervals).
Legend: B batch, H query heads, K key/value heads (H = G·K), T tokens, D head dim, R rounds or probes of one table.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lshv2.precision import full_precision


def document_starts(length: int, cu_seqlens: Tensor | None, device: torch.device) -> Tensor:
    """First position of each token's document: [T]."""
    if cu_seqlens is None:
        return torch.zeros(length, dtype=torch.long, device=device)
    bounds = cu_seqlens.to(device=device, dtype=torch.long)
    document = torch.searchsorted(bounds, torch.arange(length, device=device), right=True) - 1
    return bounds[document]


def visible_set(
    q_buckets: Tensor, k_buckets: Tensor, *, bucket_size: int, window: int, n_global: int,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """S(t) as a mask: q_buckets [B,H,R,T], k_buckets [B,K,R,T] or, one table for all R probes, [B,K,1,T] ->
    bool [B,H,T,T], True where query t sees key s."""
    batch, n_heads, rounds, length = q_buckets.shape
    device = q_buckets.device
    groups = n_heads // k_buckets.shape[1]
    start = document_starts(length, cu_seqlens, device)
    t, s = torch.arange(length, device=device)[:, None], torch.arange(length, device=device)[None, :]
    allowed = (s <= t) & (start[:, None] == start[None, :])  # causal, within one document
    local = (s > t - window) & allowed
    sinks = (s - start[:, None] < n_global) & allowed
    visible = (local | sinks).expand(batch, n_heads, length, length).clone()
    for r in range(rounds):
        table = r if k_buckets.shape[2] > 1 else 0
        keys = k_buckets[:, :, table].repeat_interleave(groups, dim=1)  # [B,H,T]
        match = (q_buckets[:, :, r, :, None] == keys[:, :, None, :]) & allowed
        newer = match.flip(-1).cumsum(-1).flip(-1)  # matching keys at positions >= s, s included
        visible |= match & (newer <= bucket_size)
    return visible


def lsh_attention_reference(
    q: Tensor, k: Tensor, v: Tensor, q_buckets: Tensor, k_buckets: Tensor, *, n_buckets: int, bucket_size: int,
    window: int, n_global: int = 0, cu_seqlens: Tensor | None = None,
) -> Tensor:
    """q [B,H,T,D], k, v [B,K,T,D] -> out [B,H,T,D] in q's dtype; float32 inside (float64 stays float64)."""
    groups = q.shape[1] // k.shape[1]
    mask = visible_set(
        q_buckets, k_buckets, bucket_size=bucket_size, window=window, n_global=n_global, cu_seqlens=cu_seqlens
    )
    work = torch.promote_types(q.dtype, torch.float32)
    keys, values = (x.to(work).repeat_interleave(groups, dim=1) for x in (k, v))
    with full_precision(q):
        scores = (q.to(work) @ keys.transpose(-1, -2)) * q.shape[-1] ** -0.5
        weights = scores.masked_fill(~mask, float("-inf")).softmax(-1)
        return (weights @ values).to(q.dtype)
