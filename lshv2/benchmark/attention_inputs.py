"""What the operator is timed on: random and clustered q, k, v at the documented shape, and bucket ids made to hurt.

Legend: B batch, H query heads, K key/value heads, T tokens, D head dim, R rounds.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

from lshv2.hashing import cell_table, codebook_tables
from lshv2.operator_results import ONE_TABLE

N_HEADS, N_KV_HEADS, HEAD_DIM, N_ROUNDS, BUCKET_SIZE, WINDOW, N_GLOBAL = 12, 4, 64, 4, 128, 256, 4
N_CLUSTERS = 256
SPREAD = 0.5  # noise over centre: a token's cosine with its centre is near 0.9, with its neighbours 0.8
FEW_KEYS = 64  # keys in the bucket that every query asks for


@dataclass(frozen=True)
class Inputs:
    """One layer's input on one device. q, k, v are leaves; grad is what the backward starts from."""

    q: Tensor  # [B,H,T,D]
    k: Tensor  # [B,K,T,D]
    v: Tensor  # [B,K,T,D]
    grad: Tensor  # [B,H,T,D]
    tables: list[Tensor]  # random codebooks, one [K,R,C,D/P] a part
    cells: Tensor  # [K,1,C,D] random centroids of an inverted file
    n_buckets: int

    @property
    def bytes(self) -> int:
        """Bytes of q, k, v and o and of their four gradients."""
        return 2 * self.q.element_size() * (2 * self.q.numel() + 2 * self.k.numel())


def buckets_for(length: int) -> int:
    """Buckets a round: the power of two nearest to length / BUCKET_SIZE."""
    return 2 ** max(0, round(math.log2(max(1.0, length / BUCKET_SIZE))))


def make_inputs(
    length: int, batch: int, data: str, device: torch.device, dtype: torch.dtype, seed: int
) -> Inputs:
    """data: "uniform" (independent normal vectors) or "clustered" (see `_clustered`). Drawn on the device."""
    generator = torch.Generator(device).manual_seed(seed)
    shapes = {heads: (batch, heads, length, HEAD_DIM) for heads in (N_HEADS, N_KV_HEADS)}

    def normal(heads: int) -> Tensor:
        return torch.randn(shapes[heads], generator=generator, device=device, dtype=dtype)

    if data == "clustered":
        centres = normalize(torch.randn(N_KV_HEADS, N_CLUSTERS, HEAD_DIM, generator=generator, device=device), dim=-1)
        q, k = (_clustered(shapes[heads], centres, generator).to(dtype) for heads in (N_HEADS, N_KV_HEADS))
    else:
        q, k = normal(N_HEADS), normal(N_KV_HEADS)
    v, grad = normal(N_KV_HEADS), normal(N_HEADS)
    n_buckets = buckets_for(length)
    draw = torch.Generator().manual_seed(seed)
    tables = codebook_tables(N_KV_HEADS, N_ROUNDS, n_buckets, HEAD_DIM, draw)
    cells = cell_table(N_KV_HEADS, n_buckets, HEAD_DIM, draw)
    return Inputs(q.requires_grad_(), k.requires_grad_(), v.requires_grad_(), grad, [t.to(device) for t in tables],
                  cells.to(device), n_buckets)


def _clustered(shape: tuple[int, ...], centres: Tensor, generator: torch.Generator) -> Tensor:
    """Vectors of length √D around centres [K,N,D], each token's centre drawn with Zipf's probabilities 1 / rank.

    The heads of a group draw from their key head's centres, so that queries lie near their keys' clusters.
    """
    batch, heads, length, dim = shape
    n_kv, n_clusters, _ = centres.shape
    share = (1 / torch.arange(1, n_clusters + 1, device=centres.device, dtype=torch.float32)).cumsum(0)
    drawn = torch.rand(batch, heads, length, generator=generator, device=centres.device) * share[-1]
    which = torch.searchsorted(share, drawn).clamp(max=n_clusters - 1)
    owner = torch.arange(n_kv, device=centres.device).repeat_interleave(heads // n_kv)[:, None] * n_clusters
    near = centres.flatten(0, 1)[which + owner]
    noise = torch.randn(shape, generator=generator, device=centres.device) * (SPREAD / math.sqrt(dim))
    return normalize(near + noise, dim=-1) * math.sqrt(dim)


def given_ids(
    length: int, batch: int, n_buckets: int, device: torch.device, seed: int
) -> dict[str, tuple[Tensor, Tensor]]:
    """(q_buckets [B,H,R,T], k_buckets [B,K,R,T]) int32 by name: `uniform` to compare with, then those that hurt; then
    the same of one table, k_buckets [B,K,1,T], with ONE_TABLE behind the name."""
    generator = torch.Generator(device).manual_seed(seed)

    def draw(heads: int, low: int = 0, high: int = n_buckets, rounds: int = N_ROUNDS) -> Tensor:
        shape = (batch, heads, rounds, length)
        return torch.randint(min(low, high - 1), high, shape, generator=generator, device=device, dtype=torch.int32)

    def mostly(heads: int, part: float, value: Tensor, otherwise: Tensor) -> Tensor:
        chosen = torch.rand(batch, heads, N_ROUNDS, length, generator=generator, device=device) < part
        return torch.where(chosen, value, otherwise)

    def one(heads: int) -> Tensor:
        return torch.zeros(batch, heads, N_ROUNDS, length, dtype=torch.int32, device=device)

    def equal_rounds(heads: int) -> Tensor:
        return draw(heads, rounds=1).expand(batch, heads, N_ROUNDS, length).contiguous()

    few = draw(N_KV_HEADS, low=1)
    few[..., :: max(1, length // FEW_KEYS)] = 0
    giant = (mostly(heads, 0.9, one(heads), draw(heads)) for heads in (N_HEADS, N_KV_HEADS))
    found = {
        "uniform": (draw(N_HEADS), draw(N_KV_HEADS)),
        "one bucket": (one(N_HEADS), one(N_KV_HEADS)),
        "queries in two buckets, 95 % of the keys elsewhere": (
            draw(N_HEADS, high=min(2, n_buckets)),
            mostly(N_KV_HEADS, 0.95, draw(N_KV_HEADS, low=2), draw(N_KV_HEADS, high=min(2, n_buckets))),
        ),
        "a bucket with 90 % of all": (next(giant), next(giant)),
        "the same ids in every round": (equal_rounds(N_HEADS), equal_rounds(N_KV_HEADS)),
        "all queries in a bucket of few keys": (one(N_HEADS), few),
        "all keys in one bucket, queries uniform": (draw(N_HEADS), one(N_KV_HEADS)),
    }
    return found | {name + ONE_TABLE: (q, k[:, :, :1].contiguous()) for name, (q, k) in found.items()}
