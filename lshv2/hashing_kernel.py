"""Bucket ids on a GPU: products with directions and the best of them in one Triton kernel, nothing stored between."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lshv2.launch import cdiv, launch, power_of_two

BLOCK = 64  # tokens a program
SCORES = 64  # directions a product, of one round or several
SHORT = 1 << 14  # tokens in all
KEPT = 8192  # best products, of all slots and tokens, that a program keeps in registers


@triton.jit
def _nearest(
    x, directions, t, first, group, sxt, T, R, SIZE: tl.constexpr, COLUMNS: tl.constexpr, ROUNDS: tl.constexpr,
    DIM: tl.constexpr, BLOCK: tl.constexpr,
):
    """Nearest of SIZE directions to each row of x in ROUNDS rounds from `first` on: int32 [BLOCK,ROUNDS]."""
    d, c = tl.arange(0, DIM), tl.arange(0, ROUNDS * COLUMNS)
    x_tile = tl.load(x + t.to(tl.int64)[:, None] * sxt + d[None, :], mask=(t < T)[:, None], other=0.0)
    r, c = first + c // COLUMNS, c % COLUMNS
    known = (r < R) & (c < SIZE)
    row = (group * R + r) * SIZE + c
    table = tl.load(directions + row[None, :] * DIM + d[:, None], mask=known[None, :], other=0.0)
    scores = tl.dot(x_tile, table.to(x_tile.dtype), input_precision="ieee")
    scores = tl.reshape(tl.where(known[None, :], scores, float("-inf")), [BLOCK, ROUNDS, COLUMNS])
    # the first of the largest: two plain reductions cost less than one that carries values and places
    largest = tl.max(scores, axis=2)
    place = tl.arange(0, COLUMNS)[None, None, :]
    return tl.min(tl.where(scores == largest[:, :, None], place, COLUMNS), axis=2)


@triton.jit
def _bucket_ids(
    x, first, second, ids, sxb, sxh, sxt, T, n_heads, G, R, offset,
    PARTS: tl.constexpr, SIZE0: tl.constexpr, SIZE1: tl.constexpr, COLUMNS0: tl.constexpr, COLUMNS1: tl.constexpr,
    ROUNDS: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr,
):
    t = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    h, b = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    x += b * sxb + h * sxh
    for r in range(0, R, ROUNDS):
        bucket = _nearest(x, first, t, r, h // G, sxt, T, R, SIZE0, COLUMNS0, ROUNDS, DIM, BLOCK)
        if PARTS == 2:
            part = _nearest(x + offset, second, t, r, h // G, sxt, T, R, SIZE1, COLUMNS1, ROUNDS, DIM, BLOCK)
            bucket = bucket * SIZE1 + part
        rounds = r + tl.arange(0, ROUNDS)
        rows = ids + ((b * n_heads + h) * R + rounds)[None, :] * T + t[:, None]
        tl.store(rows, bucket, mask=(rounds < R)[None, :] & (t < T)[:, None])


@triton.jit
def _best_cells(
    x, table, ids, sxb, sxh, sxt, T, n_heads, G,
    C: tl.constexpr, MASK: tl.constexpr, N: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr, SLOTS: tl.constexpr,
):
    """Each slot keeps its best product, with the cell's number in its last bits; the best N of all slots come out."""
    t = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    h, b = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    d, c = tl.arange(0, DIM), tl.arange(0, SLOTS)
    inside = t < T
    rows = x + b * sxb + h * sxh + t.to(tl.int64) * sxt
    x_tile = tl.load(rows[:, None] + d[None, :], mask=inside[:, None], other=0.0)
    table += h // G * C * DIM
    best = tl.full([BLOCK, SLOTS], float("-inf"), tl.float32)
    for first in range(0, C, SLOTS):
        number = first + c
        known = (C % SLOTS == 0) | (number < C)[None, :]
        centroids = tl.load(table + number[None, :] * DIM + d[:, None], mask=known, other=0.0)
        scores = tl.dot(x_tile, centroids.to(x_tile.dtype), input_precision="ieee")
        scores = ((scores.to(tl.int32, bitcast=True) & ~MASK) | number[None, :]).to(tl.float32, bitcast=True)
        if C % SLOTS:
            scores = tl.where(known, scores, float("-inf"))
        best = tl.maximum(best, scores)
    out = ids + (b * n_heads + h) * N * T + t
    for n in tl.static_range(N):
        winner = tl.max(best, axis=1)
        tl.store(out + n * T, winner.to(tl.int32, bitcast=True) & MASK, mask=inside)
        best = tl.where(best == winner[:, None], float("-inf"), best)


