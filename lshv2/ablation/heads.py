"""Attention that the product does not offer, for the study alone: subclasses of the product's, and the models of them.

    model = build_model(settings, VARIANTS["centred_half"])

Legend: B batch, T tokens, H query heads, K key/value heads, D head dim, R rounds, n chosen queries.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lshv2.ablation.depth import BudgetModel
from lshv2.ablation.variants import Variant
from lshv2.attention.masked import interval_mask
from lshv2.config import ModelConfig, Settings
from lshv2.layers import Attention, rotary_angles
from lshv2.model import LSHModel
from lshv2.precision import full_precision
from lshv2.softmax import scaled


class CentredAttention(Attention):
    """Queries and keys are hashed after subtracting their running mean: one direction that all share finds nothing.

    The means [H,1,D] and [K,1,D] are model state: an exponential average over training steps (`codebook_decay`),
    frozen at evaluation, so that a bucket still depends on one token's vector alone.
    """

    def __init__(self, config: ModelConfig, generator: torch.Generator) -> None:
        super().__init__(config, generator)
        for name, heads in (("query", config.n_heads), ("key", config.n_kv_heads)):
            self.register_buffer(f"{name}_mean", torch.zeros(heads, 1, config.head_dim))
            self.register_buffer(f"{name}_now", torch.zeros(heads, 1, config.head_dim), persistent=False)

    def hash(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        centred = []
        for name, x in (("query", q), ("key", k)):
            if self.training:
                self.get_buffer(f"{name}_now").copy_(x.detach().float().mean((0, 2))[:, None])
            centred.append(x - self.get_buffer(f"{name}_mean").to(x.dtype))
        return super().hash(centred[0], centred[1])

    @torch.no_grad()
    def update_hash(self) -> None:
        super().update_hash()
        for name in ("query", "key"):
            self.get_buffer(f"{name}_mean").lerp_(self.get_buffer(f"{name}_now"), 1 - self.config.codebook_decay)


class TwoWayAttention(Attention):
    """Logits with the settings' positions inside the window, with `far` of them outside: a full T×T emulation."""

    far = 0.5

    def logits(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, at: Tensor) -> Tensor:
        """Unrotated q [B,H,T,D], k [B,K,T,D]; queries at positions `at` [n] -> [B,H,n,T], before any mask."""
        length, config = k.shape[2], self.config
        angles = rotary_angles(length, config.model_copy(update={"rotary_fraction": self.far}), q.device)
        near, far = (_products(self, q, k, c, s, at) for c, s in ((cos, sin), angles))
        distance = at[:, None] - torch.arange(length, device=q.device)
        return torch.where(distance < config.window, near, far)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        q, k, v = self.project(x)
        length, config = q.shape[2], self.config
        everywhere = torch.arange(length, device=x.device)
        if config.attention == "dense":
            visible = everywhere[:, None] >= everywhere
        else:
            visible = interval_mask(
                *self.hash(q, k), n_buckets=config.resolved_n_buckets, bucket_size=config.bucket_size,
                window=config.window, n_global=config.n_global, cu_seqlens=None,
            )
        logits = self.logits(q, k, cos, sin, everywhere)
        weights = logits.masked_fill(~visible, float("-inf")).softmax(-1).to(v.dtype)
        out = weights @ v.repeat_interleave(config.n_heads // config.n_kv_heads, 1)
        return self.out(out.transpose(1, 2).flatten(2))


def _products(attention: Attention, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, at: Tensor) -> Tensor:
    """Scaled q·k of rotated vectors in float32, as SDPA accumulates them: [B,H,n,T]."""
    config = attention.config
    q, k = attention.place(q, k, cos, sin)
    q, k = scaled(q, config)[:, :, at], k.repeat_interleave(config.n_heads // config.n_kv_heads, 1)
    with full_precision(q):
        return (q.float() @ k.float().transpose(-1, -2)) * config.head_dim**-0.5


def attention_logits(attention: Attention, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, at: Tensor) -> Tensor:
    """What `attention` would weigh all keys by: unrotated q [B,H,T,D], k [B,K,T,D], positions [n] -> [B,H,n,T]."""
    if isinstance(attention, TwoWayAttention):
        return attention.logits(q, k, cos, sin, at)
    return _products(attention, q, k, cos, sin, at)


def attentions(model: LSHModel) -> list[Attention]:
    """The attention of each distinct block."""
    return [module for module in model.modules() if isinstance(module, Attention)]


def build_model(settings: Settings, variant: Variant) -> LSHModel:
    """The model of these settings and seed with the variant's attention in every block."""
    model = (BudgetModel if variant.special == "budget" else LSHModel)(settings.model, settings.seed)
    classes = {"centred": CentredAttention, "two_way": TwoWayAttention}
    for block, plain in zip(model.blocks, attentions(model), strict=True):
        if variant.special == "no_shift":
            plain.shift.requires_grad_(False).zero_()
        elif variant.special in classes:
            special = classes[variant.special](settings.model, torch.Generator())
            special.load_state_dict(plain.state_dict(), strict=False)  # a centred one has means that start at zero
            if isinstance(special, TwoWayAttention):
                special.far = variant.far
            block.attention = special
    return model
