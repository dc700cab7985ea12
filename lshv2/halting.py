"""Pondering outside training: which tokens halt after a step, and the next steps without them.

`LSHModel` calls `answer`; `lshv2.ponder` has the distribution that training learns.

A token halts at the first step whose cumulative halting probability reaches `ponder_threshold`, or, given a generator,
by a draw from its own λ_n, so that its number of steps follows p. It answers with the state that it has then, and that
is what later tokens see of it: once more, in the step after, each block makes key, value and bucket ids of that state,
and keeps them from there on: it adds no step embedding, its state is the same for every block, and its key, which
mixes in the token before, takes what that token shows the block in the same step. (Left as they were at its last step,
which is free, they cost up to 0.7 % more bits per byte: CONTRIBUTING.) Nothing else is computed for it: queries,
attention's output and feed-forward take the tokens that go on, packed together (`Packed`). The operator has no ragged
form: it takes a query a token, zeros for the halted ones. Decoding a token at a time has nothing to pack and must not
wait for the device: `Held` computes all rows and keeps the halted ones' values. Both are the same function.

Left out on purpose: sampled halting while decoding, whose draws a CUDA graph could not take from a generator of the
host's; skipping steps there.
Legend: B batch, T tokens, N = B·T of them, M that go on, L that halted at the step before, d model width, D head dim.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lshv2.block import Block
from lshv2.decoding import Cache, LayerCache
from lshv2.layers import tokens_before


@dataclass(frozen=True)
class Shown:
    """What a block was last shown of every token: its normalised input, and what others find and attend to."""

    h: Tensor  # [1,N,d]
    k: Tensor  # [1,K,N,D], with positions
    v: Tensor  # [1,K,N,D]
    q_ids: Tensor  # [1,H,R,N]
    k_ids: Tensor  # [1,K,R or 1,N]


class Packed:
    """The tokens that go on, then those that have just halted, by index; the host waits for their numbers."""

    def __init__(self, going: Tensor, halted: Tensor) -> None:
        """Both bool [N]: who takes this step; who took the last one and does not take this one."""
        self.going = going.nonzero().squeeze(1)
        self.shown = torch.cat([self.going, halted.nonzero().squeeze(1)])
        self.asking, self.showing = len(self.going), len(self.shown)
        self.all = self.asking == len(going)

    def take(self, x: Tensor, rows: Tensor) -> Tensor:
        """x [N, ..] -> its rows `going` or `shown`."""
        return x if self.all else x.index_select(0, rows)

    def put(self, x: Tensor, new: Tensor, rows: Tensor, axis: int) -> Tensor:
        """x, which has N along the axis, with new ones in the place of its rows `going` or `shown`."""
        return new if self.all else x.index_copy(axis, rows, new)

    def update(self, y: Tensor, new: Tensor) -> Tensor:
        """States y [M + L,d] with new ones [M,d] of those that go on."""
        return torch.cat([new, y[self.asking :]])


class Held:
    """All tokens, of which those that halted keep what they had: `Packed` where no shape may depend on data."""

    def __init__(self, going: Tensor, halted: Tensor) -> None:
        self.going, self.shown = going, going | halted
        self.asking = self.showing = len(going)

    def take(self, x: Tensor, rows: Tensor) -> Tensor:
        return x

    def put(self, x: Tensor, new: Tensor, rows: Tensor, axis: int) -> Tensor:
        return torch.where(rows.view(-1, *[1] * (x.ndim - axis - 1)), new, x)

    def update(self, y: Tensor, new: Tensor) -> Tensor:
        return self.put(y, new, self.going, 0)


def answer(
    blocks: Sequence[Block], step_embedding: Tensor, halt: Callable[[Tensor], Tensor], x: Tensor,
    angles: tuple[Tensor, Tensor], *, threshold: float, cache: Cache | None = None,
    draw: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """States [B,T,d] that answer, and the steps [B,T] float that they took, from embedded tokens x [B,T,d].

    step_embedding [steps, d]; halt: states [.., d] -> logits of λ [..]; angles: cos, sin [T, rotated / 2], or
    [B,1,1,rotated / 2] of one new token a row; threshold: see `ModelConfig.ponder_threshold`; cache: filled when empty,
    else gone on from; draw: sample halting with it, one number a token and step, made on the generator's device.
    """
    batch, length, _ = x.shape
    x = x.flatten(0, 1)
    cos, sin = (a.expand(batch, *a.shape).flatten(0, 1) if a.ndim == 2 else a.flatten(0, 2) for a in angles)
    decoding = cache is not None and cache.layers[0].previous is not None
    shown: list[Shown | None] = [None] * len(blocks)
    going = torch.ones(len(x), dtype=torch.bool, device=x.device)
    halted = torch.zeros_like(going)
    go_on = torch.ones(len(x), device=x.device)  # Π (1 − λ): 1 − go_on is the cumulative p
    steps = torch.zeros_like(go_on)
    for n, embedding in enumerate(step_embedding):
        rows = Held(going, halted) if decoding else Packed(going, halted)
        if not rows.asking and cache is None:
            break
        y = rows.take(x, rows.shown)
        y = rows.update(y, y[: rows.asking] + embedding.to(x.dtype))
        for i, block in enumerate(blocks):
            layer = cache.layers[n * len(blocks) + i] if cache else None
            y, shown[i] = _apply(block, y, shown[i], rows, (cos, sin), batch, layer)
        x = rows.put(x, y[: rows.asking], rows.going, 0)
        steps = steps + going
        if n + 1 == len(step_embedding):
            break
        chance = rows.put(torch.zeros_like(go_on), halt(y[: rows.asking]).sigmoid(), rows.going, 0)
        if draw is None:
            go_on = go_on * (1 - chance)
            stay = 1 - go_on < threshold
        else:
            stay = torch.rand(len(x), generator=draw, device=draw.device).to(x.device) >= chance
        going, halted = going & stay, going & ~stay
    return x.unflatten(0, (batch, length)), steps.view(batch, length)


def _apply(
    block: Block, y: Tensor, shown: Shown | None, rows: Packed | Held, angles: tuple[Tensor, Tensor], batch: int,
    layer: LayerCache | None,
) -> tuple[Tensor, Shown]:
    """One block for states y [M + L,d]: with new states of those that go on, and what it has been shown of all by now.

    shown: None at the first step, which all tokens take.
    """
    attention, asking = block.attention, rows.asking
    decoding = layer is not None and layer.previous is not None
    q = None
    if rows.showing:
        h = block.attention_norm(y)[None]
        seen = rows.put(shown.h, h, rows.shown, 1) if shown else h
        reach = attention.config.tokens_before
        if layer is not None and layer.previous is not None:
            before = tokens_before(_by_row(h, 1, batch), reach, layer.previous)
        else:
            before = tokens_before(_by_row(seen, 1, batch), reach)
        before = [rows.take(x.flatten(0, 1), rows.shown)[None] for x in before]
        cos, sin = (rows.take(a, rows.shown) for a in angles)
        q, k, v, q_ids, k_ids = attention.prepare(h, cos, sin, before, asking)
        if shown:
            q = rows.put(q.new_zeros(1, q.shape[1], seen.shape[1], q.shape[3]), q, rows.going, 2)
            q_ids = rows.put(shown.q_ids, q_ids, rows.going, 3)
            k, v = rows.put(shown.k, k, rows.shown, 2), rows.put(shown.v, v, rows.shown, 2)
            k_ids = rows.put(shown.k_ids, k_ids, rows.shown, 3)
        shown = Shown(seen, k, v, q_ids, k_ids)
    assert shown is not None, "every token takes the first step"
    h, k, v = _by_row(shown.h, 1, batch), _by_row(shown.k, 2, batch), _by_row(shown.v, 2, batch)
    q_ids, k_ids = _by_row(shown.q_ids, 3, batch), _by_row(shown.k_ids, 3, batch)
    if layer is not None and not decoding:
        layer.fill(h, k, v, k_ids)
    if not asking:
        return y, shown
    assert q is not None, "who goes on is shown"
    q = _by_row(q, 2, batch)
    out = layer.attend(h, q, k, v, q_ids, k_ids) if layer and decoding else attention.attend(q, k, v, q_ids, k_ids)
    out = rows.take(out.transpose(1, 2).flatten(2).flatten(0, 1), rows.going)
    return rows.update(y, block.feed_forward(y[:asking] + attention.out(out))), shown


def _by_row(x: Tensor, axis: int, batch: int) -> Tensor:
    """[1, .., B·T, ..] with B·T at the axis -> [B, .., T, ..]."""
    return x.unflatten(axis, (batch, -1)).transpose(0, axis).squeeze(axis)
