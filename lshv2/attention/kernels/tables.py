"""Bucket ids -> the integer tables that the kernels walk, built on the GPU without a host synchronisation.

The same intervals as `lshv2.attention.intervals`, laid out so that the kernels' inner loops read consecutive words:
    order    int32 [N,R,Tp]  key position at each rank (keys sorted by bucket, then position)
    queries  int32 [N,R,Mp]  query number m = (t·P + probe)·G + head, sorted by (bucket, position)
    low, length int32 [N,R,Mp]  span of ranks that this query sees, local and sinks excluded; both its ends ascend
    ranks, lows int32 [R(R-1)/2,N,Tp], [R(R-1)/2,N,Mp]  for rounds e < r, at r(r-1)/2 + e and in the order of round r:
             the key's padded rank and the query's padded low in the earlier round e

A padded rank is rank + W·bucket. The gap of W between buckets makes "an earlier round found this key" one unsigned
comparison, ranks - lows < W: keys that a span's end excludes are local or later, hence not in this round's span either.

Rows are padded to Tp and Mp entries that nobody sees, so that inner loops need no bounds. All rows, of keys and of
queries, are sorted in one call: the row number leads the code. Spans are then searched for in sorted order, where
neighbours look at the same keys. A packed document needs no bucket of its own: positions ascend within a bucket, so a
document is a stretch of it.

Either R rounds have a table each (P = 1), or one table (R = 1) is probed P times a query. Probes are then like further
heads: buckets of a table are disjoint, so nothing is found twice, except by probes that name the same bucket; all but
the first of these are sent to a bucket C behind all others, where no key lives.

Legend: N = B·K groups, G heads of a group, R rounds, P probes of a table, M = T·P·G queries of a group and table,
T keys, C buckets, W bucket size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from lshv2.attention.kernels.common import NOWHERE, Packing, document_pointers, numbered
from lshv2.launch import cdiv, launch

BLOCK = 256
PAD = 128  # rows are padded to a multiple of this, and by at least this: no tile is larger


@dataclass(frozen=True)
class Tables:
    """All int32: order [N,R,Tp], queries, low, length [N,R,Mp], ranks [R(R-1)/2,N,Tp], lows [R(R-1)/2,N,Mp]."""

    order: Tensor
    queries: Tensor
    low: Tensor
    length: Tensor
    ranks: Tensor
    lows: Tensor
    buffer: Tensor  # all of them, one after the other
    bucket_size: int
    probes: int  # P


def padded_sizes(length: int, queries: int) -> tuple[int, int]:
    """Tp and Mp of T and M."""
    return cdiv(length, PAD) * PAD + PAD, cdiv(queries, PAD) * PAD + PAD


def empty_tables(groups: int, rounds: int, length: int, queries: int, device: torch.device) -> Tensor:
    """Room for one call's tables in one allocation, which takes the host as long as a launch."""
    wide, tall = padded_sizes(length, queries)
    return torch.empty(sum(_extents(groups, rounds, wide, tall)), dtype=torch.int32, device=device)


