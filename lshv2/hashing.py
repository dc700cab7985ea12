"""Bucket ids: which tokens may find each other. Hashing stands apart from attention, so any ids can be tested.

A hash is a table of directions; a vector's bucket is the direction that it points along most:

    bucket_ids(x [B,H,T,D], tables [K,R,P,C,Dp]) -> int32 [B,H,R,T]      (H = G·K; head h uses tables[h // G])

P parts of C directions give C**P buckets a round ("product form", so that many buckets stay cheap); a part reads
the whole vector (Dp = D) or its own slice of it (Dp = D / P).
  - cross-polytope LSH (Andoni et al. 2015): C = [A, -A] of a seeded Gaussian A, every part on the whole vector.
  - codebooks (data-dependent LSH): unit centroids, each part on its slice; `update_codebooks` moves them by an
    exponential average of the queries and keys that they caught (no gradient; frozen at evaluation).
An inverted file (Jégou et al. 2011) is one table instead of R: a key lies in the cell whose centroid it points along
most, a query looks in the R cells that it points along most (multi-probe: Lv et al. 2007):

    best_cells(x [B,H,T,D], table [K,1,C,D], n) -> int32 [B,H,n,T]       (n = 1 for keys)

Cells are disjoint, so attention finds no key twice, sorts keys once, and is faster for it; centroids follow keys alone.
Keys choose by a centroid's direction, of what sets them apart from the mean of all. Queries rank by it too, or by the
mean of the cell's keys, length and all (`model.centroids`): keys that hardly differ from the common one, or point
anywhere, make short means, and a cell of them is looked into last.
Queries and keys are hashed separately, by functions of one token's vector (with `model.hash_positions`, turned by its
position) and stored state and nothing else: that is what keeps attention strictly causal.

Legend: B batch, H query heads, K key/value heads, T tokens, D head dim, R rounds, P parts, C directions a part.
"""

from __future__ import annotations

import functools
import importlib.util

import torch
from torch import Tensor
from torch.nn.functional import pad

from lshv2.precision import full_precision

SCORES = 1 << 24  # products with directions alive at once: never T x n_buckets of them
MOST_CELLS = 64  # that one vector may be asked for
MAX_SINGLE = 64  # above this many buckets a round, the product of two parts


@functools.cache
def has_triton() -> bool:
    """Whether Triton is installed: torch brings it along on Linux with CUDA."""
    return importlib.util.find_spec("triton") is not None


