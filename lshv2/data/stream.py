"""Training windows straight from the shards: tokenized, packed and shuffled on the fly, resumable at the exact window.

    stream = TokenStream(shards, run.data / "tokenizer.json", seq_length=512, n_sequences=2000, shuffle_buffer=64,
                         num_workers=2, rank=0, world_size=1)
    for input_ids, labels in stream.batches(4): ...      # without end; both int64 [4, 512], the model shifts labels
    state = stream.state()                               # after the last batch that came out: small, JSON
    stream.restore(state)                                # a new stream's next batch is the one after it

As in the packed streams, documents are encoded by pieces, end with `<|endoftext|>` and share windows. Each of
ranks x workers is a reader of its own documents (`shards.share`), which it reads again in another order when they are
all read. An epoch is `n_sequences` windows, counted in steps: every rank has the same number of batches, whatever the
shards hold, and readers with fewer tokens are in a later pass.

Shuffling is by blocks: while the windows of one block leave in seeded order, those of the next one come in, so that
`shuffle_buffer` windows are held and each yield costs one. Blocks grow from 1, 2, 4, ...: the first batch comes at
once. A position is where the block began and how many windows of it have left; with workers each batch carries its own,
because what they have read ahead was not trained on. torchdata's StatefulDataLoader would carry whole pickled states.

Left out: going on with another number of ranks or workers, which has no exact meaning: `restore` refuses, in one line.
An elastic restart of torchrun therefore has to come back with as many processes as it had.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from lshv2.data.packing import token_dtype
from lshv2.data.shards import Position, Shards
from lshv2.data.tokenizer import END_OF_TEXT_ID, encode_here, read_tokenizer
from lshv2.errors import UserError


class Place(NamedTuple):
    """What a reader goes on from: where its block of windows begins, the block's number, how many of it have left."""

    began: Position = Position()
    block: int = 0
    left: int = 0


