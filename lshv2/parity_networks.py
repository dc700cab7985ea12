"""The recurrent networks of the parity task (`lshv2.parity`): what one ponder step sees and does.

    PonderGRU       the paper's setting: every step sees the whole vector
    PonderReader    every step reads a few elements, in an order that is learned; none twice

Both give an answer and a halting logit after every step, all that `lshv2.ponder` asks of a network.
Legend: N steps, B batch, S size, h hidden width, E width of an element, M elements read in a step.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from lshv2.ponder import halting_log_probs

ELEMENT = 32  # E
SHARPNESS = 4.0  # times the cosine of query and key: the softmax that gradients take stays soft
READ = -1e4  # added to the score of what was read


class Answers(NamedTuple):
    """Of every step: logits of "odd" and log p of halting there, each [N,1,B] (a batch of one row of B tokens)."""

    odd: Tensor
    log_p: Tensor


class PonderGRU(nn.Module):
    """h_n = GRU(x, h_{n−1}) from h_0 = 0, `max_steps` times with the same input; weights drawn from a seed.

    reach: each unit is wired to so many neighbouring elements only; 0: to all.
    """

    wired: Tensor

    def __init__(self, size: int, hidden: int, max_steps: int, reach: int, prior: float, seed: int) -> None:
        super().__init__()
        self.max_steps = max_steps
        first = torch.arange(hidden)[:, None] * size // hidden
        wired = ((torch.arange(size) - first) % size < (reach or size)).repeat(3, 1)
        self.register_buffer("wired", wired)  # [3h,S]: of the reset, update and new gates
        with torch.random.fork_rng(devices=[]):  # torch's own layers draw from the global generator
            torch.manual_seed(seed)
            self.cell = nn.GRU(size, hidden)
            self.heads = _heads(hidden, prior)
            if reach:
                nn.init.uniform_(self.cell.get_parameter("weight_ih_l0"), -(reach**-0.5), reach**-0.5)
        self.cut()

    @torch.no_grad()
    def cut(self) -> None:
        """Zero what is not wired; after each optimizer step."""
        self.cell.get_parameter("weight_ih_l0").mul_(self.wired)

    def forward(self, x: Tensor, steps: int | None = None) -> Answers:
        """x [B,S] of −1, 0 and 1; steps: instead of `max_steps`."""
        states, _ = self.cell(x.expand(steps or self.max_steps, *x.shape).contiguous())
        odd, halt = self.heads(states).unbind(-1)
        return Answers(odd[:, None], halting_log_probs(halt[:, None]))


class PonderReader(nn.Module):
    """h_n = GRU(Σ of the M elements read in step n, h_{n−1}); weights drawn from a seed.

    An element is the embedding of its value; a key of value and place says by its cosine with one learned query how
    soon it is read. The best M that were not read yet are, each counting one; the gradient is that of M times the
    softmax over all that were not (straight through, Bengio, Léonard & Courville 2013). When all are read, nothing is.
    look: M, at most S.
    """

    def __init__(self, size: int, hidden: int, max_steps: int, look: int, prior: float, seed: int) -> None:
        super().__init__()
        self.max_steps, self.look = max_steps, look
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.values = nn.Embedding(3, ELEMENT)
            self.places = nn.Parameter(0.1 * torch.randn(size, ELEMENT))  # of elements with one value some come first
            self.key = nn.Linear(ELEMENT, ELEMENT, bias=False)
            self.query = nn.Parameter(torch.randn(ELEMENT))
            self.cell = nn.GRUCell(ELEMENT, hidden)
            self.heads = _heads(hidden, prior)

    def cut(self) -> None:
        """All is wired."""

    def forward(self, x: Tensor, steps: int | None = None) -> Answers:
        """x [B,S] of −1, 0 and 1; steps: instead of `max_steps`."""
        elements = self.values((x + 1).long())  # [B,S,E]
        keys = normalize(self.key(elements + self.places), dim=-1)
        rank = SHARPNESS * (keys @ normalize(self.query, dim=-1))  # [B,S]
        state = x.new_zeros(len(x), self.cell.hidden_size)
        unread = torch.ones_like(x)
        heads = []
        for _ in range(steps or self.max_steps):
            scores = rank + READ * (1 - unread)
            best = scores.topk(self.look, -1).indices
            soft = self.look * scores.softmax(-1)
            weights = torch.zeros_like(soft).scatter(1, best, 1.0) + soft - soft.detach()
            state = self.cell(((weights * unread)[:, None] @ elements).squeeze(1), state)
            unread = unread.scatter(1, best, 0.0)
            heads.append(self.heads(state))
        odd, halt = torch.stack(heads).unbind(-1)
        return Answers(odd[:, None], halting_log_probs(halt[:, None]))


def _heads(hidden: int, prior: float) -> nn.Linear:
    """Answer and halting logit, of which halting starts at the prior."""
    heads = nn.Linear(hidden, 2)
    with torch.no_grad():
        heads.bias[1] = math.log(prior / (1 - prior))
    return heads
