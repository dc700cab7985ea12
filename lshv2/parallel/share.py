"""Which part of a training step's tokens a process computes, and what it asks of the others for it.

    share = Share.of(ranks, plan(ranks.world, batch_size=2, length=131_072, config=model.config))
    model.take_share(share)          # from here on, model.train()(ids [B/data, T], labels) computes T/sequence tokens

Processes that share a sequence hold contiguous parts of it and trade tokens for heads around attention
(`lshv2.parallel.exchange`). Everything else is done a token at a time, except what `Share` answers: the token before
the first one, how many tokens are scored in all, and what all have noted for the hash tables. Bucket ids are computed
before the exchange and travel with q, k and v: R int32 beside D values, and forward only (for R = 4, D = 64, bfloat16
some 2 % of an attention's traffic with its backward). Hashing after the exchange would save those, and cut tables,
notes and key means by heads.

Evaluation splits no sequence: each process evaluates whole ones, and halted tokens can be left out.
Legend: B batch, T tokens of the sequence, S processes that share it, H query heads, K key/value heads, R rounds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from lshv2.parallel.layout import Layout
from lshv2.parallel.ranks import Ranks


@dataclass(frozen=True)
class Share:
    """This process's place in the mesh; `group`: those that share its sequences, None where S = 1."""

    layout: Layout
    data: int = 0
    sequence: int = 0
    group: dist.ProcessGroup | None = None

    @classmethod
    def of(cls, ranks: Ranks, layout: Layout) -> Share:
        """Every process must call it, in the same order."""
        data, sequence = divmod(ranks.rank, layout.sequence)
        if layout.sequence == 1:
            return cls(layout, data)
        mesh = init_device_mesh(ranks.device.type, tuple(layout), mesh_dim_names=("data", "sequence"))
        return cls(layout, data, sequence, mesh.get_group("sequence"))

    @property
    def world(self) -> int:
        return self.layout.data * self.layout.sequence

    def rows(self, batch_size: int) -> slice:
        """Which sequences of a batch are this process's."""
        size = batch_size // self.layout.data
        return slice(self.data * size, (self.data + 1) * size)

    def cut(self, x: Tensor, dim: int) -> Tensor:
        """This process's tokens of all T along a dimension."""
        if x.shape[dim] % self.layout.sequence:
            raise ValueError(f"{x.shape[dim]} tokens do not come out even over {self.layout.sequence} processes")
        size = x.shape[dim] // self.layout.sequence
        return x.narrow(dim, self.sequence * size, size)

    def every(self, stride: int, length: int) -> slice:
        """Which of this process's `length` tokens every `stride`-th token of the sequence are."""
        return slice(-self.sequence * length % stride, None, stride)

    def before(self, x: Tensor, n: int) -> Tensor | None:
        """x [B,T/S,d] -> the n tokens before its first, [B,n,d]; None where the sequence is not split."""
        if self.group is None:
            return None
        from lshv2.parallel.exchange import from_previous  # imports torch.compile: a second, for those who need it

        return from_previous(x[:, -n:], self.group)

    def by_heads(self, q: Tensor, k: Tensor, v: Tensor, q_ids: Tensor, k_ids: Tensor) -> tuple[Tensor, ...]:
        """[B,H,T/S,D], [B,K,T/S,D] twice and ids [B,H,R,T/S], [B,K,R or 1,T/S] -> the same of H/S, K/S and T."""
        if self.group is None:
            return q, k, v, q_ids, k_ids
        from lshv2.parallel.exchange import tokens_to_heads

        q, k, v = tokens_to_heads([q, k, v], self.group)
        rounds = [ids.shape[2] for ids in (q_ids, k_ids)]
        if rounds[0]:
            found = tokens_to_heads([q_ids.flatten(1, 2), k_ids.flatten(1, 2)], self.group)
            q_ids, k_ids = (ids.unflatten(1, (-1, r)) for ids, r in zip(found, rounds, strict=True))
        else:
            q_ids, k_ids = (x.new_empty(*x.shape[:2], 0, x.shape[2], dtype=ids.dtype)
                            for x, ids in ((q[..., 0], q_ids), (k[..., 0], k_ids)))
        return q, k, v, q_ids, k_ids

    def by_tokens(self, out: Tensor) -> Tensor:
        """Attention's [B,H/S,T,D] -> [B,H,T/S,D]."""
        if self.group is None:
            return out
        from lshv2.parallel.exchange import heads_to_tokens

        return heads_to_tokens(out, self.group)

    def mean_count(self, count: Tensor) -> Tensor:
        """Mean of all processes' counts (a scalar), at least 1/world, float32.

        A sum of own losses over it is this process's loss: the mean of those is the loss over all tokens, and the mean
        of their gradients, which `fully_shard` takes, its gradient.
        """
        total = count.clone()
        dist.all_reduce(total)
        return total.clamp_min(1).float() / self.world

    def add_up(self, notes: Sequence[Tensor]) -> None:
        """Sums over all processes, in place and in one message; float32."""
        flat = torch.cat([note.flatten() for note in notes])
        dist.all_reduce(flat)
        for note, total in zip(notes, flat.split([note.numel() for note in notes]), strict=True):
            note.copy_(total.view_as(note))
