"""Evaluation: held-out loss, bits per byte and accuracy. Training, the report and the package's check share this."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lshv2.losses import IGNORE
from lshv2.model import LSHModel
from lshv2.parallel.ranks import ALONE, Ranks

Batch = tuple[Tensor, Tensor]  # input_ids [B,T], labels [B,T]


@dataclass(frozen=True)
class Evaluation:
    """Means over scored tokens: `loss` in nats; `accuracy` of the most likely token; ponder steps a token.

    halted_at: the part of all tokens that halted at step 1, 2, .. of the model's; a model without pondering takes all.
    """

    loss: float
    accuracy: float
    ponder_steps: float
    tokens: int
    halted_at: tuple[float, ...]
    bits_per_byte: float | None = None


@torch.no_grad()
def evaluate(
    model: LSHModel,
    batches: Iterable[Batch],
    autocast: Callable[[], Any],
    token_bytes: Tensor | None = None,
    on_batch: Callable[[], None] = lambda: None,
    ranks: Ranks = ALONE,
) -> Evaluation:
    """Loss and accuracy of `model` in `eval()` (left in the mode it was found in).

    Several `ranks` each bring batches of their own, any number of them, and get the figures of all; each must call it.
    token_bytes [V]: bytes that each token stands for; with it bits per byte = Σ nats / ln 2 / Σ bytes of scored tokens.
    """
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    nats = hits = n_bytes = 0.0
    scored = 0
    halted = torch.zeros(model.config.n_ponder_steps, dtype=torch.int64)
    for input_ids, labels in batches:
        input_ids, labels = input_ids.to(device), labels.to(device)
        with autocast():
            out = model(input_ids, labels=labels)
        assert out.cross_entropy is not None
        where = labels[:, 1:] != IGNORE
        targets = labels[:, 1:][where]
        predicted = _most_likely(out.hidden[:, :-1][where], out.head)
        nats += out.cross_entropy.double().sum().item()
        hits += (predicted == targets).sum().item()
        scored += int(where.sum())
        halted += out.ponder_steps.long().flatten().cpu().bincount(minlength=len(halted) + 1)[1:]
        if token_bytes is not None:
            n_bytes += token_bytes.to(device)[targets].double().sum().item()
        on_batch()
    model.train(was_training)
    nats, hits, n_bytes, *counts = ranks.total([nats, hits, n_bytes, scored, *halted.tolist()])
    scored, *halted_at = map(int, counts)
    per_byte = nats / math.log(2) / n_bytes if n_bytes else None
    seen, steps = sum(halted_at), sum(n * count for n, count in enumerate(halted_at, 1))
    shares = tuple(count / max(seen, 1) for count in halted_at)
    return Evaluation(nats / max(scored, 1), hits / max(scored, 1), steps / max(seen, 1), scored, shares, per_byte)


def _most_likely(hidden: Tensor, head: Tensor, rows: int = 4096) -> Tensor:
    """argmax over the vocabulary, some rows at a time: [M,d], [V,d] -> [M]."""
    return torch.cat([(h @ head.to(h.dtype).T).argmax(-1) for h in hidden.split(rows)])
