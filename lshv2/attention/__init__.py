"""LSH attention: one operator, one dispatch point, one oracle.

    out = lsh_attention(q, k, v, q_buckets, k_buckets, n_buckets=1024, bucket_size=128, window=256, n_global=4)

Query token t sees each key s in  S(t) = Local(t) ∪ Global(t) ∪ Bucket_1(t) ∪ … ∪ Bucket_R(t):
    Local(t)    = the `window` most recent tokens, t included
    Global(t)   = the first `n_global` tokens of the document, as far as they are past
    Bucket_r(t) = the `bucket_size` most recent keys s <= t with k_buckets[r, s] == q_buckets[r, t]
and out(t) is one softmax over that union of q·k/√D: a key counts once, however many rounds found it.
With k_buckets of one round there is one table, in which every query looks into R buckets, k_buckets[0] standing for
each k_buckets[r]: an inverted file with multi-probe (Jégou et al. 2011, Lv et al. 2007). Its buckets are disjoint, so
that different probes find nothing twice and keys are sorted once: the faster form.
Output at t depends on tokens <= t only. Memory is linear in T. Bucket ids come from `lshv2.hashing`, or anywhere.

Backends: "reference" (dense mask from the definition, the oracle), "triton" (GPU kernels, linear memory), "torch"
(sorted tiles, linear memory, any device), "masked" (SDPA with a mask: quadratic, for short inputs).
`backend=None` chooses, here alone.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lshv2.attention.masked import lsh_attention_masked
from lshv2.attention.reference import lsh_attention_reference, visible_set
from lshv2.attention.tiled import lsh_attention_tiled
from lshv2.hashing import has_triton

__all__ = ["BACKENDS", "lsh_attention", "runs_here", "visible_set"]

KERNEL_DIMS = (16, 32, 64, 128)  # head dims of the kernels: what a matrix product takes to what registers hold
KERNEL_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def _triton(*tensors: Tensor, **sizes: Any) -> Tensor:
    from lshv2.attention.kernels import lsh_attention_triton  # imports triton, which a CPU installation lacks

    return lsh_attention_triton(*tensors, **sizes)


BACKENDS = {
    "reference": lsh_attention_reference, "triton": _triton, "torch": lsh_attention_tiled,
    "masked": lsh_attention_masked,
}

MASKED_UP_TO = 256  # tokens, without the kernels: those are faster from 128 tokens on
MASK_ELEMENTS = 1 << 28  # and no mask above 256 MB


def lsh_attention(
    q: Tensor, k: Tensor, v: Tensor, q_buckets: Tensor, k_buckets: Tensor, *, n_buckets: int, bucket_size: int,
    window: int, n_global: int = 0, cu_seqlens: Tensor | None = None, backend: str | None = None,
) -> Tensor:
    """Attention over S(t), differentiable in q, k and v.

    q [B,H,T,D]; k, v [B,K,T,D] with H a multiple of K; q_buckets [B,H,R,T], k_buckets [B,K,R,T], or for one table
    [B,K,1,T], integers in [0, n_buckets); cu_seqlens [documents + 1] ascending from 0 to T: no token sees another
    document. A key counts once, even if a query names its bucket twice.
    Returns [B,H,T,D] in q's dtype. Raises ValueError on shapes that do not fit or an unknown backend.
    """
    _check(q, k, v, q_buckets, k_buckets, n_buckets, bucket_size, window, n_global)
    if cu_seqlens is not None:
        _check_documents(cu_seqlens, q.shape[2])
    name = backend or choose_backend(q)
    if name not in BACKENDS:
        raise ValueError(f"backend={name!r} is unknown; allowed: {', '.join(BACKENDS)}")
    return BACKENDS[name](
        q, k, v, q_buckets, k_buckets, n_buckets=n_buckets, bucket_size=bucket_size, window=window, n_global=n_global,
        cu_seqlens=cu_seqlens,
    )


def choose_backend(q: Tensor) -> str:
    """The fastest backend measured: kernels; without them, up to a few hundred tokens a mask beats sorting."""
    if runs_here("triton", q):
        return "triton"
    batch, n_heads, length, _ = q.shape
    short = length <= MASKED_UP_TO and batch * n_heads * length**2 <= MASK_ELEMENTS
    return "masked" if short else "torch"


def runs_here(backend: str, q: Tensor) -> bool:
    """Whether a backend takes the device, dtype and head dim of q [B,H,T,D]."""
    if backend != "triton":
        return True
    return q.is_cuda and has_triton() and q.dtype in KERNEL_DTYPES and q.shape[-1] in KERNEL_DIMS


def _check_documents(cu_seqlens: Tensor, length: int) -> None:
    if cu_seqlens.ndim != 1 or len(cu_seqlens) < 2:
        raise ValueError(f"cu_seqlens {tuple(cu_seqlens.shape)} is not [documents + 1]")
    if cu_seqlens.is_cuda:  # its values are trusted: reading them would make the host wait for the device
        return
    bounds = cu_seqlens.tolist()
    if bounds != sorted(bounds) or bounds[0] != 0 or bounds[-1] != length:
        raise ValueError(f"cu_seqlens {str(bounds)[:100]} does not ascend from 0 to T = {length}")


def _check(
    q: Tensor, k: Tensor, v: Tensor, q_buckets: Tensor, k_buckets: Tensor, n_buckets: int, bucket_size: int,
    window: int, n_global: int,
) -> None:
    batch, n_heads, length, dim = q.shape
    if k.shape != v.shape or k.shape[0] != batch or k.shape[2:] != (length, dim) or n_heads % k.shape[1]:
        raise ValueError(f"q {tuple(q.shape)}, k {tuple(k.shape)} and v {tuple(v.shape)} are not [B,H,T,D], [B,K,T,D]")
    rounds = q_buckets.shape[2]
    if q_buckets.shape != (batch, n_heads, rounds, length):
        raise ValueError(f"q_buckets {tuple(q_buckets.shape)} is not [B,H,R,T] = {(batch, n_heads, rounds, length)}")
    table = (batch, k.shape[1], rounds, length)
    if k_buckets.shape not in (table, (*table[:2], min(1, rounds), length)):
        raise ValueError(f"k_buckets {tuple(k_buckets.shape)} is neither [B,K,R,T] = {table} nor, one table, [B,K,1,T]")
    for name, ids in (("q_buckets", q_buckets), ("k_buckets", k_buckets)):
        if ids.is_floating_point() or ids.dtype == torch.bool:
            raise ValueError(f"{name} must be integers, got {ids.dtype}")
    if min(n_buckets, bucket_size, window) < 1 or n_global < 0:
        raise ValueError(f"{n_buckets=}, {bucket_size=} and {window=} must be at least 1, {n_global=} at least 0")
