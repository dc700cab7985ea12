"""Judging a trained model at one length: the value of its metric, by group, against chance and shortcuts."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lshv2.arena.learn import JUDGING, autocast, generator, to_device
from lshv2.arena.task import ArenaTask, Examples
from lshv2.benchmark.meter import Meter
from lshv2.data.jsonl import IGNORED
from lshv2.model import LSHModel

TOKENS = 1 << 17  # a batch has at most this many, or is one sequence
SHORTCUTS = 1000  # sequences that shortcuts are tried on, at most


@torch.no_grad()
def judge(
    model: LSHModel, task: ArenaTask, length: int, sequences: int, device: torch.device, seed: int = 0
) -> dict[str, Any]:
    """`metric value chance shortcuts by scored sequences peak_mb` of sequences that no training saw.

    The sequences depend on (seed, length) alone (of a paired task on the seed), so that all models and seeds of a study
    are asked the same.
    peak_mb: the device's, model and batch included (`arena.cost` has one sequence's). Raises ValueError where sequences
    have different numbers of answers.
    """
    model.eval()
    meter = Meter(device)
    meter.reset_peak()
    outcomes, groups, seen = [], [], []
    for examples in _batches(task, length, sequences, seed):
        ids, labels = (to_device(x, device) for x in (examples.input_ids, examples.labels))
        counts = (examples.labels[:, 1:] != IGNORED).sum(1)
        if counts.min() != counts.max():
            raise ValueError(f"{task.name}: {counts.min()} to {counts.max()} answers a sequence; all need as many")
        answers = _answer(model, ids, labels, task, device)
        outcome, steps = (x.float().cpu().numpy().astype(np.float64).reshape(len(ids), -1) for x in answers)
        extra = {"ponder_step": steps.astype(np.int64)} if model.config.use_ponder else {}
        outcomes.append(outcome)
        groups.append({**examples.groups, **extra})
        seen.append(examples)
    values = np.concatenate(outcomes)
    named = {name: np.concatenate([group[name] for group in groups]) for name in groups[0]}
    chance = task.chance(length)
    per_sequence = values.all(1, keepdims=True).astype(float) if task.exact else values
    by = _by(named, values, per_sequence, task)
    value, scored = _mean(per_sequence, task), int(values.size)
    if task.headline:
        group, label = task.headline
        value, scored = by[group][label], int(np.sum(named[group] == label))
    return {
        "metric": task.metric, "value": value, "chance": None if chance is None else float(chance),
        "shortcuts": {name: float(reached) for name, reached in task.shortcuts(_joined(seen)).items()}, "by": by,
        "scored": scored, "sequences": len(values), "peak_mb": round(meter.peak_mb(), 1),
        **({"by_token": float(values.mean())} if task.exact else {}),
    }


def asked(task: ArenaTask, length: int, sequences: int, seed: int = 0) -> Examples:
    """What is judged at a length: of a paired task the same stream at every length."""
    return task.draw(generator(seed, JUDGING, 0 if task.paired else length), sequences, length)


def _batches(task: ArenaTask, length: int, sequences: int, seed: int) -> Iterator[Examples]:
    """`sequences` of them, some at a time; depths and the like come in whole turns of ten where they fit."""
    size = max(1, TOKENS // length)
    size = size // 10 * 10 or size
    everything = asked(task, length, sequences, seed)
    for at in range(0, sequences, size):
        part = slice(at, at + size)
        yield Examples(everything.input_ids[part], everything.labels[part],
                       {name: group[part] for name, group in everything.groups.items()})


def _answer(
    model: LSHModel, ids: Tensor, labels: Tensor, task: ArenaTask, device: torch.device
) -> tuple[Tensor, Tensor]:
    """For each answer in order: whether it is the most likely token (or its nats), and its ponder steps."""
    asked = labels[:, 1:] != IGNORED
    with autocast(device):
        out = model(ids, labels=labels)
        assert out.cross_entropy is not None
        steps = out.ponder_steps[:, :-1][asked]
        if task.metric == "bits_per_byte":
            return out.cross_entropy[:, 1:][asked], steps
        states = out.hidden[:, :-1][asked]
        likely = torch.cat([(h @ out.head.to(h.dtype).T).argmax(-1) for h in states.split(4096)])
    return likely == labels[:, 1:][asked], steps


def _mean(values: np.ndarray, task: ArenaTask) -> float:
    return float(values.mean()) / (math.log(2) if task.metric == "bits_per_byte" else 1.0)


def _by(
    groups: dict[str, np.ndarray], values: np.ndarray, per_sequence: np.ndarray, task: ArenaTask
) -> dict[str, dict[str, float]]:
    """Group -> label -> mean. A group [n] is of sequences, [n, answers] of answers."""
    result: dict[str, dict[str, float]] = {}
    for name, labels in groups.items():
        whole = labels.ndim == 1 and task.exact
        of = per_sequence if whole else values
        wide = np.broadcast_to(labels.reshape(len(labels), -1), of.shape)
        result[name] = {str(label): _mean(of[wide == label], task) for label in np.unique(wide)}
    return result


def _joined(seen: list[Examples]) -> Examples:
    ids, labels = (np.concatenate([getattr(e, name) for e in seen])[:SHORTCUTS] for name in ("input_ids", "labels"))
    names = seen[0].groups
    groups = {name: np.concatenate([np.asarray(e.groups[name]) for e in seen])[:SHORTCUTS] for name in names}
    return Examples(ids, labels, groups)
