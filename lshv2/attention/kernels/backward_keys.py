"""Backward kernels that own keys: dk and dv, the heads of a group summed inside one program, without atomics.

`far_keys`: a program owns a tile of sorted keys of one (group, round). First ranks and ends of spans ascend along the
sorted queries, so all queries that see the tile are one stretch of them, found beforehand by binary search. It leaves
the round's shares of dk and dv at the keys' positions. `local_keys`: a program owns consecutive keys, walks the queries
whose window holds them, adds the rounds' shares and what the sinks received, and stores dk and dv.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lshv2.attention.kernels.common import LOG2_E, earlier_rows, found_earlier, precision, tile_for, within
from lshv2.attention.kernels.tables import NOWHERE, Packing, Tables, document_pointers
from lshv2.launch import launch


@triton.jit
def _first_query(low, length, rank, M, FROM: tl.constexpr):
    """Binary search along sorted queries: the first whose span begins at `rank` or later (FROM) or ends beyond it."""
    left, right = tl.zeros_like(rank), tl.zeros_like(rank) + M
    while tl.max(right - left, axis=0) > 0:
        middle = (left + right) // 2
        searching = left < right
        edge = tl.load(low + middle, mask=searching, other=0)
        if not FROM:
            edge += tl.load(length + middle, mask=searching, other=0) - 1
        past = edge >= rank
        left = tl.where(searching & (past == 0), middle + 1, left)
        right = tl.where(searching & past, middle, right)
    return left


@triton.jit
def _stretches(low, length, stretches, T, M, Mp, OWN: tl.constexpr, BLOCK: tl.constexpr):
    """For each tile of keys the sorted queries that see any of it: [N·R,tiles,2], first and end."""
    row = tl.program_id(1).to(tl.int64)
    tile = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tiles = tl.cdiv(T, OWN)
    stretches += (row * tiles + tile) * 2
    first = _first_query(low + row * Mp, length + row * Mp, tile * OWN, M, False)
    end = _first_query(low + row * Mp, length + row * Mp, tile * OWN + OWN, M, True)
    tl.store(stretches, first, mask=tile < tiles)
    tl.store(stretches + 1, end, mask=tile < tiles)


@triton.jit
def _gradients(k_tile, v_tile, q_tile, grad_tile, seen, lse, delta, dk, dv, scale, PRECISION: tl.constexpr):
    """Add a tile of queries' shares: k, v [S,D], q, grad [Q,D], seen [S,Q], lse, delta [Q]; dk, dv [S,D] float32."""
    logits = tl.dot(k_tile, tl.trans(q_tile), input_precision=PRECISION) * scale
    weights = tl.where(seen, tl.exp2(logits - lse[None, :]), 0.0)
    dv = tl.dot(weights.to(grad_tile.dtype), grad_tile, dv, input_precision=PRECISION)
    dweights = tl.dot(v_tile, tl.trans(grad_tile), input_precision=PRECISION)
    share = weights * (dweights - delta[None, :])
    dk = tl.dot(share.to(q_tile.dtype), q_tile, dk, input_precision=PRECISION)
    return dk, dv