def supported(x: Tensor, tables: list[Tensor]) -> bool:
    """Whether the kernel takes these: float16, bfloat16 or float32, part widths a power of two from 16 to 128."""
    dims = {table.shape[-1] for table in tables}
    return (
        x.dtype in (torch.bfloat16, torch.float16, torch.float32) and len(tables) <= 2 and dims <= {16, 32, 64, 128}
    )


@torch.library.custom_op("lshv2::bucket_ids", mutates_args=(), schema="(Tensor x, Tensor[] tables) -> Tensor")
def bucket_ids_whole(x: Tensor, tables: list[Tensor]) -> Tensor:
    """`bucket_ids_triton` as an operator that torch.compile keeps whole."""
    return bucket_ids_triton(x, tables)


@bucket_ids_whole.register_fake
def _(x: Tensor, tables: list[Tensor]) -> Tensor:
    batch, n_heads, length, _ = x.shape
    return x.new_empty(batch, n_heads, tables[0].shape[1], length, dtype=torch.int32)


def bucket_ids_triton(x: Tensor, tables: list[Tensor]) -> Tensor:
    """x [B,H,T,D], one or two tables [K,R,C,Dp] -> int32 [B,H,R,T], as `lshv2.hashing.bucket_ids` defines them."""
    batch, n_heads, length, _ = x.shape
    n_kv, rounds, _, dim = tables[0].shape
    if x.stride(-1) != 1:
        x = x.contiguous()
    sizes = [tables[0].shape[2], tables[-1].shape[2]]
    columns = [max(16, power_of_two(size)) for size in sizes]
    at_once = min(power_of_two(rounds), max(1, SCORES // max(columns)))
    ids = torch.empty(batch, n_heads, rounds, length, dtype=torch.int32, device=x.device)
    if not rounds:
        return ids
    # parts read their own slice of the vector, or all of it
    offset = dim if len(tables) * dim == x.shape[-1] else 0
    launch(
        _bucket_ids, (cdiv(length, BLOCK), n_heads, batch),
        (x, tables[0].contiguous(), tables[-1].contiguous(), ids),
        (*x.stride()[:3], length, n_heads, n_heads // n_kv, rounds, offset),
        PARTS=len(tables), SIZE0=sizes[0], SIZE1=sizes[1], COLUMNS0=columns[0], COLUMNS1=columns[1],
        ROUNDS=at_once, DIM=dim, BLOCK=BLOCK, num_warps=4, num_stages=1,
    )
    return ids


def cells_supported(x: Tensor) -> bool:
    """Whether `best_cells_triton` takes x: float16, bfloat16 or float32, head dim a power of two from 16 to 128."""
    return x.dtype in (torch.bfloat16, torch.float16, torch.float32) and x.shape[-1] in (16, 32, 64, 128)


@torch.library.custom_op(
    "lshv2::best_cells", mutates_args=(), schema="(Tensor x, Tensor table, int n, int slots) -> Tensor"
)
def best_cells_whole(x: Tensor, table: Tensor, n: int, slots: int) -> Tensor:
    """`best_cells_triton` as an operator that torch.compile keeps whole."""
    return best_cells_triton(x, table, n, slots)


@best_cells_whole.register_fake
def _(x: Tensor, table: Tensor, n: int, slots: int) -> Tensor:
    return x.new_empty(*x.shape[:2], n, x.shape[2], dtype=torch.int32)


def best_cells_triton(x: Tensor, table: Tensor, n: int, slots: int) -> Tensor:
    """x [B,H,T,D], table [K,1,C,D], slots a power of two -> int32 [B,H,n,T], see `lshv2.hashing.best_cells`."""
    batch, n_heads, length, dim = x.shape
    size = table.shape[2]
    if x.stride(-1) != 1:
        x = x.contiguous()
    ids = torch.empty(batch, n_heads, n, length, dtype=torch.int32, device=x.device)
    if batch * length > SHORT:  # rounded once instead of tile by tile; on short inputs a launch costs more
        table = table.to(x.dtype)
    slots = max(16, min(slots, power_of_two(size)))
    block = 2 * BLOCK if dim * x.element_size() <= 128 else BLOCK  # wider vectors would not fit
    block = max(16, min(block, KEPT // slots))
    launch(
        _best_cells, (cdiv(length, block), n_heads, batch), (x, table.contiguous(), ids),
        (*x.stride()[:3], length, n_heads, n_heads // table.shape[0]),
        C=size, MASK=power_of_two(size) - 1, N=n, DIM=dim, BLOCK=block, SLOTS=slots,
        num_warps=4, num_stages=2,  # a tile of centroids is copied while another is multiplied
    )
    return ids
