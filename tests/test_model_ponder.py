"""The model's adaptive depth: halting, and the loss over its steps."""

from __future__ import annotations

import math

import pytest
import torch
from model_cases import backend, ids, small
from torch.nn.functional import cross_entropy

from lshv2.layers import rotary_angles
from lshv2.model import LSHModel
from lshv2.ponder import halting_log_probs, ponder_loss

__all__ = ["backend"]  # of model_cases: every test here twice


@torch.no_grad()
def test_halting_takes_the_first_step_whose_cumulative_probability_reaches_the_threshold() -> None:
    model, x = small(n_layers=8).eval(), ids()
    for bias, expected in ((20.0, 1), (-20.0, 4)):
        model.halt.bias.fill_(bias)
        assert (model(x).ponder_steps == expected).all()
    model.halt.bias.fill_(-0.4)  # λ = .401: cumulative .401, .641
    assert (model(x).ponder_steps == 2).all()


@torch.no_grad()
def test_a_halted_token_answers_with_the_state_at_which_it_halted() -> None:
    """With every token halting at step one, depth does not matter; a lone token that halts early keeps its answer."""
    model, x = small(n_layers=8).eval(), ids()
    model.halt.bias.fill_(20.0)
    one = LSHModel(model.config.model_copy(update=dict(n_layers=2, use_ponder=True)))
    state = {k: (v[:1] if k == "step_embedding" else v) for k, v in model.state_dict().items()}
    one.load_state_dict(state)
    assert (model(x).logits - one.eval()(x).logits).abs().max() < 1e-6


@pytest.mark.parametrize("share", [1.0, 0.4, 0.0])
def test_the_ponder_loss_weighs_each_prediction_by_the_halting_of_the_token_that_makes_it(share: float) -> None:
    """Token by token in Python's floats: what is predicted at t answers to the halting probabilities of t alone, and
    the last step for what is not pondered yet."""
    model, x = small(n_layers=6).double(), ids(2, 12)
    model.ponder_share = share
    with torch.no_grad():
        model.halt.weight.normal_(0.0, 0.4, generator=torch.Generator().manual_seed(0))
        labels = x.clone()
        labels[:, ::3] = -100
        got = model(x, labels=labels).loss.item()
        state, steps = model.embedding(x), []
        for n in range(3):
            state = model.step_of_all(state, n, rotary_angles(12, model.config, x.device))
            steps.append((model.halt(model.norm(state)).squeeze(-1).sigmoid(), model.head(model.norm(state))))
    prior = [0.3 / (1 - 0.7**3) * 0.7**n for n in range(3)]
    terms = []
    for b, t in [(b, t) for b in range(2) for t in range(11) if labels[b, t + 1] != -100]:
        halts = [steps[n][0][b, t].item() for n in range(2)]
        p = [halts[0], (1 - halts[0]) * halts[1], (1 - halts[0]) * (1 - halts[1])]
        nats = [-steps[n][1][b, t].log_softmax(-1)[labels[b, t + 1]].item() for n in range(3)]
        answers = sum(p[n] * nats[n] for n in range(3)) * share + (1 - share) * nats[2]
        terms.append(answers + model.config.ponder_beta * sum(p[n] * math.log(p[n] / prior[n]) for n in range(3)))
    assert abs(got - sum(terms) / len(terms)) < 1e-6, "cross entropy is summed in float32"


def test_the_ponder_loss_s_gradients_are_those_of_all_logits_at_once() -> None:
    """The model weighs each exit's losses where its logits are; here they are all there, and weighed at the end."""
    model, x = small(n_layers=6).double(), ids(2, 12)
    torch.nn.init.normal_(model.halt.weight, 0.0, 0.4, generator=torch.Generator().manual_seed(0))
    labels = x.clone()
    labels[:, ::3] = -100
    state, halts, nats = model.embedding(x), [], []
    for n in range(3):
        state = model.step_of_all(state, n, rotary_angles(12, model.config, x.device))
        halts.append(model.halt(model.norm(state)).squeeze(-1))
        logits = model.head(model.norm(state))[:, :-1].flatten(0, 1)
        nats.append(cross_entropy(logits, labels[:, 1:].flatten(), reduction="none").view(2, 11))
    log_p = halting_log_probs(torch.stack(halts))[..., :-1]
    plain = ponder_loss(torch.stack(nats), log_p, labels[:, 1:] != -100, prior=0.3, beta=model.config.ponder_beta)
    ours, theirs = (
        torch.autograd.grad(loss, [*model.parameters()], allow_unused=True)
        for loss in (model(x, labels=labels).loss, plain)
    )
    for a, b in zip(ours, theirs, strict=True):
        assert a is b or (a - b).abs().max() < 1e-6, "the halting distribution is in float32"


def test_while_only_the_last_step_is_trained_it_answers() -> None:
    model, x = small().eval(), ids()
    torch.nn.init.constant_(model.halt.bias, 4.0)  # else all tokens halt at the first
    assert (model(x).ponder_steps == 1).all()
    model.ponder_share = 0.0
    assert (model(x).ponder_steps == model.config.n_ponder_steps).all()
    model.ponder_share = 0.01
    assert (model(x).ponder_steps == 1).all()


def test_the_ponder_gradient_reaches_the_halting_head() -> None:
    model, x = small(), ids()
    model(x, labels=x).loss.backward()
    assert model.halt.weight.grad.abs().max() > 0 and model.step_embedding.grad.abs().max() > 0
