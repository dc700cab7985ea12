"""What a study's models read, prepared once a machine and kept on the device: no loader, no copy a step.

    folder = prepare(path, job)              # the files that a task needs
    material = load(folder, job, device)     # material.train, material.evaluations

Text is split, tokenized and cut into windows by `lshv2.data`, with seed 0 for all seeds of a study: they differ in
weights and order, never in the held-out documents. Recall's evaluation sequences are the same for all seeds too.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from lshv2.ablation.variants import BYTE_VOCABULARY, RECALL_LENGTHS, Job
from lshv2.data import PackedDataset, ensure, epoch_order, load_token_bytes
from lshv2.data.synthetic import generator_for, recall
from lshv2.evaluation import Batch
from lshv2.losses import IGNORE
from lshv2.runs import Run, atomic_path, open_run

AT_ONCE = 4096  # recall sequences drawn at a time


class Sequences(torch.utils.data.Dataset[Batch]):
    """Batches as tensors on the device. `order`: rows in reading order; a batch is the next `size` of them."""

    def __len__(self) -> int:
        raise NotImplementedError

    def batch(self, rows: Tensor) -> Batch:
        """rows int64 [B] -> (input_ids, labels), int64 [B,T]."""
        raise NotImplementedError


class Windows(Sequences):
    """Windows of `length` tokens into a stream: tokens [tokens] of a small type, starts [windows]."""

    def __init__(self, tokens: Tensor, starts: Tensor, length: int) -> None:
        self.tokens, self.starts = tokens, starts
        self.offsets = torch.arange(length, device=tokens.device)

    def __len__(self) -> int:
        return len(self.starts)

    def batch(self, rows: Tensor) -> Batch:
        ids = self.tokens[self.starts[rows][:, None] + self.offsets].long()
        return ids, ids


class Rows(Sequences):
    """Whole sequences: both [sequences, T]."""

    def __init__(self, input_ids: Tensor, labels: Tensor) -> None:
        self.input_ids, self.labels = input_ids, labels

    def __len__(self) -> int:
        return len(self.input_ids)

    def batch(self, rows: Tensor) -> Batch:
        return self.input_ids[rows].long(), self.labels[rows].long()


def in_order(data: Sequences, size: int, hidden: int = 0) -> Iterator[Batch]:
    """`size` sequences at a time; the first `hidden` positions are not scored."""
    for start in range(0, len(data), size):
        input_ids, labels = data.batch(torch.arange(start, min(start + size, len(data))))
        if hidden:
            labels = labels.clone()
            labels[:, :hidden] = IGNORE
        yield input_ids, labels


def tails(batches: Iterable[Batch], context: int, scored: int) -> Iterator[Batch]:
    """The last `scored` positions of each sequence, seen after no more than its last `context` tokens."""
    for input_ids, labels in batches:
        labels = labels[:, -context:].clone()
        labels[:, :-scored] = IGNORE
        yield input_ids[:, -context:], labels


@dataclass(frozen=True)
class Material:
    """train; evaluations by name (language: `1x`; recall: `1x` … `8x`); token_bytes [V] of text, else None."""

    train: Sequences
    evaluations: Mapping[str, Sequences]
    token_bytes: Tensor | None
    order: np.ndarray  # rows of train, in the order of reading


def text_run(folder: Path, job: Job) -> Run:
    """The prepared text: nothing synthetic with it, which would take most of the time."""
    least = {
        "model.vocab_size": BYTE_VOCABULARY, "recall.num_train_sequences": 1, "recall.num_eval_sequences": 1,
        "data.num_synthetic_train": 1, "data.num_synthetic_eval": 1, "data.synthetic_seq_length": 8,
        "train.seq_length": 256, "train.num_train_sequences": 1, "train.num_eval_sequences": 1,
    }
    given = {name: value for name, value in job.extra if name.startswith("data.")}
    return open_run((folder / "text").resolve(), preset="full", overrides={**least, **given})


def prepare(folder: Path, job: Job) -> None:
    """Make what `load` needs below `folder`, unless it is there. Raises UserError on unusable sources."""
    if not job.task.startswith("recall"):
        ensure(text_run(folder, job))


def load(folder: Path, job: Job, device: torch.device) -> Material:
    """The job's sequences on the device."""
    settings = job.settings()
    train = settings.train
    order = epoch_order(train.num_train_sequences, 0, job.seed)
    if not job.task.startswith("recall"):
        run = text_run(folder, job)
        windows = _windows(run, job, "train", device), _windows(run, job, "eval", device)
        return Material(windows[0], {"1x": windows[1]}, torch.from_numpy(load_token_bytes(run)).to(device), order)
    shape = (settings.recall.n_pairs, settings.model.vocab_size)
    longer = {f"{n}x": (n * train.seq_length, train.num_eval_sequences) for n in RECALL_LENGTHS}
    evaluations = {name: _recall(folder, 0, "eval", n, length, *shape, device) for name, (length, n) in longer.items()}
    rows = _recall(folder, job.seed, "train", train.num_train_sequences, train.seq_length, *shape, device)
    return Material(rows, evaluations, None, order)


def _windows(run: Run, job: Job, split: Literal["train", "eval"], device: torch.device) -> Windows:
    train = job.settings().train
    packed = PackedDataset(
        run.data / f"{split}.bin", vocab_size=BYTE_VOCABULARY, seq_length=train.seq_length,
        n_sequences=getattr(train, f"num_{split}_sequences"), seed=job.seed, split=split,
    )
    return Windows(_stream(packed.path, device), torch.from_numpy(packed.starts).to(device), train.seq_length)


@lru_cache(maxsize=2)
def _stream(path: Path, device: torch.device) -> Tensor:
    """All tokens of a split on the device, int16: a byte vocabulary."""
    return torch.from_numpy(np.fromfile(path, "<u2").astype(np.int16)).to(device)


def _recall(
    folder: Path, seed: int, split: str, n: int, length: int, n_pairs: int, vocab_size: int, device: torch.device
) -> Rows:
    """Drawn once, then read from a file [2, n, length] int16: input_ids and labels."""
    path = folder / f"recall-{seed}-{split}-{n}-{length}-{n_pairs}-{vocab_size}.npy"
    if not path.is_file():
        generator = generator_for(seed, "recall", split)
        content = np.empty((2, n, length), np.int16)
        for at in range(0, n, AT_ONCE):
            piece = recall(generator, min(AT_ONCE, n - at), length, n_pairs, vocab_size)
            content[0, at : at + AT_ONCE], content[1, at : at + AT_ONCE] = piece["input_ids"], piece["labels"]
        with atomic_path(path) as temporary, open(temporary, "wb") as file:
            np.save(file, content)
    tensor = torch.from_numpy(np.load(path)).to(device)
    return Rows(tensor[0], tensor[1])
