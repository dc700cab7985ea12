"""PonderNet's halting distribution and loss (Banino, Balaguer & Blundell 2021), one value per token.

After ponder step n a head gives the halting probability λ_n, conditional on not having halted before:

    p_n = λ_n Π_{j<n} (1 − λ_j),  the remainder going to the last step N (a network that has run out must answer)
    loss = Σ_n p_n · CE_n  +  β · KL(p ‖ Geometric(λ_p) truncated at N and renormalised)

both per token. A training may begin at full depth and come to this loss later: of a share s of it

    loss = Σ_n (s · p_n + (1 − s) · [n = N]) · CE_n  +  β · KL

Training runs every token through all N steps, each seeing the others' states of the same step; outside
training a token halts, and what the others then see of it is defined in `lshv2.halting`. The direction of the KL and
the renormalised prior matter: reversed or unnormalised forms have another minimum. Legend: N steps, B batch, T tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid


def halting_log_probs(halt_logits: Tensor) -> Tensor:
    """halt_logits [N,B,T] (logits of λ_n; the last step's is not used) -> log p [N,B,T], summing to one over N."""
    go_on = logsigmoid(-halt_logits[:-1]).cumsum(0)  # log Π_{j<=n} (1 − λ_j)
    before = torch.cat([torch.zeros_like(halt_logits[:1]), go_on])  # log Π_{j<n} (1 − λ_j)
    stop = torch.cat([logsigmoid(halt_logits[:-1]), torch.zeros_like(halt_logits[:1])])  # the remainder: λ_N = 1
    return before + stop


def truncated_geometric(n_steps: int, prior: float, device: torch.device | None = None) -> Tensor:
    """The prior over steps 1..N: λ_p (1 − λ_p)^(n−1), renormalised. float64 [N], sums to one."""
    weights = prior * (1 - prior) ** torch.arange(n_steps, dtype=torch.float64, device=device)
    return weights / weights.sum()


def ponder_loss(cross_entropy: Tensor, log_p: Tensor, scored: Tensor, *, prior: float, beta: float) -> Tensor:
    """Mean over scored tokens of Σ_n p_n CE_n + β KL(p ‖ prior).

    cross_entropy, log_p [N,B,T]; scored bool [B,T]. Returns a scalar; zero when nothing is scored.
    """
    expected = (log_p.exp() * cross_entropy).sum(0)
    return ((expected + beta * prior_divergence(log_p, prior)) * scored).sum() / scored.sum().clamp_min(1)


def prior_divergence(log_p: Tensor, prior: float) -> Tensor:
    """KL(p ‖ truncated geometric prior) of each token: [N,B,T] -> [B,T]."""
    log_prior = truncated_geometric(log_p.shape[0], prior, log_p.device).log().to(log_p)
    return (log_p.exp() * (log_p - log_prior[:, None, None])).sum(0)


def answer_weights(log_p: Tensor, share: float) -> Tensor:
    """What each step's cross-entropy counts: log p [N,B,T] -> [N,B,T], summing to one over N.

    share: 1 is p itself, 0 the last step alone.
    """
    p = log_p.exp()
    return p if share == 1 else torch.cat([share * p[:-1], share * p[-1:] + (1 - share)])


def ponder_share(progress: float, begin: float, end: float) -> float:
    """The share s of PonderNet's loss at this part of the training: 0 before `begin`, 1 from `end` on, linear between.

    All are in [0, 1], begin <= end.
    """
    if progress >= end:
        return 1.0
    return 0.0 if progress <= begin else (progress - begin) / (end - begin)


def expected_steps(log_p: Tensor) -> Tensor:
    """Mean number of steps under the halting distribution: [N,B,T] -> [B,T]."""
    steps = torch.arange(1, log_p.shape[0] + 1, device=log_p.device, dtype=log_p.dtype)
    return (log_p.exp() * steps[:, None, None]).sum(0)
