"""Synthetic long-range sequences: the same few rules at any length, and an answer that is certain.

Each generator gives arrays for n sequences: input_ids and labels, int64 [n, seq_length], and fields of its own. A label
stands at the answer itself (`labels[t] == input_ids[t]`, -100 elsewhere): the model predicts it from the tokens before.
The answer follows its question in input_ids, as in ordinary text.

    recall  k1 v1 k2 v2 | .. .. k2 v2 .. .. .. .. k1 v1 ..     dots: filler; scored: the v after the bar
    copy    0 w w w w w 0 w w w w w                            scored: the second w
    needle  .. .. .. k v .. .. .. .. .. .. .. .. .. .. k v     scored: the last token

`write_synthetic` writes them all as .jsonl. Every (task, split) has a random stream of its own.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from lshv2.config import Settings
from lshv2.data.jsonl import IGNORED
from lshv2.errors import UserError

POWER = 0.99  # P(gap g) is proportional to (g + 1)^-POWER
DEPTHS = 10
CELLS = 1 << 22  # array entries made at a time
SPLITS = ("train", "eval")
TASKS = ("recall", "copy", "needle")

Batch = dict[str, np.ndarray]


def n_values(vocab_size: int) -> int:
    """How many ids are values: V//2 … V-1. Keys are 1 … V//2 - 1."""
    return vocab_size - vocab_size // 2


def chance(task: str, vocab_size: int) -> float:
    """Expected accuracy of guessing among all tokens that can be the answer.

    The recall task has a shortcut above it: guessing among the values shown is right once in n_pairs.
    """
    return 1 / (vocab_size - 1) if task == "copy" else 1 / n_values(vocab_size)


def recall(generator: np.random.Generator, n: int, seq_length: int, n_pairs: int, vocab_size: int) -> Batch:
    """Multi-query associative recall, as HazyResearch/zoology lays it out, answers shown.

    n_pairs = 2, seq_length = 12, vocab_size = 16 (keys 1-7, values 8-15), gaps 1 and 3 (in pairs of tokens):

        input_ids   3 12  5  9 |  4 14   3 12   0  7   5  9
        labels      .  .  .  . |  .  .   . 12   .  .   .  9

    Keys and values of one sequence are distinct. Pair i is asked once, at 2·n_pairs + 2·gaps[i], with the gaps drawn
    without replacement and P(g) ∝ (g + 1)^-0.99: most questions come early, some very late. Filler is uniform over all
    ids but the keys in play, so that no filler asks or contradicts a pair (zoology draws from all ids).
    Chance: 1 / number of values. Fields: gaps [n, n_pairs].
    """
    slots, half = (seq_length - 2 * n_pairs) // 2, vocab_size // 2
    if slots < n_pairs or n_pairs > half - 1:
        raise UserError(f"recall: n_pairs={n_pairs} does not fit seq_length={seq_length} and vocab_size={vocab_size}")
    keys = generator.permuted(np.tile(np.arange(1, half), (n, 1)), axis=1)  # the first n_pairs are in play
    values = generator.permuted(np.tile(np.arange(half, vocab_size), (n, 1)), axis=1)[:, :n_pairs]
    # Gumbel top-k is exactly drawing without replacement, in order of the draws
    scores = generator.gumbel(size=(n, slots)) - POWER * np.log(np.arange(1, slots + 1))
    gaps = np.argsort(-scores, axis=1)[:, :n_pairs]

    allowed = np.concatenate(
        [np.zeros((n, 1), np.int64), np.tile(np.arange(half, vocab_size), (n, 1)), keys[:, n_pairs:]], axis=1
    )
    rows = np.arange(n)[:, None]
    input_ids = allowed[rows, generator.integers(allowed.shape[1], size=(n, seq_length))]
    input_ids[:, 0 : 2 * n_pairs : 2], input_ids[:, 1 : 2 * n_pairs : 2] = keys[:, :n_pairs], values
    questions = 2 * n_pairs + 2 * gaps
    input_ids[rows, questions], input_ids[rows, questions + 1] = keys[:, :n_pairs], values
    labels = np.full_like(input_ids, IGNORED)
    labels[rows, questions + 1] = values
    return {"input_ids": input_ids, "labels": labels, "gaps": gaps}