def parts_for(n_buckets: int) -> tuple[int, ...]:
    """Directions of each part: 32 -> (32,), 1024 -> (32, 32), 512 -> (32, 16)."""
    if n_buckets & (n_buckets - 1) or n_buckets < 1:
        raise ValueError(f"n_buckets={n_buckets} is not a power of two")
    if n_buckets <= MAX_SINGLE:
        return (n_buckets,)
    bits = n_buckets.bit_length() - 1
    return (1 << (bits - bits // 2), 1 << (bits // 2))


def cross_polytope_tables(
    n_kv_heads: int, n_rounds: int, n_buckets: int, head_dim: int, generator: torch.Generator
) -> list[Tensor]:
    """Seeded Gaussian directions and their opposites: one [K,R,C,D] table a part."""
    tables = []
    for size in parts_for(n_buckets):
        half = torch.randn(n_kv_heads, n_rounds, max(1, size // 2), head_dim, generator=generator)
        tables.append(torch.cat([half, -half], dim=2)[:, :, :size])
    return tables


def codebook_tables(
    n_kv_heads: int, n_rounds: int, n_buckets: int, head_dim: int, generator: torch.Generator
) -> list[Tensor]:
    """Random unit centroids to start from: one [K,R,C,D/P] table a part."""
    sizes = parts_for(n_buckets)
    shapes = [(n_kv_heads, n_rounds, size, head_dim // len(sizes)) for size in sizes]
    return [torch.nn.functional.normalize(torch.randn(shape, generator=generator), dim=-1) for shape in shapes]


def cell_table(n_kv_heads: int, n_cells: int, head_dim: int, generator: torch.Generator) -> Tensor:
    """Random unit centroids of an inverted file to start from: [K,1,C,D]."""
    return torch.nn.functional.normalize(torch.randn(n_kv_heads, 1, n_cells, head_dim, generator=generator), dim=-1)


def _slices(x: Tensor, tables: list[Tensor]) -> list[Tensor]:
    """What each part reads of x [B,H,T,D]: its own slice, or all of it."""
    if sum(table.shape[-1] for table in tables) == x.shape[-1]:
        return list(x.split([table.shape[-1] for table in tables], dim=-1))
    return [x] * len(tables)


def part_ids(x: Tensor, table: Tensor) -> Tensor:
    """Nearest direction of one part: x [B,H,T,Dp], table [K,R,C,Dp] -> int64 [B,H,R,T]."""
    batch, n_heads, length, dim = x.shape
    n_kv, rounds, size, _ = table.shape
    work = torch.promote_types(x.dtype, torch.float32)  # scores rounded to 16 bits would tie
    grouped = x.reshape(batch, n_kv, -1, dim)  # [B,K,G*T,Dp]: the heads of a group share their table
    directions = table.reshape(n_kv, rounds * size, dim).transpose(-1, -2).to(x.dtype).to(work)
    rows = max(1, SCORES // (batch * n_kv * rounds * size))
    with full_precision(x):
        pieces = [
            (part.to(work) @ directions).unflatten(-1, (rounds, size)).argmax(-1) for part in grouped.split(rows, dim=2)
        ]
    ids = torch.cat(pieces, dim=2).view(batch, n_kv, n_heads // n_kv, length, rounds)
    return ids.permute(0, 1, 2, 4, 3).reshape(batch, n_heads, rounds, length)


@torch.no_grad()
def bucket_ids(x: Tensor, tables: list[Tensor]) -> Tensor:
    """Buckets of x [B,H,T,D] by tables (one [K,R,C,Dp] a part) -> int32 [B,H,R,T] in [0, Π C).

    Directions are rounded to x's dtype, products summed in float32 (float64 stays float64); on a GPU in one kernel.
    """
    if x.is_cuda and has_triton():
        from lshv2.hashing_kernel import bucket_ids_triton, bucket_ids_whole, supported

        if supported(x, tables):
            return (bucket_ids_whole if torch.compiler.is_compiling() else bucket_ids_triton)(x, tables)
    result: Tensor | None = None
    for piece, table in zip(_slices(x, tables), tables, strict=True):
        ids = part_ids(piece, table)
        result = ids if result is None else result * table.shape[2] + ids
    assert result is not None
    return result.to(torch.int32)


def slots(n: int) -> int:
    """Among how many slots the n best cells are sought: eight for each, and 64 at least.

    Of a slot only the best cell counts, so the r-th best of all is missed with a chance of (r − 1) / slots.
    """
    return max(64, 8 << (n - 1).bit_length())


@torch.no_grad()
def best_cells(x: Tensor, table: Tensor, n: int) -> Tensor:
    """The n cells of an inverted file that each vector points along most, the best first.

    x [B,H,T,D], table [K,1,C,D] -> int32 [B,H,n,T] in [0, C), n <= min(C, MOST_CELLS). Cell c is in slot c modulo
    `slots(n)`, and only the best of a slot counts: exact for so many cells or n = 1, far cheaper beyond. Products with
    the centroids (rounded to x's dtype) are summed in float32 (float64 stays float64); the cell's number takes the
    place of a product's last bits, so that no two are equal and CPU and GPU rank alike.
    """
    n_kv, _, size, dim = table.shape
    if not 1 <= n <= min(size, MOST_CELLS):
        raise ValueError(f"{n} cells of {size} are asked for: between 1 and {min(size, MOST_CELLS)}")
    columns = slots(n)
    if x.is_cuda and has_triton():
        from lshv2.hashing_kernel import best_cells_triton, best_cells_whole, cells_supported

        if cells_supported(x):
            return (best_cells_whole if torch.compiler.is_compiling() else best_cells_triton)(x, table, n, columns)
    batch, n_heads, length, _ = x.shape
    work = torch.promote_types(x.dtype, torch.float32)
    bits = torch.int64 if work == torch.float64 else torch.int32
    directions = table[:, 0].transpose(-1, -2).to(x.dtype).to(work)  # [K,D,C]
    number, mask = torch.arange(size, dtype=bits, device=x.device), (1 << (size - 1).bit_length()) - 1
    ids = []
    for part in x.reshape(batch, n_kv, -1, dim).split(max(1, SCORES // (batch * n_kv * size)), dim=2):
        with full_precision(x):
            products = part.to(work) @ directions
        ranked = (products.view(bits) & ~mask | number).view(work)
        if size > columns:
            ranked = pad(ranked, (0, -size % columns), value=-torch.inf).unflatten(-1, (-1, columns)).amax(-2)
        winners = ranked.topk(n, dim=-1).values if n > 1 else ranked.amax(-1, keepdim=True)
        ids.append(winners.view(bits) & mask)
    return torch.cat(ids, dim=2).view(batch, n_heads, length, n).transpose(-1, -2).to(torch.int32).contiguous()


@torch.no_grad()
def codebook_sums(x: Tensor, ids: Tensor, tables: list[Tensor]) -> list[Tensor]:
    """Sum of the unit vectors that each centroid caught: like tables, for `update_codebooks`.

    x [B,H,T,D], ids int [B,H,R,T] from `bucket_ids`. Summed over batch, tokens and the heads of a group.
    """
    batch, n_heads, rounds, length = ids.shape
    sums, rest = [], ids.long()
    for piece, table in reversed(list(zip(_slices(x, tables), tables, strict=True))):
        n_kv, _, size, dim = table.shape
        part, rest = rest % size, rest // size
        unit = torch.nn.functional.normalize(piece.float(), dim=-1)
        unit = unit.reshape(batch, n_kv, -1, dim).transpose(0, 1).reshape(n_kv, 1, -1, dim)
        where = part.view(batch, n_kv, -1, rounds, length).permute(1, 3, 0, 2, 4).reshape(n_kv, rounds, 1, -1)
        caught = where == torch.arange(size, device=x.device)[:, None]  # [K,R,C,M]: a product with it is deterministic
        sums.append(caught.to(unit.dtype) @ unit)  # and, on a CPU, several times faster than index_add
    return sums[::-1]


@torch.no_grad()
def cell_sums(x: Tensor, ids: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Sum [K,1,C,D] and number [K,1,C] of the vectors that each of C = size cells caught, for `update_cells`.

    x [B,K,T,D], ids int [B,K,1,T] from `best_cells`.
    """
    n_kv, dim = x.shape[1], x.shape[3]
    where = ids[:, :, 0].transpose(0, 1).reshape(n_kv, 1, 1, -1).long()
    caught = (where == torch.arange(size, device=x.device)[:, None]).float()  # [K,1,C,M], as `codebook_sums`
    with full_precision(x):  # autocast would round the sums, and with them lengths
        total = caught @ x.float().transpose(0, 1).reshape(n_kv, 1, -1, dim)
    return total, caught.sum(-1)


@torch.no_grad()
def update_cells(table: Tensor, total: Tensor, count: Tensor, decay: float) -> None:
    """Move each centroid [K,1,C,D] that caught anything towards the mean of its catch, in place, length and all."""
    seen = (count > 0)[..., None]
    mean = total / count.clamp_min(1)[..., None]
    table.copy_(torch.where(seen, decay * table + (1 - decay) * mean.to(table.dtype), table))


@torch.no_grad()
def update_codebooks(tables: list[Tensor], sums: list[Tensor], decay: float) -> None:
    """Move each centroid that caught anything towards the mean direction of its catch, in place, and renormalise."""
    for table, total in zip(tables, sums, strict=True):
        caught = total.norm(dim=-1, keepdim=True) > 0
        target = torch.nn.functional.normalize(total, dim=-1)
        moved = torch.nn.functional.normalize(decay * table + (1 - decay) * target.to(table.dtype), dim=-1)
        table.copy_(torch.where(caught, moved, table))
