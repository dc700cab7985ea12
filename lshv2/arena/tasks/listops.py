"""ListOps (Nangia & Bowman 2018) to the Long Range Arena's definition (Tay et al. 2021): nested operations on digits.

    [MAX 4 3 [MIN 2 3 ] 1 0 ] = 4        scored: the last token, one of ten classes

A tree is a digit with probability .75, else an operation on 2 to 10 trees, down to depth 10; operations are MIN, MAX,
MED (the median, rounded down) and SM (the sum modulo 10). Kept are trees of more than 500 and fewer than 2,000 tokens,
where a digit, an operation and a closing bracket count one each; the closing brackets stand in the sequence.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np

from lshv2.arena.task import ArenaTask, Examples, fits, register
from lshv2.data.jsonl import IGNORED
from lshv2.errors import UserError

OPERATIONS = ("[MIN", "[MAX", "[MED", "[SM")
CLOSE, EQUALS, PAD = 14, 15, 16
WORDS = {**{str(d): d for d in range(10)}, **{name: 10 + i for i, name in enumerate(OPERATIONS)}, "]": CLOSE}
DIGIT, MOST_ARGUMENTS = 0.75, 10
Tree = tuple[list[int], int]  # tokens, value


def apply(operation: int, arguments: list[int]) -> int:
    """The value of an operation, 0 for MIN … 3 for SM, on digits."""
    if operation == 0:
        return min(arguments)
    if operation == 1:
        return max(arguments)
    if operation == 2:
        ordered = sorted(arguments)
        return (ordered[(len(ordered) - 1) // 2] + ordered[len(ordered) // 2]) // 2
    return sum(arguments) % 10


class _TooLong(Exception):
    pass


class _Grower:
    """Grows trees as tokens; uniform numbers come in bulk, for they are most of the time."""

    def __init__(self, generator: np.random.Generator, max_depth: int, most: int) -> None:
        self.generator, self.max_depth, self.most = generator, max_depth, most
        self.stock: Iterator[float] = iter(())
        self.tokens: list[int] = []

    def uniform(self) -> float:
        for value in self.stock:
            return value
        self.stock = iter(self.generator.random(1 << 14).tolist())
        return next(self.stock)

    def grow(self, depth: int = 1) -> None:
        """Append a tree's tokens; raises _TooLong as soon as they cannot be fewer than `most`."""
        if depth >= self.max_depth or self.uniform() < DIGIT:
            self.tokens.append(int(self.uniform() * 10))
        else:
            self.operate(depth)

    def operate(self, depth: int = 1) -> None:
        """The same, of a tree that is an operation."""
        self.tokens.append(10 + int(self.uniform() * 4))
        arguments = 2 + int(self.uniform() * (MOST_ARGUMENTS - 1))
        for left in range(arguments, 0, -1):
            if len(self.tokens) + left + depth >= self.most:  # a token each, and a bracket for each that is open
                raise _TooLong
            self.grow(depth + 1)
        self.tokens.append(CLOSE)


def trees(generator: np.random.Generator, n: int, least: int, most: int, max_depth: int) -> Iterator[Tree]:
    """n trees of least < tokens < most, least >= 1: tokens and value of each."""
    grower = _Grower(generator, max_depth, most)
    while n > 0:
        grower.tokens = []
        with suppress(_TooLong):
            grower.operate()  # a lone digit, three trees of four, is never long enough
            if len(grower.tokens) > least:
                yield grower.tokens, value_of(grower.tokens)
                n -= 1


def value_of(tokens: list[int]) -> int:
    """The value of a tree's tokens; raises ValueError where they are no tree."""
    stack: list[list[int]] = [[]]
    for token in tokens:
        if token < 10:
            stack[-1].append(token)
        elif token < CLOSE:
            stack.append([token])
        elif token == CLOSE and len(stack) > 1 and len(stack[-1]) > 1:
            operation, *arguments = stack.pop()
            stack[-1].append(apply(operation - 10, arguments))
        else:
            raise ValueError(f"token {token} out of place")
    if len(stack) != 1 or len(stack[0]) != 1:
        raise ValueError("a bracket is not closed")
    return stack[0][0]


def laid_out(trees: list[Tree], length: int) -> Examples:
    """`tree = value`, padded at the end to `length` (unseen by a causal model); grouped by the root's operation."""
    ids = np.full((len(trees), length), PAD)
    labels = np.full_like(ids, IGNORED)
    for row, (tokens, value) in enumerate(trees):
        ids[row, : len(tokens) + 2] = [*tokens, EQUALS, value]
        labels[row, len(tokens) + 1] = value
    roots = np.array([OPERATIONS[t - 10].removeprefix("[") if 10 <= t < CLOSE else "none" for t in ids[:, 0]])
    return Examples(ids, labels, {"root": roots})


