"""The text: files found, checked and indexed, then read document by document.

A source is a .txt, .md, .py or .jsonl file, a folder of them (recursive, hidden entries and __pycache__ and
site-packages left out), a glob, or None: the sources of the running Python's standard library. A .txt, .md or .py
file is one document; each line of a .jsonl file is one: an object with a "text" field, or a plain JSON string.

    corpus = scan(find_files(None))            # lshv2.data.scan: checks everything, notes where each document lies
    for piece in corpus.pieces(0): ...

A `Corpus` is 56 bytes a document, never its text. Bytes are preserved: no newline translation, no normalisation.

Left out: compressed files (but see `shards`), remote sources that are not mounted, other encodings than UTF-8.
"""

from __future__ import annotations

import glob
import json
import os
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import BinaryIO

import numpy as np

from lshv2.errors import UserError

SUFFIXES = (".txt", ".md", ".py", ".jsonl")
STREAMED = (*SUFFIXES, ".jsonl.gz")  # what a stream reads: its lines come in order, so they may be compressed
SKIPPED_FOLDERS = {"site-packages", "dist-packages", "__pycache__"}
PIECE = 1 << 16  # bytes of text handed on at a time


@dataclass(frozen=True)
class Sources:
    """Files of one source, sorted by name. `strict`: a file that is not UTF-8 is an error, else it is skipped."""

    root: Path
    names: tuple[str, ...]  # relative to root
    strict: bool

    def paths(self) -> Iterator[Path]:
        return (self.root / name for name in self.names)


def find_files(source: str | None, suffixes: tuple[str, ...] = SUFFIXES) -> Sources:
    """Files of `data.source`; None: the standard library's. Raises UserError where there is nothing to read."""
    if source is None:
        root = Path(sysconfig.get_path("stdlib"))
        names = _walk(root, (".py",))
        if not names:
            raise UserError(f"{root} holds no Python sources to train on; give a text file or folder by DATA=")
        return Sources(root, names, strict=False)
    path = Path(source).expanduser().resolve()
    if path.is_dir():
        names = _walk(path, suffixes)
        if not names:
            raise UserError(f"data source {path} holds no {', '.join(suffixes)} file: put one there or name another")
        return Sources(path, names, strict=True)
    if not path.exists() and glob.has_magic(str(path)):
        return Sources(*_match(path, suffixes), strict=True)
    if not path.exists():
        raise UserError(f"data source {path} does not exist: name a {', '.join(suffixes)} file or a folder of them")
    if not path.name.lower().endswith(suffixes):
        raise UserError(f"data source {path} has the extension {path.suffix!r}; readable: {', '.join(suffixes)}")
    return Sources(path.parent, (path.name,), strict=True)


def _walk(root: Path, suffixes: tuple[str, ...]) -> tuple[str, ...]:
    found = []
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if name not in SKIPPED_FOLDERS and not name.startswith(".")]
        for name in files:
            path = Path(folder, name)
            if name.lower().endswith(suffixes) and not name.startswith(".") and path.is_file():
                found.append(path.relative_to(root).as_posix())
    return tuple(sorted(found))


def _match(pattern: Path, suffixes: tuple[str, ...]) -> tuple[Path, tuple[str, ...]]:
    """(the folder that the pattern starts from, the files of these suffixes that it matches)"""
    root = next(folder for folder in pattern.parents if not glob.has_magic(str(folder)))
    found = (Path(name) for name in glob.glob(str(pattern), recursive=True) if name.lower().endswith(suffixes))
    names = tuple(sorted(path.relative_to(root).as_posix() for path in found if path.is_file()))
    if not names:
        raise UserError(f"data source {pattern} matches no {', '.join(suffixes)} file: mend the pattern")
    return root, names


