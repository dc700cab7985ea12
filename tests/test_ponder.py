"""The halting distribution and the ponder loss against brute force."""

from __future__ import annotations

import math

import pytest
import torch

from lshv2.ponder import expected_steps, halting_log_probs, ponder_loss, truncated_geometric


@pytest.mark.parametrize("n", [1, 2, 5])
def test_halting_distribution_is_the_product_with_the_remainder_last(n: int) -> None:
    logits = torch.randn(n, 2, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    p = halting_log_probs(logits).exp()
    for b in range(2):
        for t in range(3):
            go_on = 1.0
            for step in range(n):
                lam = 1.0 if step == n - 1 else 1 / (1 + math.exp(-logits[step, b, t].item()))
                assert abs(p[step, b, t].item() - lam * go_on) < 1e-12
                go_on *= 1 - lam
    assert (p.sum(0) - 1).abs().max() < 1e-12


def test_extreme_logits_stay_finite() -> None:
    log_p = halting_log_probs(torch.tensor([[[200.0, -200.0]], [[-200.0, 200.0]], [[0.0, 0.0]]]))
    assert log_p.exp().sum(0).sub(1).abs().max() < 1e-6 and log_p.isfinite().all()


def test_prior_is_truncated_and_renormalised() -> None:
    prior = truncated_geometric(4, 0.3)
    assert abs(prior.sum().item() - 1) < 1e-6
    assert torch.allclose(prior[1:] / prior[:-1], torch.full((3,), 0.7))


def test_loss_against_brute_force() -> None:
    g = torch.Generator().manual_seed(1)
    logits, ce = torch.randn(3, 2, 4, generator=g), torch.rand(3, 2, 4, generator=g)
    scored = torch.tensor([[False, True, True, False], [True, True, False, True]])
    log_p = halting_log_probs(logits)
    got = ponder_loss(ce, log_p, scored, prior=0.4, beta=0.2).item()
    prior = [0.4, 0.24, 0.144]
    prior = [x / sum(prior) for x in prior]
    terms = []
    for b, t in scored.nonzero().tolist():
        p = log_p[:, b, t].exp().tolist()
        expected = sum(p[n] * ce[n, b, t].item() for n in range(3))
        divergence = sum(p[n] * math.log(p[n] / prior[n]) for n in range(3))  # KL(p ‖ prior), not the reverse
        terms.append(expected + 0.2 * divergence)
    assert abs(got - sum(terms) / len(terms)) < 1e-6


def test_divergence_is_zero_at_the_prior_and_nothing_scored_is_no_nan() -> None:
    prior = truncated_geometric(3, 0.25)
    log_p = prior.log()[:, None, None].expand(3, 1, 2)
    zero = torch.zeros(3, 1, 2)
    assert abs(ponder_loss(zero, log_p, torch.ones(1, 2, dtype=torch.bool), prior=0.25, beta=1.0).item()) < 1e-6
    assert ponder_loss(zero, log_p, torch.zeros(1, 2, dtype=torch.bool), prior=0.25, beta=1.0).item() == 0


def test_expected_steps() -> None:
    log_p = torch.tensor([0.5, 0.25, 0.25]).log()[:, None, None]
    assert abs(expected_steps(log_p).item() - 1.75) < 1e-6
