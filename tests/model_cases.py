"""A small untrained model for its tests, the tokens for it, and both backends that short inputs are attended by."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lshv2.config import ModelConfig
from lshv2.model import LSHModel

SMALL: dict[str, Any] = dict(
    vocab_size=61, d_model=32, n_layers=4, n_heads=4, n_kv_heads=2, max_seq_len=256, bucket_size=8,
    weight_tied_layers=2, d_ff=48, n_rounds=2, window=8, n_global=2, n_buckets=8,
)


@pytest.fixture(params=["masked", "torch"], autouse=True)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Every test here twice: these short inputs would else never meet the backend that long ones get."""
    monkeypatch.setattr("lshv2.attention.MASKED_UP_TO", {"masked": 10**9, "torch": 0}[request.param])
    return request.param


def ids(batch: int = 2, length: int = 100, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 61, (batch, length), generator=torch.Generator().manual_seed(seed))


def small(seed: int = 0, **changes: Any) -> LSHModel:
    return LSHModel(ModelConfig(**{**SMALL, **changes}), seed=seed)