@triton.jit
def _far_keys(
    q, k, v, grad, lse, delta, dk_part, dv_part, order, queries, low, length, ranks, lows, stretches, scale,
    sqb, sqh, sqt, skb, skh, skt, svb, svh, svt, sgb, sgh, sgt, T, Tp, Mp, n_kv, groups, bucket_size,
    first_round, G: tl.constexpr, R: tl.constexpr, EARLIER: tl.constexpr, MIXED: tl.constexpr, D: tl.constexpr,
    PRECISION: tl.constexpr, OWN: tl.constexpr, OTHER: tl.constexpr,
):
    n, r = tl.program_id(1).to(tl.int64), first_round + tl.program_id(2)
    place = tl.program_id(0) * OWN + tl.arange(0, OWN)
    d = tl.arange(0, D)
    inside = place < T
    s = tl.load(order + (n * R + r) * Tp + place).to(tl.int64)
    b, g = n // n_kv, n % n_kv
    k_tile = tl.load((k + b * skb + g * skh + s * skt)[:, None] + d[None, :])
    v_tile = tl.load((v + b * svb + g * svh + s * svt)[:, None] + d[None, :])
    pair = (r * (r - 1) // 2).to(tl.int64) * groups + n
    there = earlier_rows(ranks + pair * Tp, groups * Tp, place, r, 0, EARLIER, MIXED)
    lows += pair * Mp
    stretches += ((n * R + r) * tl.num_programs(0) + tl.program_id(0)) * 2
    begin, end = tl.load(stretches), tl.load(stretches + 1)
    q += b * sqb + g * G * sqh
    grad += b * sgb + g * G * sgh
    row = (n * R + r) * Mp
    dk = tl.zeros([OWN, D], tl.float32)
    dv = tl.zeros([OWN, D], tl.float32)
    for j in range(begin // 4 * 4, end, OTHER):  # aligned, loads of consecutive words are wider
        i = tl.multiple_of(j, 4) + tl.arange(0, OTHER)
        m = tl.load(queries + row + i)
        head, t = m % G, (m // G).to(tl.int64)
        q_tile = tl.load((q + head * sqh + t * sqt)[:, None] + d[None, :])
        grad_tile = tl.load((grad + head * sgh + t * sgt)[:, None] + d[None, :])
        first, count = tl.load(low + row + i), tl.load(length + row + i)
        seen = within(place[:, None] - first[None, :], count[None, :])
        if EARLIER > 0:
            before = earlier_rows(lows, groups * Mp, i, r, NOWHERE, EARLIER, MIXED)
            seen &= found_earlier(there, before, bucket_size, EARLIER, True) == 0
        dk, dv = _gradients(
            k_tile, v_tile, q_tile, grad_tile, seen, tl.load(lse + row + i), tl.load(delta + row + i), dk, dv, scale,
            PRECISION,
        )
    rows = ((r * groups + n) * T + s)[:, None] * D + d[None, :]
    tl.store(dk_part + rows, dk.to(dk_part.dtype.element_ty), mask=inside[:, None])
    tl.store(dv_part + rows, dv.to(dv_part.dtype.element_ty), mask=inside[:, None])


@triton.jit
def _local_keys(
    q, k, v, grad, lse, delta, dk_part, dv_part, sinks, dk, dv, documents, starts, scale, logit_scale,
    sqb, sqh, sqt, skb, skh, skt, svb, svh, svt, sgb, sgh, sgt, sxb, sxh, sxt, syb, syh, syt,
    T, n_kv, window, n_global, n_documents, stack,
    G: tl.constexpr, R: tl.constexpr, D: tl.constexpr, SINKS: tl.constexpr, DOCUMENTS: tl.constexpr, EVEN: tl.constexpr,
    PRECISION: tl.constexpr, OWN: tl.constexpr, OTHER: tl.constexpr,
):
    s0, g, b = tl.program_id(0) * OWN, tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    s = s0 + tl.arange(0, OWN)
    d = tl.arange(0, D)
    inside = s < T
    here, s64 = inside[:, None], s.to(tl.int64)[:, None]
    k_tile = tl.load(k + b * skb + g * skh + s64 * skt + d[None, :], mask=here, other=0.0)
    v_tile = tl.load(v + b * svb + g * svh + s64 * svt + d[None, :], mask=here, other=0.0)
    own, start = tl.zeros_like(s), tl.zeros_like(s)
    if DOCUMENTS:
        own = tl.load(documents + s, mask=inside, other=0)
        start = tl.load(starts + own)
    acc_k = tl.zeros([OWN, D], tl.float32)
    acc_v = tl.zeros([OWN, D], tl.float32)
    for i in range(G):
        h = g * G + i
        for j in range(s0, tl.minimum(s0 + OWN + window - 1, T), OTHER):
            t = j + tl.arange(0, OTHER)
            there, t64 = EVEN | (t < T), t.to(tl.int64)[:, None]
            q_tile = tl.load(q + b * sqb + h * sqh + t64 * sqt + d[None, :], mask=there[:, None], other=0.0)
            grad_tile = tl.load(grad + b * sgb + h * sgh + t64 * sgt + d[None, :], mask=there[:, None], other=0.0)
            row = (b * n_kv * G + h) * T + t
            seen = within(t[None, :] - s[:, None], window)
            if DOCUMENTS:
                seen &= own[:, None] == tl.load(documents + t, mask=there, other=-1)[None, :]
            acc_k, acc_v = _gradients(
                k_tile, v_tile, q_tile, grad_tile, seen, tl.load(lse + row, mask=there, other=float("inf")),
                tl.load(delta + row, mask=there, other=0.0), acc_k, acc_v, logit_scale, PRECISION,
            )
    for r in tl.static_range(R):
        rows = (r * stack + (b * n_kv + g) * T + s)[:, None] * D + d[None, :]
        acc_k += tl.load(dk_part + rows, mask=here, other=0.0).to(tl.float32)
        acc_v += tl.load(dv_part + rows, mask=here, other=0.0).to(tl.float32)
    acc_k *= scale
    if SINKS:
        number = s - start
        sink = here & (number < n_global)[:, None]
        share = ((b * n_kv + g) * n_documents + own) * n_global + number
        received = sinks + share[:, None] * 2 * D + d[None, :]
        acc_k += tl.load(received, mask=sink, other=0.0)
        acc_v += tl.load(received + D, mask=sink, other=0.0)
    tl.store(dk + b * sxb + g * sxh + s64 * sxt + d[None, :], acc_k.to(dk.dtype.element_ty), mask=here)
    tl.store(dv + b * syb + g * syh + s64 * syt + d[None, :], acc_v.to(dv.dtype.element_ty), mask=here)


def far_keys(
    q: Tensor, k: Tensor, v: Tensor, grad: Tensor, lse: Tensor, delta: Tensor, tables: Tables, per_launch: int
) -> tuple[Tensor, Tensor]:
    """The rounds' shares of dk (still to be scaled) and dv, each [R,N,T,D] in k's dtype; lse, delta sorted."""
    n_kv, length, dim = k.shape[1:]
    groups, rounds, tall = tables.queries.shape
    heads = q.shape[1] // n_kv
    tile = tile_for("far_keys", dim, k.dtype)
    tiles = triton.cdiv(length, tile.own)
    stretches = tables.low.new_empty(groups, rounds, tiles, 2)
    launch(
        _stretches, (triton.cdiv(tiles, 32), groups * rounds, 1),
        tables.low, tables.length, stretches, length, heads * length, tall, OWN=tile.own, BLOCK=32, num_warps=1
    )
    dk_part, dv_part = k.new_empty(2, rounds, groups, length, dim).unbind()
    for first in range(0, rounds, per_launch):
        count = min(per_launch, rounds - first)
        launch(
            _far_keys, (tiles, groups, count),
            q, k, v, grad, lse, delta, dk_part, dv_part, tables.order, tables.queries, tables.low, tables.length,
            tables.ranks, tables.lows, stretches, dim**-0.5 * LOG2_E,
            *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *grad.stride()[:3],
            length, tables.order.shape[2], tall, n_kv, groups, tables.bucket_size, first,
            G=heads, R=rounds, EARLIER=first + count - 1, MIXED=count > 1, D=dim, PRECISION=precision(k.dtype),
            **tile.launch(),
        )
    return dk_part, dv_part


def local_keys(
    q: Tensor, k: Tensor, v: Tensor, grad: Tensor, lse: Tensor, delta: Tensor, parts: tuple[Tensor, Tensor] | None,
    sinks: Tensor | None, packing: Packing | None, window: int,
) -> tuple[Tensor, Tensor]:
    """dk, dv [B,K,T,D]; parts from `far_keys`, sinks from `local_queries`."""
    batch, n_kv, length, dim = k.shape
    dk, dv = torch.empty_like(k), torch.empty_like(v)
    documents, n_global = (0, 0) if sinks is None else sinks.shape[2:4]
    tile = tile_for("local_keys", dim, k.dtype)
    launch(
        _local_keys, (triton.cdiv(length, tile.own), n_kv, batch),
        q, k, v, grad, lse, delta, *(parts or (k, k)), lse if sinks is None else sinks, dk, dv,
        *document_pointers(packing, lse), dim**-0.5, dim**-0.5 * LOG2_E,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *grad.stride()[:3], *dk.stride()[:3], *dv.stride()[:3],
        length, n_kv, window, n_global, documents, batch * n_kv * length,
        G=q.shape[1] // n_kv, R=parts[0].shape[0] if parts else 0, D=dim, SINKS=sinks is not None,
        DOCUMENTS=packing is not None, EVEN=length % tile.other == 0, PRECISION=precision(k.dtype), **tile.launch(),
    )
    return dk, dv
