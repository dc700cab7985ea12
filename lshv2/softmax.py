"""How sharp dense attention is, by how many keys a query sees.

    q = scaled(q, config)      # before scaled_dot_product_attention
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lshv2.config import ModelConfig

SAME = 1024  # keys among which a query is as sharp as without


def scaled(q: Tensor, config: ModelConfig, before: Tensor | None = None) -> Tensor:
    """Queries q [B,H,T,D] by `config.softmax_scale`. before: how many tokens each row has before them, [B]; None: none.

    "log_length" is Scalable-Softmax (Nakanishi 2025, arXiv 2501.19399): e^z becomes n^(s z), n being the keys that a
    query sees, its own among them, and s the head's learned temperature over ln 1,024, so that both are one at 1,024
    keys. With "constant" the weight of one key among n falls as n grows; here logits that are 1 / s above the others'
    outweigh any number of them.
    """
    if config.softmax_scale == "constant":
        return q
    seen = torch.arange(1, q.shape[2] + 1, device=q.device)[:, None]
    if before is not None:
        seen = seen + before[:, None, None, None]
    return q * (seen.float().log() / math.log(SAME)).to(q.dtype)
