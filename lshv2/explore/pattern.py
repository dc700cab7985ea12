"""The visible set of one head against dense attention's softmax mass: what it catches, and what chance would.

For one head q and k are the same for both attentions, so dense attention's mass is what S(t) is judged by.
Short texts and O(T²): nothing here is for training.

Legend: K key/value heads, T tokens, R rounds, C directions a part, Dp what a part reads of the head dim.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from lshv2.errors import UserError
from lshv2.hashing import best_cells, bucket_ids, cell_table, codebook_tables, cross_polytope_tables
from lshv2.layers import Attention

MAX_ROUNDS = 8
TOP_K = 8  # the keys that dense attention weighs most: how many of them are seen?
HASHES = {
    "codebooks": codebook_tables, "cross_polytope": cross_polytope_tables,
    "inverted_file": lambda n_kv, _, n_cells, dim, generator: [cell_table(n_kv, n_cells, dim, generator)],
}


def hash_tables(attention: Attention, n_buckets: int, hashing: str, seed: int) -> tuple[list[Tensor], int]:
    """Tables of MAX_ROUNDS rounds, one [K,R,C,Dp] a part (an inverted file has one for all of them), and how many of
    the rounds are the model's own.

    The model's own rounds come first where it has tables of this kind and size; the others are drawn from `seed`.
    """
    config = attention.config
    if hashing not in HASHES:
        raise UserError(f"hashing={hashing!r} is unknown; allowed: {', '.join(HASHES)}")
    try:
        generator = torch.Generator().manual_seed(seed)
        tables = HASHES[hashing](config.n_kv_heads, MAX_ROUNDS, n_buckets, config.head_dim, generator)
    except ValueError as error:
        raise UserError(str(error)) from None
    if not attention.n_tables or (hashing, n_buckets) != (config.hashing, config.resolved_n_buckets):
        return tables, 0
    if hashing == "inverted_file":
        return attention.tables, MAX_ROUNDS
    own = [table[:, :MAX_ROUNDS] for table in attention.tables]
    return [torch.cat([a, b[:, a.shape[1] :]], dim=1) for a, b in zip(own, tables, strict=True)], own[0].shape[1]


def round_ids(attention: Attention, hashing: str, tables: list[Tensor], kv: int, q: Tensor, k: Tensor) -> list[Tensor]:
    """Bucket ids [1,1,MAX_ROUNDS,T] of one head's q and k [T,D], with the tables of key head `kv`."""
    one = [table[kv : kv + 1] for table in tables]
    if hashing != "inverted_file":
        return [bucket_ids(x[None, None], one) for x in (q, k)]
    n = min(MAX_ROUNDS, one[0].shape[2])
    cells = best_cells(q[None, None], one[0], n)
    mean = attention.get_buffer("key_mean")[kv] if attention.config.hashing == "inverted_file" else k.mean(0)
    places = best_cells((k - mean)[None, None], normalize(one[0], dim=-1), 1).expand(-1, -1, MAX_ROUNDS, -1)
    # rounds beyond the last cell look there again and find nothing new
    return [torch.cat([cells, cells[:, :, -1:].expand(-1, -1, MAX_ROUNDS - n, -1)], 2), places]


@dataclass(frozen=True)
class Shares:
    """How much of a weight [T,T] four sets of keys catch, by query: [T] each.

    `near`: window and sinks alone; `visible`: S(t). The other two see as many keys as S(t), window and sinks included:
    `random` is the expected share of keys drawn by chance beyond those, `best` that of the heaviest ones.
    """

    near: Tensor
    visible: Tensor
    random: Tensor
    best: Tensor


@dataclass(frozen=True)
class Pattern:
    """One head at one setting: dense mass [T,T], bucket ids [MAX_ROUNDS,T], and nested visible sets.

    `seen` bool [MAX_ROUNDS + 1,T,T]: seen[r] is S(t) with the first r rounds, seen[0] window and sinks alone.
    """

    mass: Tensor
    local: Tensor
    seen: Tensor
    q_ids: Tensor
    k_ids: Tensor
    n_rounds: int
    own_rounds: int
    n_buckets: int

    @property
    def visible(self) -> Tensor:
        return self.seen[self.n_rounds]

    @functools.cached_property
    def far(self) -> Tensor:
        """Past keys beyond window and sinks, bool [T,T]: only the hash can find them."""
        return torch.ones_like(self.seen[0]).tril() & ~self.seen[0]

    @functools.cached_property
    def searching(self) -> Tensor:
        """Queries with any far key, bool [T]; means are over these (over all when there are none)."""
        some = self.far.any(-1)
        return some if some.any() else torch.ones_like(some)

    @functools.cached_property
    def top(self) -> Tensor:
        """1/k at each query's k = min(TOP_K, keys so far) heaviest keys: shares of it are recall."""
        place = self.mass.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
        k = torch.arange(1, len(self.mass) + 1).clamp_max(TOP_K)[:, None]
        return (place < k) / k

    def shares(self, weight: Tensor, n_rounds: int | None = None) -> Shares:
        """Shares of `weight` [T,T] (rows sum to 1, zero in the future), with n_rounds (default: the chosen number)."""
        seen = self.visible if n_rounds is None else self.seen[n_rounds]
        far_weight = weight * self.far
        near, found = (weight * self.seen[0]).sum(-1), (seen & self.far).sum(-1)
        heaviest = torch.nn.functional.pad(far_weight.sort(-1, descending=True).values.cumsum(-1), (1, 0))
        return Shares(
            near, (weight * seen).sum(-1),
            near + far_weight.sum(-1) * found / self.far.sum(-1).clamp_min(1),
            near + heaviest.gather(-1, found[:, None])[:, 0],
        )

    def records(self) -> list[dict[str, Any]]:
        """The table of numbers, means over `searching` queries."""
        rows: list[dict[str, Any]] = []
        for name, weight in (("dense mass caught", self.mass), (f"true top {TOP_K} keys seen", self.top)):
            share = self.shares(weight)
            means = {key: float(getattr(share, key)[self.searching].mean()) for key in Shares.__annotations__}
            rows.append({"share": name, **means})
        means = {key: rows[0][key] for key in Shares.__annotations__}
        left = 1 - means["near"]
        beyond = {key: (value - means["near"]) / left if left > 1e-6 else 0.0 for key, value in means.items()}
        return [*rows, {"share": "mass beyond window and sinks caught", **beyond}]

    def keys_per_query(self) -> tuple[float, float]:
        """Mean keys that a searching query sees, and that dense attention would read."""
        counts, past = self.visible.sum(-1), torch.arange(1, len(self.mass) + 1)
        return float(counts[self.searching].float().mean()), float(past[self.searching].float().mean())

    def caption(self) -> str:
        """Keys per query, and which tables hash: the model's own, or ones drawn afresh."""
        keys, past = self.keys_per_query()
        own = min(self.own_rounds, self.n_rounds)
        whose = "the model's own hash tables"
        if own == 0:
            whose = f"<b>these hash tables are untrained</b>: drawn afresh with the seed, for {self.n_buckets} buckets"
        elif own < self.n_rounds:
            whose += f" in rounds 1–{own}; <b>the tables of the others are untrained</b>, drawn afresh with the seed"
        return (
            f"A query with keys beyond window and sinks sees {keys:.0f} of {past:.0f} keys on average "
            f"({int(self.searching.sum())} of {len(self.mass)} queries). Hashing: {whose}."
        )
