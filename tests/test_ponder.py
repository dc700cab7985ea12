"""The halting distribution and the ponder loss against brute force."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from lshv2.ponder import (
    answer_weights,
    expected_steps,
    halting_log_probs,
    ponder_loss,
    ponder_share,
    truncated_geometric,
)


def path_probabilities(logits: list[float]) -> list[float]:
    """P(halting at step n), by walking every path of a token: halt here, or go on; at the last step it must halt."""
    def walk(n: int, reached: float) -> dict[int, float]:
        if n == len(logits) - 1:
            return {n: reached}
        halts = 1 / (1 + math.exp(-logits[n]))
        return {n: reached * halts, **walk(n + 1, reached * (1 - halts))}

    found = walk(0, 1.0)
    return [found[n] for n in range(len(logits))]


def loss_by_paths(ce: Tensor, logits: Tensor, scored: Tensor, prior: float, beta: float) -> float:
    """What `ponder_loss` is to be, in Python's floats: a token at a time, a path at a time."""
    go_on, geometric = 1.0, []
    for _ in range(len(logits)):  # P(step n | at most N): a coin of λ_p, whose longer runs are thrown away
        geometric.append(go_on * prior)
        go_on *= 1 - prior
    kept = sum(geometric)
    terms = []
    for b, t in scored.nonzero().tolist():
        p = path_probabilities(logits[:, b, t].tolist())
        expected = sum(p[n] * ce[n, b, t].item() for n in range(len(p)))
        divergence = sum(p[n] * math.log(p[n] / (geometric[n] / kept)) for n in range(len(p)))
        terms.append(expected + beta * divergence)
    return sum(terms) / len(terms)


def drawn(n: int) -> tuple[Tensor, Tensor, Tensor]:
    """Halting logits and cross entropies [n,2,4] in float64, and which tokens are scored."""
    g = torch.Generator().manual_seed(n)
    logits, ce = (torch.randn(n, 2, 4, generator=g, dtype=torch.float64) for _ in range(2))
    return 2 * logits, ce.abs(), torch.tensor([[False, True, True, False], [True, True, False, True]])


@pytest.mark.parametrize("n", [1, 2, 5])
def test_halting_distribution_is_that_of_the_paths(n: int) -> None:
    logits, _, _ = drawn(n)
    p = halting_log_probs(logits).exp()
    for b in range(2):
        for t in range(4):
            assert p[:, b, t].tolist() == pytest.approx(path_probabilities(logits[:, b, t].tolist()), abs=1e-12)
    assert (p.sum(0) - 1).abs().max() < 1e-12


@pytest.mark.parametrize("n", [1, 2, 5])
@pytest.mark.parametrize(("prior", "beta"), [(0.4, 0.0), (0.4, 0.2), (0.05, 3.0)])
def test_loss_and_gradients_are_those_of_the_paths(n: int, prior: float, beta: float) -> None:
    """The gradients against central differences of the brute force, which knows no autograd."""
    logits, ce, scored = drawn(n)
    leaves = logits.clone().requires_grad_(), ce.clone().requires_grad_()
    loss = ponder_loss(leaves[1], halting_log_probs(leaves[0]), scored, prior=prior, beta=beta)
    assert abs(loss.item() - loss_by_paths(ce, logits, scored, prior, beta)) < 1e-12
    grads = torch.autograd.grad(loss, leaves)
    step = 1e-5  # truncation about step², rounding about 1e-16 / step
    for x, grad in ((logits, grads[0]), (ce, grads[1])):
        for at in range(x.numel()):
            ends = []
            for sign in (1, -1):
                x.view(-1)[at] += sign * step
                ends.append(loss_by_paths(ce, logits, scored, prior, beta))
                x.view(-1)[at] -= sign * step
            assert abs(grad.flatten()[at].item() - (ends[0] - ends[1]) / (2 * step)) < 1e-9


def test_extreme_logits_stay_finite() -> None:
    log_p = halting_log_probs(torch.tensor([[[200.0, -200.0]], [[-200.0, 200.0]], [[0.0, 0.0]]]))
    assert log_p.exp().sum(0).sub(1).abs().max() < 1e-6 and log_p.isfinite().all()


def test_prior_is_truncated_and_renormalised() -> None:
    prior = truncated_geometric(4, 0.3)
    assert abs(prior.sum().item() - 1) < 1e-12
    assert torch.allclose(prior[1:] / prior[:-1], torch.full((3,), 0.7, dtype=torch.float64))


def test_divergence_is_zero_at_the_prior_and_nothing_scored_is_no_nan() -> None:
    prior = truncated_geometric(3, 0.25)
    log_p = prior.log()[:, None, None].expand(3, 1, 2)
    zero = torch.zeros(3, 1, 2, dtype=torch.float64)
    assert abs(ponder_loss(zero, log_p, torch.ones(1, 2, dtype=torch.bool), prior=0.25, beta=1.0).item()) < 1e-6
    assert ponder_loss(zero, log_p, torch.zeros(1, 2, dtype=torch.bool), prior=0.25, beta=1.0).item() == 0


def test_a_training_comes_to_the_ponder_loss_between_two_points() -> None:
    assert [ponder_share(x, 0.25, 0.75) for x in (0.0, 0.25, 0.5, 0.625, 0.75, 1.0)] == [0, 0, 0.5, 0.75, 1, 1]
    assert [ponder_share(x, 0.5, 0.5) for x in (0.0, 0.49, 0.5, 1.0)] == [0, 0, 1, 1], "at once"
    assert ponder_share(0.0, 0.0, 0.0) == 1, "from the start"
    log_p = torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64).log()[:, None, None]
    assert answer_weights(log_p, 0.5).flatten().tolist() == pytest.approx([0.1, 0.15, 0.75])


def test_expected_steps() -> None:
    log_p = torch.tensor([0.5, 0.25, 0.25]).log()[:, None, None]
    assert abs(expected_steps(log_p).item() - 1.75) < 1e-6