def copy(generator: np.random.Generator, n: int, seq_length: int, vocab_size: int) -> Batch:
    """Duplication, `0 w 0 w` (Reformer): w is uniform over 1 … V-1 and seq_length / 2 - 1 tokens long.

        input_ids   0  7  2  7  5  0  7  2  7  5
        labels      .  .  .  .  .  .  7  2  7  5

    Chance: 1 / (V - 1).
    """
    if seq_length % 2 or seq_length < 4:
        raise UserError(f"data.synthetic_seq_length={seq_length} must be even and at least 4 (0 w 0 w)")
    word = generator.integers(1, vocab_size, (n, seq_length // 2 - 1))
    half = np.concatenate([np.zeros((n, 1), np.int64), word], axis=1)
    labels = np.full((n, seq_length), IGNORED)
    labels[:, seq_length // 2 + 1 :] = word
    return {"input_ids": np.concatenate([half, half], axis=1), "labels": labels}


def needle(generator: np.random.Generator, n: int, seq_length: int, vocab_size: int) -> Batch:
    """One key and value at a given depth in noise, asked at the end.

    seq_length = 12, depth 2/9, at position round(2/9 · (12 - 4)) = 2:

        input_ids   9 14  3 11  6  0 15  9 12  1  3 11
        labels      .  .  .  .  .  .  .  .  .  .  . 11

    Depths are 0, 1/9 … 1 in turn: 0 is the start, 1 right before the question. Noise is uniform over all ids but the
    key. Keys are 1 … V//2 - 1, values V//2 … V-1. Chance: 1 / number of values. Fields: depth [n].
    """
    if seq_length < 4:
        raise UserError(f"data.synthetic_seq_length={seq_length} must be at least 4 for a needle")
    half = vocab_size // 2
    key, value = generator.integers(1, half, (n, 1)), generator.integers(half, vocab_size, (n, 1))
    input_ids = generator.integers(vocab_size - 1, size=(n, seq_length))
    input_ids += input_ids >= key
    depth = np.arange(n) % DEPTHS / (DEPTHS - 1)
    place = np.rint(depth * (seq_length - 4)).astype(np.int64)[:, None]
    rows = np.arange(n)[:, None]
    pair = np.concatenate([key, value], axis=1)
    input_ids[rows, place + np.arange(2)] = pair
    input_ids[:, -2:] = pair
    labels = np.full_like(input_ids, IGNORED)
    labels[:, -1:] = value
    return {"input_ids": input_ids, "labels": labels, "depth": depth}


def generator_for(seed: int, task: str, split: str) -> np.random.Generator:
    """The random stream of one task and split: no two share one, whatever the seed."""
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(2, TASKS.index(task), SPLITS.index(split))))


def write_synthetic(folder: Path, settings: Settings, on_sequences: Callable[[int], None] = lambda n: None) -> None:
    """Write `<task>_<split>.jsonl` for every task and split into a new folder.

    Sizes: settings.recall for recall; settings.data.synthetic_seq_length and num_synthetic_* for copy and needle, with
    recall's vocabulary. on_sequences: called with the number of sequences just written.
    """
    folder.mkdir(parents=True)
    for task in TASKS:
        for split in SPLITS:
            _write(folder / f"{task}_{split}.jsonl", task, split, settings, on_sequences)


def n_sequences(settings: Settings, task: str, split: str) -> int:
    section, prefix = (settings.recall, "num_%s_sequences") if task == "recall" else (settings.data, "num_synthetic_%s")
    return getattr(section, prefix % split)


def _write(path: Path, task: str, split: str, settings: Settings, on_sequences: Callable[[int], None]) -> None:
    shape: dict[str, Any] = {"vocab_size": settings.recall.vocab_size, "seq_length": settings.data.synthetic_seq_length}
    if task == "recall":
        shape |= {"seq_length": settings.recall.seq_length, "n_pairs": settings.recall.n_pairs}
    makers: dict[str, Callable[..., Batch]] = {"recall": recall, "copy": copy, "needle": needle}
    generator, total = generator_for(settings.seed, task, split), n_sequences(settings, task, split)
    at_once = DEPTHS * max(1, CELLS // max(shape["vocab_size"], shape["seq_length"]) // DEPTHS)  # whole turns of depths
    with open(path, "w", encoding="utf-8") as file:
        for done in range(0, total, at_once):
            batch = makers[task](generator, min(at_once, total - done), **shape)
            for row in zip(*(column.tolist() for column in batch.values()), strict=True):
                record = {"task": task, **dict(zip(batch, row, strict=True))}
                file.write(json.dumps(record, separators=(",", ":")) + "\n")
            on_sequences(len(batch["input_ids"]))
