"""Bytes of real text: bits per byte by position, so that what is gained from context is a number.

A corpus of your own is a subclass with a name and a `source`:

    from lshv2.arena.task import register
    from lshv2.arena.tasks.text import Text

    @register
    class Pg19(Text):
        name, source = "pg19", "/data/pg19/test"      # a .txt, .md, .py or .jsonl file, a folder of them or a glob
"""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

import numpy as np

from lshv2.arena.task import ArenaTask, Examples, octave, register
from lshv2.config import Settings
from lshv2.errors import UserError
from lshv2.presets import make_settings

SPLITS = ("train", "eval")


@register
class Text(ArenaTask):
    """Windows of the corpus's bytes, documents after each other with an end mark (256) between; everything is scored.

    Training windows are of the training documents, evaluated ones of those held out. position: of each byte.
    """

    name, vocab_size, metric, like = "bytes", 257, "bits_per_byte", "bytes"
    source: ClassVar[str | None] = None  # None: Python's standard library

    def settings(self) -> Settings:
        """What phase 2 is told; the byte vocabulary, and nothing synthetic beside it."""
        least = {
            "recall.num_train_sequences": 1, "recall.num_eval_sequences": 1, "data.num_synthetic_train": 1,
            "data.num_synthetic_eval": 1, "data.synthetic_seq_length": 8, "train.seq_length": 256,
            "train.num_train_sequences": 1, "train.num_eval_sequences": 1, "model.vocab_size": self.vocab_size,
        }
        return make_settings("full", least, data=self.source)

    def prepare(self, folder: Path) -> None:
        from lshv2.data import ensure
        from lshv2.runs import Run

        run = Run((folder / self.name).resolve(), self.settings())
        run.path.mkdir(parents=True, exist_ok=True)
        ensure(run)
        self.streams = {split: np.fromfile(run.data / f"{split}.bin", "<u2") for split in SPLITS}

    def draw(self, generator: np.random.Generator, n: int, length: int) -> Examples:
        stream = self.streams[self.split]
        if len(stream) < length:
            raise UserError(
                f"{self.name}: {len(stream):,} bytes of {self.split} text are fewer than one window of {length:,}"
            )
        starts = generator.integers(len(stream) - length + 1, size=n)
        ids = stream[starts[:, None] + np.arange(length)].astype(np.int64)
        # the first byte has nothing before it: position 1 is the first that is scored
        position = np.broadcast_to(octave(np.arange(1, length)), (n, length - 1))
        labels = ids.copy()
        labels[:, 0] = -100
        return Examples(ids, labels, {"position": position})
