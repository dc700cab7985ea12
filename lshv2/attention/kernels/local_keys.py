"""Backward kernel that owns consecutive keys: their window's share of dk and dv, and the sum of all shares.

`local_keys`: a program owns a tile of keys of one key head, walks the queries of its group whose window holds them,
adds the rounds' shares and what the sinks received, and stores dk and dv.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lshv2.attention.kernels.common import (
    LOG2_E,
    Packing,
    add_gradients,
    document_pointers,
    precision,
    tile_for,
    within,
)
from lshv2.launch import cdiv, launch


@triton.jit
def _local_keys(
    q, k, v, grad, lse, delta, dk_part, dv_part, sinks, dk, dv, documents, starts, scale, logit_scale,
    sqb, sqh, sqt, skb, skh, skt, svb, svh, svt, sgb, sgh, sgt, sxb, sxh, sxt, syb, syh, syt,
    T, n_kv, window, n_global, n_documents, stack,
    G: tl.constexpr, R: tl.constexpr, D: tl.constexpr, SINKS: tl.constexpr, DOCUMENTS: tl.constexpr, EVEN: tl.constexpr,
    PRECISION: tl.constexpr, OWN: tl.constexpr, OTHER: tl.constexpr,
):
    s0, g, b = tl.program_id(0) * OWN, tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    s = s0 + tl.arange(0, OWN)
    d = tl.arange(0, D)
    inside = s < T
    here, s64 = inside[:, None], s.to(tl.int64)[:, None]
    k_tile = tl.load(k + b * skb + g * skh + s64 * skt + d[None, :], mask=here, other=0.0)
    v_tile = tl.load(v + b * svb + g * svh + s64 * svt + d[None, :], mask=here, other=0.0)
    own, start = tl.zeros_like(s), tl.zeros_like(s)
    if DOCUMENTS:
        own = tl.load(documents + s, mask=inside, other=0)
        start = tl.load(starts + own)
    acc_k = tl.zeros([OWN, D], tl.float32)
    acc_v = tl.zeros([OWN, D], tl.float32)
    for i in range(G):
        h = g * G + i
        for j in range(s0, tl.minimum(s0 + OWN + window - 1, T), OTHER):
            t = j + tl.arange(0, OTHER)
            there, t64 = EVEN | (t < T), t.to(tl.int64)[:, None]
            q_tile = tl.load(q + b * sqb + h * sqh + t64 * sqt + d[None, :], mask=there[:, None], other=0.0)
            grad_tile = tl.load(grad + b * sgb + h * sgh + t64 * sgt + d[None, :], mask=there[:, None], other=0.0)
            row = (b * n_kv * G + h) * T + t
            seen = within(t[None, :] - s[:, None], window)
            if DOCUMENTS:
                seen &= own[:, None] == tl.load(documents + t, mask=there, other=-1)[None, :]
            acc_k, acc_v = add_gradients(
                k_tile, v_tile, q_tile, grad_tile, seen, tl.load(lse + row, mask=there, other=float("inf")),
                tl.load(delta + row, mask=there, other=0.0), acc_k, acc_v, logit_scale, PRECISION,
            )
    key = (b * n_kv + g) * T + s
    stack += key * 0  # 64 bits wide
    for r in tl.static_range(R):
        rows = (r * stack + key)[:, None] * D + d[None, :]
        acc_k += tl.load(dk_part + rows, mask=here, other=0.0).to(tl.float32)
        acc_v += tl.load(dv_part + rows, mask=here, other=0.0).to(tl.float32)
    acc_k *= scale
    if SINKS:
        number = s - start
        sink = here & (number < n_global)[:, None]
        share = ((b * n_kv + g) * n_documents + own) * n_global + number
        received = sinks + share[:, None] * 2 * D + d[None, :]
        acc_k += tl.load(received, mask=sink, other=0.0)
        acc_v += tl.load(received + D, mask=sink, other=0.0)
    tl.store(dk + b * sxb + g * sxh + s64 * sxt + d[None, :], acc_k.to(dk.dtype.element_ty), mask=here)
    tl.store(dv + b * syb + g * syh + s64 * syt + d[None, :], acc_v.to(dv.dtype.element_ty), mask=here)


def local_keys(
    q: Tensor, k: Tensor, v: Tensor, grad: Tensor, lse: Tensor, delta: Tensor, parts: tuple[Tensor, Tensor] | None,
    sinks: Tensor | None, packing: Packing | None, window: int,
) -> tuple[Tensor, Tensor]:
    """dk, dv [B,K,T,D]; parts from `far_keys`, sinks from `local_queries`."""
    batch, n_kv, length, dim = k.shape
    dk, dv = torch.empty_like(k), torch.empty_like(v)
    documents, n_global = (0, 0) if sinks is None else sinks.shape[2:4]
    tile = tile_for("local_keys", dim, k.dtype)
    launch(
        _local_keys, (cdiv(length, tile.own), n_kv, batch),
        (q, k, v, grad, lse, delta, *(parts or (k, k)), lse if sinks is None else sinks, dk, dv,
         *document_pointers(packing, lse)),
        (dim**-0.5, dim**-0.5 * LOG2_E, *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *grad.stride()[:3],
         *dk.stride()[:3], *dv.stride()[:3], length, n_kv, window, n_global, documents, batch * n_kv * length),
        G=q.shape[1] // n_kv, R=parts[0].shape[0] if parts else 0, D=dim, SINKS=sinks is not None,
        DOCUMENTS=packing is not None, EVEN=length % tile.other == 0, PRECISION=precision(k.dtype), **tile.options(),
    )
    return dk, dv
