"""Sequences in a .jsonl file, one record a line, read one at a time.

A record is {"input_ids": [...], "labels": [...], ...}: two lists of integers of one length. labels are in the model's
convention (it shifts inside): labels[t] is what must be predicted from the tokens before t, -100 where nothing is.
"""

from __future__ import annotations

import json
from array import array
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lshv2.errors import UserError

IGNORED = -100  # what torch's cross-entropy leaves out


class JsonlDataset(torch.utils.data.Dataset):
    """`dataset[i]` is (input_ids, labels), LongTensors of the record's length.

    Opening reads the file once: every record is checked, and where it starts is kept (8 bytes a record), nothing else.
    vocab_size: ids must be below it. Raises UserError naming file and line.
    """

    def __init__(self, path: Path, vocab_size: int) -> None:
        self.path, self.vocab_size = Path(path), vocab_size
        starts, position = array("q"), 0
        try:
            with open(self.path, "rb") as file:
                for number, line in enumerate(file, 1):
                    if line.strip():
                        self._parse(line, number)
                        starts.append(position)
                    position += len(line)
        except OSError as error:
            raise UserError(f"{self.path} cannot be read ({error.strerror}): run phase 02_data") from None
        if not starts:
            raise UserError(f"{self.path} holds no record: run phase 02_data again (FORCE=1)")
        self.starts = np.array(starts)

    def __len__(self) -> int:
        return len(self.starts)

    def record(self, index: int) -> dict[str, Any]:
        """The whole record, task fields included."""
        with open(self.path, "rb") as file:
            file.seek(self.starts[index])
            return json.loads(file.readline())

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        record = self.record(index)
        return torch.tensor(record["input_ids"]), torch.tensor(record["labels"])

    def _parse(self, line: bytes, number: int) -> None:
        where = f"{self.path}: line {number}"
        try:
            record = json.loads(line.decode("utf-8"))
            ids, labels = (np.array(record[name]) for name in ("input_ids", "labels"))
        except UnicodeDecodeError as error:
            raise UserError(f"{where}: byte {error.start} is not UTF-8: mend or delete this line") from None
        except (KeyError, TypeError):
            raise UserError(f'{where}: not an object with "input_ids" and "labels": mend or delete this line') from None
        except (ValueError, RecursionError) as error:
            raise UserError(f"{where}: broken JSON ({str(error)[:80]}): mend or delete this line") from None
        if ids.ndim != 1 or ids.shape != labels.shape or (ids.dtype.kind, labels.dtype.kind) != ("i", "i"):
            raise UserError(f'{where}: "input_ids" and "labels" must be lists of integers of one length')
        for name, values in (("input_ids", ids), ("labels", labels[labels != IGNORED])):
            wrong = values[(values < 0) | (values >= self.vocab_size)]
            if len(wrong):
                raise UserError(
                    f"{where}: {name} holds {wrong[0]}, outside the vocabulary of {self.vocab_size}: "
                    "mend the line or raise the vocabulary"
                )
