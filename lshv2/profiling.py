"""Where a training step's time goes: named regions, exclusive of each other, summing to the step.

    profiler = Profiler(device)
    with profiler:                      # makes it the active one
        with region("hashing"):         # anywhere below: library code marks its pieces
            ...
    profiler.milliseconds()             # {"hashing": 1.2, ...}, exclusive: an inner region's time is not its outer's

On a CPU regions are timed by the host clock; on CUDA by device events, read only in `milliseconds()`, so that
nothing synchronises while the step runs. With no active profiler `region` returns one shared null context.
Regions also cover backward passes written by hand (the attention's own), whichever thread runs them.
"""

from __future__ import annotations

import time
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

_NULL: AbstractContextManager[Any] = nullcontext()
_active: Profiler | None = None


class Profiler:
    """Accumulates exclusive time by region name; reentrant regions of one name add up."""

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.cuda = torch.device(device).type == "cuda"
        self._stack: list[str] = []
        self._marks: list[tuple[str | None, Any]] = []  # (region from here on, time stamp)

    def __enter__(self) -> Profiler:
        global _active
        if _active is not None:
            raise RuntimeError("a Profiler is already active: profile one step at a time")
        _active = self
        self._mark()
        return self

    def __exit__(self, *_: object) -> None:
        global _active
        self._mark()
        _active = None

    def push(self, name: str) -> None:
        self._stack.append(name)
        self._mark()

    def pop(self) -> None:
        self._stack.pop()
        self._mark()

    def _mark(self) -> None:
        stamp: Any = time.perf_counter()
        if self.cuda:
            stamp = torch.cuda.Event(enable_timing=True)
            stamp.record()
        self._marks.append((self._stack[-1] if self._stack else None, stamp))

    def milliseconds(self) -> dict[str, float]:
        """Exclusive milliseconds by region; time in no region is left out (the caller compares with the wall clock)."""
        if self.cuda:
            torch.cuda.synchronize()
        total: dict[str, float] = {}
        for (name, start), (_, end) in zip(self._marks, self._marks[1:], strict=False):
            if name is not None:
                elapsed = start.elapsed_time(end) if self.cuda else (end - start) * 1e3
                total[name] = total.get(name, 0.0) + elapsed
        return total


class _Region:
    __slots__ = ("name",)

    def __init__(self, name: str) -> None:
        self.name = name

    def __enter__(self) -> None:
        if _active is not None:
            _active.push(self.name)

    def __exit__(self, *_: object) -> None:
        if _active is not None:
            _active.pop()


def is_profiling() -> bool:
    """Whether a profiler is active."""
    return _active is not None


def region(name: str) -> AbstractContextManager[Any]:
    """Mark a piece of the step; free when nothing is profiled, and nothing where torch.compile traces."""
    return _NULL if torch.compiler.is_compiling() or _active is None else _Region(name)
