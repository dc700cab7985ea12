"""Streams over small shards, for the tests of what they read and of how they go on."""

import gzip
import itertools
import json

from lshv2.data.shards import Shards
from lshv2.data.stream import Place, TokenStream, WindowStream
from lshv2.data.tokenizer import train_tokenizer

SEQ = 32
TEXTS = [f"<{n}> " + " ".join(f"word{n * k % 89}" for k in range(n % 13 + 2)) for n in range(200)]


def write_shards(folder, texts, n_shards, suffix=".jsonl"):
    """The texts in turn over the shards, with blank lines and empty texts between."""
    folder.mkdir(exist_ok=True)
    for shard in range(n_shards):
        lines = "\n\n".join(json.dumps({"text": text}) for text in [*texts[shard::n_shards], ""])
        path = folder / f"{shard:03}{suffix}"
        path.write_bytes(gzip.compress(lines.encode()) if suffix.endswith(".gz") else lines.encode())
    return str(folder)


def make(folder):
    """(source, the path of a tokenizer), both in the folder."""
    train_tokenizer(TEXTS, 300).save(str(folder / "tokenizer.json"))
    return write_shards(folder / "shards", TEXTS, 5), folder / "tokenizer.json"


def find(source, eval_fraction=0.0, seed=0):
    return Shards.find(source, seed=seed, eval_fraction=eval_fraction)


def one_reader(source, tokenizer, place=None, *, buffer=7, seed=0, seq_length=SEQ):
    return WindowStream(
        find(source, seed=seed), tokenizer, seq_length=seq_length, batch_size=2, shuffle_buffer=buffer, rank=0,
        world_size=1, places=[place or Place()],
    )


def token_stream(made, *, workers=0, rank=0, ranks=1, buffer=5, eval_fraction=0.1, seed=0):
    return TokenStream(
        find(made[0], eval_fraction, seed), made[1], seq_length=SEQ, n_sequences=100, shuffle_buffer=buffer,
        num_workers=workers, rank=rank, world_size=ranks,
    )


def take(stream, n, size=3):
    """The next n batches, and the state after each as a file would hold it."""
    batches = ((ids.numpy().copy(), json.dumps(stream.state())) for ids, _ in stream.batches(size))
    return list(itertools.islice(batches, n))


def first_pass(documents):
    return list(itertools.takewhile(lambda document: document.position.epoch == 0, documents))


def text_of(document):
    return "".join(piece for _, piece, _ in document.pieces())
