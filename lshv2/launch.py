"""Starting Triton kernels with little host time: on short inputs the host, not the GPU, sets the pace."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

_compiled: dict[Any, tuple[Any, tuple[Any, ...]]] = {}
KEPT = 4096  # calls remembered: inputs of ever new lengths must not fill the host's memory


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up; Triton's own takes microseconds on the host."""
    return -(-a // b)


def power_of_two(n: int) -> int:
    """The least power of two that is no less than n."""
    return 1 << max(0, n - 1).bit_length()


def current_stream(device: torch.device) -> int:
    """The handle of a GPU's current stream, without torch's object around it."""
    handle: int = triton.runtime.driver.active.get_current_stream(device.index)
    return handle


def launch(
    kernel: Any, grid: tuple[int, int, int], tensors: tuple[Tensor, ...], numbers: tuple[float, ...], **options: Any
) -> None:
    """kernel[grid](*tensors, *numbers, **options), with less of the host's time for a call seen before.

    Triton's own launcher looks at every argument anew to choose a specialisation; here equal numbers, dtypes and
    alignments lead to the compiled kernel directly. options: the constexprs and launch choices. Triton's launch hooks
    see the first call only.
    """
    device = tensors[0].device
    if not isinstance(kernel, triton.JITFunction):  # Triton's interpreter
        kernel[grid](*tensors, *numbers, **options)
        return
    if device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            return launch(kernel, grid, tensors, numbers, **options)
    addresses = [x.data_ptr() for x in tensors]  # a launcher that is given tensors asks the driver about each of them
    key = (id(kernel), device.index, numbers, *options.values(), *[x.dtype for x in tensors],
           *[address & 15 for address in addresses])
    known = _compiled.get(key)
    if known is None:
        compiled = kernel[grid](*tensors, *numbers, **options)
        count = len(tensors) + len(numbers)
        if len(_compiled) >= KEPT:
            _compiled.clear()
        _compiled[key] = compiled, (*numbers, *[options[name] for name in kernel.arg_names[count:]])
        return
    compiled, rest = known
    stream = current_stream(device)
    compiled.run(*grid, stream, compiled.function, compiled.packed_metadata, None, None, None, *addresses, *rest)
