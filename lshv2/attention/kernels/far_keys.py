"""Backward kernels that own sorted keys: each table's shares of dk and dv, heads and probes summed in one program.

`far_keys`: a program owns a tile of sorted keys of one (group, table). First ranks and ends of spans ascend along the
sorted queries, so all queries that see the tile are one stretch of them, found beforehand by binary search. It leaves
the shares at the keys' positions. Keys that very many queries see must not hold up the rest: blocks of BULK queries
that lie wholly inside a stretch are done by programs of their own, and `_add_bulk` adds what they left. A query sees a
span of W ranks, so a block lies inside at most W / tile + 1 stretches, which are neighbours. No addition is atomic.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from lshv2.attention.kernels.common import (
    LOG2_E,
    NOWHERE,
    add_gradients,
    earlier_rows,
    found_earlier,
    numbered,
    precision,
    tile_for,
    within,
)
from lshv2.attention.kernels.tables import Tables
from lshv2.launch import cdiv, launch

BULK = 8192  # queries


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
    behind = tl.minimum(tile * OWN + OWN, T)  # spans that begin at T are empty: of buckets behind the last key
    end = _first_query(low + row * Mp, length + row * Mp, behind, M, True)
    tl.store(stretches, first, mask=tile < tiles)
    tl.store(stretches + 1, end, mask=tile < tiles)


@triton.jit
def _tile_of_bulk(stretches, slot, tiles, depth, BULK: tl.constexpr):
    """The tile whose stretch holds all of block slot // depth and whose number is slot modulo depth, or -1."""
    begin = slot // depth * BULK
    left, right = 0, tiles
    while left < right:  # the first tile whose stretch reaches the block's end
        middle = (left + right) // 2
        if tl.load(stretches + middle * 2 + 1) < begin + BULK:
            left = middle + 1
        else:
            right = middle
    tile = left + (slot % depth - left % depth + depth) % depth
    holds = tile < tiles
    holds &= tl.load(stretches + tile * 2, mask=holds, other=0) <= begin
    holds &= tl.load(stretches + tile * 2 + 1, mask=holds, other=0) >= begin + BULK
    return tl.where(holds, tile, -1)


@triton.jit
def _far_keys(
    q, k, v, grad, lse, delta, dk_part, dv_part, bulk, order, queries, low, length, ranks, lows, stretches, scale,
    sqb, sqh, sqt, skb, skh, skt, svb, svh, svt, sgb, sgh, sgt,
    T, Tp, Mp, n_kv, groups, tiles, depth, bucket_size, first_round,
    G: tl.constexpr, R: tl.constexpr, PROBES: tl.constexpr, EARLIER: tl.constexpr, MIXED: tl.constexpr,
    D: tl.constexpr, PRECISION: tl.constexpr, BULK: tl.constexpr, OWN: tl.constexpr, OTHER: tl.constexpr,
):
    n, r = tl.program_id(1).to(tl.int64), first_round + tl.program_id(2)
    stretches += (n * R + r) * tiles * 2
    tile = tl.program_id(0)
    slot = tile - tiles
    if slot >= 0:
        tile = _tile_of_bulk(stretches, slot, tiles, depth, BULK)
        if tile < 0:
            return
    begin, end = tl.load(stretches + tile * 2), tl.load(stretches + tile * 2 + 1)
    stop, resume = end, end
    if BULK > 0:
        if slot >= 0:
            begin = slot // depth * BULK
            stop, resume, end = begin + BULK, begin + BULK, begin + BULK
        elif tl.cdiv(begin, BULK) < end // BULK:  # leave out the blocks that lie inside, and end where they begin
            stop, resume = tl.cdiv(begin, BULK) * BULK, end // BULK * BULK
            begin = begin // OTHER * OTHER
    begin = begin // 4 * 4  # aligned, loads of consecutive words are wider
    place = tile * OWN + tl.arange(0, OWN)
    d = tl.arange(0, D)
    inside = place < T
    s = tl.load(order + (n * R + r) * Tp + place).to(tl.int64)
    b, g = n // n_kv, n % n_kv
    k_tile = tl.load((k + b * skb + g * skh + s * skt)[:, None] + d[None, :])
    v_tile = tl.load((v + b * svb + g * svh + s * svt)[:, None] + d[None, :])
    pair = (r * (r - 1) // 2).to(tl.int64) * groups + n
    there = earlier_rows(ranks + pair * Tp, groups * Tp, place, r, 0, EARLIER, MIXED)
    lows += pair * Mp
    q += b * sqb + g * G * sqh
    grad += b * sgb + g * G * sgh
    row = (n * R + r) * Mp
    dk = tl.zeros([OWN, D], tl.float32)
    dv = tl.zeros([OWN, D], tl.float32)
    for step in range(0, stop - begin + end - resume, OTHER):
        j = begin + step
        j += tl.where(j >= stop, resume - stop, 0)
        i = tl.multiple_of(j, 4) + tl.arange(0, OTHER)
        m = tl.load(queries + row + i)
        head, _, t = numbered(m, G, PROBES)
        q_tile = tl.load((q + head * sqh + t * sqt)[:, None] + d[None, :])
        grad_tile = tl.load((grad + head * sgh + t * sgt)[:, None] + d[None, :])
        first, count = tl.load(low + row + i), tl.load(length + row + i)
        seen = within(place[:, None] - first[None, :], count[None, :])
        if EARLIER > 0:
            before = earlier_rows(lows, groups * Mp, i, r, NOWHERE, EARLIER, MIXED)
            seen &= found_earlier(there, before, bucket_size, EARLIER, True) == 0
        dk, dv = add_gradients(
            k_tile, v_tile, q_tile, grad_tile, seen, tl.load(lse + row + i), tl.load(delta + row + i), dk, dv,
            scale, PRECISION,
        )
    if slot >= 0:
        left = ((r * groups + n) * (tl.num_programs(0) - tiles) + slot) * 2 * OWN * D
        rows = bulk + left + tl.arange(0, OWN)[:, None] * D + d[None, :]
        tl.store(rows, dk)
        tl.store(rows + OWN * D, dv)
    else:
        target = ((r * groups + n) * T + s)[:, None] * D + d[None, :]
        tl.store(dk_part + target, dk.to(dk_part.dtype.element_ty), mask=inside[:, None])
        tl.store(dv_part + target, dv.to(dv_part.dtype.element_ty), mask=inside[:, None])


@triton.jit
def _add_bulk(
    bulk, dk_part, dv_part, order, stretches, T, Tp, groups, slots, depth,
    R: tl.constexpr, D: tl.constexpr, BULK: tl.constexpr, OWN: tl.constexpr,
):
    """Add what the programs of whole blocks left to the shares of the tile's keys."""
    tile, n, r = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2)
    stretches += ((n * R + r) * tl.num_programs(0) + tile) * 2
    first, last = tl.cdiv(tl.load(stretches), BULK), tl.load(stretches + 1) // BULK
    if first >= last:
        return
    place, d = tile * OWN + tl.arange(0, OWN), tl.arange(0, D)
    s = tl.load(order + (n * R + r) * Tp + place).to(tl.int64)
    inside = (place < T)[:, None]
    rows = ((r * groups + n) * T + s)[:, None] * D + d[None, :]
    dk = tl.load(dk_part + rows, mask=inside, other=0.0).to(tl.float32)
    dv = tl.load(dv_part + rows, mask=inside, other=0.0).to(tl.float32)
    bulk += (r * groups + n) * slots * 2 * OWN * D
    for block in range(first, last):
        left = bulk + (block * depth + tile % depth) * 2 * OWN * D + tl.arange(0, OWN)[:, None] * D + d[None, :]
        dk += tl.load(left)
        dv += tl.load(left + OWN * D)
    tl.store(dk_part + rows, dk.to(dk_part.dtype.element_ty), mask=inside)
    tl.store(dv_part + rows, dv.to(dv_part.dtype.element_ty), mask=inside)


