"""From logits to tokens: prompts as a batch, greedy choice and sampling, stopping.

`LSHModel.generate` and `LSHModel.stream` are how to use it. Randomness comes from the caller's generator alone.
Left out on purpose: beam search, penalties, text in and out (a tokenizer's matter).
Legend: B batch, T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from lshv2.errors import UserError

Step = Callable[[Tensor], Tensor]  # token int64 [B] -> logits [B,V] of the next one


Prompts = Tensor | Sequence[Sequence[int]]


def as_batch(prompts: Prompts, vocab_size: int, device: torch.device) -> tuple[Tensor, list[int]]:
    """int64 [B,T] on the device, short rows padded at the right, and each row's length. Raises UserError."""
    if isinstance(prompts, Tensor):
        if prompts.ndim != 2 or prompts.is_floating_point():
            raise UserError(f"prompts {tuple(prompts.shape)} of {prompts.dtype} are not token ids [B,T]")
        prompts = prompts.tolist()
    lengths = [len(row) for row in prompts]
    if not lengths or min(lengths) == 0:
        raise UserError(f"prompt {lengths.index(0) if lengths else 0} is empty: give it at least one token")
    wrong = next(((b, i) for b, row in enumerate(prompts) for i in row if not 0 <= i < vocab_size), None)
    if wrong:
        raise UserError(f"prompt {wrong[0]}: token {wrong[1]} is outside the vocabulary of {vocab_size}")
    ids = torch.zeros(len(lengths), max(lengths), dtype=torch.int64)
    for row, prompt in zip(ids, prompts, strict=True):
        row[: len(prompt)] = torch.tensor(list(prompt))
    return ids.to(device), lengths


def choose(logits: Tensor, temperature: float, top_p: float, generator: torch.Generator | None) -> Tensor:
    """Next tokens int64 [B] from logits [B,V]: the likeliest at temperature 0, else drawn from the nucleus.

    The nucleus is the smallest set of likeliest tokens whose probability reaches top_p (Holtzman et al. 2020). Drawn on
    the generator's device, so that a seed on the CPU gives the same draws everywhere.
    """
    if temperature == 0:
        return logits.argmax(-1)
    assert generator is not None
    p = (logits.to(generator.device, torch.float32) / temperature).softmax(-1)
    p, token = p.sort(dim=-1, descending=True, stable=True)
    p = p.masked_fill(p.cumsum(-1) - p >= top_p, 0.0)
    drawn = torch.multinomial(p, 1, generator=generator)
    return token.gather(-1, drawn).squeeze(-1).to(logits.device)


def check_sampling(max_new_tokens: int, temperature: float, top_p: float, generator: torch.Generator | None) -> None:
    """Raises UserError with one line."""
    if max_new_tokens < 1:
        raise UserError(f"max_new_tokens={max_new_tokens} is not at least 1")
    if not 0 <= temperature < float("inf"):
        raise UserError(f"temperature={temperature} is not a number of at least 0 (0 takes the likeliest token)")
    if not 0 < top_p <= 1:
        raise UserError(f"top_p={top_p} is not in (0, 1]")
    if temperature > 0 and generator is None:
        raise UserError(f"temperature={temperature} draws tokens: pass generator=torch.Generator().manual_seed(...)")


def tokens(
    logits: Tensor, step: Step, max_new_tokens: int, stop: Sequence[int], temperature: float, top_p: float,
    generator: torch.Generator | None,
) -> Iterator[Tensor]:
    """Tokens [B] one after the other: logits [B,V] choose the first. A row that met a stop token repeats it."""
    stops = torch.tensor(list(stop), dtype=torch.int64, device=logits.device)
    token = choose(logits, temperature, top_p, generator)
    for made in range(1, max_new_tokens + 1):
        yield token
        ended = torch.isin(token, stops) if stop else None
        if made == max_new_tokens or (ended is not None and bool(ended.all())):
            return
        chosen = choose(step(token), temperature, top_p, generator)
        token = chosen if ended is None else torch.where(ended, token, chosen)
