"""The key/value cache: what later tokens may attend to, and the attention of one new token to it.

    logits, cache = model.prefill(prompt_ids, capacity=4096)      # lshv2.model
    logits = model.step(token, cache)                             # token int64 [B] -> [B,V], again and again

One `LayerCache` a layer *application* (a tied block applied four times keeps four), all sharing one `Cursor`. Memory is
linear in the capacity: keys and values [B,K,capacity,D], and n_buckets rings of the last W positions a table, which
point into them. A step writes one key and one value, puts its position into a ring of each table (R of them, or one
that a query probes R times), and reads R·W + window + n_global keys: the visible set of `lshv2.attention`, every key
once. Shapes depend on settings alone and nothing reads the device, so a step costs the same at every context length and
can be captured in a CUDA graph. The exception is the dense twin, whose step reads every past key (a slice whose length
the host knows).

Rows of a batch may differ in length. They are aligned at the left: row b holds positions 0 .. length[b] − 1, whatever a
prompt was padded with lies behind them, is visible to none of them, and is overwritten by the tokens that follow.

Left out on purpose: a second prompt in one go (feed its tokens one by one), paging, eviction.
Legend: B batch, K key/value heads, G = H / K, R rounds or probes, W bucket_size, N keys seen near (window and sinks),
D head dim.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

from lshv2.config import ModelConfig
from lshv2.errors import UserError
from lshv2.precision import full_precision
from lshv2.profiling import region
from lshv2.softmax import scaled


class Cursor:
    """Where each row stands: shared by all layers, moved once a token."""

    def __init__(self, config: ModelConfig, lengths: Sequence[int], angles: tuple[Tensor, Tensor]) -> None:
        device = angles[0].device
        self.angles, self.capacity = angles, angles[0].shape[0]
        self.longest, self.uniform = max(lengths), len(set(lengths)) == 1
        self.window, self.n_global = config.window, config.n_global
        self.length = torch.tensor(list(lengths), device=device)  # [B], tokens held
        heads = torch.arange(len(lengths) * config.n_kv_heads, device=device).view(len(lengths), -1)
        self.heads = heads  # [B,K]: number of each (row, key head)
        self.first_row = heads * self.capacity  # [B,K]: where its positions begin in [B·K·capacity, D]
        self._back = torch.arange(min(config.window, self.capacity) - 1, -1, -1, device=device)
        self._sinks = torch.arange(min(config.n_global, self.capacity), device=device)

    def claim(self) -> None:
        """Room for one more token a row, on the host's side; raises UserError when there is none."""
        if self.longest >= self.capacity:
            raise UserError(f"the cache is full: it holds capacity={self.capacity} tokens; prefill with a larger one")
        self.longest += 1

    def begin(self) -> tuple[Tensor, Tensor]:
        """What all layers need to know about the token that goes to position length[b]; its cos, sin [B,1,1,rotated/2].
        """
        self.edge = self.length - self.window  # [B]: positions above it are local
        near = self.length[:, None] - self._back
        hidden_sinks = self._sinks > self.edge[:, None]  # not there yet, or local already
        self.near = torch.cat([self._sinks.expand(hidden_sinks.shape), near.clamp_min(0)], dim=1)  # [B,N]
        self.near_hidden = torch.cat([hidden_sinks, near < 0], dim=1)
        cos, sin = (table.index_select(0, self.length)[:, None, None] for table in self.angles)
        return cos, sin

    def end(self) -> None:
        self.length += 1


