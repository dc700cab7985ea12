"""The LSH v2 language model: tied blocks applied in ponder steps, LSH attention in each.

    model = create_lsh_v2_model(vocab_size=32000, target_params="100M")
    out = model(input_ids)                    # out.logits [B,T,vocab], computed when read
    out = model(input_ids, labels=input_ids)  # out.loss, without storing all logits
    new = model.eval().generate(prompt_ids, max_new_tokens=64)

While training every ponder step (`lshv2.backbone`) answers and the losses are weighed by the halting distribution; in
`eval()` tokens halt, and the later steps go on without them: each block projects a halted token's last state once more,
to the key, value and bucket ids that the others see from there on (`lshv2.halting`):

    out = model.eval()(input_ids)                                        # at ponder_threshold
    out = model(input_ids, draw=torch.Generator().manual_seed(0))        # by a draw from each token's λ
Legend: B batch, T tokens, d model width, V vocabulary, N ponder steps.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import repeat
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor
from torch.nn.functional import pad

from lshv2.backbone import Angles, Backbone
from lshv2.block import recomputed
from lshv2.config import ModelConfig, parse_size
from lshv2.decoding import Cache
from lshv2.errors import UserError
from lshv2.generation import Prompts, Step, as_batch, check_sampling, tokens
from lshv2.graphs import GraphedStep
from lshv2.layers import rotary_angles
from lshv2.losses import IGNORE, linear_cross_entropy
from lshv2.ponder import answer_weights, expected_steps, halting_log_probs, prior_divergence
from lshv2.precision import product_dtype
from lshv2.profiling import region
from lshv2.sizes import SHAPE_KEYS, shape_for


@dataclass
class LMOutput:
    """What a forward gives: `hidden` [B,T,d] that answers, `ponder_steps` [B,T], and with labels `loss` (scalar).

    `cross_entropy` [B,T] are the nats of predicting labels[t] at t − 1 from the answering state (zero where unscored):
    sum it for bits per byte. It is None while training with Ponder, where N states answer, or with a `Share`.
    """

    hidden: Tensor
    head: Tensor
    ponder_steps: Tensor
    loss: Tensor | None = None
    cross_entropy: Tensor | None = None

    @property
    def logits(self) -> Tensor:
        """[B,T,V], computed at each read: 131,072 x 32,000 of them are not kept by accident."""
        return self.hidden @ self.head.to(self.hidden.dtype).T


class LSHModel(Backbone):
    """The model of a `ModelConfig`; weights are drawn from a generator seeded with `seed`, hash tables from another."""

    def forward(
        self, input_ids: Tensor, labels: Tensor | None = None, *, draw: torch.Generator | None = None
    ) -> LMOutput:
        """input_ids int64 [B,T]; labels int64 [B,T]: labels[t] is predicted at t − 1, -100 is not scored.

        draw: outside training, halting is sampled with it instead of taking `ponder_threshold`. With a `Share`, while
        training, T are all tokens, of which this process computes its part; the loss is the mean of all processes'.
        Raises ValueError when T is above `max_seq_len`, and UserError on `draw` where nothing halts.
        """
        config = self.config
        if draw is not None and (self.training or not config.use_ponder):
            raise UserError("draw samples where tokens halt: it needs use_ponder=True and model.eval()")
        length = input_ids.shape[1]
        if length > config.max_seq_len:
            raise ValueError(f"{length} tokens are more than max_seq_len={config.max_seq_len}")
        angles = rotary_angles(length, config, input_ids.device)
        targets = None if labels is None else pad(labels[:, 1:], (0, 1), value=IGNORE)  # what each token is to say
        share = self.share if self.training else None
        if share:
            angles = (share.cut(angles[0], 0), share.cut(angles[1], 0))
            input_ids, targets = share.cut(input_ids, 1), None if targets is None else share.cut(targets, 1)
        x = self.embedding(input_ids)
        if self.training and config.use_ponder:
            return self._train_ponder(x, angles, targets)
        x, steps = self._answer(x, angles, draw=draw)
        out = LMOutput(self.norm(x), self.head.weight, steps)
        if targets is not None:
            weight = self._scored(targets).reciprocal()
            out.loss, nats = self._score(out.hidden, targets, weight.expand(targets.shape))
            out.cross_entropy = None if share else pad(nats[:, :-1], (1, 0))
        return out

    def _scored(self, targets: Tensor) -> Tensor:
        """What a sum of losses is divided by: the number of tokens that are scored."""
        count = (targets != IGNORE).sum()
        return self.share.mean_count(count) if self.share and self.training else count.clamp_min(1)

    def _train_ponder(self, x: Tensor, angles: Angles, targets: Tensor | None) -> LMOutput:
        states, halts = [], []
        for n in range(self.config.n_ponder_steps):
            x = self.step_of_all(x, n, angles)
            state, halt = recomputed(self._exit, x) if self.gradient_checkpoint else self._exit(x)
            states.append(state)
            halts.append(halt)
        log_p = halting_log_probs(torch.stack(halts))
        out = LMOutput(states[-1], self.head.weight, expected_steps(log_p.detach()))
        if targets is not None:
            # `lshv2.ponder.ponder_loss`, each step's part weighed where its logits are: they are there once only
            count = self._scored(targets)
            weights = answer_weights(log_p, self.ponder_share) / count
            asked = slice(None if self.ponder_share else -1, None)  # what counts for nothing is not computed
            losses = [self._score(*each)[0] for each in zip(states[asked], repeat(targets), weights[asked])]
            divergence = self._divergence(log_p, targets != IGNORE, count)
            out.loss = torch.stack(losses).sum() + self.config.ponder_beta * divergence
        return out

    def _exit(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """What a ponder step's answer is read from [B,T,d], and its halting logits [B,T].

        Rounded here and not where it is read: the losses of all steps pass their gradients back first, and those wait,
        rounded as the answers are, for the blocks of the later steps.
        """
        state = self.norm(x)
        return state.to(product_dtype(state)), self.halt(state).squeeze(-1).float()

    def _divergence(self, log_p: Tensor, scored: Tensor, count: Tensor) -> Tensor:
        """Mean KL to the prior: log_p [N,B,T], scored bool [B,T], what a sum is divided by -> scalar."""
        return (prior_divergence(log_p, self.config.ponder_prior) * scored).sum() / count

    def _score(self, hidden: Tensor, targets: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Σ weights · nats of each token's saying its target, and the nats [B,T], zero where there is none.

        hidden [B,T,d], targets [B,T], weights [B,T].
        """
        with region("head_loss"):
            loss, nats = linear_cross_entropy(
                hidden.flatten(0, 1), self.head.weight, targets.flatten(), weights.flatten()
            )
        return loss, nats.view(targets.shape)

    @torch.no_grad()
    def prefill(self, input_ids: Tensor, lengths: Sequence[int], *, capacity: int) -> tuple[Tensor, Cache]:
        """Prompts through the parallel forward: logits [B,V] of each row's next token, and the cache to go on with.

        input_ids int64 [B,T]; lengths: tokens of each row, the rest being padding at its end; capacity: tokens that a
        row can hold, the prompt included. Raises UserError when they do not fit, or in training mode.
        """
        if self.training:
            raise UserError("the model is in training mode, where tokens do not halt: call model.eval() first")
        if capacity > self.config.max_seq_len:
            raise UserError(f"{capacity} tokens, prompt and new, are more than max_seq_len={self.config.max_seq_len}")
        cos, sin = rotary_angles(capacity, self.config, input_ids.device)
        cache, length = Cache(self.config, lengths, (cos, sin)), input_ids.shape[1]
        x, _ = self._answer(self.embedding(input_ids), (cos[:length], sin[:length]), cache)
        last = x[torch.arange(len(lengths), device=x.device), cache.cursor.length - 1]
        return self.head(self.norm(last)), cache

    @torch.no_grad()
    def step(self, token: Tensor, cache: Cache) -> Tensor:
        """One more token int64 [B] into the cache -> logits [B,V] as `forward` has them; UserError when it is full."""
        cache.cursor.claim()  # on the host; on the device no shape below depends on data
        x, _ = self._answer(self.embedding(token[:, None]), cache.cursor.begin(), cache)
        cache.cursor.end()
        return self.head(self.norm(x[:, 0]))

    def stream(
        self, prompt_ids: Prompts, max_new_tokens: int, *, temperature: float = 0.0, top_p: float = 1.0,
        generator: torch.Generator | None = None, stop: Sequence[int] = (),
    ) -> Iterator[Tensor]:
        """New tokens int64 [B] as they come, at most `max_new_tokens` of them.

        prompt_ids: [B,T], or lists of any lengths. temperature 0 takes the likeliest token; above, tokens are
        drawn with `generator` from the smallest likeliest set of probability `top_p`. stop: ids that end a row, which
        then repeats the one it met; the stream ends with its last row. Raises UserError at once.
        """
        check_sampling(max_new_tokens, temperature, top_p, generator)
        ids, lengths = as_batch(prompt_ids, self.config.vocab_size, self.embedding.weight.device)
        logits, cache = self.prefill(ids, lengths=lengths, capacity=max(lengths) + max_new_tokens - 1)
        step: Step = partial(self.step, cache=cache)
        # not the dense twin's, whose length the host knows; nobody counts tokens on the host, and the cache has room
        if self.config.attention != "dense" and not torch.is_autocast_enabled("cuda"):
            step = GraphedStep(step, ids.device)
        return tokens(logits, step, max_new_tokens, stop, temperature, top_p, generator)

    def generate(self, prompt_ids: Prompts, max_new_tokens: int, **how: Any) -> Tensor:
        """The new tokens int64 [B,n], n <= max_new_tokens; prompt_ids and `how`: see `stream`."""
        return torch.stack(list(self.stream(prompt_ids, max_new_tokens, **how)), dim=1)

def create_lsh_v2_model(
    vocab_size: int = 32_000, target_params: str = "100M", *, seed: int = 0, **overrides: Any
) -> LSHModel:
    """A model with `target_params` distinct parameters within 5 %; "100M" is the documented configuration.

    overrides: any `ModelConfig` field, such as `n_layers=12` or `attention="dense"`; shape fields given here are kept.
    Raises `UserError` when no shape fits, for instance because the vocabulary alone is larger.
    """
    try:
        fixed = {"vocab_size": vocab_size, **overrides}
        shape = shape_for(parse_size(target_params), **fixed)
        return LSHModel(ModelConfig(**{**{k: shape[k] for k in SHAPE_KEYS}, **fixed}), seed=seed)
    except ValidationError as error:
        first = error.errors()[0]
        raise UserError(f"{'.'.join(map(str, first['loc']))}={first['input']!r}: {first['msg']}") from None
