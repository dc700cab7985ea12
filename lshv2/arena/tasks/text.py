"""Bytes of real text: bits per byte of the same bytes by the context they are given, so that its gain is a number.

A corpus of your own is a subclass with a name and a `source`:

    from lshv2.arena.task import register
    from lshv2.arena.tasks.text import Text

    @register
    class Pg19(Text):
        name, source = "pg19", "/data/pg19/test"      # a .txt, .md, .py or .jsonl file, a folder of them or a glob
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from lshv2.arena.task import ArenaTask, Examples, octave, register
from lshv2.config import Settings
from lshv2.errors import UserError
from lshv2.presets import make_settings

SPLITS = ("train", "eval")
END = 0  # the mark after a document; bytes are 1 to 256, in the tokenizer's order


@register
class Text(ArenaTask):
    """Windows of the corpus's bytes, documents after each other with an end mark (0) between; everything is scored.

        length 9, a document's end in it     s  +  1  \n  0  d  e  f  _
                                             .  +  1  \n  0  d  e  f  _        each by the bytes before it

    Training windows are of the training documents, evaluated ones of those held out. At every length these end in the
    same places, and the value is of their last 512 bytes (half of a shorter window): what differs is how much stands
    before. They end behind the first 131,072 bytes, or half of a text of less than twice as many; where a window does
    not fit before such a place it ends further on. position: of each byte.
    """

    name, vocab_size, metric, like, version = "bytes", 257, "bits_per_byte", "bytes", 2
    paired, LAST, LONGEST = True, 512, 131_072
    headline = ("part", "end")
    source: ClassVar[str | None] = None  # None: Python's standard library
    order2: Any = None  # `lshv2.data.order2.Order2Model`, when it was first asked

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
        # where a window may end, whatever its length; training leaves out little: of a short text its first sixteenth
        least = max(1, min(self.LONGEST, len(stream) // (16 if self.split == "train" else 2)))
        ends = least + (generator.random(n) * (len(stream) - least + 1)).astype(np.int64)
        ends = ends.clip(min=length)
        ids = stream[ends[:, None] - length + np.arange(length)].astype(np.int64)
        # the first byte has nothing before it: position 1 is the first that is scored
        places = np.arange(1, length)
        part = np.where(places >= length - min(self.LAST, length // 2), "end", "before")
        labels = ids.copy()
        labels[:, 0] = -100
        groups = {"position": octave(places), "part": part}
        return Examples(ids, labels, {name: np.broadcast_to(of, (n, length - 1)) for name, of in groups.items()})

    def shortcuts(self, examples: Examples) -> dict[str, float]:
        """Bits per byte of what `value` is of, by the two bytes before each: an order-2 model of the training text.
        End marks, which it does not know, are left out."""
        from lshv2.data.order2 import fit_order2

        if self.order2 is None:
            train = self.streams["train"]
            self.order2 = fit_order2([(train[train != END] - 1).astype(np.uint8).tobytes()])
        length = examples.input_ids.shape[1]
        last = examples.input_ids[:, length - min(self.LAST, length // 2) - 2 :]
        marks = last[:, 2:] == END
        first, second, third = (np.where(x == END, 0, x - 1) for x in (last[:, :-2], last[:, 1:-1], last[:, 2:]))
        bits = -np.log2(self.order2.probability((first << 16 | second << 8 | third)[~marks]))
        return {"the two bytes before": float(bits.mean())}