class LayerCache:
    """Keys, values and bucket rings of one layer application. `fill` once, then `attend` for each new token."""

    def __init__(self, config: ModelConfig, cursor: Cursor) -> None:
        self.config, self.cursor = config, cursor
        self.n_tables = 0  # R, or 1 that is probed R times, once filled
        self.previous: Tensor | None = None  # [B,tokens_before,d]: the newest inputs, of which the next key is made too
        self.k = self.v = torch.empty(0)  # [B·K·capacity, D] once filled
        self.rings = torch.empty(0)  # int32 [B·K·tables·n_buckets + 1, W]: newest positions, -1 none; the last is scrap
        self.slot = torch.empty(0)  # [B·K·tables·n_buckets + 1]: where in its ring the next position goes

    def fill(self, x: Tensor, k: Tensor, v: Tensor, k_ids: Tensor) -> None:
        """Take over a prompt: input x [B,T,d], rotated k and v [B,K,T,D], k_ids [B,K,R or 1,T]; device and dtype are
        theirs.

        Row b's tokens from cursor.length[b] on are padding.
        """
        batch, n_kv, length, dim = k.shape
        if self.cursor.longest > length:
            raise UserError(f"lengths go up to {self.cursor.longest}, but the prompts have {length} tokens")
        reach = self.config.tokens_before
        last = self.cursor.length[:, None] + torch.arange(reach, device=x.device)  # in x with `reach` zeros before it
        self.previous = pad(x, (0, 0, reach, 0)).gather(1, last[..., None].expand(-1, -1, x.shape[-1]))
        stores = []
        for y in (k, v):
            store = y.new_zeros(batch, n_kv, self.cursor.capacity, dim)  # zeros: a hidden NaN would still be a NaN
            store[:, :, :length] = y
            stores.append(store.view(-1, dim))
        self.k, self.v = stores
        cos, sin = self.cursor.angles
        self.cursor.angles = cos.to(k.dtype), sin.to(k.dtype)  # once, not in every layer of every step
        if self.config.attention == "lsh":
            self.n_tables = k_ids.shape[2]
            self._fill_rings(k_ids)

    def _fill_rings(self, k_ids: Tensor) -> None:
        """The newest W positions of each bucket, at the slots where steps one by one would have left them."""
        n_buckets, width, device = self.config.resolved_n_buckets, self.config.bucket_size, k_ids.device
        lists = torch.arange(self.n_tables, device=device) + self.cursor.heads[..., None] * self.n_tables
        self.first_ring = lists * n_buckets  # [B,K,tables]
        scrap = lists.numel() * n_buckets
        self.rings = torch.full((scrap + 1, width), -1, dtype=torch.int32, device=device)
        self.slot = torch.zeros(scrap + 1, dtype=torch.int64, device=device)
        position = torch.arange(k_ids.shape[-1], device=device)
        padding = position >= self.cursor.length[:, None, None, None]
        ids, order = k_ids.long().masked_fill(padding, n_buckets).sort(dim=-1, stable=True)  # positions ascend within
        rank = position - torch.searchsorted(ids, ids)
        count = torch.searchsorted(ids, ids, right=True) - position + rank
        ring = torch.where(ids < n_buckets, self.first_ring[..., None] + ids, scrap)
        newest = torch.where((ids < n_buckets) & (count - rank <= width), ring * width + rank % width, scrap * width)
        self.rings.view(-1).scatter_(0, newest.flatten(), order.int().flatten())
        self.slot.scatter_(0, ring.flatten(), (count % width).flatten())

    def attend(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, q_ids: Tensor, k_ids: Tensor) -> Tensor:
        """One token a row, at position cursor.length: x [B,1,d], q [B,H,1,D], k, v [B,K,1,D], q_ids [B,H,R,1],
        k_ids [B,K,R or 1,1], of as many tables as `fill` had.

        Keeps it, and returns its attention [B,H,1,D] in q's dtype.
        """
        assert self.previous is not None, "fill comes first"
        self.previous.copy_(torch.cat([self.previous[:, 1:], x], dim=1))
        here = (self.cursor.first_row + self.cursor.length[:, None]).flatten()
        self.k.index_copy_(0, here, k.flatten(0, 2))
        self.v.index_copy_(0, here, v.flatten(0, 2))
        if self.config.attention == "dense":
            with region("dense_attn"):
                return self._dense(q)
        with region("bucket_attn"), full_precision(q):
            if self.n_tables:
                self._push(k_ids.squeeze(-1))
            return self._sparse(q, q_ids)

    def _dense(self, q: Tensor) -> Tensor:
        cursor, dim = self.cursor, q.shape[-1]
        keys, values = (y.view(*cursor.heads.shape, -1, dim)[:, :, : cursor.longest] for y in (self.k, self.v))
        mask = None
        if not cursor.uniform:
            mask = (torch.arange(cursor.longest, device=q.device) <= cursor.length[:, None])[:, None, None]
        q = scaled(q, self.config, cursor.length)
        return scaled_dot_product_attention(q, keys, values, attn_mask=mask, enable_gqa=True)

    def _push(self, k_ids: Tensor) -> None:
        """The new position into its ring of each table: k_ids [B,K,tables]."""
        width = self.config.bucket_size
        ring = (self.first_ring + k_ids).flatten()
        slot = self.slot.index_select(0, ring)
        position = self.cursor.length[:, None, None].expand(k_ids.shape).flatten()
        self.rings.view(-1).index_copy_(0, ring * width + slot, position.int())
        self.slot.index_copy_(0, ring, (slot + 1) % width)

    def _found(self, q_ids: Tensor) -> Tensor:
        """Positions that the rounds found, each once, -1 elsewhere and for those seen near: [B,K,G,R·W]."""
        cursor, grouped = self.cursor, q_ids.unflatten(1, (self.config.n_kv_heads, -1)).squeeze(-1)  # [B,K,G,R]
        ring = self.first_ring[:, :, None] + grouped  # of one table every probe reads another ring
        found = self.rings.index_select(0, ring.flatten()).view(*grouped.shape[:3], -1)
        near = (found > cursor.edge[:, None, None, None]) | (found < cursor.n_global)
        found = found.masked_fill(near, -1).sort(dim=-1).values  # a key found twice stands beside itself
        twice = found[..., 1:] == found[..., :-1]
        return torch.cat([found[..., :1], found[..., 1:].masked_fill(twice, -1)], dim=-1)

    def _sparse(self, q: Tensor, q_ids: Tensor) -> Tensor:
        """One softmax over S(t): window and sinks are read once a key head, what was found once a query head."""
        cursor, n_kv, dim = self.cursor, self.config.n_kv_heads, q.shape[-1]
        grouped = q.reshape(q.shape[0], n_kv, -1, dim)  # [B,K,G,D]
        groups, work = grouped.shape[2], torch.promote_types(q.dtype, torch.float32)
        n_near = cursor.near.shape[1]
        rows = cursor.near[:, None].expand(-1, n_kv, -1)  # [B,K,N]
        hidden = cursor.near_hidden[:, None, None].expand(-1, n_kv, groups, -1)  # [B,K,G,N]
        if self.n_tables:
            found = self._found(q_ids)
            rows = torch.cat([rows, found.flatten(2).clamp_min(0)], dim=-1)
            hidden = torch.cat([hidden, found < 0], dim=-1)
        at = (cursor.first_row[..., None] + rows).flatten()
        (near_k, far_k), (near_v, far_v) = (
            y.index_select(0, at).view(*rows.shape, dim).to(work).split([n_near, rows.shape[-1] - n_near], dim=2)
            for y in (self.k, self.v)
        )
        grouped, shape = grouped.to(work), (*grouped.shape[:3], (rows.shape[-1] - n_near) // groups, dim)
        near = grouped @ near_k.transpose(-1, -2)
        far = (far_k.reshape(shape) @ grouped[..., None]).squeeze(-1)
        scores = torch.cat([near, far], dim=-1) * dim**-0.5
        weights = scores.masked_fill(hidden, float("-inf")).softmax(-1)  # a token sees itself: never all hidden
        near, far = weights.split([n_near, far.shape[-1]], dim=-1)
        out = near @ near_v + (far[..., None, :] @ far_v.reshape(shape)).squeeze(-2)
        return out.view(q.shape).to(q.dtype)


class Cache:
    """The caches of every layer application, in the order of application, for rows of the given lengths."""

    def __init__(self, config: ModelConfig, lengths: Sequence[int], angles: tuple[Tensor, Tensor]) -> None:
        """lengths: tokens of each row's prompt; angles: cos, sin [capacity, rotated / 2] on the device to use.

        Keys and values are allocated by `fill`. Raises UserError on an empty prompt, or one above the capacity.
        """
        if not lengths or min(lengths) < 1:
            raise UserError(f"prompts of {list(lengths)[:8]} tokens: every prompt needs at least one")
        self.cursor = Cursor(config, lengths, angles)
        if self.cursor.longest > self.cursor.capacity:
            raise UserError(f"a prompt of {max(lengths)} tokens does not fit into capacity={self.cursor.capacity}")
        self.layers = [LayerCache(config, self.cursor) for _ in range(config.n_layers)]
