"""What an arena task is, and how one of your own is added.

A task draws sequences of any length from a numpy generator, with the answers in place. One of your own is a file with
a registered class:

    from lshv2.arena.task import ArenaTask, Examples, register

    @register
    class LastToken(ArenaTask):
        name, vocab_size = "last_token", 64

        def draw(self, generator, n, length): ...
            return Examples(input_ids, labels)

A label stands at the answer itself (`labels[t] == input_ids[t]`, IGNORED elsewhere): the model predicts it from the
tokens before, and the answer follows its question, as in ordinary text. While a model learns (`split == "train"`) a
task may ask more, and what the sequence does not say. Nothing here needs torch.
"""

from __future__ import annotations

import inspect
import re
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import numpy as np

from lshv2.data.jsonl import IGNORED
from lshv2.errors import UserError


@dataclass(frozen=True)
class Examples:
    """input_ids, labels int64 [n, length]; groups: by what accuracy is broken down, name -> label of each answer.

    A group is [n], one label a sequence, or [n, answers] in the order of the answers, of which every sequence then has
    as many. Labels are numbers or strings.
    """

    input_ids: np.ndarray
    labels: np.ndarray
    groups: dict[str, np.ndarray] = field(default_factory=dict)

    def answers(self) -> np.ndarray:
        """The answers, row by row: int64 [n, answers]; every sequence has as many."""
        scored = self.labels != IGNORED
        return self.labels[scored].reshape(len(self.labels), -1)


class ArenaTask(ABC):
    """One task. Its class attributes describe it; `draw` makes sequences.

    exact: a sequence counts as right only when all its answers are. min_length: shorter sequences do not fit.
    metric: "accuracy", or "bits_per_byte", of which less is better. version: raised whenever the sequences change, so
    that models of earlier ones are trained and judged anew; so do another `source`, what the sequences are made of (a
    relative path begins at the folder of the class's file), and another `code`, what a plugin's file was as it was
    loaded. in_processes: drawing is Python rather than numpy, so that
    training draws in processes instead of threads. like: the task whose recipe it learns by, unless `recipes.RECIPES`
    has one under its own name. paired: all lengths are drawn by the same random numbers. headline: the group and the
    label whose mean is the value; None: all answers.
    """

    name: ClassVar[str]
    vocab_size: ClassVar[int]
    exact: ClassVar[bool] = False
    min_length: ClassVar[int] = 8
    metric: ClassVar[str] = "accuracy"
    version: ClassVar[int] = 1
    in_processes: ClassVar[bool] = False
    source: ClassVar[str | None] = None
    code: ClassVar[str] = ""
    like: ClassVar[str] = ""
    paired: ClassVar[bool] = False
    headline: ClassVar[tuple[str, str] | None] = None
    split: str = "eval"  # what is drawn from, where there is a corpus: "train" while a model learns

    @abstractmethod
    def draw(self, generator: np.random.Generator, n: int, length: int) -> Examples:
        """n sequences of `length` tokens; raises UserError where they do not fit."""

    def chance(self, length: int) -> float | None:
        """Expected accuracy of guessing among all tokens that can be the answer; None: there is no such thing."""
        return None

    def shortcuts(self, examples: Examples) -> dict[str, float]:
        """What can be had without solving the task: name -> accuracy on these examples."""
        return {}

    def prepare(self, folder: Path) -> None:  # noqa: B027 - most tasks have nothing to prepare
        """Make what `draw` reads, below `folder`, once: a changed plugin gets another. Raises UserError on unusable
        sources."""


REGISTERED: dict[str, type[ArenaTask]] = {}


def register(task: type[ArenaTask]) -> type[ArenaTask]:
    """Make a task known by its name; a class decorator. The later one of two of one name counts.

    Raises UserError where the class lacks what a task must have.
    """
    name, size = str(getattr(task, "name", "")), getattr(task, "vocab_size", None)
    lacking = [what for what, there in (
        ("a name of letters, digits, '.', '_' and '-'", re.fullmatch(r"[\w.-]+", name)),
        ("a vocab_size of 1 or more", isinstance(size, int) and size > 0),
        ("a method draw(generator, n, length)", not inspect.isabstract(task)),
    ) if not there]
    if lacking:
        raise UserError(f"class {task.__name__} is no task yet: it needs {' and '.join(lacking)}")
    REGISTERED[task.name] = task
    return task


def fits(task: ArenaTask, length: int) -> None:
    """Raise UserError when sequences are too short for the task."""
    if length < task.min_length:
        raise UserError(f"{task.name}: {length} tokens are too few, {task.min_length} at least")


def octave(distance: np.ndarray) -> np.ndarray:
    """Which power of two begins a distance's octave, as labels such as "4096-8191"."""
    exponents = np.floor(np.log2(np.maximum(distance, 1))).astype(np.int64)
    names = np.array([f"{1 << e}-{(2 << e) - 1}" for e in range(int(exponents.max(initial=0)) + 1)])
    return names[exponents]


def most_common(values: np.ndarray, size: int) -> np.ndarray:
    """The most frequent value of each row: int [n, m] in [0, size) -> int64 [n]."""
    rows = np.arange(len(values))[:, None] * size + values
    return np.bincount(rows.ravel(), minlength=len(values) * size).reshape(len(values), size).argmax(1)
