"""Tied blocks applied in ponder steps: from embedded tokens to the states that answer, and the weights of it all.

`n_layers` blocks are `weight_tied_layers` distinct ones applied `n_layers / weight_tied_layers` times; one pass over
the distinct ones is a ponder step. `lshv2.model` makes losses and text of the states.
Legend: B batch, T tokens, d model width, N ponder steps.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils import skip_init

from lshv2.block import Block, Parts, compiled_parts, train_block
from lshv2.config import ModelConfig, Recompute
from lshv2.decoding import Cache
from lshv2.halting import answer
from lshv2.layers import Attention
from lshv2.parallel.share import Share

Angles = tuple[Tensor, Tensor]  # cos, sin
NEVER = 2.0  # a threshold above all probabilities, rounded to one or not: full depth
HASH_SEED = 1 << 32  # added to a model's seed


class Backbone(nn.Module):
    """The model of a `ModelConfig`; weights are drawn from a generator seeded with `seed`, hash tables from another."""

    def __init__(self, config: ModelConfig, seed: int = 0) -> None:
        super().__init__()
        # hash tables of another shape, or none, leave the weights as they are: twins of a seed start alike
        hashes = torch.Generator().manual_seed(HASH_SEED + seed)
        self.config = config
        # the trainer's choices, not properties of the weights
        self.gradient_checkpoint: Recompute = False
        self.parts: list[Parts | None] = [None] * config.weight_tied_layers  # of each block, compiled
        self.share: Share | None = None
        self.ponder_share = 1.0  # of PonderNet's loss in training (`lshv2.ponder`); at 0 no token halts: see `_answer`
        table = torch.empty(config.vocab_size, config.d_model)  # skip_init would import torch._dynamo: two seconds
        self.embedding = nn.Embedding(config.vocab_size, config.d_model, _weight=table)
        self.blocks = nn.ModuleList(Block(config, hashes) for _ in range(config.weight_tied_layers))
        self.norm = nn.RMSNorm(config.d_model, eps=1e-6)
        self.head = skip_init(nn.Linear, config.d_model, config.vocab_size, bias=False)
        if config.use_ponder:
            self.step_embedding = nn.Parameter(torch.zeros(config.n_ponder_steps, config.d_model))
            self.halt = skip_init(nn.Linear, config.d_model, 1)
        self._initialise(torch.Generator().manual_seed(seed))

    @torch.no_grad()
    def _initialise(self, generator: torch.Generator) -> None:
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                std = module.in_features**-0.5
                if name.endswith((".out", ".down")):  # the residual stream's variance stays near one over the depth
                    std /= (2 * self.config.n_layers) ** 0.5
                module.weight.normal_(0.0, std, generator=generator)
                if module.bias is not None:
                    module.bias.zero_()
            elif isinstance(module, Attention) and module.taps is not None:
                module.taps.normal_(0.0, (1 + len(module.taps)) ** -0.5, generator=generator)
        self.embedding.weight.normal_(0.0, 0.2, generator=generator)  # of 1, 0.2 and 0.02 the fastest learner
        self.head.weight.mul_(0.5)  # near-uniform first predictions
        if self.config.use_ponder:
            self.halt.weight.zero_()
            prior = self.config.ponder_prior
            self.halt.bias.fill_(torch.tensor(prior / (1 - prior)).log())  # start at the prior

    def step_of_all(self, x: Tensor, n: int, angles: Angles, cache: Cache | None = None) -> Tensor:
        """Ponder step n: every distinct block once. x [B,T,d] -> [B,T,d]."""
        added = self.step_embedding[n].to(x.dtype) if self.config.use_ponder else None  # to the first block's input
        for i, block in enumerate(self.blocks):
            if self.training:
                x = train_block(block, self.parts[i], self.gradient_checkpoint, x, added, *angles)  # type: ignore[arg-type]
            else:
                x = x if added is None else x + added
                x = block(x, *angles, cache.layers[n * len(self.blocks) + i] if cache else None)
            added = None
        return x

    def compile_blocks(self, backend: str = "inductor") -> None:
        """Train through torch.compile from here on: what is around attention, in three graphs for all blocks.

        Evaluation and decoding are not compiled: their shapes change from call to call. A new batch shape is compiled
        anew.
        """
        self.parts = [compiled_parts(block, backend) for block in self.blocks]  # type: ignore[arg-type]

    def _answer(
        self, x: Tensor, angles: Angles, cache: Cache | None = None, draw: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor]:
        """The states [B,T,d] that answer outside training, and the steps [B,T] they took.

        While a training has asked for no answer but the last, nothing else would answer well.
        """
        if self.config.use_ponder:
            threshold = self.config.ponder_threshold if self.ponder_share else NEVER
            return answer(
                [*self.blocks], self.step_embedding, self._halt_logits, x, angles,
                threshold=threshold, cache=cache, draw=draw,
            )
        for n in range(self.config.n_ponder_steps):
            x = self.step_of_all(x, n, angles, cache)
        return x, x.new_full(x.shape[:2], self.config.n_ponder_steps, dtype=torch.float32)

    def _halt_logits(self, x: Tensor) -> Tensor:
        """[.., d] -> float32 logits of λ [..]."""
        return self.halt(self.norm(x)).squeeze(-1).float()

    def take_share(self, share: Share) -> None:
        """From here on a forward in training computes this process's part of the tokens; before `compile_blocks`."""
        self.share = share
        for attention in self._attentions:
            attention.share = share

    @property
    def _attentions(self) -> list[Attention]:
        return [module for module in self.modules() if isinstance(module, Attention)]

    def update_hash(self) -> None:
        """Let the hash codebooks follow the last training step's queries and keys; after the optimizer step."""
        notes = [note for attention in self._attentions for note in attention.notes]
        if self.share and notes:
            self.share.add_up(notes)
        for attention in self._attentions:
            attention.update_hash()

    def count_parameters(self) -> int:
        """Distinct trainable parameters: a tied block counts once."""
        return sum(p.numel() for p in self.parameters())
