"""Generation: greedy, sampled, streamed and stopped; mistakes in one line."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from small_models import PONDER, ids, small

from lshv2.errors import UserError
from lshv2.generation import choose
from lshv2.model import LSHModel


def greedy(model: LSHModel, prompt: list[int], n: int) -> list[int]:
    x = list(prompt)
    for _ in range(n):
        with torch.no_grad():
            x.append(int(model(torch.tensor([x])).logits[0, -1].argmax()))
    return x[len(prompt) :]


@pytest.mark.parametrize("changes", [{}, PONDER, dict(attention="dense")], ids=["plain", "ponder", "dense"])
def test_greedy_generation_is_the_argmax_of_repeated_forwards(changes: dict[str, Any]) -> None:
    model = small(seed=4, **changes)
    prompts = [ids()[0, :30].tolist(), [7], ids()[1, :11].tolist()]
    new = model.generate(prompts, 25)
    assert new.tolist() == [greedy(model, prompt, 25) for prompt in prompts]
    assert len(set(new.flatten().tolist())) > 5, "a constant answer would show little"


def test_streaming_gives_the_same_tokens_as_they_come() -> None:
    model = small()
    generators = (torch.Generator().manual_seed(5) for _ in range(2))
    whole = model.generate(ids(2, 20), 12, temperature=0.8, top_p=0.9, generator=next(generators))
    stream = model.stream(ids(2, 20), 12, temperature=0.8, top_p=0.9, generator=next(generators))
    first = next(stream)
    assert first.shape == (2,) and torch.equal(torch.stack([first, *stream], dim=1), whole)


def test_sampling_follows_its_generator_alone() -> None:
    model, state = small(), torch.get_rng_state()

    def drawn(seed: int, **how: Any) -> list[list[int]]:
        generator = torch.Generator().manual_seed(seed)
        return model.generate(ids(2, 10), 20, temperature=1.0, generator=generator, **how).tolist()

    assert drawn(1) == drawn(1) != drawn(2)
    assert drawn(1, top_p=1e-9) == model.generate(ids(2, 10), 20).tolist()
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (1.0, 0.7), (2.0, 0.5), (0.5, 0.95)])
def test_tokens_are_drawn_from_the_renormalised_nucleus(temperature: float, top_p: float) -> None:
    """Counts of 40,000 draws against the nucleus built by hand; a chi-square far out in its tail fails."""
    logits = torch.tensor([2.0, -1.0, 0.5, 1.5, 0.0, -3.0, 1.0, 0.25]).double()
    p = [math.exp(x / temperature) for x in logits.tolist()]
    p = [x / sum(p) for x in p]
    nucleus: dict[int, float] = {}
    for token in sorted(range(len(p)), key=lambda i: -p[i]):
        if sum(nucleus.values()) >= top_p - 1e-12:
            break
        nucleus[token] = p[token]
    n = 40_000
    drawn = choose(logits.expand(n, -1), temperature, top_p, torch.Generator().manual_seed(0))
    counts = drawn.bincount(minlength=len(p)).tolist()
    assert {i for i, count in enumerate(counts) if count} == set(nucleus), (counts, nucleus)
    expected = {i: n * x / sum(nucleus.values()) for i, x in nucleus.items()}
    chi_square = sum((counts[i] - e) ** 2 / e for i, e in expected.items())
    freedom = len(nucleus) - 1
    assert chi_square <= freedom + 5 * math.sqrt(2 * freedom), f"χ² = {chi_square:.1f} at {freedom} degrees of freedom"


def test_a_row_ends_at_its_stop_token_and_repeats_it() -> None:
    model = small()
    prompts = [[5, 6, 7], [1, 2]]
    free = model.generate(prompts, 20).tolist()
    stop = free[0][4]
    at = [row.index(stop) if stop in row else None for row in free]
    got = model.generate(prompts, 20, stop=[stop]).tolist()
    for row, want, end in zip(got, free, at, strict=True):
        cut = len(row) if end is None else min(end + 1, len(row))
        assert row[:cut] == want[:cut] and set(row[cut:]) <= {stop}
    alone = model.generate(prompts[:1], 20, stop=[stop])
    assert alone.tolist() == [free[0][: free[0].index(stop) + 1]]


@pytest.mark.parametrize(
    ("prompt", "how", "message"),
    [
        ([[1] * 250], dict(max_new_tokens=8), "257 tokens, prompt and new, are more than max_seq_len=256"),
        ([[1], []], dict(max_new_tokens=8), "prompt 1 is empty"),
        ([], dict(max_new_tokens=8), "prompt 0 is empty"),
        ([[1, 61]], dict(max_new_tokens=8), "token 61 is outside the vocabulary of 61"),
        (torch.zeros(3, dtype=torch.int64), dict(max_new_tokens=8), "are not token ids"),
        ([[1]], dict(max_new_tokens=0), "max_new_tokens=0"),
        ([[1]], dict(max_new_tokens=8, temperature=-0.5), "temperature=-0.5"),
        ([[1]], dict(max_new_tokens=8, temperature=1.0), "generator"),
        ([[1]], dict(max_new_tokens=8, top_p=0.0), "top_p=0.0"),
        ([[1]], dict(max_new_tokens=8, top_p=1.5), "top_p=1.5"),
    ],
)
def test_mistakes_are_one_line_before_anything_runs(prompt: Any, how: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        small().stream(prompt, **how)
    assert "\n" not in str(caught.value)


def test_a_full_cache_and_a_training_model_are_refused() -> None:
    model = small()
    _, cache = model.prefill(ids(1, 10), [10], capacity=11)
    model.step(torch.tensor([1]), cache)
    with pytest.raises(UserError, match="capacity=11"):
        model.step(torch.tensor([1]), cache)
    for lengths, message in (([12], "does not fit into capacity=11"), ([11], "the prompts have 10 tokens")):
        with pytest.raises(UserError, match=message):
            model.prefill(ids(1, 10), lengths, capacity=11)
    with pytest.raises(UserError, match="model.eval"):
        model.train().generate(ids(1, 10), 3)
