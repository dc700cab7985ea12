"""Halted tokens left out equal a full-width computation of the same definition, and are really left out."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from small_models import PONDER, ids, small
from torch import Tensor

from lshv2.errors import UserError
from lshv2.evaluation import evaluate
from lshv2.layers import rotary_angles
from lshv2.model import LSHModel


def full_width(model: LSHModel, x: Tensor, draws: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The definition with every token computed in every step: answering states [B,T,d], steps [B,T].

    draws [steps - 1,B,T]: halting where they lie below λ; None: at the threshold.
    """
    config, (batch, length) = model.config, x.shape
    cos, sin = rotary_angles(length, config, x.device)
    state = model.embedding(x)
    going = shown = torch.ones(batch, length, dtype=torch.bool)  # shown: until the step after the last one, halted
    reached, steps = torch.zeros(batch, length, dtype=torch.float64), torch.zeros(batch, length)
    last: dict[int, list[Tensor]] = {}
    for n in range(config.n_ponder_steps):
        moved = torch.where(going[..., None], state + model.step_embedding[n], state)
        for i, block in enumerate(model.blocks):
            h = block.attention_norm(moved)
            if i in last:
                h = torch.where(shown[..., None], h, last[i][0])
            q, k, v, q_ids, k_ids = block.attention.prepare(h, cos, sin)
            if i in last:
                k, v = (torch.where(shown[:, None, :, None], a, b) for a, b in zip((k, v), last[i][1:3], strict=True))
                k_ids = torch.where(shown[:, None, None], k_ids, last[i][3])
            last[i] = [h, k, v, k_ids]
            out = block.attention.attend(q, k, v, q_ids, k_ids).transpose(1, 2).flatten(2)
            moved = torch.where(going[..., None], block.feed_forward(moved + block.attention.out(out)), moved)
        state = moved
        steps += going
        chance = model.halt(model.norm(state)).squeeze(-1).sigmoid()
        reached = torch.where(going, reached + (1 - reached) * chance, reached)
        if n + 1 < config.n_ponder_steps:
            shown = going
            going = going & (reached < config.ponder_threshold if draws is None else draws[n] >= chance)
    return state, steps


KINDS = {
    "lsh": {}, "inverted_file": dict(hashing="inverted_file"), "dense": dict(attention="dense"),
    "window": dict(attention="window"), "short_conv": dict(short_conv=3),
    "one_block": dict(weight_tied_layers=1, n_layers=3),
}
HALTING = {"ragged": None, "all at once": 20.0, "none": -20.0}  # the halting head's bias


@pytest.mark.parametrize("short", [True, False], ids=["masked", "tiled"])
@pytest.mark.parametrize("bias", HALTING.values(), ids=HALTING)
@pytest.mark.parametrize("changes", KINDS.values(), ids=KINDS)
@torch.no_grad()
def test_leaving_halted_tokens_out_changes_nothing(
    changes: dict[str, Any], bias: float | None, short: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lshv2.attention.MASKED_UP_TO", 10**9 if short else 0)
    model, x = small(**{**PONDER, **changes}), ids(3, 70)
    if bias is not None:
        model.halt.bias.fill_(bias)
    expected, steps = full_width(model, x)
    assert len(steps.unique()) > 1 if bias is None else (steps == (1 if bias > 0 else 3)).all()
    out = model(x)
    assert torch.equal(out.ponder_steps, steps)
    assert (out.hidden - model.norm(expected)).abs().max() < 1e-12


@pytest.mark.parametrize("attention", ["lsh", "dense", "window"])
@torch.no_grad()
def test_sampled_halting_follows_the_draws(attention: str) -> None:
    model, x = small(**PONDER, attention=attention), ids(3, 70)
    g = torch.Generator().manual_seed(1)
    expected, steps = full_width(model, x, torch.stack([torch.rand(3 * 70, generator=g).view(3, 70) for _ in range(2)]))
    before = torch.get_rng_state()
    out = model(x, draw=torch.Generator().manual_seed(1))
    assert torch.equal(before, torch.get_rng_state()), "the global generator was drawn from"
    assert torch.equal(out.ponder_steps, steps) and not torch.equal(steps, model(x).ponder_steps)
    assert (out.hidden - model.norm(expected)).abs().max() < 1e-12
    assert not torch.equal(model(x, draw=torch.Generator().manual_seed(2)).ponder_steps, steps)


@torch.no_grad()
def test_sampled_steps_are_distributed_as_p() -> None:
    """20,000 sequences of one and the same token, which has nobody else to look at, so that all share one p."""
    model, count = small(**PONDER).float(), 20_000
    x = torch.full((count, 1), 5)
    state, p, reached = model.embedding(x[:1]), [], 1.0
    for n in range(3):
        state = model.step_of_all(state, n, rotary_angles(1, model.config, x.device))
        chance = model.halt(model.norm(state)).sigmoid().item() if n < 2 else 1.0
        p.append(reached * chance)
        reached *= 1 - chance
    assert min(p) * count > 100, "too rare to compare"
    steps = model(x, draw=torch.Generator().manual_seed(0)).ponder_steps
    seen = [(steps == n + 1).sum().item() for n in range(3)]
    chi_squared = sum((have - count * q) ** 2 / (count * q) for have, q in zip(seen, p, strict=True))
    assert chi_squared < 13.8, f"{seen} of p = {p}: chance gives that once in 1,000 times"


def test_sampling_where_nothing_halts_is_refused() -> None:
    g = torch.Generator()
    for model in (small(), small(**PONDER).train()):
        with pytest.raises(UserError, match="use_ponder"):
            model(ids(), draw=g)


@torch.no_grad()
def test_only_tokens_that_go_on_pass_through_the_layers() -> None:
    """Counted in every linear layer: who halts is projected once more to a key and a value, and then no more."""
    model, x = small(**PONDER), ids(3, 70)
    seen: dict[str, list[int]] = {}
    for name, module in model.blocks.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_hook(
                lambda _, inputs, __, name=name: seen.setdefault(name, []).append(inputs[0][..., 0].numel())
            )
    steps = model(x).ponder_steps
    going = [int((steps >= n).sum()) for n in (1, 2, 3)]
    shown = [210, going[0], going[1]]
    assert 210 == going[0] > going[1] > going[2] > 0
    assert len(seen) == 2 * 7
    for name, counts in seen.items():
        assert counts == (shown if name.endswith(("key", "value")) else going), name
    alone = dict(seen)
    seen.clear()
    model.prefill(x, [70, 70, 70], capacity=70)
    assert seen == alone, "a prompt costs what its evaluation does"
    seen.clear()
    model.halt.bias.fill_(20.0)
    model.prefill(x, [70, 70, 70], capacity=70)
    for name, counts in seen.items():
        assert sum(counts) == (420 if name.endswith(("key", "value")) else 210), "steps that nobody takes are empty"


def test_evaluation_tells_where_tokens_halted() -> None:
    model, batches = small(**PONDER).float(), [(ids(2, 40, seed), ids(2, 40, seed)) for seed in range(3)]
    with torch.no_grad():
        steps = torch.stack([model(x).ponder_steps for x, _ in batches])
    result = evaluate(model, batches, nullcontext)
    assert result.halted_at == tuple((steps == n).double().mean().item() for n in (1, 2, 3))
    assert min(result.halted_at) > 0 and result.ponder_steps == pytest.approx(steps.mean().item())
    assert evaluate(small().float(), batches, nullcontext).halted_at == (0.0, 1.0), "no pondering: every step is taken"
