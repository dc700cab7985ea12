"""Cross-entropy of a language-model head without ever storing all logits."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

IGNORE = -100  # a label that is not scored
CHUNK_ELEMENTS = 1 << 20  # logits alive at once: 4 MB in float32, so that no benchmark's memory is this buffer,
MIN_ROWS = 512  # or this many rows of them: smaller products waste the hardware


def _chunk(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return cross_entropy((hidden @ weight.T).float(), labels, ignore_index=IGNORE, reduction="none")


def token_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Nats of each token: hidden [M,d], weight [V,d], labels int64 [M] -> [M], zero where labels are IGNORE.

    Chunks of rows are recomputed in the backward, so memory is O(CHUNK_ELEMENTS + MIN_ROWS·V), not M·V.
    """
    rows = max(MIN_ROWS, CHUNK_ELEMENTS // weight.shape[0])
    if hidden.shape[0] <= rows:
        return _chunk(hidden, weight, labels)
    pieces = zip(hidden.split(rows), labels.split(rows), strict=True)
    return torch.cat([checkpoint(_chunk, h, weight, y, use_reentrant=False) for h, y in pieces])
