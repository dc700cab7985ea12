"""Phase 02_data: from a source and the settings to the run's `data/` folder.

    run = open_run("quick-1", preset="quick")
    statistics = prepare(run)                    # always anew; `ensure(run)` only where something changed
    dataset = language_dataset(run, "train")

Everything is made in a folder beside `data/` and renamed into place at the end: a mistake in the input, a full disk
or a kill leaves the former `data/` as it was.
"""

from __future__ import annotations

import hashlib
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
from tokenizers import Tokenizer

from lshv2.data import synthetic
from lshv2.data.corpus import STREAMED, SUFFIXES, Corpus, Sources, find_files
from lshv2.data.folder import replacing
from lshv2.data.jsonl import JsonlDataset
from lshv2.data.order2 import order2_bits_per_byte
from lshv2.data.packing import PackedDataset, token_dtype, window_starts, write_stream
from lshv2.data.scan import scan
from lshv2.data.split import Split, split_corpus
from lshv2.data.streamed import SPOOL, sample_shards
from lshv2.data.tokenizer import (
    SAMPLE_PER_ENTRY,
    bytes_per_token,
    check_vocab_size,
    decode,
    encode,
    read_tokenizer,
    train_tokenizer,
)
from lshv2.errors import UserError
from lshv2.progress import Progress
from lshv2.runs import PHASES, Run, read_json, write_json

PHASE = PHASES[1]
SCHEMA = 1
CHECK_BYTES = 4_000_000  # eval text that is decoded again and compared


def prepare(run: Run) -> dict[str, Any]:
    """Make `data/` anew and return the content of its data.json. Raises UserError on bad settings or input."""
    settings, began = run.settings, time.monotonic()
    check_vocab_size(settings.model.vocab_size)
    sources = _find(run)
    with replacing(run.data) as folder:
        fingerprint = _fingerprint(run, sources)
        split, counted = sample_shards(run, folder, PHASE) if settings.data.stream else _read_all(run, sources)
        tokenizer, sample = _make_tokenizer(run, split.train, folder)
        statistics = {
            "schema": SCHEMA,
            "fingerprint": fingerprint,
            "seed": settings.seed,
            "source": {
                "path": settings.data.source or str(sources.root),
                "kind": "stream" if settings.data.stream else "given" if settings.data.source else "standard library",
                "files": len(sources.names),
                **counted,
            },
            "tokenizer": {"vocab_size": tokenizer.get_vocab_size(), "asked": settings.model.vocab_size, **sample},
            "splits": _write_streams(run, split, tokenizer, folder),
            "order2_bits_per_byte": order2_bits_per_byte(_texts(split.train), _texts(split.eval)),
            "synthetic": _write_synthetic(run, folder),
        }
        np.save(folder / "token_bytes.npy", bytes_per_token(tokenizer))
        _check_round_trip(split.eval, tokenizer)
        shutil.rmtree(folder / SPOOL, ignore_errors=True)
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        statistics["files"] = [
            {"path": path.relative_to(folder).as_posix(), "bytes": path.stat().st_size} for path in files
        ]
        statistics["seconds"] = round(time.monotonic() - began, 2)
        write_json(folder / "data.json", statistics)
    return statistics


def prepared(run: Run) -> bool:
    """Whether `data/` is whole and made from these settings and, where they are still there, these source files."""
    content, _ = read_json(run.data / "data.json")
    if not isinstance(content, dict) or content.get("schema") != SCHEMA:
        return False
    files = [(run.data / entry["path"], entry["bytes"]) for entry in content["files"]]
    if not all(path.is_file() and path.stat().st_size == size for path, size in files):
        return False
    try:
        sources = _find(run)
    except UserError:
        sources = None  # moved away since: what was made from it is still good
    return content["fingerprint"] == _fingerprint(run, sources, content["fingerprint"]["sources"])


def ensure(run: Run) -> dict[str, Any]:
    """The content of data.json; prepares first where `data/` is absent, damaged or made from something else."""
    return read_json(run.data / "data.json")[0] if prepared(run) else prepare(run)


def load_tokenizer(run: Run) -> Tokenizer:
    return read_tokenizer(run.data / "tokenizer.json")


def load_token_bytes(run: Run) -> np.ndarray:
    """int32 [vocab]: bytes of text per id, see `tokenizer.bytes_per_token`."""
    path = run.data / "token_bytes.npy"
    if not path.is_file():
        raise UserError(f"{path} is missing: run phase {PHASE} first")
    return np.load(path)


def language_dataset(run: Run, split: Literal["train", "eval"]) -> PackedDataset:
    """The windows of real text that the run's settings ask for."""
    train = run.settings.train
    return PackedDataset(
        run.data / f"{split}.bin", vocab_size=len(load_token_bytes(run)), seq_length=train.seq_length,
        n_sequences=getattr(train, f"num_{split}_sequences"), seed=run.settings.seed, split=split,
    )


def synthetic_dataset(
    run: Run, task: Literal["recall", "copy", "needle"], split: Literal["train", "eval"]
) -> JsonlDataset:
    """The sequences of one task, checked against its vocabulary."""
    path = run.data / "synthetic" / f"{task}_{split}.jsonl"
    return JsonlDataset(path, vocab_size=run.settings.recall.vocab_size)


def _find(run: Run) -> Sources:
    return find_files(run.settings.data.source, STREAMED if run.settings.data.stream else SUFFIXES)


