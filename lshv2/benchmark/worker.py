"""The process that measures one (attention, seq_len, batch_size): `main()`, with a job on standard input.

What is timed: `latency_ms` is `model.eval()`, no gradients, `model(ids, labels=ids).loss`; `train_latency_ms` is
`model.train()`, the loss and its backward, gradients dropped afterwards, no optimizer. `attention_latency_ms` and
`attention_train_latency_ms` are the first block's attention operator alone, of the q, k and v that this input has
there: from them to what is attended, so hashing and sorting too, and with backward to their gradients; no projections.

The first pass of each at the measured length is a warm-up and discarded, unless no second one would fit into the time
limit: a GPU's kernels are compiled in it; on a CPU its memory is touched for the first time, which made a pass of three
seconds half as long again. No further sample is taken once those of a part have used its share of the time limit, or
when the next would not fit into what is left: `n_samples`, `train_n_samples` and so on tell. Dense attention gets the
FASTEST of torch's backends that takes it.

Memory is the meter's peak over the forward + backward passes. `fixed_mb` is the same peak for the same two passes at
TINY tokens: interpreter, libraries, weights, gradients.
"""

from __future__ import annotations

import json
import math
import os
import statistics
import sys
import threading
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from lshv2.benchmark.meter import Meter
from lshv2.benchmark.process import MEMORY_ERROR
from lshv2.block import Block
from lshv2.checkpoint import load_model, read_checkpoint
from lshv2.config import ModelConfig
from lshv2.data.packing import read_stream
from lshv2.layers import rotary_angles
from lshv2.machine import cpu_model
from lshv2.model import LSHModel
from lshv2.trainer import pick_device

TINY = 16  # tokens
SHARE, ATTENTION_SHARE = 1 / 12, 1 / 90  # of the time limit, for the samples of each part
# By their speed on an H200 (`lshv2.benchmark.attention`); torch's own choice is not always the fastest.
FASTEST = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


class Measurement:
    """One job: the model, its input, and what has been measured so far, reported as it comes."""

    def __init__(self, job: dict[str, Any], report: Callable[[dict[str, Any]], None]) -> None:
        self.job, self.report = job, report
        age = time.time() - psutil.Process().create_time()  # the limit counts from the start, imports included
        self.deadline = time.monotonic() + job["timeout_seconds"] - age
        self.device = pick_device()
        self.meter = Meter(self.device)
        self.model = build_model(job).to(self.device)
        half = job["precision"] == "bfloat16" or (job["precision"] == "auto" and self.device.type == "cuda")
        self.dtype = torch.bfloat16 if half else torch.float32
        self.loss = math.nan
        self.medians: dict[str, float] = {}  # milliseconds of each part, by its prefix

    def precision(self) -> torch.autocast:
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def loss_of(self, ids: Tensor) -> Tensor:
        with self.precision():
            return self.model(ids, labels=ids).loss

    @torch.no_grad()
    def forward(self, ids: Tensor) -> None:
        self.loss = float(self.loss_of(ids))

    def forward_backward(self, ids: Tensor) -> None:
        loss = self.loss_of(ids)
        loss.backward()
        self.model.zero_grad(set_to_none=True)
        self.loss = float(loss.detach())

    def run(self) -> None:
        """Everything in order; a limit that strikes ends it with what was reported until then."""
        self.report({
            "device": device_name(self.device), "dtype": str(self.dtype).removeprefix("torch."),
            "threads": torch.get_num_threads(), "parameters": self.model.count_parameters(),
        })
        ids = load_ids(self.job).to(self.device)
        tiny = ids[:1, :TINY].contiguous()
        self.meter.reset_peak()
        for train in (False, True):
            self.model.train(train)
            (self.forward_backward if train else self.forward)(tiny)
        fixed = self.meter.peak_mb()
        self.report({"fixed_mb": round(fixed, 2)})
        limit_mb = self.job["max_memory_gb"] * 1024
        if fixed > limit_mb:
            raise MemoryError(f"libraries and weights alone take {fixed:,.0f} MB of {limit_mb:,.0f}")
        dense = self.model.config.attention == "dense"
        with self.meter.limited(limit_mb / 1024), sdpa_kernel(FASTEST, set_priority=True) if dense else nullcontext():
            peaks = [self._whole("", self.forward, ids), self._whole("train_", self.forward_backward, ids)]
            # Without a resettable peak both readings include what came before: the larger is the peak either way.
            self.report({
                "forward_rss_mb": round(peaks[0], 2), "rss_mb": round(max(peaks), 2),
                "activation_mb": round(max(peaks) - fixed, 2),
            })
            for prefix in ("", "train_"):
                if self._fits(self.medians[prefix]):  # a part of that pass, which cannot take longer
                    self._part(f"attention_{prefix}", self._attention(ids, bool(prefix)), ATTENTION_SHARE)
        self.report({"status": "ok"})

    def _whole(self, prefix: str, step: Callable[[Tensor], None], ids: Tensor) -> float:
        """Time one of the two kinds of pass of the model, report it, and return its peak in MB."""
        self.model.train(bool(prefix))
        self.meter.reset_peak()
        self._part(prefix, lambda: step(ids), SHARE)
        if not math.isfinite(self.loss):
            raise FloatingPointError(f"the loss is {self.loss} at {self.job['seq_len']} tokens")
        self.report({f"{prefix}tokens_per_sec": round(ids.numel() / self.medians[prefix] * 1e3, 2),
                     **({} if prefix else {"loss": round(self.loss, 5)})})
        return self.meter.peak_mb()

    def _attention(self, ids: Tensor, train: bool) -> Callable[[], None]:
        """A pass of the first block's attention operator alone, with its inputs made before."""
        self.model.train(train)
        block, config = self.model.blocks[0], self.model.config
        assert isinstance(block, Block)
        attention, lsh = block.attention, config.attention == "lsh"
        with torch.no_grad(), self.precision():
            hidden = block.attention_norm(self.model.embedding(ids))
            plain_q, plain_k, _ = attention.project(hidden)
            q, k, v, *no_ids = attention.prepare(hidden, *rotary_angles(ids.shape[1], config, self.device))
        hashed = attention.sought((plain_q, plain_k), (q, k))
        inputs = [x.detach().requires_grad_(train) for x in (q, k, v)]
        # not ones: a GPU's power, and with it its clock, follows the bits; laid out in memory as the model's is
        generator = torch.Generator(self.device).manual_seed(self.job["seed"])
        shape = q.transpose(1, 2).shape
        gradient = torch.randn(shape, generator=generator, device=self.device).to(v.dtype).transpose(1, 2)

        def step() -> None:
            with torch.set_grad_enabled(train), self.precision():
                found = attention.hash(*hashed) if lsh else no_ids
                out = attention.attend(*inputs, *found)
            if train:
                torch.autograd.grad(out, inputs, gradient)

        return step

    def _part(self, prefix: str, step: Callable[[], None], share: float) -> None:
        """Time a pass; report its median, spread and samples under this prefix."""
        samples = self._samples(step, share * self.job["timeout_seconds"])
        low, median, high = (float(value) for value in np.quantile(samples, [0.2, 0.5, 0.8]))
        name = f"{prefix}latency"
        self.report({
            f"{name}_ms": round(median, 4), f"{name}_ms_p20": round(low, 4), f"{name}_ms_p80": round(high, 4),
            f"{name}_samples_ms": [round(s, 4) for s in samples], f"{prefix}n_samples": len(samples),
        })
        self.medians[prefix] = median

    def _samples(self, step: Callable[[], None], seconds: float) -> list[float]:
        """Milliseconds of each sample; the module's docstring says when fewer than asked for are taken."""
        first = self.meter.milliseconds(step)
        samples = [] if self._fits(first) else [first]
        while len(samples) < self.job["samples"]:
            if samples and (sum(samples) > seconds * 1e3 or not self._fits(statistics.median(samples))):
                break
            samples.append(self.meter.milliseconds(step))
        return samples

    def _fits(self, milliseconds: float) -> bool:
        """Whether a sample like this would end within the time limit."""
        return self.deadline - time.monotonic() > 1.5e-3 * milliseconds


