"""One job of a study: train a variant from its seed, evaluate it, look into its lookups; the result is one row.

The step is the product's own (`Trainer`): optimizer, schedule, clipping, precision and codebook updates. Its `fit` is
not used: loading, evaluating, logging and saving on the way cost more than these small models' training, and none of
that is asked for here. What remains is a loop that never waits for the device but to see that the loss is finite.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from lshv2.ablation.depth import depth_figures
from lshv2.ablation.heads import TwoWayAttention, attentions, build_model
from lshv2.ablation.lookup import measure_layers
from lshv2.ablation.material import Material, in_order, load, tails
from lshv2.ablation.variants import CUT, VARIANTS, Job
from lshv2.attention import choose_backend
from lshv2.backbone import NEVER
from lshv2.batches import Task
from lshv2.evaluation import evaluate
from lshv2.losses import IGNORE
from lshv2.machine import git_state
from lshv2.runs import Run
from lshv2.trainer import Trainer, pick_device

CHECK_EVERY = 100  # steps between looks at the loss
WARM_STEPS = 20  # not timed: allocators, autotuning
EVAL_TOKENS = 1 << 15  # a batch of evaluation
LOOKUPS, QUERIES = 8, 32  # sequences looked into, and queries of each


def run_job(job: Job, data: Path, alone: bool = True) -> dict[str, Any]:
    """Train and evaluate; needs `material.prepare(data, job)`. alone: whether nothing else runs on the device, without
    which `step_ms` is None. Raises FloatingPointError when the loss diverges, RuntimeError where the attention would
    be too slow to be worth a GPU."""
    began = time.perf_counter()
    device, settings, depth = pick_device(), job.settings(), job.task.startswith("depth")
    material = load(data, job, device)
    model = build_model(settings, VARIANTS[job.variant])
    train = settings.train
    task = Task(
        job.task, material.train, material.train, train.batch_size, 1, train.learning_rate, 1, material.token_bytes
    )
    trainer = Trainer(Run(data, settings), task, model)
    backend = _backend(trainer, job)
    if (backend, device.type) == ("torch", "cuda"):
        raise RuntimeError(f"{job.task}: plain-torch tiles take seconds a step on a GPU; this study needs the kernels")
    loaded = time.perf_counter()
    losses, step_ms = _train(trainer, material, device, VARIANTS[job.variant].first)
    trained = time.perf_counter()
    if depth:
        model.config = model.config.model_copy(update={"ponder_threshold": NEVER})
    row = {
        "variant": job.variant, "task": job.task, "seed": job.seed, "steps": trainer.step,
        **(_recall if job.task.startswith("recall") else _language)(trainer, material),
        **(depth_figures(trainer, material) if depth else {}),
        "layers": [] if depth else measure_layers(model, _samples(job, material, device), trainer.autocast),
        "loss_train": losses, "step_ms": step_ms if alone else None, "backend": backend,
        "parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu", **git_state(),
        "peak_mb": round(torch.cuda.max_memory_allocated() / 2**20) if device.type == "cuda" else None,
        "train_seconds": round(trained - loaded, 2), "seconds": round(time.perf_counter() - began, 2),
        "settings": job.overrides(),
    }
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    return row


def _train(
    trainer: Trainer, material: Material, device: torch.device, first: int
) -> tuple[list[float], float | None]:
    """Every step of one epoch, the first half in windows of `first` tokens unless that is 0; (20 means of the training
    loss, median milliseconds a step)."""
    order = torch.from_numpy(material.order).to(device)
    trainer.model.train()
    losses: list[Tensor] = []
    marks: list[Any] = []
    for rows in order.split(trainer.task.batch_size)[: trainer.total_steps]:
        input_ids, labels = material.train.batch(rows)
        if first and 2 * trainer.step < trainer.total_steps:
            input_ids, labels = input_ids.view(-1, first), labels.view(-1, first)
        loss, _, _ = trainer._train_step(input_ids, labels)
        losses.append(loss)
        marks.append(_mark(device))
        if trainer.step % CHECK_EVERY == 0 or trainer.step == trainer.total_steps:
            trainer._check_finite(loss.item(), 0.0)
    timed = marks[min(WARM_STEPS, len(marks) - 2) :] if len(marks) > 1 else []
    gaps = [_between(a, b) for a, b in zip(timed, timed[1:], strict=False)]
    curve = [part.mean().item() for part in torch.stack(losses).tensor_split(min(20, len(losses)))]
    return curve, round(median(gaps), 3) if gaps else None


def _mark(device: torch.device) -> Any:
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _between(first: Any, second: Any) -> float:
    """Milliseconds; of events, after the device is done with both."""
    return (second - first) * 1e3 if isinstance(first, float) else first.elapsed_time(second)


def _language(trainer: Trainer, material: Material) -> dict[str, float]:
    """Bits per byte of held-out text, over all positions and over the second half of each window; of windows longer
    than `CUT` also over the last CUT / 2 positions (`tail_…`), and over the same with CUT tokens in view (`…_cut`)."""
    length, data = trainer.settings.seq_length, material.evaluations["1x"]
    size = max(1, EVAL_TOKENS // length)
    asked = {"bits_per_byte": in_order(data, size), "late_bits_per_byte": in_order(data, size, length // 2)}
    if length > CUT:
        asked["tail_bits_per_byte"] = tails(in_order(data, size), length, CUT // 2)
        asked["tail_bits_per_byte_cut"] = tails(in_order(data, size), CUT, CUT // 2)
    row = {}
    for name, batches in asked.items():
        result = evaluate(trainer.model, batches, trainer.autocast, material.token_bytes)
        assert result.bits_per_byte is not None
        row[name] = result.bits_per_byte
    return row


def _recall(trainer: Trainer, material: Material) -> dict[str, float]:
    """Accuracy at each length, and of the questions asked past the training length (`far_accuracy_2x` …)."""
    trained, row = trainer.settings.seq_length, {}
    for name, data in material.evaluations.items():
        length = data.batch(torch.zeros(1, dtype=torch.long))[0].shape[1]
        for label, hidden in (("accuracy", 0), ("far_accuracy", trained)):
            if hidden < length:
                batches = in_order(data, max(1, EVAL_TOKENS // length), hidden)
                row[f"{label}_{name}"] = evaluate(trainer.model, batches, trainer.autocast).accuracy
    return row


def _samples(job: Job, material: Material, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    """Queries to look into: anywhere in the second half of text; recall's questions past the training length."""
    data = list(material.evaluations.values())[-1]
    generator = torch.Generator().manual_seed(0)  # the same queries for all variants and seeds
    language = job.task.startswith("language")
    for row in range(min(len(data), LOOKUPS if language else LOOKUPS * QUERIES)):
        input_ids, labels = data.batch(torch.tensor([row]))
        length = input_ids.shape[1]
        if language:
            at = torch.randperm(length // 2, generator=generator)[:QUERIES] + length // 2
        else:  # the answer is predicted one position before it stands
            at = (labels[0] != IGNORE).nonzero()[:, 0].cpu() - 1
            at = at[at >= job.length]
        if len(at):
            yield input_ids, at.to(device)


def _backend(trainer: Trainer, job: Job) -> str:
    """What computed the attention while training; times of a T×T mask say nothing about LSH attention."""
    config, dtype = trainer.model.config, trainer.autocast_dtype or torch.float32
    if isinstance(attentions(trainer.model)[0], TwoWayAttention):
        return "emulated"
    if config.attention == "dense":
        return "sdpa"
    q = torch.empty(1, device=trainer.device, dtype=dtype)
    return choose_backend(q.expand(trainer.settings.batch_size, config.n_heads, job.length, config.head_dim))
