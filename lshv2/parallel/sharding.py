"""Parameters, gradients and moments over all processes: FSDP2 (`fully_shard`), the whole model as one group.

    sharded = Sharded(model, ranks)                  # before the optimizer is made
    loss, steps = sharded(input_ids, labels)         # as model(..), then
    loss.backward(); norm = sharded.clip(1.0); optimizer.step()
    with sharded.whole(): evaluate(model, ..)

One group, not one a block: blocks are tied, each is used in every ponder step, by halves and through torch.compile,
and FSDP would be called before and after each of these uses. So weights are gathered once a step, before the forward,
and kept until the backward is through; then gradients, which autograd has added up over all uses, are averaged once.
For 100M parameters that is 400 MB each way, not hidden behind computation, and what each process holds in between;
moments and master weights stay divided. Mixed precision is autocast's, as for one process: float32 travels.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from lshv2.parallel.ranks import Ranks


class Sharded(nn.Module):
    """A model whose weights lie over the processes; with one process all of this is nothing."""

    def __init__(self, model: nn.Module, ranks: Ranks) -> None:
        """Leaves each process a part of every parameter, in place. All must have made the same weights."""
        super().__init__()
        self.model, self._divided = model, ranks.world > 1
        if self._divided:
            from torch.distributed.device_mesh import init_device_mesh
            from torch.distributed.fsdp import fully_shard  # half a second, which one process need not wait for

            mesh = init_device_mesh(ranks.device.type, (ranks.world,), mesh_dim_names=("ranks",))
            fully_shard(self, mesh=mesh, reshard_after_forward=False)

    def forward(self, input_ids: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """The model's loss and its mean ponder steps, of this process's tokens.

        FSDP2 finds out that a backward has begun from the tensors returned here: in a dataclass it would see none.
        """
        out = self.model(input_ids, labels=labels)
        return out.loss, out.ponder_steps.mean()

    @contextmanager
    def whole(self) -> Iterator[None]:
        """All weights in every process: forwards of the model inside need no other process. All must enter it."""
        if self._divided:
            self.unshard()  # type: ignore[operator]
        try:
            yield
        finally:
            if self._divided:
                self.reshard()  # type: ignore[operator]

    def clip(self, limit: float) -> Tensor:
        """Clips the gradients to a norm over all processes; returns the norm they had, a scalar."""
        norm = torch.nn.utils.clip_grad_norm_(self.parameters(), limit)
        return norm.full_tensor() if self._divided else norm  # type: ignore[attr-defined]
