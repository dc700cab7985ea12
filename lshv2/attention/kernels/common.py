"""What the forward and backward kernels share: who sees which key, documents sharing a row, how large the tiles are.

Sizes are in tokens. One program owns one tile of queries (or of keys) and loops over tiles of the other side.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

NOWHERE = tl.constexpr(1 << 30)  # a low that no padded rank comes near
LOG2_E = 1.4426950408889634  # kernels work in powers of two: exp2 is the hardware's instruction


@dataclass(frozen=True)
class Tile:
    """own: rows a program owns; other: rows of the other side it reads at a time; and Triton's launch choices.

    registers: at most so many a thread, so that more programs share a multiprocessor (None: as the compiler likes).
    """

    own: int
    other: int
    warps: int
    stages: int
    registers: int | None = None

    def options(self) -> dict[str, Any]:
        return dict(
            OWN=self.own, OTHER=self.other, num_warps=self.warps, num_stages=self.stages, maxnreg=self.registers
        )


TILES: dict[str, Tile] = {
    "far_forward": Tile(64, 32, 4, 3, 96),
    "local_forward": Tile(64, 64, 4, 3, 128),
    "far_queries": Tile(64, 32, 4, 3, 128),
    "local_queries": Tile(64, 32, 4, 3),
    "far_keys": Tile(64, 32, 4, 3, 168),
    "local_keys": Tile(64, 32, 4, 3, 168),
}


def tile_for(kernel: str, dim: int, dtype: torch.dtype) -> Tile:
    """The kernel's tile; four-byte or 128-wide heads get smaller ones, so that they fit in 96 KB of shared memory, what
    consumer GPUs have. `local_queries` holds the most: a tile each of q, k, v, dO, dq and the sinks' shares."""
    tile = TILES[kernel]
    width = dim * dtype.itemsize
    halved = 2 if kernel == "local_queries" and dtype.itemsize == 4 else 1
    if width <= 128:
        return tile
    if width <= 256:
        return Tile(tile.own // halved, 32, tile.warps, 2 if dtype.itemsize == 2 else 1)
    return Tile(32 // halved, 16, tile.warps, 1)


def precision(dtype: torch.dtype) -> str:
    """How products of float32 are made: in three tf32 passes, which keeps float32's accuracy."""
    return "tf32x3" if dtype == torch.float32 else "tf32"


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
def within(distance, length):
    """0 <= distance < length in one comparison: as an unsigned number, a negative distance is a large one."""
    return distance.to(tl.uint32, bitcast=True) < length


@triton.jit
def numbered(m, G: tl.constexpr, PROBES: tl.constexpr):
    """Head, probe and position (64 bits) of query number m = (t·PROBES + probe)·G + head of a group and table."""
    return m % G, m // G % PROBES, (m // (G * PROBES)).to(tl.int64)


@triton.jit
def earlier_rows(table, stride, place, current, MISSING: tl.constexpr, EARLIER: tl.constexpr, MIXED: tl.constexpr):
    """Consecutive rows of a table at `place`, one for each earlier round, as a tuple.

    MIXED: the launch serves several rounds; rows from `current` on are not of this one.
    """
    rows = ()
    for e in tl.static_range(EARLIER):
        if MIXED:
            row = tl.load(table + e * stride + place, mask=e < current, other=MISSING)
        else:
            row = tl.load(table + e * stride + place)
        rows = rows + (row,)
    return rows


@triton.jit
def tile_of_queries(
    queries, low, length, lows, row, i, r, stride, OTHER: tl.constexpr, EARLIER: tl.constexpr, MIXED: tl.constexpr
):
    """What a tile of sorted queries sees: number, first rank and count of each, its lows in earlier rounds, and
    whether a stretch of keys ends with it: the next query's span begins further on, past ranks that nobody sees."""
    first, count = tl.load(low + row), tl.load(length + row)
    last = tl.load(low + row + 1) > first + count + OTHER
    before = earlier_rows(lows, stride, i, r, NOWHERE, EARLIER, MIXED)
    return tl.load(queries + row), first, count, last, before


@triton.jit
def found_earlier(ranks, lows, bucket_size, EARLIER: tl.constexpr, KEYS_FIRST: tl.constexpr):
    """Which keys some earlier round found, from tuples of padded ranks and lows: [Q,S], or [S,Q] with KEYS_FIRST."""
    for e in tl.static_range(EARLIER):
        distance = ranks[e][:, None] - lows[e][None, :] if KEYS_FIRST else ranks[e][None, :] - lows[e][:, None]
        distance = distance.to(tl.uint32, bitcast=True)
        nearest = distance if e == 0 else tl.minimum(nearest, distance)  # noqa: F821
    return nearest < bucket_size


@triton.jit
def add_gradients(k_tile, v_tile, q_tile, grad_tile, seen, lse, delta, dk, dv, scale, PRECISION: tl.constexpr):
    """Add a tile of queries' shares: k, v [S,D], q, grad [Q,D], seen [S,Q], lse, delta [Q]; dk, dv [S,D] float32."""
    logits = tl.dot(k_tile, tl.trans(q_tile), input_precision=PRECISION) * scale
    weights = tl.where(seen, tl.exp2(logits - lse[None, :]), 0.0)
    dv = tl.dot(weights.to(grad_tile.dtype), grad_tile, dv, input_precision=PRECISION)
    dweights = tl.dot(v_tile, tl.trans(grad_tile), input_precision=PRECISION)
    share = weights * (dweights - delta[None, :])
    dk = tl.dot(share.to(q_tile.dtype), q_tile, dk, input_precision=PRECISION)
    return dk, dv
