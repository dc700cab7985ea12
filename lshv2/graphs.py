"""Training steps replayed as CUDA graphs: a small model's kernels take less time than their launches.

    set_rate = rate_setter(optimizer, device)
    step = GraphedStep(eager, device)      # eager(ids, labels) -> loss, weights and optimizer updated in place
    set_rate(1e-3)
    loss = step(ids, labels)               # the first WARM calls of a shape run as they are, then it is captured
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

WARM = 3  # eager calls of a shape before it is captured: kernels compile, libraries and optimizers allocate


def rate_setter(optimizer: torch.optim.Optimizer, device: torch.device) -> Callable[[float], object]:
    """What sets the learning rate of all groups; on a GPU in memory, where captured steps read it."""
    if device.type == "cuda":
        held = torch.zeros((), device=device)
        for group in optimizer.param_groups:
            group["capturable"], group["lr"] = True, held
        return held.fill_

    def set_rate(rate: float) -> None:
        for group in optimizer.param_groups:
            group["lr"] = rate

    return set_rate


class GraphedStep:
    """`step` of tensors to a tensor, captured once for each shape of its inputs; eager on a CPU. Results are copies.

    The step must read and write the same memory at each call: what changes from call to call is in its inputs, or in
    tensors that others fill (a learning rate, say). It may not wait for the device, nor draw random numbers.
    """

    def __init__(self, step: Callable[..., Tensor], device: torch.device) -> None:
        self.step, self.device = step, device
        self.seen: dict[tuple[torch.Size, ...], int] = {}
        self.pool = torch.cuda.graph_pool_handle() if device.type == "cuda" else None
        self.graphs: dict[tuple[torch.Size, ...], tuple[torch.cuda.CUDAGraph, tuple[Tensor, ...], Tensor]] = {}

    def __call__(self, *inputs: Tensor) -> Tensor:
        if self.device.type != "cuda":
            return self.step(*inputs)
        shape = tuple(x.shape for x in inputs)
        if shape not in self.graphs:
            seen = self.seen[shape] = self.seen.get(shape, 0) + 1
            if seen <= WARM:
                return self._aside(inputs)
            self._capture(shape, inputs)
        graph, own, result = self.graphs[shape]
        for mine, given in zip(own, inputs, strict=True):
            mine.copy_(given)
        graph.replay()
        return result.clone()

    def _aside(self, inputs: tuple[Tensor, ...]) -> Tensor:
        """An eager call on a stream of its own, as capturing wants what comes before it."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            result = self.step(*inputs)
        torch.cuda.current_stream().wait_stream(stream)
        return result

    def _capture(self, shape: tuple[torch.Size, ...], inputs: tuple[Tensor, ...]) -> None:
        own, graph = tuple(x.clone() for x in inputs), torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        # one memory for all: a shape's results are copied before another's replay overwrites what it worked in
        with torch.cuda.graph(graph, pool=self.pool):
            result = self.step(*own)
        self.graphs[shape] = graph, own, result
