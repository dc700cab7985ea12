"""Sequences drawn on trial, before anything is trained: what cannot be learnt from or judged is said then.

    try_draws(jobs, folder / "arena")

Nothing is kept, and nothing here needs torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lshv2.arena.registry import get_task
from lshv2.arena.study import Job, workplace
from lshv2.arena.task import ArenaTask, Examples
from lshv2.data.jsonl import IGNORED
from lshv2.errors import UserError

TRAINED = 8  # sequences of a trained length, at most; of a judged one as many as will be


def try_draws(jobs: Sequence[Job], folder: Path | None) -> None:
    """Draw once what the jobs will read; raises UserError with the task, the length and what is wrong there.

    folder: where tasks prepare what they draw from; None: those that prepare something are left out. A length that a
    `source` does not have is no mistake where it has another one: its row will say so.
    """
    for name in dict.fromkeys(job.task for job in jobs):
        task, of = get_task(name), [job for job in jobs if job.task == name]
        if folder is not None:
            task.prepare(workplace(folder, task))
        elif type(task).prepare is not ArenaTask.prepare:
            continue
        task.split = "train"
        for length in sorted({n for job in of for n in job.recipe.lengths}):
            _draw(task, min(TRAINED, max(1, of[0].recipe.tokens // length)), length)
        task.split = "eval"
        lacking, lengths, rules = list[UserError](), sorted({n for job in of for n in job.lengths}), True
        for length in lengths:
            try:
                _draw(task, max(job.recipe.sequences for job in of), length, rules)
                rules = False  # of the first length that there is
            except _Lacking as error:
                lacking.append(UserError(str(error)))
        if lacking and (not task.source or len(lacking) == len(lengths)):
            raise lacking[0]


class _Lacking(Exception):
    """What a task's own `draw` says of a length."""


def _draw(task: ArenaTask, n: int, length: int, rules: bool = False) -> None:
    """rules: ask for the shortcuts too, which take their time on long sequences."""
    purpose = "learn" if task.split == "train" else "judge"
    where = f"arena: {task.name}, {n} sequences of {length:,} tokens to {purpose} by"
    try:
        examples = task.draw(np.random.default_rng(0), n, length)
    except UserError as error:
        if task.split == "train":
            raise UserError(f"{where}: {error}") from None
        raise _Lacking(f"{where}: {error}") from None
    except Exception as error:  # a person's own code
        raise UserError(f"{where}: draw raised {type(error).__name__}: {error}") from error
    if problem := _problem(task, examples, n, length):
        raise UserError(f"{where}: {problem}")
    if task.split == "eval" and (problem := _levels(task, examples if rules else None, length)):
        raise UserError(f"{where}: {problem}")


def _problem(task: ArenaTask, examples: object, n: int, length: int) -> str | None:
    """What is wrong with the examples, and the bound it breaks."""
    if not isinstance(examples, Examples):
        return f"draw gave {type(examples).__name__}, not Examples(input_ids, labels, groups)"
    for what, x in (("input_ids", examples.input_ids), ("labels", examples.labels)):
        if not (isinstance(x, np.ndarray) and np.issubdtype(x.dtype, np.integer) and x.shape == (n, length)):
            found = f"{x.dtype} {list(x.shape)}" if isinstance(x, np.ndarray) else type(x).__name__
            return f"{what} are {found}, not a numpy array of whole numbers [{n}, {length}]"
    scored = examples.labels[:, 1:] != IGNORED  # nothing is before the first token
    for what, x in (("input_ids", examples.input_ids), ("labels", examples.labels[:, 1:][scored])):
        if x.size and not 0 <= x.min() <= x.max() < task.vocab_size:
            return f"{what} go from {x.min()} to {x.max()}, beyond 0 to {task.vocab_size - 1} (vocab_size)"
    others = scored & (examples.labels != examples.input_ids)[:, 1:]
    if task.split == "eval" and others.any():
        row, at = (int(place[0]) for place in others.nonzero())
        label, there = examples.labels[row, at + 1], examples.input_ids[row, at + 1]
        return (f"{others.sum():,} of {scored.sum():,} labels are not what stands there, first at [{row}, {at + 1}]: "
                f"{label}, and input_ids {there}; a label stands at the answer itself, {IGNORED} elsewhere")
    counts = scored.sum(1)
    if not counts.any():
        return f"no answers: every label after the first is {IGNORED}"
    if task.split == "train":
        return None
    if counts.min() != counts.max():
        return f"{counts.min()} to {counts.max()} answers a sequence; all need as many"
    for name, group in examples.groups.items():
        if np.shape(group) not in ((n,), (n, counts[0])):
            return f"group {name!r} is {list(np.shape(group))}, not [{n}] (sequences) or [{n}, {counts[0]}] (answers)"
    if task.headline and task.headline[0] not in examples.groups:
        return f"headline is of a group {task.headline[0]!r}; there are: {', '.join(examples.groups) or 'none'}"
    return None


def _levels(task: ArenaTask, examples: Examples | None, length: int) -> str | None:
    """What is wrong with chance, or with the shortcuts on these examples: else asked for only when models are there."""
    most, what = 1.0 if task.metric == "accuracy" else np.inf, "chance"
    try:
        said: dict[str, Any] = {"": task.chance(length)}
        if examples is not None:
            what = "shortcuts"
            said |= {f" {name!r}": value for name, value in task.shortcuts(examples).items()}
    except Exception as error:  # a person's own code
        return f"{what} raised {type(error).__name__}: {error}"
    for name, value in said.items():
        if value is None and not name:  # there is no such thing
            continue
        number = isinstance(value, int | float | np.number) and not isinstance(value, bool)
        if not (number and np.isfinite(value) and 0 <= value <= most):
            bound = "0 to 1" if most == 1 else "0 or more"
            return f"{'shortcut' + name if name else 'chance'} is {value!r}, no {task.metric} of {bound}"
    return None
