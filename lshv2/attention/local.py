"""The local window and the sinks, block by block: forward with log-sum-exp, and the recomputing backward.

Legend: N = B·K groups, G heads of a group, T tokens, Q query block, C = n_global + window - 1 + Q key columns.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

BLOCK = 64  # query block: the fastest of 64, 128 and 256 on a 2-core CPU


class LocalBlocks:
    """Views of q, k, v as overlapping blocks; one instance serves a forward or a backward."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, window: int, n_global: int) -> None:
        """q [N,G,T,D], k, v [N,T,D], all in the working dtype."""
        self.n, self.groups, self.length, self.dim = q.shape
        self.window, self.n_global = window, min(n_global, self.length)
        self.block = min(BLOCK, self.length)
        self.count = -(-self.length // self.block)
        self.reach = min(window, self.length) - 1  # keys before a block that its first query sees
        self.q, self.k, self.v = q, self._pad(k), self._pad(v)
        self.sink_k, self.sink_v = k[:, : self.n_global], v[:, : self.n_global]
        a = torch.arange(self.block, device=q.device)[:, None]
        c = torch.arange(self.reach + self.block, device=q.device)[None, :]
        self.band = (c < a) | (c > a + self.reach)  # True: hidden

    def _pad(self, x: Tensor) -> Tensor:
        return torch.nn.functional.pad(x, (0, 0, self.reach, self.count * self.block - self.length))

    def rows(self, x: Tensor, i: int) -> Tensor:
        """Block i of a per-query tensor [N,G,T,...] -> [N, G*Q', ...] with Q' <= Q in the last block."""
        return x[:, :, i * self.block : (i + 1) * self.block].flatten(1, 2)

    def columns(self, x: Tensor, sink: Tensor, i: int) -> Tensor:
        """Sinks, then the padded keys (or values) that block i can see: [N,C,D]."""
        own = x[:, i * self.block : i * self.block + self.reach + self.block]
        return torch.cat([sink, own], dim=1) if self.n_global else own

    def hidden(self, i: int) -> Tensor:
        """Mask of block i, True where hidden: [G*Q', C]."""
        t0 = i * self.block
        size = min(self.block, self.length - t0)
        band = self.band[:size]
        if t0 < self.reach:  # columns before the sequence's start
            band = band | (torch.arange(band.shape[1], device=band.device) < self.reach - t0)
        if self.n_global:
            t = torch.arange(t0, t0 + size, device=band.device)[:, None]
            sinks = torch.arange(self.n_global, device=band.device)[None, :]
            band = torch.cat([sinks > t - self.window, band], dim=1)
        return band.repeat(self.groups, 1)

    def scores(self, q: Tensor, keys: Tensor, i: int) -> Tensor:
        """Scaled, masked logits of block i: [N, G*Q', C]."""
        scores = torch.bmm(q, keys.transpose(1, 2)).mul_(self.dim**-0.5)
        return scores.masked_fill_(self.hidden(i), float("-inf"))

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.count))


def local_forward(q: Tensor, k: Tensor, v: Tensor, window: int, n_global: int) -> tuple[Tensor, Tensor]:
    """q [N,G,T,D], k, v [N,T,D] -> out [N,G,T,D], lse [N,G,T]; every query sees itself, so lse is finite."""
    blocks = LocalBlocks(q, k, v, window, n_global)
    out, lse = torch.empty_like(q), q.new_empty(q.shape[:3])
    for i in blocks:
        keys, values = blocks.columns(blocks.k, blocks.sink_k, i), blocks.columns(blocks.v, blocks.sink_v, i)
        scores = blocks.scores(blocks.rows(q, i), keys, i)
        peak = scores.amax(-1, keepdim=True)
        weights = scores.sub_(peak).exp_()
        total = weights.sum(-1, keepdim=True)
        piece = torch.bmm(weights, values).div_(total)
        where = slice(i * blocks.block, (i + 1) * blocks.block)
        out[:, :, where] = piece.unflatten(1, (blocks.groups, -1))
        lse[:, :, where] = (peak + total.log()).squeeze(-1).unflatten(1, (blocks.groups, -1))
    return out, lse


def local_backward(
    q: Tensor, k: Tensor, v: Tensor, window: int, n_global: int, grad: Tensor, lse: Tensor, delta: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the local part under the merged softmax: grad [N,G,T,D]; lse, delta [N,G,T] -> dq, dk, dv."""
    blocks = LocalBlocks(q, k, v, window, n_global)
    dq, dk, dv = torch.empty_like(q), torch.zeros_like(blocks.k), torch.zeros_like(blocks.v)
    dk_sink, dv_sink = torch.zeros_like(blocks.sink_k), torch.zeros_like(blocks.sink_v)
    sinks = blocks.n_global
    for i in blocks:
        keys, values = blocks.columns(blocks.k, blocks.sink_k, i), blocks.columns(blocks.v, blocks.sink_v, i)
        q_i, grad_i = blocks.rows(q, i), blocks.rows(grad, i)
        weights = blocks.scores(q_i, keys, i).sub_(blocks.rows(lse, i)[..., None]).exp_()
        dscores = torch.bmm(grad_i, values.transpose(1, 2)).sub_(blocks.rows(delta, i)[..., None])
        dscores.mul_(weights).mul_(blocks.dim**-0.5)
        where = slice(i * blocks.block, (i + 1) * blocks.block)
        dq[:, :, where] = torch.bmm(dscores, keys).unflatten(1, (blocks.groups, -1))
        own = slice(i * blocks.block, i * blocks.block + blocks.reach + blocks.block)
        dk_i, dv_i = torch.bmm(dscores.transpose(1, 2), q_i), torch.bmm(weights.transpose(1, 2), grad_i)
        dk[:, own] += dk_i[:, sinks:]
        dv[:, own] += dv_i[:, sinks:]
        dk_sink += dk_i[:, :sinks]
        dv_sink += dv_i[:, :sinks]
    inner = slice(blocks.reach, blocks.reach + blocks.length)
    dk, dv = dk[:, inner].clone(), dv[:, inner].clone()
    dk[:, :sinks] += dk_sink
    dv[:, :sinks] += dv_sink
    return dq, dk, dv
