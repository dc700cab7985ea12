"""What the processes that share a sequence tell each other, differentiably. Each holds T/S tokens, in order.

Attention needs all tokens of a head: `tokens_to_heads` trades tokens for heads before it, `heads_to_tokens` back
after it (all-to-all: DeepSpeed-Ulysses, Jacobs et al. 2023). A process sends and receives (S − 1)/S of what it holds,
whatever the number of processes; forward, backward and a recomputed forward alike. torch.compile's graphs end here
and begin again behind it.

Legend: S processes, B batch, N rows (heads, or heads x rounds), T tokens of the sequence, t = T/S.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

Group = dist.ProcessGroup


def _swap(x: Tensor, group: Group) -> Tensor:
    received = torch.empty_like(x)
    dist.all_to_all_single(received, x, group=group)
    return received


class _Swap(torch.autograd.Function):
    """x [S, ..]: part i goes to process i, and what it had for this one takes its place. Its own transpose."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return _swap(x, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _swap(grads[0].contiguous(), ctx.group), None


@torch.compiler.disable
def tokens_to_heads(xs: Sequence[Tensor], group: Group) -> list[Tensor]:
    """Each [B,N,t,..] -> [B,N/S,T,..] of this process's rows, in one exchange; one dtype and one trailing shape."""
    size = group.size()
    parts = [x.unflatten(1, (size, -1)).movedim(1, 0) for x in xs]  # [S,B,N/S,t,..]
    received = _Swap.apply(torch.cat(parts, dim=2).contiguous(), group)
    return [x.movedim(0, 2).flatten(2, 3) for x in received.split([part.shape[2] for part in parts], dim=2)]


@torch.compiler.disable
def heads_to_tokens(x: Tensor, group: Group) -> Tensor:
    """[B,N/S,T,..] -> [B,N,t,..]: undoes `tokens_to_heads`."""
    parts = x.unflatten(2, (group.size(), -1)).movedim(2, 0).contiguous()  # [S,B,N/S,t,..]
    return _Swap.apply(parts, group).movedim(0, 1).flatten(1, 2)


class _FromPrevious(torch.autograd.Function):
    """x -> the x of the process before; zeros in the first. The gradient goes back there.

    Gathered from all: some kilobytes, and every backend does it the same way.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        everyone = _gather(x, group)
        return everyone[group.rank() - 1] if group.rank() else torch.zeros_like(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        everyone, after = _gather(grads[0], ctx.group), ctx.group.rank() + 1
        return (everyone[after] if after < len(everyone) else torch.zeros_like(grads[0])), None


def _gather(x: Tensor, group: Group) -> list[Tensor]:
    everyone = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(group.size())]
    dist.all_gather(everyone, x.contiguous(), group=group)
    return everyone


@torch.compiler.disable
def from_previous(x: Tensor, group: Group) -> Tensor:
    """x [..] of each process -> the x of the process before it; zeros in the first."""
    return _FromPrevious.apply(x, group)
