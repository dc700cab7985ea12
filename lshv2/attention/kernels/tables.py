"""Bucket ids -> the integer tables that the kernels walk, built on the GPU without a host synchronisation.

The same intervals as `lshv2.attention.intervals`, laid out so that the kernels' inner loops read consecutive words:
    order    int32 [N,R,Tp]  key position at each rank (keys sorted by bucket, then position)
    queries  int32 [N,R,Mp]  query number m = t·G + head, sorted by (bucket, position), those with an empty span last
    low, length int32 [N,R,Mp]  span of ranks that this query sees, local and sinks excluded
    ranks    int32 [R(R-1)/2,N,Tp], lows int32 [R(R-1)/2,N,Mp]  for rounds e < r, at r(r-1)/2 + e: the key's (query's)
             padded rank (low) in the earlier round e, in the order of round r

A padded rank is rank + W·bucket. The gap of W between buckets makes "an earlier round found this key" one unsigned
comparison, ranks - lows < W: keys that a span's end excludes are local or later, hence not in this round's span either.

Rows are padded to Tp and Mp entries that nobody sees, so that inner loops need no bounds.
All rows are sorted in one call: the row number leads the code. A packed document needs no bucket of its own: positions
ascend within a bucket, so a document is a stretch of it, found by the same binary search as everything else here.

Legend: N = B·K groups, G heads of a group, M = T·G queries of a group, R rounds, T keys, C buckets, W bucket size.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 256
PAD = 128  # rows are padded to a multiple of this, and by at least this: no tile is larger


NOWHERE = tl.constexpr(1 << 30)  # a low that no padded rank comes near


@dataclass(frozen=True)
class Tables:
    """All int32: order [N,R,Tp], queries, low, length [N,R,Mp], ranks [R(R-1)/2,N,Tp], lows [R(R-1)/2,N,Mp]."""

    order: Tensor
    queries: Tensor
    low: Tensor
    length: Tensor
    ranks: Tensor
    lows: Tensor
    bucket_size: int


@dataclass(frozen=True)
class Packing:
    """Documents that share a row: index int32 [T] of each token's document, bounds int32 [documents + 1]."""

    index: Tensor
    bounds: Tensor


def packing_of(cu_seqlens: Tensor | None, length: int, device: torch.device) -> Packing | None:
    """cu_seqlens [documents + 1] -> Packing, on the device, or None."""
    if cu_seqlens is None:
        return None
    bounds = cu_seqlens.to(device=device, dtype=torch.int32)
    tokens = torch.arange(length, dtype=torch.int32, device=device)
    return Packing(torch.searchsorted(bounds, tokens, right=True, out_int32=True) - 1, bounds)


def document_pointers(packing: Packing | None, unused: Tensor) -> tuple[Tensor, Tensor]:
    """A kernel's two arguments for documents; without packing it reads neither."""
    return (unused, unused) if packing is None else (packing.index, packing.bounds)


@triton.jit
def _first_from(order, start, end, position):
    """Elementwise binary search: the first rank in [start, end) whose key stands at `position` or later, else end."""
    low, high = start, end
    while tl.max(high - low, axis=0) > 0:
        middle = (low + high) // 2
        searching = low < high
        before = tl.load(order + middle, mask=searching, other=0) < position
        low = tl.where(searching & before, middle + 1, low)
        high = tl.where(searching & (before == 0), middle, high)
    return low