def _extents(groups: int, rounds: int, wide: int, tall: int) -> tuple[int, ...]:
    rows, pairs = groups * rounds, groups * (rounds * (rounds - 1) // 2)
    return rows * wide, rows * tall, rows * tall, rows * tall, pairs * wide, pairs * tall


def tables_in(
    buffer: Tensor, groups: int, rounds: int, length: int, queries: int, bucket_size: int, probes: int
) -> Tables:
    """The tables that lie in a buffer of `empty_tables`."""
    wide, tall = padded_sizes(length, queries)
    order, sorted_queries, low, count, ranks, lows = buffer.split(_extents(groups, rounds, wide, tall))
    return Tables(
        order.view(groups, rounds, wide), sorted_queries.view(groups, rounds, tall), low.view(groups, rounds, tall),
        count.view(groups, rounds, tall), ranks.view(-1, groups, wide), lows.view(-1, groups, tall),
        buffer, bucket_size, probes,
    )


@triton.jit
def _bucket(ids, inside, C):
    """Bucket ids; those outside [0, C) are moved to its ends."""
    return tl.minimum(tl.maximum(tl.load(ids, mask=inside, other=0).to(tl.int32), 0), C - 1)


@triton.jit
def _codes(
    q_buckets, k_buckets, codes, rows, n_keys, T, M, C, stride,
    G: tl.constexpr, R: tl.constexpr, PROBES: tl.constexpr, BLOCK: tl.constexpr,
):
    """(row, bucket) of every key, then of every query, as one number: row · stride + bucket."""
    row = tl.program_id(1).to(tl.int64)
    tiles = tl.cdiv(M, BLOCK)
    if tl.program_id(0) < tiles:
        m = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        inside = m < M
        head, probe, t = numbered(m, G, PROBES)
        ids = q_buckets + ((row // R * G + head) * (R * PROBES) + row % R) * T + t
        bucket = _bucket(ids + probe * T, inside, C)
        repeated = probe < 0
        for e in tl.static_range(PROBES - 1):
            repeated |= (probe > e) & (_bucket(ids + e * T, inside & (probe > e), C) == bucket)
        code = (rows + row) * stride + tl.where(repeated, C, bucket)
        tl.store(codes + n_keys + row * M + m, code, mask=inside)
    else:
        s = (tl.program_id(0) - tiles) * BLOCK + tl.arange(0, BLOCK)
        key_code = row * stride + _bucket(k_buckets + row * T + s, s < T, C)
        tl.store(codes + row * T + s, key_code, mask=s < T)


@triton.jit
def _first_from(table, start, end, value, steps):
    """Elementwise binary search in an ascending stretch of a table: the first place in [start, end) with an entry of
    at least `value`, else end. `steps` halvings of the longest stretch: asking whether all are done costs more."""
    low, high = start, end
    for _ in range(steps):
        middle = (low + high) // 2
        searching = low < high
        before = tl.load(table + middle, mask=searching, other=0) < value
        low = tl.where(searching & before, middle + 1, low)
        high = tl.where(searching & (before == 0), middle, high)
    return low


@triton.jit
def _spans(
    codes, places, documents, starts, order, queries, low, length, padded, padded_low, rows, n_keys, T, Tp, M, Mp,
    stride, bucket_size, window, n_global, steps, sink_steps, span_steps,
    G: tl.constexpr, R: tl.constexpr, PROBES: tl.constexpr, DOCUMENTS: tl.constexpr, BLOCK: tl.constexpr,
):
    """Sorted codes and the flat places they came from -> order, queries and spans, and if R > 1, for other rounds, the
    padded rank of each key [N,T,R] and the padded low of each query [N,M,R]."""
    row = tl.program_id(1).to(tl.int64)
    n, r = row // R, row % R
    tiles = tl.cdiv(Mp, BLOCK)
    if tl.program_id(0) < tiles:
        i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        inside = i < M
        first = n_keys + row * M  # of the row's queries, behind all keys
        code = tl.load(codes + first + i, mask=inside, other=0).to(tl.int32) - rows * stride
        m = tl.load(places + first + i, mask=inside, other=0) - first
        m = tl.where(inside, m, 0).to(tl.int32)
        t = m // (G * PROBES)
        own_codes, own_places = codes + row * T, places + row * T
        none = tl.zeros_like(i)
        start = _first_from(own_codes, none, tl.where(inside, T, 0), code, steps)
        end = _first_from(own_codes, start, tl.where(inside, T, 0), code + 1, steps)
        begin, before = none, tl.minimum(start + n_global, end)  # a bucket begins with its sinks, n_global at most
        if DOCUMENTS:
            begin, before = tl.load(starts + tl.load(documents + t)), end
        past_sinks = _first_from(own_places, start, before, row * T + begin + n_global, sink_steps)
        seen = _first_from(own_places, past_sinks, end, row * T + t + 1, steps)
        span = tl.maximum(past_sinks, seen - bucket_size)
        high = _first_from(own_places, span, seen, row * T + t - window + 1, span_steps)
        tl.store(queries + row * Mp + i, m, mask=i < Mp)
        tl.store(low + row * Mp + i, tl.where(inside, span, T), mask=i < Mp)
        tl.store(length + row * Mp + i, high - span, mask=i < Mp)
        if R > 1:
            bucket = (code - row * stride).to(tl.int32)
            place = tl.where(end > start, span + bucket_size * bucket, NOWHERE)
            tl.store(padded_low + (n * M + m) * R + r, place, mask=inside)
    else:
        i = (tl.program_id(0) - tiles) * BLOCK + tl.arange(0, BLOCK)
        inside = i < T
        s = tl.where(inside, tl.load(places + row * T + i, mask=inside, other=0) - row * T, 0)
        tl.store(order + row * Tp + i, s.to(tl.int32), mask=i < Tp)
        if R > 1:
            key_bucket = tl.load(codes + row * T + i, mask=inside, other=0) - row * stride
            tl.store(padded + (n * T + s) * R + r, (i + bucket_size * key_bucket).to(tl.int32), mask=inside)


@triton.jit
def _earlier(
    order, queries, padded, padded_low, ranks, lows, groups, T, Tp, M, Mp, R: tl.constexpr, BLOCK: tl.constexpr
):
    """Bring what a round's queries and keys have in earlier rounds into the order of this round."""
    row = tl.program_id(1).to(tl.int64)
    n, r = row // R, row % R
    pair = (r * (r - 1) // 2) * groups + n
    tiles = tl.cdiv(Mp, BLOCK)
    if tl.program_id(0) < tiles:
        i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        m = tl.load(queries + row * Mp + i, mask=i < Mp, other=0)
        for e in range(r):
            earlier = tl.load(padded_low + (n * M + m) * R + e, mask=i < M, other=NOWHERE)
            tl.store(lows + (pair + e * groups) * Mp + i, earlier, mask=i < Mp)
    else:
        i = (tl.program_id(0) - tiles) * BLOCK + tl.arange(0, BLOCK)
        s = tl.load(order + row * Tp + i, mask=i < Tp, other=0)
        for e in range(r):
            earlier = tl.load(padded + (n * T + s) * R + e)
            tl.store(ranks + (pair + e * groups) * Tp + i, earlier, mask=i < Tp)


def build_tables(
    q_buckets: Tensor, k_buckets: Tensor, packing: Packing | None, *, n_buckets: int, bucket_size: int, window: int,
    n_global: int,
) -> Tables:
    """q_buckets [B,H,R·P,T], k_buckets [B,K,R,T] integers in [0, n_buckets), R or P 1 -> the tables of one call."""
    batch, n_kv, rounds, length = k_buckets.shape
    n_heads, device = q_buckets.shape[1], q_buckets.device
    groups, heads, probes = batch * n_kv, n_heads // n_kv, q_buckets.shape[2] // rounds
    queries, rows = length * probes * heads, groups * rounds
    wide, tall = padded_sizes(length, queries)
    stride = n_buckets + (probes > 1)  # buckets a row: the last is that of repeated probes
    # a radix sort makes a pass for each byte of the code: 16 bits whenever they hold every (row, bucket)
    code = torch.int16 if 2 * rows * stride <= 1 << 15 else torch.int32
    codes = torch.empty(rows * (length + queries), dtype=code, device=device)
    key_tiles, query_tiles = cdiv(length, BLOCK), cdiv(queries, BLOCK)
    launch(
        _codes, (query_tiles + key_tiles, rows, 1),
        (q_buckets.contiguous(), k_buckets.contiguous(), codes),
        (rows, rows * length, length, queries, n_buckets, stride),
        G=heads, R=rounds, PROBES=probes, BLOCK=BLOCK,
    )
    codes, places = codes.sort(stable=True)
    tables = tables_in(
        empty_tables(groups, rounds, length, queries, device), groups, rounds, length, queries, bucket_size, probes
    )
    padded = padded_low = tables.low  # without other rounds neither is written
    if rounds > 1:
        padded, padded_low = torch.empty(rows * (length + queries), dtype=torch.int32, device=device).split(
            (rows * length, rows * queries)
        )
    blocks = cdiv(tall, BLOCK) + cdiv(wide, BLOCK)
    launch(
        _spans, (blocks, rows, 1),
        (codes, places, *document_pointers(packing, padded), tables.order, tables.queries, tables.low, tables.length,
         padded, padded_low),
        (rows, rows * length, length, wide, queries, tall, stride, bucket_size, window, n_global, length.bit_length(),
         (length if packing else n_global).bit_length(), bucket_size.bit_length()),
        G=heads, R=rounds, PROBES=probes, DOCUMENTS=packing is not None, BLOCK=BLOCK,
    )
    if rounds > 1:
        launch(
            _earlier, (blocks, rows, 1),
            (tables.order, tables.queries, padded, padded_low, tables.ranks, tables.lows),
            (groups, length, wide, queries, tall), R=rounds, BLOCK=BLOCK,
        )
    return tables
