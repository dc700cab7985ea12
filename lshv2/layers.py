"""One attention layer: QK-norm, token shift, partial rotary positions, and the hash tables that it finds keys by.

Legend: B batch, T tokens, d model width, H query heads, K key/value heads, D head dim, R hash rounds.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize, pad, rms_norm, scaled_dot_product_attention
from torch.nn.utils import skip_init

from lshv2.attention import lsh_attention
from lshv2.config import ModelConfig
from lshv2.decoding import LayerCache
from lshv2.hashing import (
    MOST_CELLS,
    best_cells,
    bucket_ids,
    cell_sums,
    cell_table,
    codebook_sums,
    codebook_tables,
    cross_polytope_tables,
    update_cells,
    update_codebooks,
)
from lshv2.parallel.share import Share
from lshv2.profiling import region
from lshv2.softmax import scaled

CODEBOOK_TOKENS = 2048  # at most this many tokens of a batch move the codebooks each step: enough for a mean direction


def rotary_angles(length: int, config: ModelConfig, device: torch.device) -> tuple[Tensor, Tensor]:
    """cos, sin [T, rotated / 2] of the first `rotary_fraction` of each head's dimensions (Su et al. 2021)."""
    half = int(config.head_dim * config.rotary_fraction) // 2
    frequency = config.rotary_base ** (-torch.arange(half, device=device, dtype=torch.float32) / max(half, 1))
    angles = torch.arange(length, device=device, dtype=torch.float32)[:, None] * frequency
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [B,heads,T,D]: pairs (i, i + half) of the leading dimensions turn, the rest stays content-only."""
    half = cos.shape[-1]
    first, second, rest = x.split([half, half, x.shape[-1] - 2 * half], dim=-1)
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], dim=-1)


def tokens_before(x: Tensor, n: int, first: Tensor | None = None) -> list[Tensor]:
    """x [B,T,d] -> of each token the one before it, the one before that .. the nth: n views [B,T,d].

    first [B,n,d]: what came before x; None: nothing, zeros.
    """
    whole = pad(x, (0, 0, n, 0)) if first is None else torch.cat([first, x], dim=1)
    return [whole[:, n - i : n - i + x.shape[1]] for i in range(1, n + 1)]


class Attention(nn.Module):
    """Grouped-query attention: "lsh", or its twins "dense" (SDPA) and "window" (no bucket rounds)."""

    def __init__(self, config: ModelConfig, generator: torch.Generator) -> None:
        super().__init__()
        self.config = config
        self.share: Share | None = None  # of several processes that train together
        d, dim = config.d_model, config.head_dim
        self.query = skip_init(nn.Linear, d, config.n_heads * dim, bias=False)
        self.key = skip_init(nn.Linear, d, config.n_kv_heads * dim, bias=False)
        self.value = skip_init(nn.Linear, d, config.n_kv_heads * dim, bias=False)
        self.out = skip_init(nn.Linear, config.n_heads * dim, d, bias=False)
        self.shift = nn.Parameter(torch.ones(d))  # μ: how much of the previous token a key also carries
        # c: with it one layer tells apart what follows the same few tokens; without, two layers must learn to
        self.taps = nn.Parameter(torch.zeros(config.short_conv, d)) if config.short_conv else None
        self.log_temperature = nn.Parameter(torch.zeros(config.n_heads))  # QK-norm bounds logits by √D without it
        tables = self._draw_tables(generator)
        self.n_tables = len(tables) if config.attention == "lsh" else 0
        for i in range(self.n_tables):
            self.register_buffer(f"table{i}", tables[i])
            self.register_buffer(f"sum{i}", torch.zeros_like(tables[i]), persistent=False)
        if self.n_tables and config.hashing == "inverted_file":
            self.register_buffer("key_mean", torch.zeros(config.n_kv_heads, 1, dim))
            self.register_buffer("key_sum", torch.zeros(config.n_kv_heads, 1, dim), persistent=False)
            self.register_buffer("key_count", torch.zeros(()), persistent=False)
            if config.mean_cells:
                self.register_buffer("caught", torch.zeros(tables[0].shape[:3]), persistent=False)

    def _draw_tables(self, generator: torch.Generator) -> list[Tensor]:
        config = self.config
        n_kv, n_buckets, dim = config.n_kv_heads, config.resolved_n_buckets, config.head_dim
        if config.hashing == "inverted_file":
            return [cell_table(n_kv, n_buckets, dim, generator)]
        make = codebook_tables if config.hashing == "codebooks" else cross_polytope_tables
        return make(n_kv, config.n_rounds, n_buckets, dim, generator)

    @property
    def tables(self) -> list[Tensor]:
        """Hash directions, one [K,R,C,Dp] a part."""
        return [self.get_buffer(f"table{i}") for i in range(self.n_tables)]

    @property
    def sums(self) -> list[Tensor]:
        return [self.get_buffer(f"sum{i}") for i in range(self.n_tables)]

    @property
    def notes(self) -> list[Tensor]:
        """What the last forwards noted for `update_hash`."""
        rest = [name for name in ("key_sum", "key_count", "caught") if hasattr(self, name)]
        return [*self.sums, *(self.get_buffer(name) for name in rest)]

    def project(
        self, x: Tensor, before: list[Tensor] | None = None, asking: int | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """x [B,T,d] -> unrotated, normalised q [B,H,T,D], k [B,K,T,D], and v [B,K,T,D].

        before: `tokens_before`, `config.tokens_before` of them; None: x are the first T tokens. asking: only so many
        have queries.
        """
        dim = self.config.head_dim
        if before is None:
            first = self.share.before(x, self.config.tokens_before) if self.share and self.training else None
            before = tokens_before(x, self.config.tokens_before, first)
        last = before[0]
        if self.taps is not None:  # x_t + Σ c_i x_{t−i}
            for tap, now, earlier in zip(self.taps.to(x.dtype), before[:-1], before[1:], strict=True):
                x, last = torch.addcmul(x, tap, now), torch.addcmul(last, tap, earlier)
        shifted = x + self.shift.to(x.dtype) * last  # x_t + μ x_{t−1}: strictly causal
        q, k, v = (
            layer(source).unflatten(-1, (-1, dim)).transpose(1, 2)
            for layer, source in ((self.query, x[:, :asking]), (self.key, shifted), (self.value, x))
        )
        return rms_norm(q, (dim,)).to(v.dtype), rms_norm(k, (dim,)).to(v.dtype), v

    def hash(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Bucket ids of unrotated q and k: [B,H,R,T] and [B,K,R,T], or of an inverted file [B,K,1,T].

        While training, notes what moves the codebooks or centroids.
        """
        with region("hashing"):
            if self.config.hashing == "inverted_file":
                return self._look_up(q, k)
            q_ids, k_ids = bucket_ids(q, self.tables), bucket_ids(k, self.tables)
            if self.training and self.config.hashing == "codebooks":
                self._note(q, q_ids)
                self._note(k, k_ids)
            return q_ids, k_ids

    def _look_up(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """The best cells of queries and the cell of each key: [B,H,R,T], [B,K,1,T].

        Keys choose by what sets them apart from their running mean, or they would all lie in the same few cells. Added
        to mean centroids it would add the same product for every cell, and no query would choose otherwise.
        """
        table, mean = self.tables[0], self.get_buffer("key_mean")
        centred = k.detach() - mean.to(k.dtype)
        n = min(self.config.n_rounds, table.shape[2], MOST_CELLS)
        directions = normalize(table, dim=-1) if self.config.mean_cells else table
        q_ids, k_ids = best_cells(q, table, n), best_cells(centred, directions, 1)
        if self.training:
            self._note(centred, k_ids)
            self.get_buffer("key_sum").add_(k.detach().float().mean((0, 2))[:, None])
            self.get_buffer("key_count").add_(1)
        return q_ids, k_ids

    def _note(self, x: Tensor, ids: Tensor) -> None:
        """Add what each centroid caught of x [B,heads,T,D], of a part of the tokens: as if one process had them all."""
        world = self.share.world if self.share else 1
        # odd, so that it cannot fall in step with text laid out in pairs and miss every second position
        stride = x.shape[0] * x.shape[2] * world // CODEBOOK_TOKENS | 1
        part = self.share.every(stride, x.shape[2]) if self.share else slice(None, None, stride)
        x, ids = x.detach()[:, :, part], ids[..., part]
        if self.config.mean_cells:
            total, count = cell_sums(x, ids, self.tables[0].shape[2])
            self.sums[0].add_(total)
            self.get_buffer("caught").add_(count)
            return
        for total, more in zip(self.sums, codebook_sums(x, ids, self.tables), strict=True):
            total += more

    @torch.no_grad()
    def update_hash(self) -> None:
        """Move the codebooks by what the last step's tokens were; call after the optimizer step."""
        if not self.n_tables or self.config.hashing == "cross_polytope":
            return
        if self.config.mean_cells:
            caught = self.get_buffer("caught")
            update_cells(self.tables[0], self.sums[0], caught, self.config.codebook_decay)
            caught.zero_()
        else:
            update_codebooks(self.tables, self.sums, self.config.codebook_decay)
        for total in self.sums:
            total.zero_()
        if self.config.hashing == "inverted_file":
            mean, now, count = (self.get_buffer(name) for name in ("key_mean", "key_sum", "key_count"))
            # the first mean is taken whole; nothing was seen: nothing moves
            weight = torch.where(mean.any(), 1 - self.config.codebook_decay, 1.0) * (count > 0)
            mean.lerp_(now / count.clamp_min(1), weight)
            now.zero_()
            count.zero_()

    def turn(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Queries or keys [B,heads,T,D] with the positions that they are weighed by: the first heads carry none."""
        plain = x.shape[1] * self.config.n_content_kv_heads // self.config.n_kv_heads
        return torch.cat([x[:, :plain], rotate(x[:, plain:], cos, sin)], dim=1) if plain else rotate(x, cos, sin)

    def prepare(
        self, x: Tensor, cos: Tensor, sin: Tensor, before: list[Tensor] | None = None, asking: int | None = None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """What attention weighs and finds: q [B,H,T,D] and k with positions, v [B,K,T,D], and both bucket ids.

        before, asking: see `project`.
        """
        q, k, v = self.project(x, before, asking)
        placed = self.place(q, k, cos, sin, asking)
        return *placed, v, *self.find(*self.sought((q, k), placed))

    def sought(self, plain: tuple[Tensor, Tensor], placed: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """What `find` goes by, of q and k from `project` and from `place`: a head's temperature changes no bucket."""
        return placed if self.config.hash_positions else plain

    def place(
        self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, asking: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """q and k of `project` as attention weighs them: with positions, q with its head's temperature."""
        q = self.turn(q, cos[..., :asking, :], sin[..., :asking, :])
        return q * self.log_temperature.exp().to(q.dtype)[:, None, None], self.turn(k, cos, sin)

    def find(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Bucket ids of `project`'s q and k: see `hash`; of no rounds for the twins."""
        if self.config.attention == "lsh":
            return self.hash(q, k)
        q_ids, k_ids = (y.new_zeros(*y.shape[:2], 0, y.shape[2], dtype=torch.int32) for y in (q, k))
        return q_ids, k_ids

    def attend(self, q: Tensor, k: Tensor, v: Tensor, q_ids: Tensor, k_ids: Tensor) -> Tensor:
        """All tokens of a sequence, or this process's, at once: what `prepare` gives -> [B,H,T,D]."""
        if self.share is None or not self.training:
            return self._operator(q, k, v, q_ids, k_ids)
        with region("exchange"):
            traded = self.share.by_heads(q, k, v, q_ids, k_ids)
        out = self._operator(*traded)
        with region("exchange"):
            return self.share.by_tokens(out)

    def _operator(self, q: Tensor, k: Tensor, v: Tensor, q_ids: Tensor, k_ids: Tensor) -> Tensor:
        config = self.config
        if config.attention == "dense":
            with region("dense_attn"):
                return scaled_dot_product_attention(scaled(q, config), k, v, is_causal=True, enable_gqa=True)
        return lsh_attention(
            q, k, v, q_ids, k_ids, n_buckets=config.resolved_n_buckets, bucket_size=config.bucket_size,
            window=config.window, n_global=config.n_global,
        )

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """x [B,T,d] -> [B,T,d]."""
        return self.out(self.attend(*self.prepare(x, cos, sin)).transpose(1, 2).flatten(2))

    def cached(self, x: Tensor, cos: Tensor, sin: Tensor, cache: LayerCache) -> Tensor:
        """`forward` for decoding: x [B,T,d] is the prompt that an empty cache takes over, then one token a call."""
        before = None if cache.previous is None else tokens_before(x, self.config.tokens_before, cache.previous)
        q, k, v, q_ids, k_ids = self.prepare(x, cos, sin, before)
        if before is None:
            cache.fill(x, k, v, k_ids)
            out = self.attend(q, k, v, q_ids, k_ids)
        else:
            out = cache.attend(x, q, k, v, q_ids, k_ids)
        return self.out(out.transpose(1, 2).flatten(2))
