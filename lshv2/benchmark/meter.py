"""Clock, peak memory and memory limit of one device, for the process that measures.

Peak memory is that of the process's resident set on a CPU (VmHWM, reset before each part where the kernel allows,
else the largest so far; elsewhere than on Linux `ru_maxrss`), of torch's allocator on a GPU.

The limit: on a CPU RLIMIT_AS, which makes the allocation that passes it fail cleanly. It counts address space,
reserved or not (libraries, thread arenas), so it is to be set after a tiny warm-up, when those are mapped, and is
max_memory_gb + (mapped − resident). On a GPU the allocator's own fraction; RLIMIT_AS would break CUDA's reservations.

On a GPU a sample begins with an idle device whose L2 cache holds nothing of the sample before: a buffer of twice its
size is written over first, outside the events. Short inputs would else be found in the cache and long ones not, which
bends a curve of time by length. The buffer is neither in the peak nor in the limit.
"""

from __future__ import annotations

import contextlib
import gc
import resource
import sys
import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

BLOCK = 2 << 20  # what the allocator rounds large tensors to: such a one weighs what it says


class Meter:
    """Clock, peak memory and memory limit of one device."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.cuda = device, device.type == "cuda"
        self.over_cache: Tensor | None = None
        if self.cuda:
            cache = torch.cuda.get_device_properties(device).L2_cache_size
            self.over_cache = torch.empty((2 * cache // BLOCK + 1) * BLOCK, dtype=torch.int8, device=device)

    @property
    def own_bytes(self) -> int:
        """Device memory that the meter itself holds."""
        return 0 if self.over_cache is None else self.over_cache.numel()

    def milliseconds(self, step: Callable[[], None]) -> float:
        if self.over_cache is None:
            began = time.perf_counter()
            step()
            return (time.perf_counter() - began) * 1e3
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.over_cache.zero_()
        torch.cuda.synchronize()
        start.record()
        step()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end)

    def reset_peak(self) -> None:
        gc.collect()
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
            return
        with contextlib.suppress(OSError), open("/proc/self/clear_refs", "w") as file:
            file.write("5")  # VmHWM = VmRSS

    def peak_mb(self) -> float:
        if self.cuda:
            return (torch.cuda.max_memory_allocated() - self.own_bytes) / 2**20
        peak = _status_kb("VmHWM")
        if peak is not None:
            return peak / 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 1024)

    @contextlib.contextmanager
    def limited(self, max_memory_gb: float) -> Iterator[None]:
        """Within, allocations beyond the limit raise."""
        if self.cuda:
            total = torch.cuda.get_device_properties(self.device).total_memory
            torch.cuda.set_per_process_memory_fraction(min(1.0, (max_memory_gb * 2**30 + self.own_bytes) / total))
            yield
            return
        mapped, resident = _status_kb("VmSize"), _status_kb("VmRSS")
        soft, hard = resource.getrlimit(resource.RLIMIT_AS)
        if mapped is not None and resident is not None:
            wanted = int(max_memory_gb * 2**30) + (mapped - resident) * 1024
            resource.setrlimit(resource.RLIMIT_AS, (wanted if hard == -1 else min(wanted, hard), hard))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_AS, (soft, hard))  # reporting needs memory too


def _status_kb(key: str) -> int | None:
    """A field of /proc/self/status in kB; None where there is no such file."""
    try:
        with open("/proc/self/status") as file:
            return next((int(line.split()[1]) for line in file if line.startswith(f"{key}:")), None)
    except OSError:
        return None
