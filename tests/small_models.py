"""Untrained models in float64 and tokens for them, small enough to decode a hundred tokens in a second."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lshv2.config import ModelConfig
from lshv2.model import LSHModel

VOCAB = 61
SMALL: dict[str, Any] = dict(
    vocab_size=VOCAB, d_model=32, n_layers=4, n_heads=4, n_kv_heads=2, max_seq_len=256, bucket_size=8,
    weight_tied_layers=2, d_ff=48, n_rounds=3, window=8, n_global=2, n_buckets=4, use_ponder=False,
)
PONDER = dict(use_ponder=True, n_layers=6, ponder_threshold=0.5)


def small(seed: int = 0, **changes: Any) -> LSHModel:
    """An untrained model in float64 whose tokens halt at different steps, where it ponders, and whose cells' means are
    of different lengths, where they are asked."""
    model = LSHModel(ModelConfig(**{**SMALL, **changes}), seed=seed).eval().double()
    if model.config.use_ponder:
        g = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            model.halt.weight.normal_(0.0, 0.4, generator=g)
            model.step_embedding.normal_(0.0, 0.2, generator=g)
    if model.config.centroids == "mean":
        g = torch.Generator().manual_seed(seed)
        for block in model.blocks:
            for table in block.attention.tables:
                table *= torch.rand(table.shape[:-1], generator=g, dtype=table.dtype)[..., None] * 4
    return model


def ids(batch: int = 2, length: int = 150, seed: int = 0) -> Tensor:
    return torch.randint(0, VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))
