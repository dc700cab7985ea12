"""AdamW and its learning rate: linear warm-up, then a cosine."""

from __future__ import annotations

import math

import torch
from torch import nn

from lshv2.config import TrainingConfig


def make_optimizer(model: nn.Module, settings: TrainingConfig, learning_rate: float) -> torch.optim.AdamW:
    """AdamW over the model's parameters, matrices decayed; fused on a GPU."""
    decayed = [p for p in model.parameters() if p.ndim >= 2]
    plain = [p for p in model.parameters() if p.ndim < 2]  # norms, shifts, temperatures, biases
    groups = [{"params": decayed, "weight_decay": settings.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    betas = (settings.adam_beta1, settings.adam_beta2)
    return torch.optim.AdamW(groups, lr=learning_rate, betas=betas, fused=decayed[0].is_cuda)


def scheduled(step: int, total_steps: int, peak: float, settings: TrainingConfig) -> float:
    """The learning rate of a step: `warmup_fraction` of them up to the peak, then down to `min_learning_rate_ratio`."""
    warm = max(1, round(settings.warmup_fraction * total_steps))
    if step < warm:
        return peak * (step + 1) / warm
    low = settings.min_learning_rate_ratio
    progress = (step - warm) / max(1, total_steps - warm)
    return peak * (low + (1 - low) * 0.5 * (1 + math.cos(math.pi * progress)))
