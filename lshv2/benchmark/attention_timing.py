"""Times contenders in turn, sample by sample, so that a machine that slows down slows them all alike.

A sample is forward and backward in one go, from an idle device: forward (in training mode, it saves what its backward
needs), backward, and both together. On CUDA device events tell them apart; on a CPU the host clock. Every figure keeps
its samples. Compilation and autotuning are over before: each contender is warmed up first. Where a call takes less than
`warm_below_ms`, one that does not count goes before each sample: contenders take turns, and after the others' the
host's caches hold nothing of this one's, unlike in a model, whose layers call the same operator one after the other.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median, quantiles
from typing import Any

import torch

from lshv2.benchmark.attention_contenders import Contender
from lshv2.profiling import Profiler, region

WARM_UPS = 4  # the third call of a shape may be recorded as a CUDA graph
Sample = dict[str, float]  # milliseconds of forward, backward and both, as far as there are such
Taken = dict[str, list[Sample] | str]  # by contender; a string says in one line why there are none


@dataclass(frozen=True)
class Limits:
    """When a contender has enough samples: at `most`, or after `seconds` of its own time and at least `least`."""

    most: int = 20
    least: int = 5
    seconds: float = 1.5
    warm_below_ms: float = 20.0

    def enough(self, samples: list[Sample]) -> bool:
        spent = sum(max(sample.values()) for sample in samples) / 1e3
        return len(samples) >= self.most or (len(samples) >= min(self.least, self.most) and spent >= self.seconds)


def sample(contender: Contender, device: torch.device, warm: bool = False) -> Sample:
    """One forward and backward, or forward alone, in milliseconds; warm: after one that does not count."""
    with contender.context():
        if warm:
            contender.backward(contender.forward())
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        began = _stamp(device)
        out = contender.forward()
        between = _stamp(device)
        if not contender.inputs:
            return _elapsed(device, forward=(began, between))
        contender.backward(out)
        ended = _stamp(device)
    return _elapsed(device, forward=(began, between), backward=(between, ended), both=(began, ended))


def _stamp(device: torch.device) -> Any:
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _elapsed(device: torch.device, **spans: tuple[Any, Any]) -> Sample:
    """Milliseconds of each span between two stamps."""
    if device.type != "cuda":
        return {part: (end - start) * 1e3 for part, (start, end) in spans.items()}
    torch.cuda.synchronize(device)
    return {part: start.elapsed_time(end) for part, (start, end) in spans.items()}


def measure(contenders: Sequence[Contender], device: torch.device, limits: Limits) -> Taken:
    """Samples by contender. One that fails (out of memory, refused shape) has its reason instead; the others go on."""
    warm = {contender.name: False for contender in contenders}

    def step(contender: Contender) -> Sample:
        taken = sample(contender, device, warm[contender.name])
        warm[contender.name] = max(taken.values()) < limits.warm_below_ms
        return taken

    return in_turn({contender.name: partial(step, contender) for contender in contenders}, limits)


def in_turn(steps: dict[str, Callable[[], Sample]], limits: Limits) -> Taken:
    """Warm every step up, then take a sample of each in turn until each has enough."""
    taken: Taken = {name: [] for name in steps}
    for name, step in steps.items():
        for _ in range(WARM_UPS):
            if isinstance(got := _try(step), str):
                taken[name] = got
                break
    while True:
        waiting = [name for name in steps if isinstance(have := taken[name], list) and not limits.enough(have)]
        if not waiting:
            return taken
        for name in waiting:
            got = _try(steps[name])
            if isinstance(got, str):
                taken[name] = got
            else:
                taken[name].append(got)  # type: ignore[union-attr]


def _try(step: Callable[[], Sample]) -> Sample | str:
    """The step's times, or why it has none: any error of torch or its compilers is this contender's result."""
    try:
        return step()
    except Exception as error:
        gc.collect()
        return reason(error)


def reason(error: Exception) -> str:
    """An exception as one line."""
    first = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return f"{error.__class__.__name__}: {first}"[:300]


def figures(samples: list[Sample]) -> dict[str, Any]:
    """A row's fields: median, 20th and 80th percentile and samples of each part, in milliseconds."""
    fields: dict[str, Any] = {"n_samples": len(samples)}
    for part in samples[0]:
        values = [taken[part] for taken in samples]
        fifths = quantiles(values, n=5, method="inclusive") if len(values) > 1 else [values[0]] * 4
        fields |= {f"{part}_ms": median(values), f"{part}_ms_p20": fifths[0], f"{part}_ms_p80": fifths[3],
                   f"{part}_samples_ms": values}
    return fields


def graph_step(contender: Contender, device: torch.device) -> Callable[[], Sample]:
    """A step that replays forward + backward as one CUDA graph; its sample has `both` alone.

    Warm-up and capture share a side stream, as `torch.cuda.make_graphed_callables` does it.
    """
    stream = torch.cuda.Stream()
    torch.cuda.synchronize(device)
    with contender.context(), torch.cuda.stream(stream):
        for _ in range(3):
            contender.backward(contender.forward())
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    with contender.context(), torch.cuda.graph(graph, stream=stream):
        contender.backward(contender.forward())

    def step() -> Sample:
        torch.cuda.synchronize(device)
        began = _stamp(device)
        graph.replay()
        return _elapsed(device, both=(began, _stamp(device)))

    return step


def peak_memory(contender: Contender, own_bytes: int, device: torch.device) -> dict[str, float]:
    """Peak of forward + backward on a GPU: `peak_mb`, and `extra_memory_ratio`, what is beyond q, k, v, o and their
    four gradients (`own_bytes`) over those bytes. What else is alive (masks, tables) is not the contender's."""
    gc.collect()
    given = sum(x.numel() * x.element_size() for x in (*contender.inputs, contender.grad))
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    sample(contender, device)
    peak = torch.cuda.max_memory_allocated(device) - before + given
    return {"peak_mb": peak / 2**20, "extra_memory_ratio": (peak - own_bytes) / own_bytes}


def breakdown(contender: Contender, device: torch.device, samples: int) -> dict[str, dict[str, float]]:
    """Medians in milliseconds by region of `lshv2.profiling`, forward and backward apart; `other` is in no region."""
    found: dict[str, list[dict[str, float]]] = {"forward": [], "backward": []}
    for _ in range(samples):
        with Profiler(device) as forward, region("other"):
            out = contender.forward()
        with Profiler(device) as backward, region("other"):
            contender.backward(out)
        found["forward"].append(forward.milliseconds())
        found["backward"].append(backward.milliseconds())
    return {part: {name: median(taken.get(name, 0.0) for taken in runs) for name in runs[0]}
            for part, runs in found.items()}
