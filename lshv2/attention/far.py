"""The bucket rounds in sorted tiles: each tile of queries reads one contiguous stretch of sorted keys.

The queries of a group are sorted by (bucket, position), all G heads together, and cut into tiles; a tile's keys are
the ranks from its lowest `lo` to its highest `hi`. Stretches are ragged, so tiles are batched by stretch length and
long stretches are cut into pieces. Since `lo` and `hi` ascend along the sorted queries, the stretches of a round
overlap by at most W a tile: the total is O(T) whatever the data. Probes of one table are rounds that share its sorted
keys: they stay apart, because a batch may merge into a query's result only once.

Legend: N = B·K groups, M = G·T queries of a group, R rounds or probes of one table, Q query tile, C key columns of a
batch, b tiles in it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from lshv2.attention.intervals import Intervals

QUERY_TILE = 64
KEY_STEP = 32  # stretches are rounded up to this many keys
MAX_STEPS = 32  # longer stretches are cut into pieces of this many steps
BUDGET = {False: 1 << 19, True: 1 << 25}  # scores worked on at once: a CPU's cache, or enough to fill a GPU


@dataclass
class Batch:
    """b tiles of equal size: rows [b,Q] flat query index (N*M is the dummy row), ranks [b] where their stretch of the
    round's sorted keys begins (flat), keys [b,C] flat key index, hidden [b,Q,C]."""

    rows: Tensor
    ranks: Tensor
    keys: Tensor
    hidden: Tensor


def _take(x: Tensor, index: Tensor) -> Tensor:
    """x[index] along dimension 0; index_select is several times faster here than advanced indexing on a CPU."""
    return x.index_select(0, index.flatten()).view(*index.shape, *x.shape[1:])


