"""Who is timed: the LSH operator whole, torch's dense attention by backend, FlexAttention on window and sinks, and a
published LSH attention where it is installed.

Dense opponents get every advantage: the backend is chosen outside the timed region (`sdpa_kernel` toggles flags), and
where expanding keys and values to all query heads beforehand is faster than `enable_gqa`, or is the only way, they are
expanded outside too and the opponent owes no sum over the heads of a group. A contender that cannot run is
`Unusable`, with the reason in one line.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from lshv2.attention import lsh_attention
from lshv2.benchmark.attention_inputs import BUCKET_SIZE, N_GLOBAL, N_ROUNDS, WINDOW, Inputs
from lshv2.hashing import best_cells, bucket_ids
from lshv2.profiling import region

DENSE = {  # by name: torch's backend, and where it can run
    "sdpa_flash": (SDPBackend.FLASH_ATTENTION, "cuda"),
    "sdpa_cudnn": (SDPBackend.CUDNN_ATTENTION, "cuda"),
    "sdpa_efficient": (SDPBackend.EFFICIENT_ATTENTION, "cuda"),
    "sdpa": (None, "cpu"),  # torch's choice
}
FLEX_BLOCK = 128


class Unusable(Exception):
    """This opponent cannot run here; the message is one line."""


@dataclass(frozen=True)
class Contender:
    """forward() -> o; its backward goes to `inputs` from `grad`, and is left out where `inputs` is empty."""

    name: str
    forward: Callable[[], Tensor]
    inputs: tuple[Tensor, ...]
    grad: Tensor
    context: Callable[[], AbstractContextManager[Any]] = nullcontext
    note: str | None = None

    def backward(self, out: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(out, self.inputs, self.grad) if self.inputs else ()


def lsh(
    name: str, inputs: Inputs, ids: tuple[Tensor, Tensor] | None = None, inverted_file: bool = False
) -> Contender:
    """The whole operator from q, k, v: hashing, sorting, attention. With `ids` (q's, k's) hashing is left out.

    inverted_file: one table of cells, of which a query looks in its N_ROUNDS best, instead of N_ROUNDS tables.
    """
    q, k, v = inputs.q, inputs.k, inputs.v
    probes = min(N_ROUNDS, inputs.n_buckets)

    def forward() -> Tensor:
        if ids is None:
            with region("hashing"):
                if inverted_file:
                    found = best_cells(q, inputs.cells, probes), best_cells(k, inputs.cells, 1)
                else:
                    found = bucket_ids(q, inputs.tables), bucket_ids(k, inputs.tables)
        else:
            found = ids
        return lsh_attention(q, k, v, *found, n_buckets=inputs.n_buckets, bucket_size=BUCKET_SIZE, window=WINDOW,
                             n_global=N_GLOBAL)

    return Contender(name, forward, (q, k, v), inputs.grad)


def dense(name: str, inputs: Inputs, expand: bool) -> Contender:
    """SDPA of one backend, causal. expand: keys and values repeated to all heads beforehand."""
    q, k, v = inputs.q, inputs.k, inputs.v
    if expand:
        k, v = (x.detach().repeat_interleave(q.shape[1] // x.shape[1], dim=1).requires_grad_() for x in (k, v))
    backend = DENSE[name][0]
    return Contender(
        name, lambda: scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=not expand), (q, k, v),
        inputs.grad, nullcontext if backend is None else lambda: sdpa_kernel(backend),
        "keys and values expanded to all heads outside the timing" if expand else "enable_gqa",
    )


def flex_window(inputs: Inputs) -> Contender:
    """Compiled FlexAttention on window and sinks alone: what sparsity costs without finding. On a CPU forward only."""
    from torch.nn.attention.flex_attention import flex_attention

    torch._dynamo.reset()  # a compilation a length; its limit of recompilations is for models
    q, k, v = inputs.q, inputs.k, inputs.v
    trains = q.device.type == "cuda"
    if not trains:
        q, k, v = q.detach(), k.detach(), v.detach()
    mask = window_mask(q.shape[2], q.device)
    compiled = torch.compile(flex_attention, dynamic=False)
    return Contender("flex_window", lambda: compiled(q, k, v, block_mask=mask, enable_gqa=True),
                     (q, k, v) if trains else (), inputs.grad,
                     note="compiled, enable_gqa" + ("" if trains else "; torch has no backward for it on a CPU"))


def visible(q: Tensor, k: Tensor) -> Tensor:
    """Whether position q sees position k through window and sinks."""
    return (k <= q) & ((q - k < WINDOW) | (k < N_GLOBAL))


def window_mask(length: int, device: torch.device) -> Any:
    """FlexAttention's block mask from block numbers alone: `create_block_mask` passes over all T x T pairs."""
    from torch.nn.attention.flex_attention import BlockMask

    first = torch.arange(0, length, FLEX_BLOCK, device=device)
    last = first + FLEX_BLOCK - 1
    q_first, q_last = first[:, None], last[:, None]
    full = (last <= q_first) & (first > q_last - WINDOW)
    partial = (first <= q_last) & ((last > q_first - WINDOW) | (first < N_GLOBAL)) & ~full

    def ordered(blocks: Tensor) -> tuple[Tensor, Tensor]:
        """How many key blocks a row of queries has, and their numbers first."""
        order = blocks.byte().argsort(dim=-1, descending=True, stable=True)
        return blocks.sum(-1, dtype=torch.int32)[None, None], order.to(torch.int32)[None, None]

    return BlockMask.from_kv_blocks(
        *ordered(partial), *ordered(full), BLOCK_SIZE=FLEX_BLOCK, seq_lengths=(length, length),
        mask_mod=lambda b, h, q, k: visible(q, k),
    )


