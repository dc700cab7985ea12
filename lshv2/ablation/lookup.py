"""What limits sparse attention: do the visible keys hold those that dense attention would have weighed most?

For chosen queries of a trained model, from its own q and k over **all** past keys: the part of the softmax mass that
S(t) holds, the part that window and sinks alone hold, and how many of the 32 heaviest keys outside the window are in
S(t). A low figure blames the finding; a high one with a worse loss blames something else.
Legend: B batch, H query heads, K key/value heads, R rounds, T tokens, n chosen queries.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from lshv2.ablation.heads import attention_logits, attentions
from lshv2.layers import Attention
from lshv2.model import LSHModel

TOP = 32


def visible_rows(
    q_ids: Tensor, k_ids: Tensor, at: Tensor, *, bucket_size: int, window: int, n_global: int
) -> Tensor:
    """S(t) of the queries at positions `at` [n]: q_ids [B,H,R,T], k_ids [B,K,R,T] -> bool [B,H,n,T]."""
    position = torch.arange(k_ids.shape[-1], device=k_ids.device)
    past = position <= at[:, None]
    near = past & ((position > at[:, None] - window) | (position < n_global))
    keys = k_ids.repeat_interleave(q_ids.shape[1] // k_ids.shape[1], 1)
    match = (q_ids[..., at, None] == keys[..., None, :]) & past  # [B,H,R,n,T]
    newer = match.flip(-1).cumsum(-1, dtype=torch.int32).flip(-1)
    return near | (match & (newer <= bucket_size)).any(2)


def found(logits: Tensor, visible: Tensor, at: Tensor, window: int, top: int = TOP) -> dict[str, Tensor]:
    """logits float and visible bool [B,H,n,T], at [n] -> by query [B,H,n]: `mass` of the causal softmax on visible
    keys; `top_far`: part of the `top` heaviest keys outside the window that is visible (1 where there is none)."""
    position = torch.arange(logits.shape[-1], device=logits.device)
    weights = logits.masked_fill(position > at[:, None], float("-inf")).softmax(-1)
    outside = position <= at[:, None] - window
    far = logits.masked_fill(~outside, float("-inf"))
    values, where = far.topk(min(top, logits.shape[-1]), dim=-1)
    real = values > float("-inf")
    seen = (visible.gather(-1, where) & real).sum(-1)
    total = real.sum(-1)
    return {"mass": (weights * visible).sum(-1), "top_far": torch.where(total > 0, seen / total.clamp_min(1), 1.0)}


@torch.no_grad()
def measure_layers(
    model: LSHModel, samples: Iterable[tuple[Tensor, Tensor]], autocast: Callable[[], Any]
) -> list[dict[str, float]]:
    """For each layer `mass`, `local_mass` (window and sinks alone) and `top_far`: the mean over samples (input_ids
    [1,T], positions [n]), and `_low` and `_high`, the worst and the best head's mean. The model is left in `eval()`."""
    model.eval()
    caught: list[tuple[Attention, Any]] = []
    hooks = [
        attention.register_forward_pre_hook(lambda module, inputs: caught.append((module, inputs)))
        for attention in attentions(model)
    ]
    layers: list[dict[str, list[Tensor]]] = []
    try:
        for input_ids, at in samples:
            caught.clear()
            with autocast():
                model(input_ids)
                figures = [_layer(attention, x, cos, sin, at) for attention, (x, cos, sin) in caught]
            layers = layers or [{name: [] for name in one} for one in figures]
            for layer, one in zip(layers, figures, strict=True):
                for name, value in one.items():
                    layer[name].append(value.transpose(0, 1).flatten(1))  # [H, B·n]
    finally:
        for hook in hooks:
            hook.remove()
    rows = []
    for layer in layers:
        row: dict[str, float] = {}
        for name, values in layer.items():
            heads = torch.cat(values, 1).mean(1)
            row |= {name: heads.mean().item(), f"{name}_low": heads.min().item(), f"{name}_high": heads.max().item()}
        rows.append(row)
    return rows


def _layer(attention: Attention, x: Tensor, cos: Tensor, sin: Tensor, at: Tensor) -> dict[str, Tensor]:
    """x [B,T,d] that entered the attention -> figures [B,H,n]."""
    config = attention.config
    q, k, _ = attention.project(x)
    if config.attention == "lsh":
        q_ids, k_ids = attention.hash(*attention.sought((q, k), attention.place(q, k, cos, sin)))
    else:
        q_ids = torch.zeros(q.shape[0], config.n_heads, 0, q.shape[2], dtype=torch.int32, device=q.device)
        k_ids = q_ids[:, : config.n_kv_heads]
    logits = attention_logits(attention, q, k, cos, sin, at)
    pattern = {"window": config.window, "n_global": config.n_global}
    local = visible_rows(q_ids[:, :, :0], k_ids[:, :, :0], at, bucket_size=1, **pattern)
    visible = visible_rows(q_ids, k_ids, at, bucket_size=config.bucket_size, **pattern)
    return {**found(logits, visible, at, config.window), "local_mass": found(logits, local, at, config.window)["mass"]}
