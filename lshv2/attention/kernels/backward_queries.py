"""Backward kernels that own queries: dq, and what the sinks receive.

Same walk as the forward. Weights are rebuilt from the merged log-sum-exp, so that the bucket rounds and the local part
are the softmax's true shares: with P = exp(logits - lse), dS = P (dO·V - delta), dq = scale · Σ dS k. Each round leaves
its share of dq as a partial sum; `local_queries` adds its own and the rounds'. Sinks are seen from everywhere: each
tile of queries leaves its contribution to them, and `_sum_sinks` adds those up in a fixed order.
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
from lshv2.attention.kernels.forward import sink_block
from lshv2.attention.kernels.tables import Tables
from lshv2.launch import cdiv, launch


@triton.jit
def _delta(out, grad, delta, sob, soh, sot, sgb, sgh, sgt, T, n_heads, D: tl.constexpr, BLOCK: tl.constexpr):
    """delta = Σ_d dO·O, [B,H,T]."""
    h, b = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    t = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    d = tl.arange(0, D)
    inside = t < T
    t64 = t.to(tl.int64)[:, None]
    o = tl.load(out + b * sob + h * soh + t64 * sot + d[None, :], mask=inside[:, None], other=0.0)
    g = tl.load(grad + b * sgb + h * sgh + t64 * sgt + d[None, :], mask=inside[:, None], other=0.0)
    tl.store(delta + (b * n_heads + h) * T + t, tl.sum(o.to(tl.float32) * g.to(tl.float32), axis=1), mask=inside)


@triton.jit
def _share(q_tile, k_tile, v_tile, grad_tile, seen, lse, delta, scale, PRECISION: tl.constexpr):
    """P and dS of a tile: q, grad [Q,D], k, v [D,S] (both transposed), seen [Q,S], lse, delta [Q]."""
    logits = tl.dot(q_tile, k_tile, input_precision=PRECISION) * scale
    weights = tl.where(seen, tl.exp2(logits - lse[:, None]), 0.0)
    dweights = tl.dot(grad_tile, v_tile, input_precision=PRECISION)
    return weights, weights * (dweights - delta[:, None])


@triton.jit
def _far_queries(
    q, k, v, grad, lse, delta, part, sorted_lse, sorted_delta, order, queries, low, length, ranks, lows, scale,
    sqb, sqh, sqt, skb, skh, skt, svb, svh, svt, sgb, sgh, sgt, T, Tp, M, Mp, n_kv, groups, bucket_size,
    first_round, G: tl.constexpr, R: tl.constexpr, PROBES: tl.constexpr, EARLIER: tl.constexpr, MIXED: tl.constexpr,
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
    M = M // PROBES
    lse_tile = tl.load(lse + n * M + head * T + t, mask=busy, other=0.0)
    delta_tile = tl.load(delta + n * M + head * T + t, mask=busy, other=0.0)
    tl.store(sorted_lse + row, lse_tile)  # in the order in which `far_keys` reads them
    tl.store(sorted_delta + row, delta_tile)

    b, g = n // n_kv, n % n_kv
    here = busy[:, None]
    q_tile = tl.load((q + b * sqb + (g * G + head) * sqh + t * sqt)[:, None] + d[None, :], mask=here, other=0.0)
    grad_tile = tl.load((grad + b * sgb + (g * G + head) * sgh + t * sgt)[:, None] + d[None, :], mask=here, other=0.0)
    k += b * skb + g * skh
    v += b * svb + g * svh
    order += (n * R + r) * Tp
    acc = tl.zeros([OWN, D], tl.float32)
    end = tl.max((first + count) * busy, axis=0)
    begin = tl.min(tl.where(busy, first, end), axis=0)
    while begin < end:
        begin = begin // 4 * 4
        stop = tl.min(tl.where(last & (first + count > begin), first + count, end), axis=0)
        for j in range(begin, stop, OTHER):
            place = tl.multiple_of(j, 4) + tl.arange(0, OTHER)
            s = tl.load(order + place).to(tl.int64)
            k_tile = tl.load(k + s[None, :] * skt + d[:, None])
            v_tile = tl.load(v + s[None, :] * svt + d[:, None])
            seen = within(place[None, :] - first[:, None], count[:, None])
            if EARLIER > 0:
                there = earlier_rows(ranks, groups * Tp, place, r, 0, EARLIER, MIXED)
                seen &= found_earlier(there, before, bucket_size, EARLIER, False) == 0
            _, share = _share(q_tile, k_tile, v_tile, grad_tile, seen, lse_tile, delta_tile, scale, PRECISION)
            acc = tl.dot(share.to(k_tile.dtype), tl.trans(k_tile), acc, input_precision=PRECISION)
        begin = tl.min(tl.where(busy & (first >= stop), first, end), axis=0)
    rows = part + (((r + probe) * groups + n) * M + head * T + t) * D
    tl.store(rows[:, None] + d[None, :], acc.to(part.dtype.element_ty), mask=inside[:, None])


@triton.jit
def _local_queries(
    q, k, v, grad, lse, delta, part, dq, sink_part, documents, starts, scale, logit_scale,
    sqb, sqh, sqt, skb, skh, skt, svb, svh, svt, sgb, sgh, sgt, sdb, sdh, sdt,
    T, n_heads, window, n_global, n_slots, stack,
    G: tl.constexpr, R: tl.constexpr, D: tl.constexpr, SINKS: tl.constexpr, DOCUMENTS: tl.constexpr, EVEN: tl.constexpr,
    PRECISION: tl.constexpr, OWN: tl.constexpr, OTHER: tl.constexpr,
):
    tile = tl.program_id(0)
    t0, h, b = tile * OWN, tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
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
    here, t64 = inside[:, None], t.to(tl.int64)[:, None]
    q_tile = tl.load(q + b * sqb + h * sqh + t64 * sqt + d[None, :], mask=here, other=0.0)
    grad_tile = tl.load(grad + b * sgb + h * sgh + t64 * sgt + d[None, :], mask=here, other=0.0)
    row = (b * n_heads + h) * T + t
    lse_tile = tl.load(lse + row, mask=inside, other=float("inf"))  # rows past the end weigh nothing
    delta_tile = tl.load(delta + row, mask=inside, other=0.0)
    k += b * skb + h // G * skh
    v += b * svb + h // G * svh
    acc = tl.zeros([OWN, D], tl.float32)
    begin = tl.maximum(begin, t0 - window + 1) // OTHER * OTHER
    for j in range(begin, tl.minimum(t0 + OWN, T), OTHER):
        s = j + tl.arange(0, OTHER)
        s64 = s.to(tl.int64)[None, :]
        k_tile = tl.load(k + s64 * skt + d[:, None], mask=EVEN | (s < T)[None, :], other=0.0)
        v_tile = tl.load(v + s64 * svt + d[:, None], mask=EVEN | (s < T)[None, :], other=0.0)
        seen = within(t[:, None] - s[None, :], window)
        if DOCUMENTS:
            seen &= s[None, :] >= start[:, None]
        _, share = _share(q_tile, k_tile, v_tile, grad_tile, seen, lse_tile, delta_tile, logit_scale, PRECISION)
        acc = tl.dot(share.to(k_tile.dtype), tl.trans(k_tile), acc, input_precision=PRECISION)
    if SINKS > 0:
        # pairs of tile and document ascend together, so that their sum numbers them
        sink_part += (b * n_heads + h) * n_slots * n_global * 2 * D
        for c in range(first, last + 1):
            begin = tl.load(starts + c) if DOCUMENTS else 0
            for j in tl.range(0, n_global, SINKS, num_stages=1):  # mostly a single step
                number = j + tl.arange(0, SINKS)
                s = begin + number
                there = (number < n_global) & (s < T)
                s64 = s.to(tl.int64)[None, :]
                k_tile = tl.load(k + s64 * skt + d[:, None], mask=there[None, :], other=0.0)
                v_tile = tl.load(v + s64 * svt + d[:, None], mask=there[None, :], other=0.0)
                seen = there[None, :] & (s[None, :] <= t[:, None] - window) & (own == c)[:, None]
                weights, share = _share(
                    q_tile, k_tile, v_tile, grad_tile, seen, lse_tile, delta_tile, logit_scale, PRECISION
                )
                acc = tl.dot(share.to(k_tile.dtype), tl.trans(k_tile), acc, input_precision=PRECISION)
                dk = tl.dot(tl.trans(share.to(q_tile.dtype)), q_tile, input_precision=PRECISION) * scale
                dv = tl.dot(tl.trans(weights.to(q_tile.dtype)), grad_tile, input_precision=PRECISION)
                rows = sink_part + ((tile + c) * n_global + number[:, None]) * 2 * D + d[None, :]
                tl.store(rows, dk, mask=(number < n_global)[:, None])
                tl.store(rows + D, dv, mask=(number < n_global)[:, None])
    stack += row * 0  # 64 bits wide
    for r in tl.static_range(R):
        rows = part + (r * stack + row) * D
        acc += tl.load(rows[:, None] + d[None, :], mask=here, other=0.0).to(tl.float32)
    dq_rows = dq + b * sdb + h * sdh + t64 * sdt + d[None, :]
    tl.store(dq_rows, (acc * scale).to(dq.dtype.element_ty), mask=here)


@triton.jit
def _sum_sinks(
    sink_part, sinks, starts, n_slots, n_global, WIDTH: tl.constexpr, OWN: tl.constexpr, BLOCK: tl.constexpr
):
    """What the tiles left for each document's sinks: [B,H,slots,n_global,2D] -> [B,H,documents,n_global,2D]."""
    document, number, head = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    d = tl.arange(0, WIDTH)
    begin, end = tl.load(starts + document), tl.load(starts + document + 1)
    end = tl.where(end > begin, tl.cdiv(end, OWN), 0)
    acc = tl.zeros([BLOCK, WIDTH], tl.float32)
    rows = sink_part + (head * n_slots * n_global + number) * WIDTH
    for j in range(begin // OWN, end, BLOCK):
        tile = j + tl.arange(0, BLOCK)
        place = (tile + document) * n_global * WIDTH
        acc += tl.load(rows + place[:, None] + d[None, :], mask=(tile < end)[:, None], other=0.0)
    row = ((head * tl.num_programs(0) + document) * n_global + number) * WIDTH
    tl.store(sinks + row + d, tl.sum(acc, axis=0))


def far_queries(
    q: Tensor, k: Tensor, v: Tensor, grad: Tensor, lse: Tensor, delta: Tensor, tables: Tables, per_launch: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The rounds' shares of dq, still to be scaled, [R·P,N,G,T,D] in q's dtype; lse and delta sorted, [N,R,Mp]."""
    length, dim = q.shape[2:]
    groups, rounds, tall = tables.queries.shape
    heads = q.shape[1] // k.shape[1]
    part = q.new_empty(rounds * tables.probes, groups, heads, length, dim)
    sorted_lse, sorted_delta = lse.new_empty(2, groups, rounds, tall).unbind()
    tile = tile_for("far_queries", dim, q.dtype)
    for first in range(0, rounds, per_launch):
        count = min(per_launch, rounds - first)
        launch(
            _far_queries, (cdiv(tall, tile.own), groups, count),
            (q, k, v, grad, lse, delta, part, sorted_lse, sorted_delta, tables.order, tables.queries, tables.low,
             tables.length, tables.ranks, tables.lows),
            (dim**-0.5 * LOG2_E, *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *grad.stride()[:3],
             length, tables.order.shape[2], length * tables.probes * heads, tall, k.shape[1], groups,
             tables.bucket_size, first),
            G=heads, R=rounds, PROBES=tables.probes, EARLIER=first + count - 1, MIXED=count > 1, D=dim,
            PRECISION=precision(q.dtype), **tile.options(),
        )
    return part, sorted_lse, sorted_delta


def row_products(out: Tensor, grad: Tensor) -> Tensor:
    """delta = Σ_d dO·O of out and grad [B,H,T,D] -> float32 [B,H,T]."""
    batch, n_heads, length, dim = out.shape
    delta = out.new_empty(batch, n_heads, length, dtype=torch.float32)
    launch(
        _delta, (cdiv(length, 64), n_heads, batch),
        (out, grad, delta), (*out.stride()[:3], *grad.stride()[:3], length, n_heads), D=dim, BLOCK=64
    )
    return delta


def local_queries(
    q: Tensor, k: Tensor, v: Tensor, grad: Tensor, lse: Tensor, delta: Tensor, part: Tensor | None,
    packing: Packing | None, window: int, n_global: int,
) -> tuple[Tensor, Tensor | None]:
    """dq [B,H,T,D] and, with sinks, their dk and dv as float32 [B,K,documents,n_global,2,D]."""
    batch, n_heads, length, dim = q.shape
    n_kv = k.shape[1]
    dq = torch.empty_like(q)
    tile = tile_for("local_queries", dim, q.dtype)
    tiles = cdiv(length, tile.own)
    slots = tiles + (0 if packing is None else packing.bounds.shape[0] - 1)
    sink_part = lse.new_empty(batch, n_heads, slots, n_global, 2, dim)
    launch(
        _local_queries, (tiles, n_heads, batch),
        (q, k, v, grad, lse, delta, q if part is None else part, dq, sink_part, *document_pointers(packing, lse)),
        (dim**-0.5, dim**-0.5 * LOG2_E, *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *grad.stride()[:3],
         *dq.stride()[:3], length, n_heads, window, n_global, slots, lse.numel()),
        G=n_heads // n_kv, R=0 if part is None else part.shape[0], D=dim, SINKS=sink_block(n_global),
        DOCUMENTS=packing is not None, EVEN=length % tile.other == 0, PRECISION=precision(q.dtype), **tile.options(),
    )
    if not n_global:
        return dq, None
    if packing is None:
        return dq, sink_part.view(batch, n_kv, -1, 1, n_global, 2, dim).sum(2)
    documents = packing.bounds.shape[0] - 1
    sinks = lse.new_empty(batch, n_heads, documents, n_global, 2, dim)
    launch(
        _sum_sinks, (documents, n_global, batch * n_heads),
        (sink_part, sinks, packing.bounds), (slots, n_global), WIDTH=2 * dim, OWN=tile.own, BLOCK=64, num_warps=8,
    )
    return dq, sinks.unflatten(1, (n_kv, -1)).sum(2)
