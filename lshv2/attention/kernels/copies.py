"""Several tensors copied in one launch: what a recorded call reads and returns moves twice, and its host time counts.

`torch._foreach_copy_` launches once a dtype and gives each block 65,536 numbers, too few blocks for a GPU at these
sizes: counted, 19 µs a launch at 8,192 tokens, nine launches a step.
"""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from lshv2.launch import cdiv, launch

SLOTS = 8  # tensors a launch
BLOCK = 4096  # numbers a program


@triton.jit
def _slot(source, target, n, block, BLOCK: tl.constexpr):
    """Copy numbers block · BLOCK … of n, if this is one of the slot's blocks; the block's number in the next slot."""
    blocks = tl.cdiv(n, BLOCK)
    if (block >= 0) & (block < blocks):
        at = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        tl.store(target + at, tl.load(source + at, mask=at < n), mask=at < n)
    return block - blocks


@triton.jit
def _copy(
    s0, s1, s2, s3, s4, s5, s6, s7, t0, t1, t2, t3, t4, t5, t6, t7, n0, n1, n2, n3, n4, n5, n6, n7,
    BLOCK: tl.constexpr,
):
    block = tl.program_id(0)
    block = _slot(s0, t0, n0, block, BLOCK)
    block = _slot(s1, t1, n1, block, BLOCK)
    block = _slot(s2, t2, n2, block, BLOCK)
    block = _slot(s3, t3, n3, block, BLOCK)
    block = _slot(s4, t4, n4, block, BLOCK)
    block = _slot(s5, t5, n5, block, BLOCK)
    block = _slot(s6, t6, n6, block, BLOCK)
    _slot(s7, t7, n7, block, BLOCK)


def copy_all(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    """Each of `sources` into the target of its shape and dtype; targets are dense (`torch.empty_like`)."""
    flat = []
    for target, source in zip(targets, sources, strict=True):
        if source.stride() != target.stride():  # a source with gaps, or expanded
            target.copy_(source)
        elif source.numel():
            flat.append((source, target, source.numel()))
    for first in range(0, len(flat), SLOTS):
        part = flat[first : first + SLOTS]
        blocks = sum(cdiv(n, BLOCK) for _, _, n in part)
        part += [(*part[0][:2], 0)] * (SLOTS - len(part))
        s, t, n = zip(*part, strict=True)
        launch(_copy, (blocks, 1, 1), (*s, *t), n, BLOCK=BLOCK)
