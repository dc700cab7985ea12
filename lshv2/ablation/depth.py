"""Pondering on language, for the study alone: one training, asked at many thresholds; and a loss that is a lead.

    model = BudgetModel(settings.model, settings.seed)
    row = depth_figures(trainer, material)      # the study's columns of a `depth-N` job

A threshold is read when answering only, so a single training gives bits per byte over mean steps. Thresholds are not a
grid: near the prior all tokens' cumulative probabilities lie close together, and a grid would miss what is between two
steps. They are quantiles of those probabilities on *training* text, at which the mean steps are about `MEAN_STEPS`; the
held-out text decides nothing, it only says what they cost. Which of them is judged is decided on training text too.
Legend: N ponder steps, B batch, T tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from lshv2.ablation.material import Material, in_order
from lshv2.backbone import NEVER
from lshv2.evaluation import Batch, evaluate
from lshv2.layers import rotary_angles
from lshv2.model import LSHModel
from lshv2.ponder import expected_steps, halting_log_probs, prior_divergence
from lshv2.trainer import Trainer

MEAN_STEPS = (1.25, 1.5, 2.0, 2.5, 2.8, 2.9, 3.5)  # asked for; held-out text takes up to .1 more: below 3 of 4
LOOKED = 2.9  # where the steps are told apart by how hard a token is
CALIBRATION = 1 << 18  # tokens of training text
QUARTERS = 4
AT_ONCE = 1 << 15  # tokens of a batch


class BudgetModel(LSHModel):
    """The KL is that of the mean halting distribution of all scored tokens: which of them take the steps is free."""

    def _divergence(self, log_p: Tensor, scored: Tensor, count: Tensor) -> Tensor:
        mean = (log_p.exp() * scored).sum((1, 2), keepdim=True) / count
        return prior_divergence(mean.clamp_min(1e-12).log(), self.config.ponder_prior).squeeze()


def thresholds(cumulative: Tensor, wanted: Iterable[float]) -> list[float]:
    """Thresholds at which tokens take so many steps in the mean.

    cumulative [N − 1, tokens]: halting probability up to each step but the last.
    A token goes on past step n while its cumulative probability is below the threshold, so the mean is one plus
    Σ_n P(below): a quantile of all values together. In (0, 1], as `ModelConfig.ponder_threshold` has it.
    """
    ordered = cumulative.flatten().double().sort().values
    places = [min(len(ordered) - 1, round((mean - 1) / len(cumulative) * len(ordered))) for mean in wanted]
    return [min(1.0, max(1e-9, ordered[place].item())) for place in places]


@contextmanager
def halting_at(model: LSHModel, threshold: float) -> Iterator[None]:
    """The model with this `ponder_threshold` for a while."""
    before = model.config
    model.config = before.model_copy(update={"ponder_threshold": threshold})
    try:
        yield
    finally:
        model.config = before


@torch.no_grad()
def halting_probabilities(model: LSHModel, batches: Iterable[Batch], autocast: Callable[[], Any]) -> Tensor:
    """log p [N, tokens] of every token at full depth, where none has halted; the model is left in `eval()`."""
    model.eval()
    found = []
    for input_ids, _ in batches:
        with autocast():
            x, angles = model.embedding(input_ids), rotary_angles(input_ids.shape[1], model.config, input_ids.device)
            logits = []
            for n in range(model.config.n_ponder_steps):
                x = model.step_of_all(x, n, angles)
                logits.append(model._halt_logits(x))
        found.append(halting_log_probs(torch.stack(logits).float()).flatten(1))
    return torch.cat(found, 1)


@torch.no_grad()
def steps_by_loss(model: LSHModel, batches: Iterable[Batch], autocast: Callable[[], Any]) -> list[float]:
    """Mean steps of a quarter of the tokens each, by the nats that the byte after it costs: the easiest first.

    A model that spends its steps where they are needed rises.
    """
    model.eval()
    nats, steps = [], []
    for input_ids, labels in batches:
        with autocast():
            out = model(input_ids, labels=labels)
        assert out.cross_entropy is not None
        nats.append(out.cross_entropy[:, 1:].flatten())  # of labels[t], said at t − 1
        steps.append(out.ponder_steps[:, :-1].flatten())
    ordered = torch.cat(steps)[torch.cat(nats).argsort()]
    return [part.mean().item() for part in ordered.tensor_split(QUARTERS)]


def depth_figures(trainer: Trainer, material: Material) -> dict[str, Any]:
    """`curve` (a point a threshold), `halting` (the loss's other term, and how tokens differ), and `steps_by_loss`.

    The last point is full depth; a model without pondering has one point, its own depth. `train_bits_per_byte` are of
    the text that the thresholds come from.
    """
    model, length = trainer.model, trainer.settings.seq_length
    size = max(1, AT_ONCE // length)
    sample = list(islice(in_order(material.train, size), max(1, CALIBRATION // (size * length))))
    if not model.config.use_ponder:
        return {"curve": [_point(trainer, material, sample, NEVER)]}
    log_p = halting_probabilities(model, sample, trainer.autocast)
    chosen = dict(zip(MEAN_STEPS, thresholds(log_p.exp().cumsum(0)[:-1], MEAN_STEPS), strict=True))
    curve = [{"wanted": wanted, **_point(trainer, material, sample, at)} for wanted, at in chosen.items()]
    each = expected_steps(log_p[:, None])
    with halting_at(model, chosen[LOOKED]):
        by_loss = steps_by_loss(model, in_order(material.evaluations["1x"], size), trainer.autocast)
    return {
        "curve": [*curve, _point(trainer, material, sample, NEVER)],
        "halting": {
            "divergence": prior_divergence(log_p[:, None], model.config.ponder_prior).mean().item(),
            "expected_steps": each.mean().item(), "expected_steps_std": each.std().item(),
            "mean_p": log_p.exp().mean(1).tolist(),
        },
        "steps_by_loss": by_loss,
    }


def _point(trainer: Trainer, material: Material, sample: list[Batch], threshold: float) -> dict[str, Any]:
    size = len(sample[0][0])
    with halting_at(trainer.model, threshold):
        held_out, train = (
            evaluate(trainer.model, batches, trainer.autocast, material.token_bytes)
            for batches in (in_order(material.evaluations["1x"], size), sample)
        )
    return {
        "threshold": threshold, "ponder_steps": held_out.ponder_steps, "bits_per_byte": held_out.bits_per_byte,
        "halted_at": list(held_out.halted_at), "train_bits_per_byte": train.bits_per_byte,
    }