@triton.jit
def _rank_keys(
    codes, places, order, padded, bounds, T, Tp, C, bucket_size, R: tl.constexpr, BLOCK: tl.constexpr
):
    """Sorted codes and their flat places [N·R,T] -> order, padded ranks [N,T,R], bounds of each bucket [N·R,C,2]."""
    row = tl.program_id(1).to(tl.int64)
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = i < T
    codes += row * T
    code = tl.load(codes + i, mask=inside, other=0).to(tl.int32)
    before = tl.load(codes + i - 1, mask=inside & (i > 0), other=-1).to(tl.int32)
    after = tl.load(codes + i + 1, mask=i < T - 1, other=-1).to(tl.int32)
    position = tl.load(places + row * T + i, mask=inside, other=0) - row * T
    position = tl.minimum(tl.maximum(position, 0), T - 1)  # ids outside [0, C) mix rows: wrong, but within memory
    bucket = (code - row * (C + 1)).to(tl.int32)
    tl.store(order + row * Tp + i, tl.where(inside, position, 0).to(tl.int32), mask=i < Tp)
    tl.store(padded + (row // R * T + position) * R + row % R, i + bucket_size * bucket, mask=inside)
    inside &= (bucket >= 0) & (bucket < C)
    bounds += (row * C + bucket) * 2
    tl.store(bounds, i, mask=inside & ((code != before) | (i == 0)))
    tl.store(bounds + 1, i + 1, mask=inside & ((code != after) | (i == T - 1)))


@triton.jit
def _find_spans(
    buckets, bounds, order, documents, starts, spans, codes, T, Tp, M, C, bucket_size, window, n_global,
    G: tl.constexpr, R: tl.constexpr, DOCUMENTS: tl.constexpr, BLOCK: tl.constexpr,
):
    """Each query's span in one round [N,M,R,2] as (padded low, length), and the code that sorts it: the sentinel
    bucket C when the span is empty."""
    n, r = tl.program_id(1).to(tl.int64), tl.program_id(0) % R  # rounds next to each other: they share lines of spans
    m = tl.program_id(0) // R * BLOCK + tl.arange(0, BLOCK)
    inside = m < M
    t = m // G
    row = n * R + r
    bucket = tl.load(buckets + ((n * G + m % G) * R + r) * T + t, mask=inside, other=0).to(tl.int32)
    known = inside & (bucket >= 0) & (bucket < C)
    start = tl.load(bounds + (row * C + bucket) * 2, mask=known, other=0)
    end = tl.load(bounds + (row * C + bucket) * 2 + 1, mask=known, other=0)
    document = tl.zeros_like(t)
    if DOCUMENTS:
        document = tl.load(starts + tl.load(documents + t, mask=inside, other=0))
    order += row * Tp
    first = start
    if DOCUMENTS:
        first = _first_from(order, start, end, document)
    for _ in range(n_global):  # at most so many sinks stand first
        sink = tl.load(order + first, mask=first < end, other=T) < document + n_global
        first += sink.to(tl.int32)
    seen = _first_from(order, first, end, t + 1)
    low = tl.maximum(first, seen - bucket_size)
    # mostly none of the keys is local, so look at the newest before searching
    far = tl.load(order + seen - 1, mask=seen > low, other=0) <= t - window
    high = _first_from(order, tl.where(far, seen, low), seen, t - window + 1)
    spans += ((n * M + m) * R + r) * 2
    tl.store(spans, tl.where(end > start, low + bucket_size * bucket, NOWHERE), mask=inside)
    tl.store(spans + 1, high - low, mask=inside)
    tl.store(codes + row * M + m, row * (C + 1) + tl.where(high > low, bucket, C), mask=inside)


@triton.jit
def _arrange(
    codes, places, spans, padded, order, queries, low, length, ranks, lows, T, Tp, M, Mp, C, bucket_size, groups,
    R: tl.constexpr, BLOCK: tl.constexpr,
):
    """Bring what belongs to a round's queries, and to its keys, into that round's order."""
    row = tl.program_id(1).to(tl.int64)
    n, r = row // R, row % R
    pair = (r * (r - 1) // 2) * groups + n
    tiles = tl.cdiv(Mp, BLOCK)
    if tl.program_id(0) < tiles:
        i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        inside, there = i < M, i < Mp
        bucket = (tl.load(codes + row * M + i, mask=inside, other=0) - row * (C + 1)).to(tl.int32)
        m = tl.where(inside, tl.load(places + row * M + i, mask=inside, other=0) - row * M, 0)
        source = spans + (n * M + m) * R * 2
        first = tl.load(source + r * 2, mask=inside, other=0) - bucket_size * bucket
        tl.store(queries + row * Mp + i, m.to(tl.int32), mask=there)
        tl.store(low + row * Mp + i, first, mask=there)
        tl.store(length + row * Mp + i, tl.load(source + r * 2 + 1, mask=inside, other=0), mask=there)
        for e in range(r):
            earlier = tl.load(source + e * 2, mask=inside, other=NOWHERE)
            tl.store(lows + (pair + e * groups) * Mp + i, earlier, mask=there)
    else:
        i = (tl.program_id(0) - tiles) * BLOCK + tl.arange(0, BLOCK)
        s = tl.load(order + row * Tp + i, mask=i < Tp, other=0)
        for e in range(r):
            earlier = tl.load(padded + (n * T + s) * R + e)
            tl.store(ranks + (pair + e * groups) * Tp + i, earlier, mask=i < Tp)


@functools.lru_cache(maxsize=16)
def _row_codes(rows: int, step: int, device: torch.device) -> Tensor:
    """What leads the codes of each row: int32 [rows,1]."""
    return torch.arange(0, rows * step, step, dtype=torch.int32, device=device)[:, None]


@torch.no_grad()
def build_tables(
    q_buckets: Tensor, k_buckets: Tensor, packing: Packing | None, *, n_buckets: int, bucket_size: int, window: int,
    n_global: int,
) -> Tables:
    """q_buckets [B,H,R,T], k_buckets [B,K,R,T] integers in [0, n_buckets) -> the tables of one call."""
    batch, n_heads, rounds, length = q_buckets.shape
    n_kv, device = k_buckets.shape[1], q_buckets.device
    groups, heads = batch * n_kv, n_heads // n_kv
    queries, rows, pairs = heads * length, groups * rounds, rounds * (rounds - 1) // 2
    wide, tall = (triton.cdiv(x, PAD) * PAD + PAD for x in (length, queries))

    def table(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.int32, device=device)

    # a radix sort makes a pass for each byte of the code: 16 bits whenever they hold every (row, bucket)
    code = torch.int16 if rows * (n_buckets + 1) <= 1 << 15 else torch.int32
    codes = torch.empty(rows, length, dtype=code, device=device)
    torch.add(k_buckets.reshape(rows, length), _row_codes(rows, n_buckets + 1, device), out=codes)
    codes, places = codes.view(-1).sort(stable=True)
    order, padded = table(groups, rounds, wide), table(groups, length, rounds)
    bounds = torch.zeros(rows, n_buckets, 2, dtype=torch.int32, device=device)
    _rank_keys[(triton.cdiv(wide, BLOCK), rows)](
        codes, places, order, padded, bounds, length, wide, n_buckets, bucket_size, R=rounds, BLOCK=BLOCK
    )
    spans = table(groups, queries, rounds, 2)
    codes = torch.empty(rows * queries, dtype=code, device=device)
    _find_spans[(triton.cdiv(queries, BLOCK) * rounds, groups)](
        q_buckets.contiguous(), bounds, order, *document_pointers(packing, order), spans, codes, length, wide, queries,
        n_buckets, bucket_size, window, n_global, G=heads, R=rounds, DOCUMENTS=packing is not None, BLOCK=BLOCK,
    )
    codes, places = codes.sort(stable=True)
    sorted_queries, low, count = (table(groups, rounds, tall) for _ in range(3))
    ranks, lows = table(pairs, groups, wide), table(pairs, groups, tall)
    blocks = triton.cdiv(tall, BLOCK) + (triton.cdiv(wide, BLOCK) if pairs else 0)
    _arrange[(blocks, rows)](
        codes, places, spans, padded, order, sorted_queries, low, count, ranks, lows, length, wide, queries, tall, n_buckets,
        bucket_size, groups, R=rounds, BLOCK=BLOCK,
    )
    return Tables(order, sorted_queries, low, count, ranks, lows, bucket_size)