class WindowStream(IterableDataset[tuple[Tensor, str]]):
    """One rank's batches: (input_ids int64 [batch_size, seq_length], the worker's place after it as JSON).

    Batch n comes from worker n modulo the number of workers, beginning with `turn`. A `UserError` comes as its text,
    alone, since a DataLoader would wrap it in the traceback of its process.
    """

    def __init__(
        self, shards: Shards, tokenizer: Path, *, seq_length: int, batch_size: int, shuffle_buffer: int, rank: int,
        world_size: int, places: list[Place], turn: int = 0, held_out: bool = False,
    ) -> None:
        self.shards, self.tokenizer, self.held_out = shards, tokenizer, held_out
        self.seq_length, self.batch_size, self.shuffle_buffer = seq_length, batch_size, shuffle_buffer
        self.rank, self.world_size, self.places, self.turn = rank, world_size, places, turn

    def __iter__(self) -> Iterator[Any]:
        info = get_worker_info()
        worker = (self.turn + (info.id if info else 0)) % len(self.places)
        try:
            yield from self._batches(worker)
        except UserError as error:
            yield str(error)

    def _batches(self, worker: int) -> Iterator[tuple[Tensor, str]]:
        rows: list[np.ndarray] = []
        for window, place in self.shuffled(worker):
            rows.append(window)
            if len(rows) == self.batch_size:
                yield torch.from_numpy(np.stack(rows).astype(np.int64)), json.dumps(place)
                rows = []

    def shuffled(self, worker: int) -> Iterator[tuple[np.ndarray, Place]]:
        """One worker's windows in the order of training, each with the place after it."""
        place, part = self.places[worker], self.rank * len(self.places) + worker
        windows = self.windows(part, place.began)
        held = [next(windows) for _ in range(self._size(place.block))]
        skipped = place.left
        for block in itertools.count(place.block):
            began, size, coming_size = held[0][0], len(held), self._size(block + 1)
            generator = np.random.default_rng(np.random.SeedSequence(self.shards.seed, spawn_key=(3, part, block)))
            held = [held[slot] for slot in generator.permutation(size)]
            coming: list[tuple[Position, np.ndarray]] = []
            for left in range(1, size + 1):
                _, window = held.pop()
                coming += [next(windows) for _ in range(coming_size * left // size - len(coming))]
                if left > skipped:
                    yield window, Place(began, block, left)
            held, skipped = coming, 0

    def _size(self, block: int) -> int:
        """Windows in a block: 1, 2, 4, ... up to the buffer's."""
        return min(self.shuffle_buffer, 1 << min(block, 62))

    def windows(self, part: int, at: Position) -> Iterator[tuple[Position, np.ndarray]]:
        """One reader's windows in the order of its text from `at` on: where each begins, its tokens [seq_length]."""
        held: list[np.ndarray] = []
        missing, began = self.seq_length, at
        for position, ids in self._tokens(part, at):
            used = 0
            while used < len(ids):
                if not held:
                    began = position._replace(token=position.token + used)
                held.append(ids[used : used + missing])
                used += len(held[-1])
                missing -= len(held[-1])
                if not missing:
                    yield began, np.concatenate(held)
                    held, missing = [], self.seq_length

    def _tokens(self, part: int, at: Position) -> Iterator[tuple[Position, np.ndarray]]:
        """Piece by piece from `at` on: where its first token lies, and the tokens; a document's end is in its last."""
        tokenizer = read_tokenizer(self.tokenizer)
        dtype = token_dtype(tokenizer.get_vocab_size())
        parts = self.world_size * len(self.places)
        for document in self.shards.documents(part=part, parts=parts, held_out=self.held_out, at=at):
            done, skipped = (at.text, at.token) if document.position[:-2] == at[:-2] else (0, 0)
            for text_at, text, last in document.pieces(done):
                ids = np.array(encode_here(tokenizer, text) + [END_OF_TEXT_ID] * last, dtype)
                yield document.position._replace(text=text_at, token=skipped), ids[skipped:]
                skipped = 0


class TokenStream:
    """What a rank trains on: `len` windows an epoch, batches without end, and the state to go on from.

    rank, world_size: among the processes that read different text. Raises UserError at a shard that is broken or gone.
    """

    def __init__(
        self, shards: Shards, tokenizer: Path, *, seq_length: int, n_sequences: int, shuffle_buffer: int,
        num_workers: int = 0, rank: int = 0, world_size: int = 1,
    ) -> None:
        self.shards, self.tokenizer, self.num_workers = shards, tokenizer, num_workers
        self.seq_length, self.n_sequences, self.shuffle_buffer = seq_length, n_sequences, shuffle_buffer
        self.rank, self.world_size = rank, world_size
        self.places = [Place()] * max(1, num_workers)
        self.n_batches = 0
        self.made_with = {
            "seed": shards.seed, "data.eval_fraction": shards.eval_fraction, "data.shuffle_buffer": shuffle_buffer,
            "train.seq_length": seq_length, "the number of ranks": world_size, "the rank": rank,
            "the number of readers a rank (train.num_workers)": len(self.places),
            "the list of shards": shards.digest(), "the tokenizer": _digest(tokenizer),
        }

    def __len__(self) -> int:
        return self.n_sequences

    def batches(
        self, batch_size: int, *, pin_memory: bool = False, worker_init_fn: Callable[[int], None] | None = None
    ) -> Generator[tuple[Tensor, Tensor], None, None]:
        """(input_ids, labels), the same int64 [batch_size, seq_length] twice, from where the stream stands.

        pin_memory, worker_init_fn: the DataLoader's. Closing it ends the workers.
        """
        windows = WindowStream(
            self.shards, self.tokenizer, seq_length=self.seq_length, batch_size=batch_size,
            shuffle_buffer=self.shuffle_buffer, rank=self.rank, world_size=self.world_size, places=list(self.places),
            turn=self.n_batches % len(self.places),
        )
        generator = torch.Generator().manual_seed(self.shards.seed)  # else it draws from the global one
        loader = DataLoader(
            windows, batch_size=None, num_workers=self.num_workers, pin_memory=pin_memory, generator=generator,
            worker_init_fn=worker_init_fn,
        )
        for batch in loader:
            if isinstance(batch, str):
                raise UserError(batch)
            began, block, left = json.loads(batch[1])
            self.places[self.n_batches % len(self.places)] = Place(Position(*began), block, left)
            self.n_batches += 1
            yield batch[0], batch[0]

    def state(self) -> dict[str, Any]:
        """Where this rank stands after the last batch that came out: JSON, some 50 bytes a worker."""
        return {"made_with": self.made_with, "batches": self.n_batches, "places": self.places}

    def restore(self, state: dict[str, Any] | None) -> None:
        """Go on from a state of the same rank. Raises UserError where it belongs to another stream."""
        if state is None:
            raise UserError("this checkpoint was not trained on a stream: set data.stream=false, or FORCE=1 to retrain")
        for name, value in self.made_with.items():
            before = state["made_with"].get(name)
            if before != value:
                raise UserError(
                    f"the stream cannot go on where it stopped: {name} was {before} and is {value}: "
                    "set it back, or FORCE=1 to retrain"
                )
        self.places = [Place(Position(*began), block, left) for began, block, left in state["places"]]
        self.n_batches = state["batches"]


def _digest(path: Path) -> str:
    if not path.is_file():
        raise UserError(f"{path} is missing: run phase 02_data first")
    return hashlib.blake2b(path.read_bytes(), digest_size=8).hexdigest()
