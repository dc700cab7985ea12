"""The files of a corpus too large to prepare, read document by document, each by exactly one of many readers.

    shards = Shards.find("corpus/*.jsonl.gz", seed=0, eval_fraction=0.05)
    for document in shards.documents(part=3, parts=8, held_out=False):      # goes on for ever, pass after pass
        for piece in document.pieces(): ...

Nothing is read ahead: memory holds the names, one line of a .jsonl file, or 64 KiB of a whole-file document. Where a
document lies is a `Position`, from which reading goes on. A line in a .jsonl.gz is found by decompressing its shard.

Which side a document is on is a hash of the seed and of its first 64 KiB: copies are never on both sides.
Left out: dropping copies, which needs a memory of every document seen.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import BinaryIO, NamedTuple, cast

import numpy as np

from lshv2.data.corpus import ENCODING, STREAMED, blocks, find_files, json_text
from lshv2.errors import UserError
from lshv2.runs import read_json, write_json

BUFFER = 1 << 20  # bytes of a shard fetched at a time: a remote mount answers slowly


class Position(NamedTuple):
    """Where a token lies in one reader's endless stream; each is what was passed before it."""

    epoch: int = 0  # passes over this reader's shards
    turn: int = 0  # shards of this pass
    line: int = 0  # lines of this shard
    place: int = 0  # lines that are not blank, by which readers divide a shard
    start: int = 0  # bytes of this shard, decompressed
    text: int = 0  # bytes of the document's text, up to a piece
    token: int = 0  # tokens of this piece


@dataclass(frozen=True)
class Document:
    """One document of a shard. position: of its first token; name: file, and line in a .jsonl file."""

    position: Position
    name: str
    read: Callable[[int, int], bytes]
    length: int

    def pieces(self, done: int = 0) -> Iterator[tuple[int, str, bool]]:
        """From byte `done` of the text on, each piece: where it starts, its text, whether it is the last."""
        for start, block in blocks(self.read, self.length, done):
            try:
                text = block.decode("utf-8")
            except UnicodeDecodeError as error:
                wrong = f"byte {start + error.start} ({block[error.start]:#04x})"
                raise UserError(f"{self.name}: {wrong} is not UTF-8: {ENCODING}") from None
            if not block:
                raise UserError(f"{self.name} became shorter while it was read: run phase 02_data again")
            yield start, text, start + len(block) == self.length


