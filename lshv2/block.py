"""One transformer block: attention, then SwiGLU; and while training, what its backward computes again.

Bytes a token and application at the documented shape, bfloat16 autocast: its input is 3,072 (float32); q, k, v and the
output of attention 4,096, beside its tables. `True` keeps these, so that attention runs once; "block" keeps the input
alone; "feed_forward" keeps what comes before attention too; False keeps everything.
Legend: B batch, T tokens, d model width, H query heads, D head dim.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import silu
from torch.nn.utils import skip_init
from torch.utils.checkpoint import checkpoint

from lshv2.config import ModelConfig, Recompute
from lshv2.decoding import LayerCache
from lshv2.layers import Attention
from lshv2.profiling import region

Part = Callable[..., Any]
Parts = tuple[Part, Part, Part]  # Block.prepare, Attention.find, Block.finish
recomputed = partial(checkpoint, use_reentrant=False)  # its inputs alone are kept for the backward


class Block(nn.Module):
    """Pre-norm attention and SwiGLU feed-forward, each with its residual."""

    def __init__(self, config: ModelConfig, generator: torch.Generator) -> None:
        super().__init__()
        d = config.d_model
        self.attention_norm, self.ff_norm = nn.RMSNorm(d, eps=1e-6), nn.RMSNorm(d, eps=1e-6)
        self.attention = Attention(config, generator)
        self.gate = skip_init(nn.Linear, d, config.d_ff, bias=False)
        self.up = skip_init(nn.Linear, d, config.d_ff, bias=False)
        self.down = skip_init(nn.Linear, config.d_ff, d, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, cache: LayerCache | None = None) -> Tensor:
        """x [B,T,d] -> [B,T,d]; cache: see `Attention.cached`."""
        h = self.attention_norm(x)
        return self.feed_forward(
            x + (self.attention(h, cos, sin) if cache is None else self.attention.cached(h, cos, sin, cache))
        )

    def prepare(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """What comes before attention: x [B,T,d] -> q, k, v to weigh, q and k to find by (`Attention.find`)."""
        q, k, v = self.attention.project(self.attention_norm(x))
        placed = self.attention.place(q, k, cos, sin)
        by_q, by_k = self.attention.sought((q, k), placed)
        return *placed, v, by_q.detach(), by_k.detach()

    def finish(self, x: Tensor, attended: Tensor) -> Tensor:
        """What comes after attention: x [B,T,d] and `Attention.attend`'s [B,H,T,D] -> [B,T,d]."""
        return self.feed_forward(x + self.attention.out(attended.transpose(1, 2).flatten(2)))

    def feed_forward(self, x: Tensor) -> Tensor:
        """The second half, with its residual: x [.., d] -> [.., d]."""
        h = self.ff_norm(x)
        with region("feed_forward"):
            return x + self.down(swiglu(self.gate(h), self.up(h)))


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        d_gate = torch.ops.aten.silu_backward(grads[0] * up, gate)  # has no derivative: a second backward raises
        return d_gate, silu(gate).mul_(grads[0])


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) · up (Shazeer 2020), to the bit and with its gradients.

    silu(gate) is not kept for the backward: these are a training step's largest tensors, and a step's peak is there.
    """
    if torch.compiler.is_compiling():  # which sees to that itself
        return silu(gate) * up
    out: Tensor = _SwiGLU.apply(gate, up)
    return out


def compiled_parts(block: Block, backend: str) -> Parts:
    """What is around attention, through torch.compile: three graphs, the same ones for all blocks of a shape."""
    compiled = partial(torch.compile, dynamic=False, backend=backend)
    return compiled(block.prepare), compiled(block.attention.find), compiled(block.finish)


def train_block(
    block: Block, parts: Parts | None, again: Recompute, x: Tensor, added: Tensor | None, cos: Tensor, sin: Tensor
) -> Tensor:
    """`block(x + added, cos, sin)` while training, the same to rounding whatever is asked for.

    x [B,T,d], or a ponder step's state and added [d] its vector: what is computed again begins at x, which is kept
    anyway, and the sum is not. parts: see `compiled_parts`.
    """
    if not (again or parts):
        return block(_sum(x, added), cos, sin)  # as it is: an attention may have a forward of its own
    parts = parts or (block.prepare, block.attention.find, block.finish)
    if again == "block":
        return recomputed(_from_sum, partial(_in_parts, block, parts, False), x, added, cos, sin)
    if again is not True:  # what comes before attention keeps the sum
        x, added = _sum(x, added), None
    return _in_parts(block, parts, again, x, cos, sin, added)


def _in_parts(
    block: Block, parts: Parts, again: Recompute, x: Tensor, cos: Tensor, sin: Tensor, added: Tensor | None = None
) -> Tensor:
    """again: what is computed again around attention. Buckets are found once: they take no part in the gradient."""
    prepare, find, finish = parts
    q, k, v, *plain = recomputed(_from_sum, prepare, x, added, cos, sin) if again is True else prepare(x, cos, sin)
    attended = block.attention.attend(q, k, v, *find(*plain))
    return recomputed(_from_sum, finish, x, added, attended) if again else finish(x, attended)


def _from_sum(part: Part, x: Tensor, added: Tensor | None, *rest: Tensor) -> Any:
    return part(_sum(x, added), *rest)


def _sum(x: Tensor, added: Tensor | None) -> Tensor:
    return x if added is None else x + added