def device_name(device: torch.device) -> str:
    return f"cuda ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else f"cpu ({cpu_model()})"


def build_model(job: dict[str, Any]) -> LSHModel:
    """The run's model at this job's attention, with the checkpoint's weights if the run has one."""
    model = LSHModel(ModelConfig(**job["model"]), seed=job["seed"])
    model.gradient_checkpoint = job["gradient_checkpoint"]
    if job["checkpoint"]:
        path = Path(job["checkpoint"])
        tensors, _ = read_checkpoint(path)
        if model.config.attention != job["trained_attention"]:  # hash tables: the dense twin has none, or keeps its own
            own = {f"model.{name}": x for name, x in model.state_dict().items()}
            tensors = {name: tensors.get(name, x) for name, x in own.items()}
        load_model(model, tensors, path)
    return model


def load_ids(job: dict[str, Any]) -> Tensor:
    """int64 [batch_size, seq_len]: the run's held-out tokens, repeated if they are too few, else seeded random ids."""
    shape = (job["batch_size"], job["seq_len"])
    if not job["tokens"]:
        generator = torch.Generator().manual_seed(job["seed"])
        return torch.randint(job["model"]["vocab_size"], shape, generator=generator)
    tokens = read_stream(Path(job["tokens"]), job["tokenizer_size"])[: shape[0] * shape[1]]
    return torch.from_numpy(np.resize(tokens, shape).astype(np.int64))


def main() -> None:
    # Whatever a library prints goes to standard error: standard output carries results only.
    results = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)

    def report(record: dict[str, Any]) -> None:
        results.write(json.dumps(record) + "\n")

    job = json.loads(sys.stdin.buffer.readline())
    threading.Thread(target=_die_with_parent, daemon=True).start()
    try:
        Measurement(job, report).run()
    except Exception as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]
        memory = isinstance(error, MemoryError | torch.OutOfMemoryError) or MEMORY_ERROR.search(reason)
        report({"status": "out of memory" if memory else "error", "reason": reason})


def _die_with_parent() -> None:
    """Standard input ends when the benchmark does, however it ends: no orphan goes on using the machine."""
    sys.stdin.buffer.read()
    os._exit(1)