def _read_all(run: Run, sources: Sources) -> tuple[Split, dict[str, Any]]:
    """(both sides of the whole text, what is known of it)"""
    settings = run.settings
    size = sum(path.stat().st_size for path in sources.paths())
    with Progress(run, PHASE, "reading", total=size, unit="B") as bar:
        corpus = scan(sources, bar.update)
    split = split_corpus(
        corpus, eval_fraction=settings.data.eval_fraction, max_bytes=settings.data.max_bytes, seed=settings.seed
    )
    return split, {
        "documents": len(corpus), "bytes": int(corpus.length.sum()), "skipped_files": corpus.skipped,
        "duplicates_dropped": split.duplicates, "documents_beyond_max_bytes": split.beyond_cap, "cut": split.cut,
    }


def _fingerprint(run: Run, sources: Sources | None, unknown: str = "") -> dict[str, Any]:
    """All that `data/` depends on; sources count by name, size and time of change. unknown: stands for lost ones."""
    settings, digest = run.settings, hashlib.sha256()
    for path in sources.paths() if sources else ():
        stat = path.stat()
        digest.update(f"{path}\0{stat.st_size}\0{stat.st_mtime_ns}\n".encode("utf-8", "surrogateescape"))
    train = settings.train
    return {
        "seed": settings.seed,
        "data": settings.data.model_dump(mode="json"),
        "vocab_size": settings.model.vocab_size,
        "windows": [train.seq_length, train.num_train_sequences, train.num_eval_sequences],
        "recall": [getattr(settings.recall, name) for name in RECALL_KEYS],
        "sources": digest.hexdigest() if sources else unknown,
    }


RECALL_KEYS = ("seq_length", "n_pairs", "vocab_size", "num_train_sequences", "num_eval_sequences")


def _make_tokenizer(run: Run, train: Corpus, folder: Path) -> tuple[Tokenizer, dict[str, int]]:
    """Train on the first documents in seeded order, save, and read back what was saved."""
    taken = {"sample_documents": 0, "sample_bytes": 0}
    enough = min(SAMPLE_PER_ENTRY * run.settings.model.vocab_size, int(train.length.sum()))

    def sample() -> Iterator[str]:
        for row in range(len(train)):
            taken["sample_documents"] += 1
            for piece in train.pieces(row):
                size = len(piece.encode())
                taken["sample_bytes"] += size
                bar.update(size)
                yield piece
                if taken["sample_bytes"] >= enough:
                    return

    with Progress(run, PHASE, "training the tokenizer", total=enough, unit="B") as bar:
        tokenizer = train_tokenizer(sample(), run.settings.model.vocab_size)
    tokenizer.save(str(folder / "tokenizer.json"))
    return read_tokenizer(folder / "tokenizer.json"), taken


def _write_streams(run: Run, split: Split, tokenizer: Tokenizer, folder: Path) -> dict[str, Any]:
    settings = run.settings.train
    sizes: dict[str, Any] = {}
    total = int(split.eval.length.sum()) + (0 if run.settings.data.stream else int(split.train.length.sum()))
    with Progress(run, PHASE, "tokenizing", total=total, unit="B") as bar:
        pairs: list[tuple[Literal["train", "eval"], Corpus]] = [("eval", split.eval), ("train", split.train)]
        for name, corpus in pairs[:1] if run.settings.data.stream else pairs:
            path, n_bytes = folder / f"{name}.bin", int(corpus.length.sum())
            tokens = write_stream(path, corpus, tokenizer, bar.update)
            asked = getattr(settings, f"num_{name}_sequences")
            starts, passes = window_starts(
                run.data / path.name, tokens, settings.seq_length, asked, run.settings.seed, name
            )
            sizes[name] = {
                "documents": len(corpus),
                "bytes": n_bytes,
                "tokens": tokens,
                "bytes_per_token": round(n_bytes / (tokens - len(corpus)), 4),  # the documents' ends are no text
                "dtype": token_dtype(tokenizer.get_vocab_size()).name,
                "seq_length": settings.seq_length,
                "windows_asked": asked,
                "windows": len(starts),
                "passes": passes,
            }
    return sizes


def _write_synthetic(run: Run, folder: Path) -> dict[str, Any]:
    settings = run.settings
    sizes = {
        task: {split: synthetic.n_sequences(settings, task, split) for split in synthetic.SPLITS}
        | {"chance": synthetic.chance(task, settings.recall.vocab_size)}
        for task in synthetic.TASKS
    }
    total = sum(size["train"] + size["eval"] for size in sizes.values())
    with Progress(run, PHASE, "synthetic sequences", total=int(total), unit="sequence") as bar:
        synthetic.write_synthetic(folder / "synthetic", settings, bar.update)
    return sizes


def _check_round_trip(corpus: Corpus, tokenizer: Tokenizer) -> None:
    checked = 0
    for row in range(len(corpus)):
        for piece in corpus.pieces(row):
            if decode(tokenizer, next(encode(tokenizer, [piece]))) != piece:
                raise RuntimeError(f"the tokenizer does not give {corpus.name(row)} back exactly")
            checked += len(piece)
            if checked >= CHECK_BYTES:
                return


def _texts(corpus: Corpus) -> Iterator[bytes]:
    return (piece.encode() for row in range(len(corpus)) for piece in corpus.pieces(row))