class FarTiles:
    """Every (query tile, key stretch) of all rounds, as batches of equal shape."""

    def __init__(self, tables: Intervals) -> None:
        self.tables = tables
        self.n, self.n_tables, self.length = tables.order.shape
        self.rounds, self.queries = tables.lo.shape[1:]
        flat = (self.rounds, self.n * self.queries)
        self.lo, self.hi = tables.lo.transpose(0, 1).reshape(flat), tables.hi.transpose(0, 1).reshape(flat)  # [R,N*M]

    def __iter__(self) -> Iterator[Batch]:
        for table in range(self.n_tables):
            yield from self.of_table(table)

    def of_table(self, table: int) -> Iterator[Batch]:
        """The batches of the rounds that look in one table."""
        for r in range(table, self.rounds, self.n_tables):
            yield from self.round(r)

    def round(self, r: int) -> Iterator[Batch]:
        """The batches of one round; a query is in one tile a round, and its pieces in different batches."""
        rows, first, steps = self._tiles(r)
        if rows is None:
            return
        assert first is not None and steps is not None
        positions = self._positions(self.tables.table(r))
        ranks = self._earlier_ranks(r)
        piece = 0
        while True:
            left = (steps - piece * MAX_STEPS).clamp_max(MAX_STEPS)
            order = left.argsort(stable=True)
            counts = left[order].tolist()
            at = next((i for i, c in enumerate(counts) if c > 0), len(counts))
            if at == len(counts):
                return
            while at < len(counts):
                width = counts[at]
                most = max(1, BUDGET[rows.is_cuda] // (rows.shape[1] * width * KEY_STEP))
                end = at
                while end < len(counts) and end - at < most and counts[end] == width:
                    end += 1
                chosen = order[at:end]
                start = first[chosen] + piece * MAX_STEPS * KEY_STEP
                yield self._batch(r, rows[chosen], start, width, positions, ranks)
                at = end
            piece += 1

    def _tiles(self, r: int) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Tiles of round r that have keys: rows [tiles,Q] flat, first flat rank-row [tiles], steps [tiles]."""
        lo, hi = self.tables.lo[:, r], self.tables.hi[:, r]  # [N,M]
        empty = hi <= lo
        most = int((~empty).sum(-1).max())
        if most == 0:
            return None, None, None
        tile = min(QUERY_TILE, most)
        code = self.tables.query_code[:, r].masked_fill(empty, torch.iinfo(torch.int64).max)
        order = code.argsort(dim=-1, stable=True)[:, :most]
        order = torch.nn.functional.pad(order, (0, -most % tile), value=-1)  # [N, tiles*Q]
        idle = (order < 0) | empty.gather(-1, order.clamp_min(0))
        safe = order.clamp_min(0)
        far = torch.iinfo(torch.int32).max
        low = lo.gather(-1, safe).masked_fill(idle, far).view(self.n, -1, tile).amin(-1)
        high = hi.gather(-1, safe).masked_fill(idle, 0).view(self.n, -1, tile).amax(-1)
        steps = ((high - low).clamp_min(0) + KEY_STEP - 1) // KEY_STEP  # [N,tiles]
        group = torch.arange(self.n, device=lo.device)[:, None]
        rows = torch.where(idle, self.n * self.queries, safe + group * self.queries).view(self.n, -1, tile)
        keep = steps > 0
        return rows[keep], (low + group * self.length)[keep], steps[keep]

    def _positions(self, table: int) -> Tensor:
        """Flat key index at each flat rank of a table: [N*T]."""
        group = torch.arange(self.n, device=self.tables.order.device)[:, None]
        return (self.tables.order[:, table] + group * self.length).flatten()

    def places(self, table: int) -> Tensor:
        """Flat rank in a table of each flat key index: [N*T], the inverse of `_positions`."""
        group = torch.arange(self.n, device=self.tables.rank.device)[:, None]
        return (self.tables.rank[:, table] + group * self.length).flatten()

    def _earlier_ranks(self, r: int) -> list[Tensor]:
        """For each earlier round with another table: the rank there of the key at each rank here, flat [N*T]."""
        if self.n_tables < self.rounds:
            return []
        order = self.tables.order[:, r]
        return [self.tables.rank[:, e].gather(-1, order).flatten() for e in range(r)]

    def _batch(self, r: int, rows: Tensor, first: Tensor, steps: int, positions: Tensor, ranks: list[Tensor]) -> Batch:
        flat = first[:, None] + torch.arange(steps * KEY_STEP, device=rows.device)  # flat ranks, [b,C]
        query = rows.clamp_max(self.n * self.queries - 1)  # the dummy row borrows the last query, its result is dropped
        group = query[:, :1] // self.queries
        inside = flat.clamp_max(self.n * self.length - 1)
        place = (flat - group * self.length).int()[:, None, :]  # rank within its group
        hidden = place < _take(self.lo[r], query)[..., None]
        hidden |= place >= _take(self.hi[r], query)[..., None]
        for e, earlier in enumerate(ranks):
            place = _take(earlier, inside)[:, None, :]
            found = place >= _take(self.lo[e], query)[..., None]
            found &= place < _take(self.hi[e], query)[..., None]
            hidden |= found
        keys = _take(positions, inside)
        return Batch(rows, first, keys, hidden)


def far_forward(q: Tensor, k: Tensor, v: Tensor, tiles: FarTiles, out: Tensor, lse: Tensor) -> None:
    """Merge every bucket round into the running softmax, in place.

    q [N*M+1,D], k, v [N*T,D] flat; out [N*M+1,D], lse [N*M+1] start as the local part's (last row: dummy).
    """
    scale = q.shape[-1] ** -0.5
    for batch in tiles:
        scores = torch.bmm(_take(q, batch.rows), _take(k, batch.keys).transpose(1, 2)).mul_(scale)
        scores.masked_fill_(batch.hidden, float("-inf"))
        old = _take(lse, batch.rows)[..., None]
        peak = torch.maximum(scores.amax(-1, keepdim=True), old)
        weights = scores.sub_(peak).exp_()
        kept = (old - peak).exp_()
        total = weights.sum(-1, keepdim=True).add_(kept)
        merged = torch.bmm(weights, _take(v, batch.keys)).addcmul_(_take(out, batch.rows), kept).div_(total)
        out.index_copy_(0, batch.rows.flatten(), merged.flatten(0, 1))
        lse.index_copy_(0, batch.rows.flatten(), (peak + total.log()).flatten())


def far_backward(
    q: Tensor, k: Tensor, v: Tensor, tiles: FarTiles, grad: Tensor, lse: Tensor, delta: Tensor,
    dq: Tensor, dk: Tensor, dv: Tensor,
) -> None:
    """Add the bucket rounds' gradients to dq [N*M+1,D], dk, dv [N*T,D]; grad [N*M+1,D], lse, delta [N*M+1]."""
    scale = q.shape[-1] ** -0.5
    for table in range(tiles.n_tables):
        dk_sorted, dv_sorted = (x.new_zeros(x.shape[0] + MAX_STEPS * KEY_STEP, x.shape[1]) for x in (dk, dv))
        for batch in tiles.of_table(table):
            q_b, k_b, grad_b = _take(q, batch.rows), _take(k, batch.keys), _take(grad, batch.rows)
            scores = torch.bmm(q_b, k_b.transpose(1, 2)).mul_(scale)
            weights = scores.sub_(_take(lse, batch.rows)[..., None]).masked_fill_(batch.hidden, float("-inf")).exp_()
            dscores = torch.bmm(grad_b, _take(v, batch.keys).transpose(1, 2)).sub_(_take(delta, batch.rows)[..., None])
            dscores.mul_(weights).mul_(scale)
            moved = torch.bmm(dscores, k_b).add_(_take(dq, batch.rows))
            dq.index_copy_(0, batch.rows.flatten(), moved.flatten(0, 1))
            dk_b, dv_b = torch.bmm(dscores.transpose(1, 2), q_b), torch.bmm(weights.transpose(1, 2), grad_b)
            _add_stretches(dk_sorted, batch.ranks, dk_b)
            _add_stretches(dv_sorted, batch.ranks, dv_b)
        place = tiles.places(table)
        dk += _take(dk_sorted, place)
        dv += _take(dv_sorted, place)


def _add_stretches(total: Tensor, first: Tensor, stretches: Tensor) -> None:
    """total[first[i] : first[i] + C] += stretches[i]: total [rows,D], first [b], stretches [b,C,D], which may overlap.

    On a CPU adding slices beats scattering rows several times over; on a GPU each slice would be a launch.
    """
    if total.is_cuda:
        rows = first[:, None] + torch.arange(stretches.shape[1], device=first.device)
        total.index_add_(0, rows.flatten(), stretches.flatten(0, 1))
        return
    for at, stretch in zip(first.tolist(), stretches, strict=True):
        total[at : at + len(stretch)] += stretch
