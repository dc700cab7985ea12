"""Forward kernels: the bucket rounds into partial results, then the local part, which merges them.

`far_forward`: a program owns a tile of sorted queries of one (group, table) and walks the stretch of sorted keys that
they span, gathering rows of k and v by index; keys that an earlier round found are hidden. It leaves a normalised
partial output and its log-sum-exp. `local_forward`: a program owns a tile of consecutive queries of one head, attends
to window and sinks, merges the partial results and stores the output and one log-sum-exp (of base 2).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lshv2.attention.kernels.common import (
    LOG2_E,
    Packing,
    document_pointers,
    earlier_rows,
    found_earlier,
    numbered,
    precision,
    tile_for,
    tile_of_queries,
    within,
)
from lshv2.attention.kernels.tables import Tables
from lshv2.launch import cdiv, launch, power_of_two


@triton.jit
def _attend(q_tile, k_tile, v_tile, seen, peak, total, acc, scale, PRECISION: tl.constexpr):
    """One step of the running softmax over unscaled logits; a row may have seen nothing yet."""
    logits = tl.where(seen, tl.dot(q_tile, k_tile, input_precision=PRECISION), float("-inf"))
    new_peak = tl.maximum(peak, tl.max(logits, axis=1))
    shift = tl.where(new_peak == float("-inf"), 0.0, new_peak * scale)
    weights = tl.exp2(logits * scale - shift[:, None])
    keep = tl.exp2(peak * scale - shift)
    total = total * keep + tl.sum(weights, axis=1)
    acc = tl.dot(weights.to(v_tile.dtype), v_tile, acc * keep[:, None], input_precision=PRECISION)
    return new_peak, total, acc


@triton.jit
def _far_forward(
    q, k, v, part, part_lse, order, queries, low, length, ranks, lows, scale,
    sqb, sqh, sqt, skb, skh, skt, svb, svh, svt, T, Tp, M, Mp, n_kv, groups, bucket_size, first_round,
    G: tl.constexpr, R: tl.constexpr, PROBES: tl.constexpr, EARLIER: tl.constexpr, MIXED: tl.constexpr,
    D: tl.constexpr, PRECISION: tl.constexpr, OWN: tl.constexpr, OTHER: tl.constexpr,
):
    n, r = tl.program_id(1).to(tl.int64), first_round + tl.program_id(2)
    i = tl.program_id(0) * OWN + tl.arange(0, OWN)
    d = tl.arange(0, D)
    row = (n * R + r) * Mp + i
    pair = (r * (r - 1) // 2).to(tl.int64) * groups + n
    ranks += pair * Tp
    m, first, count, last, before = tile_of_queries(
        queries, low, length, lows + pair * Mp, row, i, r, groups * Mp, OTHER, EARLIER, MIXED
    )
    busy = count > 0
    head, probe, t = numbered(m, G, PROBES)
    inside = i < M
    b, g = n // n_kv, n % n_kv
    q_rows = q + b * sqb + (g * G + head) * sqh + t * sqt
    q_tile = tl.load(q_rows[:, None] + d[None, :], mask=busy[:, None], other=0.0)
    k += b * skb + g * skh
    v += b * svb + g * svh
    order += (n * R + r) * Tp
    peak = tl.full([OWN], float("-inf"), tl.float32)
    total = tl.zeros([OWN], tl.float32)
    acc = tl.zeros([OWN, D], tl.float32)
    end = tl.max((first + count) * busy, axis=0)
    begin = tl.min(tl.where(busy, first, end), axis=0)
    while begin < end:
        begin = begin // 4 * 4  # aligned, loads of consecutive words are wider
        stop = tl.min(tl.where(last & (first + count > begin), first + count, end), axis=0)
        for j in range(begin, stop, OTHER):
            place = tl.multiple_of(j, 4) + tl.arange(0, OTHER)
            s = tl.load(order + place).to(tl.int64)
            k_tile = tl.load(k + s[None, :] * skt + d[:, None])
            v_tile = tl.load(v + s[:, None] * svt + d[None, :])
            seen = within(place[None, :] - first[:, None], count[:, None])
            if EARLIER > 0:
                there = earlier_rows(ranks, groups * Tp, place, r, 0, EARLIER, MIXED)
                seen &= found_earlier(there, before, bucket_size, EARLIER, False) == 0
            peak, total, acc = _attend(q_tile, k_tile, v_tile, seen, peak, total, acc, scale, PRECISION)
        begin = tl.min(tl.where(busy & (first >= stop), first, end), axis=0)
    found = total > 0
    safe = tl.where(found, total, 1.0)
    row = ((r + probe) * groups + n) * (M // PROBES) + head * T + t
    tl.store(part_lse + row, tl.where(found, peak * scale + tl.log2(safe), float("-inf")), mask=inside)
    acc = acc / safe[:, None]
    tl.store(part + row[:, None] * D + d[None, :], acc.to(part.dtype.element_ty), mask=(inside & found)[:, None])


@triton.jit
def _local_forward(
    q, k, v, part, part_lse, out, lse, documents, starts, scale,
    sqb, sqh, sqt, skb, skh, skt, svb, svh, svt, sob, soh, sot, T, n_heads, window, n_global, stack,
    G: tl.constexpr, R: tl.constexpr, D: tl.constexpr, SINKS: tl.constexpr, DOCUMENTS: tl.constexpr, EVEN: tl.constexpr,
    PRECISION: tl.constexpr, OWN: tl.constexpr, OTHER: tl.constexpr,
):
    t0, h, b = tl.program_id(0) * OWN, tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    t = t0 + tl.arange(0, OWN)
    d = tl.arange(0, D)
    inside = t < T
    own, start = tl.zeros_like(t), tl.zeros_like(t)  # each token's document, and where that begins
    first, last, begin = 0, 0, 0
    if DOCUMENTS:
        own = tl.load(documents + t, mask=inside, other=0)
        start = tl.load(starts + own)
        first, last = tl.load(documents + t0), tl.load(documents + tl.minimum(t0 + OWN, T) - 1)
        begin = tl.load(starts + first)
    q_tile = tl.load(
        q + b * sqb + h * sqh + t.to(tl.int64)[:, None] * sqt + d[None, :], mask=inside[:, None], other=0.0
    )
    k += b * skb + h // G * skh
    v += b * svb + h // G * svh
    peak = tl.full([OWN], float("-inf"), tl.float32)
    total = tl.zeros([OWN], tl.float32)
    acc = tl.zeros([OWN, D], tl.float32)
    begin = tl.maximum(begin, t0 - window + 1) // OTHER * OTHER  # EVEN: then no tile reaches past the last token
    for j in range(begin, tl.minimum(t0 + OWN, T), OTHER):
        s = j + tl.arange(0, OTHER)
        s64 = s.to(tl.int64)
        k_tile = tl.load(k + s64[None, :] * skt + d[:, None], mask=EVEN | (s < T)[None, :], other=0.0)
        v_tile = tl.load(v + s64[:, None] * svt + d[None, :], mask=EVEN | (s < T)[:, None], other=0.0)
        seen = within(t[:, None] - s[None, :], window)
        if DOCUMENTS:
            seen &= s[None, :] >= start[:, None]
        peak, total, acc = _attend(q_tile, k_tile, v_tile, seen, peak, total, acc, scale, PRECISION)
    if SINKS > 0:
        for c in range(first, last + 1):
            begin = tl.load(starts + c) if DOCUMENTS else 0
            for j in tl.range(0, n_global, SINKS, num_stages=1):  # mostly a single step
                s = begin + j + tl.arange(0, SINKS)
                there = (s < begin + n_global) & (s < T)
                k_tile = tl.load(k + s.to(tl.int64)[None, :] * skt + d[:, None], mask=there[None, :], other=0.0)
                v_tile = tl.load(v + s.to(tl.int64)[:, None] * svt + d[None, :], mask=there[:, None], other=0.0)
                seen = there[None, :] & (s[None, :] <= t[:, None] - window) & (own == c)[:, None]
                peak, total, acc = _attend(q_tile, k_tile, v_tile, seen, peak, total, acc, scale, PRECISION)
    peak *= scale
    row = (b * n_heads + h) * T + t
    stack += row * 0  # 64 bits wide
    for r in tl.static_range(R):
        far = tl.load(part_lse + r * stack + row, mask=inside, other=float("-inf"))
        rows = part + (r * stack + row) * D
        more = tl.load(rows[:, None] + d[None, :], mask=(far > float("-inf"))[:, None], other=0.0)
        new_peak = tl.maximum(peak, far)
        keep, add = tl.exp2(peak - new_peak), tl.exp2(far - new_peak)
        acc = acc * keep[:, None] + more.to(tl.float32) * add[:, None]
        total = total * keep + add
        peak = new_peak
    tl.store(lse + row, peak + tl.log2(total), mask=inside)
    out_rows = out + b * sob + h * soh + t.to(tl.int64) * sot
    acc = acc / total[:, None]
    tl.store(out_rows[:, None] + d[None, :], acc.to(out.dtype.element_ty), mask=inside[:, None])


def far_forward(q: Tensor, k: Tensor, v: Tensor, tables: Tables, per_launch: int) -> tuple[Tensor, Tensor]:
    """q [B,H,T,D], k, v [B,K,T,D] -> partial outputs [R·P,N,G,T,D] in q's dtype and their lse float32 [R·P,N,G,T].

    Rows that saw nothing hold -inf in the latter and anything in the former. All lse are of base 2.
    """
    length, dim = q.shape[2:]
    groups, rounds, tall = tables.queries.shape
    heads = q.shape[1] // k.shape[1]
    queries = length * tables.probes * heads
    part = q.new_empty(rounds * tables.probes, groups, heads, length, dim)
    part_lse = q.new_empty(rounds * tables.probes, groups, heads, length, dtype=torch.float32)
    tile = tile_for("far_forward", dim, q.dtype)
    for first in range(0, rounds, per_launch):
        count = min(per_launch, rounds - first)
        launch(
            _far_forward, (cdiv(queries, tile.own), groups, count),
            (q, k, v, part, part_lse, tables.order, tables.queries, tables.low, tables.length, tables.ranks,
             tables.lows),
            (dim**-0.5 * LOG2_E, *q.stride()[:3], *k.stride()[:3], *v.stride()[:3],
             length, tables.order.shape[2], queries, tall, k.shape[1], groups, tables.bucket_size, first),
            G=heads, R=rounds, PROBES=tables.probes, EARLIER=first + count - 1, MIXED=count > 1, D=dim,
            PRECISION=precision(q.dtype), **tile.options(),
        )
    return part, part_lse


def local_forward(
    q: Tensor, k: Tensor, v: Tensor, part: Tensor | None, part_lse: Tensor | None, packing: Packing | None, window: int,
    n_global: int,
) -> tuple[Tensor, Tensor]:
    """Window, sinks and the merge -> out [B,H,T,D] and lse float32 [B,H,T]."""
    batch, n_heads, length, dim = q.shape
    out = q.new_empty(batch, length, n_heads, dim).transpose(1, 2)  # so that joining the heads again costs nothing
    lse = q.new_empty(batch, n_heads, length, dtype=torch.float32)
    tile = tile_for("local_forward", dim, q.dtype)
    launch(
        _local_forward, (cdiv(length, tile.own), n_heads, batch),
        (q, k, v, q if part is None else part, lse if part_lse is None else part_lse, out, lse,
         *document_pointers(packing, lse)),
        (dim**-0.5 * LOG2_E, *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *out.stride()[:3],
         length, n_heads, window, n_global, lse.numel()),
        G=n_heads // k.shape[1], R=0 if part is None else part.shape[0], D=dim, SINKS=sink_block(n_global),
        DOCUMENTS=packing is not None, EVEN=length % tile.other == 0, PRECISION=precision(q.dtype), **tile.options(),
    )
    return out, lse


def sink_block(n_global: int) -> int:
    """Sinks read at a time: 16 is the least that a matrix product takes."""
    return min(64, max(16, power_of_two(n_global))) if n_global else 0