def far_keys(
    q: Tensor, k: Tensor, v: Tensor, grad: Tensor, lse: Tensor, delta: Tensor, tables: Tables, per_launch: int
) -> tuple[Tensor, Tensor]:
    """The tables' shares of dk (still to be scaled) and dv, each [R,N,T,D] in k's dtype; lse, delta sorted."""
    n_kv, length, dim = k.shape[1:]
    groups, rounds, tall = tables.queries.shape
    heads = q.shape[1] // n_kv
    queries = length * tables.probes * heads
    tile = tile_for("far_keys", dim, k.dtype)
    tiles = cdiv(length, tile.own)
    stretches = tables.low.new_empty(groups, rounds, tiles, 2)
    launch(
        _stretches, (cdiv(tiles, 32), groups * rounds, 1),
        (tables.low, tables.length, stretches), (length, queries, tall), OWN=tile.own, BLOCK=32, num_warps=1
    )
    dk_part, dv_part = k.new_empty(2, rounds, groups, length, dim).unbind()
    # short inputs have no stretch worth a program more
    bulk_size = BULK if queries >= 4 * BULK else 0
    depth = cdiv(tables.bucket_size, tile.own) + 1
    slots = queries // BULK * depth if bulk_size else 0
    bulk = lse.new_empty(rounds, groups, slots, 2, tile.own, dim)
    for first in range(0, rounds, per_launch):
        count = min(per_launch, rounds - first)
        launch(
            _far_keys, (tiles + slots, groups, count),
            (q, k, v, grad, lse, delta, dk_part, dv_part, bulk if slots else lse, tables.order, tables.queries,
             tables.low, tables.length, tables.ranks, tables.lows, stretches),
            (dim**-0.5 * LOG2_E, *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *grad.stride()[:3],
             length, tables.order.shape[2], tall, n_kv, groups, tiles, depth, tables.bucket_size, first),
            G=heads, R=rounds, PROBES=tables.probes, EARLIER=first + count - 1, MIXED=count > 1, D=dim,
            PRECISION=precision(k.dtype), BULK=bulk_size, **tile.options(),
        )
    if slots:
        launch(
            _add_bulk, (tiles, groups, rounds),
            (bulk, dk_part, dv_part, tables.order, stretches), (length, tables.order.shape[2], groups, slots, depth),
            R=rounds, D=dim, BULK=bulk_size, OWN=tile.own,
        )
    return dk_part, dv_part
