"""One pass over the sources: everything is checked, and where each document lies is noted.

    corpus = scan(find_files("notes/"), on_bytes=bar.update)

Raises UserError naming file and line (and byte) at the first file that is not UTF-8 or .jsonl line that is not a
document. The standard library's few files in other encodings are left out and counted instead: they are no user's.
"""

from __future__ import annotations

import codecs
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import numpy as np

from lshv2.data.corpus import ENCODING, Corpus, Sources, json_text
from lshv2.errors import UserError

BLOCK = 1 << 20  # bytes read at a time


def scan(sources: Sources, on_bytes: Callable[[int], None] = lambda n: None) -> Corpus:
    """Read every file once: check it, and index its documents. Empty documents are counted and left out.

    on_bytes: called with the number of bytes just read. Raises UserError naming file and line (and byte).
    """
    rows: list[np.ndarray] = []
    skipped = {"empty": 0, "not UTF-8": 0}
    for number, path in enumerate(sources.paths()):
        try:
            with open(path, "rb") as file:
                is_lines = path.suffix.lower() == ".jsonl"
                found = _scan_lines(file, path, on_bytes) if is_lines else _scan_file(file, path, on_bytes)
        except OSError as error:
            raise UserError(f"data source {path} cannot be read: {error.strerror}") from None
        except _NotUtf8 as error:
            if sources.strict:
                raise UserError(str(error)) from None
            skipped["not UTF-8"] += 1
            continue
        if len(found):
            rows.append(np.insert(found, 0, number, axis=1))
        else:
            skipped["empty"] += 1
    if not rows:
        where = sources.root / sources.names[0] if len(sources.names) == 1 else sources.root
        raise UserError(f"data source {where} is empty ({len(sources.names)} file(s) without text): name another")
    file, line, start, size, length, digest = np.concatenate(rows).T.copy()
    return Corpus(sources, file, line, start, size, np.zeros_like(file), length, digest, skipped)


class _NotUtf8(ValueError):
    """A text file in another encoding."""


def _digest(content: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little", signed=True)


def _scan_file(file: BinaryIO, path: Path, on_bytes: Callable[[int], None]) -> np.ndarray:
    """One row [line, start, size, length, digest], or none where the file is empty."""
    decoder, digest, size = codecs.getincrementaldecoder("utf-8")(), hashlib.blake2b(digest_size=8), 0
    while True:
        block = file.read(BLOCK)
        held = len(decoder.getstate()[0])
        try:
            decoder.decode(block, final=not block)
        except UnicodeDecodeError as error:
            offset = size - held + error.start
            file.seek(0)
            line, wrong = file.read(offset).count(b"\n") + 1, file.read(1)[0]
            raise _NotUtf8(f"{path}: line {line}: byte {offset} ({wrong:#04x}) is not UTF-8: {ENCODING}") from None
        if not block:
            break
        digest.update(block)
        size += len(block)
        on_bytes(len(block))
    content = int.from_bytes(digest.digest(), "little", signed=True)
    return np.array([[0, 0, size, size, content]] if size else [], np.int64).reshape(-1, 5)


def _scan_lines(file: BinaryIO, path: Path, on_bytes: Callable[[int], None]) -> np.ndarray:
    """Rows [line, start, size, length, digest] of a .jsonl file; blank lines and empty texts give none."""
    parts, rows, start = [np.empty((0, 5), np.int64)], [], 0
    for number, line in enumerate(file, 1):
        if line.strip():
            text = json_text(line, f"{path}: line {number}")
            if text:
                rows.append((number, start, len(line), len(text), _digest(text)))
        start += len(line)
        on_bytes(len(line))
        if len(rows) == 4096:  # a column of integers takes a tenth of a list of tuples
            parts.append(np.array(rows, np.int64))
            rows = []
    return np.concatenate([*parts, np.array(rows, np.int64).reshape(-1, 5)])