@register
class ListOps(ArenaTask):
    """At 2,001 tokens and more trees of 500 to 2,000, as the Long Range Arena has them. Chance 1/10.

    Shorter sequences, for a model to begin with, hold trees of a quarter of their length to all of it. A subclass with
    a `source`, one of the Long Range Arena's own .tsv files, is judged by trees of that file.
    """

    name, vocab_size, version = "listops", 17, 2
    LEAST, MOST, MAX_DEPTH = 500, 2000, 10
    min_length, in_processes = 6, True

    def prepare(self, folder: Path) -> None:
        if self.source:
            read_tsv(Path(self.source))  # before anything is trained; it is read again to be judged by

    def draw(self, generator: np.random.Generator, n: int, length: int) -> Examples:
        fits(self, length)
        if self.source and self.split == "eval":
            return laid_out(_some(generator, Path(self.source), n, length), length)
        return laid_out(list(trees(generator, n, *self.bounds(length))), length)

    def bounds(self, length: int) -> tuple[int, int, int]:
        """Fewest tokens, most tokens (both excluded), depth."""
        if length <= self.MOST:
            return length // 4, length - 1, self.MAX_DEPTH
        return self.LEAST, self.MOST, self.MAX_DEPTH

    def chance(self, length: int) -> float:
        return 1 / 10

    def shortcuts(self, examples: Examples) -> dict[str, float]:
        """The most frequent class; that of each root operation; the value of the root operation on the digits right
        below it, and of the two upper levels of operations (where these have no digit, its most frequent class)."""
        answers = examples.answers()[:, 0]
        roots = examples.input_ids[:, 0]
        usual = {root: int(np.bincount(answers[roots == root]).argmax()) for root in np.unique(roots)}
        trees = [row[: row.index(EQUALS)] for row in examples.input_ids.tolist()]

        def reached(levels: int) -> float:
            values = [upper(tree, levels) for tree in trees]
            return float(np.mean([usual[r] if v is None else v for r, v in zip(roots, values, strict=True)] == answers))

        return {
            "the most frequent class": float(np.bincount(answers).max() / len(answers)),
            "the root operation alone": float(np.mean([usual[r] == a for r, a in zip(roots, answers, strict=True)])),
            "the root operation on its own digits": reached(1), "the two upper levels": reached(2),
        }


def _some(generator: np.random.Generator, path: Path, n: int, length: int) -> list[Tree]:
    """n of a file's trees; raises UserError where it has fewer, or one that is too long."""
    trees = read_tsv(path)
    longest = max((len(tokens) for tokens, _ in trees), default=0) + 2
    if len(trees) < n or longest > length:
        raise UserError(f"{path} has {len(trees)} trees of up to {longest:,} tokens; asked: {n} of {length:,}")
    return [trees[i] for i in generator.permutation(len(trees))[:n]]


def upper(tokens: list[int], levels: int) -> int | None:
    """The value of a tree without what lies below `levels` operations; an operation that is left without a digit
    vanishes too: None for a whole tree that does."""
    stack: list[list[int]] = [[]]
    for token in tokens:
        if 10 <= token < CLOSE:
            stack.append([token])
        elif token == CLOSE:
            operation, *arguments = stack.pop()
            if arguments and len(stack) <= levels:
                stack[-1].append(apply(operation - 10, arguments))
        elif len(stack) <= levels + 1:
            stack[-1].append(token)
    return stack[0][0] if stack[0] else None


@register
class LongListOps(ListOps):
    """The same beyond the Long Range Arena: trees of a quarter of the length to all of it, two levels deeper for each
    factor of four over 2,000 tokens."""

    name = "listops_long"

    def bounds(self, length: int) -> tuple[int, int, int]:
        return length // 4, length - 1, self.MAX_DEPTH + max(0, int(np.log2(length / 2000)))


def read_tsv(path: Path) -> list[Tree]:
    """Trees and values of one of the Long Range Arena's own files, columns Source and Target.

    Round brackets, which only show how the tree was parsed, are dropped. Raises UserError naming file and line.
    """
    read: list[Tree] = []
    try:
        with open(path, encoding="utf-8", newline="") as file:
            reader = csv.DictReader(file, delimiter="\t")
            if not {"Source", "Target"} <= set(reader.fieldnames or ()):
                raise UserError(f"{path}: line 1 has no columns Source and Target: give one of the LRA's .tsv files")
            for number, record in enumerate(reader, 2):
                try:
                    tokens = [WORDS[word] for word in record["Source"].split() if word not in "()"]
                    value = int(record["Target"])
                    if value_of(tokens) != value:
                        raise ValueError(f"Target is {value}, the tree's value {value_of(tokens)}")
                except (KeyError, ValueError, AttributeError, TypeError) as error:
                    raise UserError(f"{path}: line {number} is no ListOps tree: {error}") from None
                read.append((tokens, value))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    return read