@dataclass(frozen=True)
class Shards:
    """The files, sorted by name, with their sizes in bytes, and what decides which documents are held out."""

    root: Path
    names: tuple[str, ...]
    sizes: tuple[int, ...]
    seed: int
    eval_fraction: float

    @classmethod
    def find(cls, source: str, *, seed: int, eval_fraction: float) -> Shards:
        """The shards that a file, a folder or a glob names. Raises UserError where there is none."""
        found = find_files(source, STREAMED)
        sizes = tuple(path.stat().st_size for path in found.paths())
        return cls(found.root, found.names, sizes, seed, eval_fraction)

    @classmethod
    def load(cls, path: Path, *, seed: int, eval_fraction: float) -> Shards:
        """What `save` wrote: every process of a training reads the same files, whatever came after."""
        content, problem = read_json(path)
        if problem:
            raise UserError(f"{path.parent}: {problem}: run phase 02_data first")
        names, sizes = zip(*content["shards"], strict=True)
        return cls(Path(content["root"]), names, sizes, seed, eval_fraction)

    def save(self, path: Path) -> None:
        shards = list(zip(self.names, self.sizes, strict=True))
        write_json(path, {"root": str(self.root), "shards": shards})

    def digest(self) -> str:
        """Of names and sizes: a position means nothing among other shards."""
        return hashlib.blake2b(json.dumps([self.names, self.sizes]).encode(), digest_size=8).hexdigest()

    def documents(
        self, *, part: int = 0, parts: int = 1, held_out: bool | None = None, at: Position | None = None
    ) -> Iterator[Document]:
        """The documents of one reader among `parts`, from the document at `at` on, without end.

        held_out: only these, or only the others; None: both. Each pass takes the reader's shards in another order,
        drawn from (seed, pass). Raises UserError where a pass finds no document, and at a shard that cannot be read.
        """
        at = at or Position()
        own = {shard: (number, of) for shard, number, of in share(len(self.names), part, parts)}
        while True:
            found = any(at[1:])  # there were some where this pass began
            generator = np.random.default_rng(np.random.SeedSequence(self.seed, spawn_key=(2, at.epoch)))
            order = [int(shard) for shard in generator.permutation(len(self.names)) if int(shard) in own]
            for turn in range(at.turn, len(order)):
                for document in self._read(order[turn], *own[order[turn]], at._replace(turn=turn, text=0, token=0)):
                    if held_out is None or self.is_held_out(document) == held_out:
                        found = True
                        yield document
                at = Position(at.epoch)
            if not found:
                side = "" if held_out is None else "held-out " if held_out else "train "
                raise UserError(
                    f"{self.root}: reader {part + 1} of {parts} (ranks x train.num_workers) finds no {side}document "
                    f"in {len(self.names)} shard(s): lower train.num_workers, or give more documents by DATA="
                )
            at = Position(at.epoch + 1)

    def is_held_out(self, document: Document) -> bool:
        first = next(iter(blocks(document.read, document.length)))[1]
        digest = hashlib.blake2b(first, key=f"{self.seed}/split".encode(), digest_size=8).digest()
        return (int.from_bytes(digest, "little") >> 11) / 2.0**53 < self.eval_fraction

    def check_first(self, shard: int) -> None:
        """Read the beginning of a shard's first document. Raises UserError naming file and line."""
        for document in self._read(shard, 0, 1, Position()):
            next(document.pieces())
            return

    def _read(self, shard: int, number: int, of: int, at: Position) -> Iterator[Document]:
        """Documents of one shard whose place modulo `of` is `number`, from the line at `at` on; empty ones are none."""
        path = self.root / self.names[shard]
        with _readable(path), open(path, "rb", buffering=BUFFER) as file:
            size = os.fstat(file.fileno()).st_size
            if size != self.sizes[shard]:
                raise UserError(f"shard {path} has {size} bytes, not {self.sizes[shard]}: run phase 02_data again")
            if not path.name.lower().endswith((".jsonl", ".jsonl.gz")):
                if number == 0 and size and not at.line:
                    yield Document(at, str(path), partial(_pread, path, file), size)
                return
            lines = cast(BinaryIO, gzip.GzipFile(fileobj=file)) if path.name.lower().endswith(".gz") else file
            lines.seek(at.start)
            place, start = at.place, at.start
            for line_number, line in enumerate(lines, at.line):
                if line.strip():
                    where = f"{path}: line {line_number + 1}"
                    if place % of == number and (text := json_text(line, where)):
                        position = at._replace(line=line_number, place=place, start=start)
                        yield Document(position, where, partial(_part, text), len(text))
                    place += 1
                start += len(line)


def share(n_shards: int, part: int, parts: int) -> list[tuple[int, int, int]]:
    """(shard, number, of): this part reads the shard's documents whose place modulo `of` is `number`.

    Whole shards in turn as far as they go round; each of the rest is divided by document among an even share of the
    parts. So a part reads at most one shard that others read too, and fewer shards than parts are divided.
    """
    whole = n_shards // parts * parts
    own = [(shard, 0, 1) for shard in range(part, whole, parts)]
    if left := n_shards - whole:
        own.append((whole + part % left, part // left, len(range(part % left, parts, left))))
    return own


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """A shard that is gone or damaged is a line that says so."""
    try:
        yield
    except (OSError, EOFError, zlib.error) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise UserError(f"shard {path} cannot be read ({reason}): bring it back and start the same command") from None


def _pread(path: Path, file: BinaryIO, low: int, high: int) -> bytes:
    with _readable(path):
        return os.pread(file.fileno(), high - low, low)


def _part(text: bytes, low: int, high: int) -> bytes:
    return text[low:high]