@dataclass(frozen=True)
class Corpus:
    """Where each document lies; all arrays are [documents] int64, one row a document.

    file: index into sources.names; line: its line in a .jsonl file, 0 for a whole file; start, size: its span in the
    file in bytes; skip, length: the part of its text that is used, in bytes of UTF-8; digest: 64 bits of its content.
    """

    sources: Sources
    file: np.ndarray
    line: np.ndarray
    start: np.ndarray
    size: np.ndarray
    skip: np.ndarray
    length: np.ndarray
    digest: np.ndarray
    skipped: dict[str, int] = field(default_factory=dict)  # reason -> files

    def __len__(self) -> int:
        return len(self.file)

    def take(self, rows: np.ndarray) -> Corpus:
        """The documents of these rows, in this order."""
        columns = ("file", "line", "start", "size", "skip", "length", "digest")
        return replace(self, **{name: getattr(self, name)[rows] for name in columns})

    def part(self, row: int, low: int, high: int) -> Corpus:
        """One document, only bytes [low, high) of the text it has here."""
        one = self.take(np.array([row]))
        return replace(one, skip=one.skip + low, length=np.array([high - low]))

    def name(self, row: int) -> str:
        name, line = self.sources.names[self.file[row]], self.line[row]
        return f"{name}:{line}" if line else name

    def text(self, row: int, low: int, high: int) -> bytes:
        """Bytes [low, high) of a document's text."""
        with open(self._path(row), "rb") as file:
            return self._reader(file, row)(low, high)

    def pieces(self, row: int) -> Iterator[str]:
        """A document's text in order, in pieces of at most 64 KiB that end at a line's end where there is one."""
        with open(self._path(row), "rb") as file:
            for _, block in blocks(self._reader(file, row), int(self.length[row])):
                try:
                    if not block:
                        raise ValueError
                    piece = block.decode("utf-8")
                except ValueError:
                    raise UserError(f"{self._path(row)} changed while it was read: run this phase again") from None
                yield piece

    def _path(self, row: int) -> Path:
        return self.sources.root / self.sources.names[self.file[row]]

    def _reader(self, file: BinaryIO, row: int) -> Callable[[int, int], bytes]:
        start, skip = int(self.start[row]), int(self.skip[row])
        if not self.line[row]:
            return lambda low, high: os.pread(file.fileno(), high - low, start + skip + low)
        line = os.pread(file.fileno(), int(self.size[row]), start)
        text = json_text(line, f"{self._path(row)}: line {self.line[row]}")
        return lambda low, high: text[skip + low : skip + high]


def blocks(read: Callable[[int, int], bytes], length: int, done: int = 0) -> Iterator[tuple[int, bytes]]:
    """Where each piece of a text starts, and its bytes: what a document is cut into before it is encoded.

    read(low, high): bytes of the text, of which there are `length`; done: where a piece starts, to go on from.
    An empty piece, the last one: the text is shorter than that.
    """
    while done < length:
        block = read(done, min(done + PIECE, length))
        if done + len(block) < length:
            block = block[: line_end(block)]
        yield done, block
        if not block:
            return
        done += len(block)


def line_end(block: bytes) -> int:
    """Where to cut a block of UTF-8: after its last newline, else before its last character (never inside one)."""
    return block.rfind(b"\n") + 1 or character_start(block, len(block) - 1)


def character_start(block: bytes, at: int) -> int:
    """The first byte of the UTF-8 character that byte `at` belongs to."""
    while at > 0 and block[at] & 0xC0 == 0x80:
        at -= 1
    return at


def json_text(line: bytes, where: str) -> bytes:
    """The text of one .jsonl line as UTF-8. where: file and line, for the message of the UserError."""
    try:
        content = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: byte {error.start} ({line[error.start]:#04x}) is not UTF-8: {ENCODING}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: broken JSON ({str(error)[:80]}): mend or delete this line") from None
    text = content.get("text") if isinstance(content, dict) else content
    if not isinstance(text, str):
        raise UserError(f'{where}: no text here: each line is an object with a "text" string, or a JSON string')
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError:
        raise UserError(f"{where}: the text holds half a surrogate pair (\\ud8xx), which is no Unicode text") from None


ENCODING = "save it as UTF-8, for instance with iconv -f latin1 -t utf-8"
