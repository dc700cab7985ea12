"""Phase 02_data for a stream: what must be known before training, from the beginning of the shards alone.

    split, counted = sample_shards(run, folder, "02_data")
    stream = language_stream(run)        # then, in training

Each shard's first document is checked, and the list of shards is kept as `shards.json`. One reading, in the seeded
order of pass 0 and no further than necessary, takes train documents for the tokenizer and the order-2 model, and
held-out documents for `eval.bin`. Both are put into plain files, so that the rest of the phase is the same code.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lshv2.data.corpus import find_files
from lshv2.data.scan import scan
from lshv2.data.shards import Document, Shards
from lshv2.data.split import Split
from lshv2.data.stream import TokenStream
from lshv2.data.tokenizer import SAMPLE_PER_ENTRY
from lshv2.errors import UserError
from lshv2.progress import Progress
from lshv2.runs import Run

SHARDS, SPOOL = "shards.json", ".spool"
BYTES_PER_TOKEN = 6  # of held-out text for each token wanted: more than a byte-level BPE packs into one on average


def language_stream(run: Run, rank: int = 0, world_size: int = 1) -> TokenStream:
    """The text that this rank trains on, as the run's settings say."""
    settings = run.settings
    return TokenStream(
        Shards.load(run.data / SHARDS, seed=settings.seed, eval_fraction=settings.data.eval_fraction),
        run.data / "tokenizer.json", seq_length=settings.train.seq_length,
        n_sequences=settings.train.num_train_sequences, shuffle_buffer=settings.data.shuffle_buffer,
        num_workers=settings.train.num_workers, rank=rank, world_size=world_size,
    )


def sample_shards(run: Run, folder: Path, phase: str) -> tuple[Split, dict[str, Any]]:
    """(a sample of train documents, the first held-out ones; null for what a stream does not count).

    Writes `shards.json` into the folder, and the documents into its `.spool`, which the caller removes at the end.
    """
    settings = run.settings
    assert settings.data.source is not None
    shards = Shards.find(settings.data.source, seed=settings.seed, eval_fraction=settings.data.eval_fraction)
    shards.save(folder / SHARDS)
    with Progress(run, phase, "checking shards", total=len(shards.names), unit="shard") as bar:
        for shard in range(len(shards.names)):
            shards.check_first(shard)
            bar.update(1)
    wanted = {
        "train": SAMPLE_PER_ENTRY * settings.model.vocab_size,
        "eval": BYTES_PER_TOKEN * settings.train.num_eval_sequences * settings.train.seq_length,
    }
    spool = folder / SPOOL
    spool.mkdir()
    _spool(run, shards, spool, wanted, phase)
    empty = [side for side in wanted if not (spool / f"{side}.jsonl").stat().st_size]
    if empty:
        raise UserError(
            f"data source {settings.data.source} leaves no {empty[0]} document by data.eval_fraction="
            f"{settings.data.eval_fraction}: give more documents by DATA=, or change it"
        )
    train, held_out = (scan(find_files(str(spool / f"{side}.jsonl"))) for side in ("train", "eval"))
    unknown = ("documents", "bytes", "skipped_files", "duplicates_dropped", "documents_beyond_max_bytes", "cut")
    return Split(train, held_out, duplicates=0, beyond_cap=0, cut=None), dict.fromkeys(unknown)


def _spool(run: Run, shards: Shards, spool: Path, wanted: dict[str, int], phase: str) -> None:
    """Documents of each side into its file until there is enough, or all were read."""
    taken = dict.fromkeys(wanted, 0)
    with (
        Progress(run, phase, "sampling", total=sum(wanted.values()), unit="B") as bar,
        open(spool / "train.jsonl", "w", encoding="utf-8") as train,
        open(spool / "eval.jsonl", "w", encoding="utf-8") as held_out,
    ):
        for document in shards.documents():
            if document.position.epoch or all(taken[side] >= wanted[side] for side in wanted):
                return
            side, file = ("eval", held_out) if shards.is_held_out(document) else ("train", train)
            if taken[side] < wanted[side]:
                text = _beginning(document, wanted[side] - taken[side])
                file.write(json.dumps(text) + "\n")
                taken[side] += len(text.encode())
                bar.update(len(text.encode()))


def _beginning(document: Document, enough: int) -> str:
    """The document's text, or its first pieces where these are enough: a single file may be the whole corpus."""
    pieces, size = [], 0
    for _, piece, _ in document.pieces():
        pieces.append(piece)
        size += len(piece.encode())
        if size >= enough:
            break
    return "".join(pieces)