def peer(inputs: Inputs) -> Contender:
    """Reformer's LSH attention (Kitaev, Kaiser & Levskaya 2020) as published in reformer-pytorch, where installed.

    With its own defaults but the rounds and the mask: buckets of 64 and the one before, 4 · 128 keys a query. Queries
    are its keys too, and it knows no grouped heads: values are expanded outside the timing.
    """
    if find_spec("reformer_pytorch") is None:
        raise Unusable("not installed: pip install reformer-pytorch")
    from reformer_pytorch.reformer_pytorch import LSHAttention

    attention = LSHAttention(n_hashes=N_ROUNDS, causal=True).to(inputs.q.device)
    size = attention.bucket_size
    if inputs.q.shape[2] % (2 * size):
        raise Unusable(f"takes multiples of {2 * size} tokens only")
    shape = inputs.q.shape
    qk = inputs.q.detach().flatten(0, 1).requires_grad_()
    v = inputs.v.detach().repeat_interleave(shape[1] // inputs.v.shape[1], dim=1).flatten(0, 1).requires_grad_()
    return Contender(
        "peer", lambda: attention(qk, v)[0].view(shape), (qk, v), inputs.grad,
        note=f"queries are the keys; {N_ROUNDS} rounds of buckets of {size} and the one before, no window",
    )


def probe_dense(name: str, inputs: Inputs, time_both: Callable[[Contender], float]) -> tuple[bool, float]:
    """(whether to expand keys and values, milliseconds of forward + backward), the faster of both ways on `inputs`.

    Raises `Unusable` where neither runs.
    """
    best: tuple[float, bool] | None = None
    reasons: list[str] = []
    for expand in (False, True):
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            try:
                taken = time_both(dense(name, inputs, expand))
            except RuntimeError as error:
                reasons = [str(error), *(str(warning.message) for warning in said)]
                continue
        best = (taken, expand) if best is None else min(best, (taken, expand))
    if best is None:
        raise Unusable("; ".join(reason.splitlines()[0].split(" (Triggered")[0] for reason in reasons)[:300])
    return best[1], best[0]
