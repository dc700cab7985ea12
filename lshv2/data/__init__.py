"""Data: real text and synthetic sequences, from a source and a seed to files that training reads.

corpus -> scan -> split -> tokenizer -> packing make the token streams, order2 their baseline, synthetic and jsonl the
sequences with known answers; phase puts them into a run's folder. shards -> stream read while training what is too
large for that, streamed is phase 2 for it. Start here:

    from lshv2.data import ensure, language_dataset, language_stream, synthetic_dataset, epoch_order
"""

from lshv2.data.jsonl import JsonlDataset
from lshv2.data.order2 import order2_bits_per_byte
from lshv2.data.packing import PackedDataset, epoch_order
from lshv2.data.phase import (
    ensure,
    language_dataset,
    load_token_bytes,
    load_tokenizer,
    prepare,
    prepared,
    synthetic_dataset,
)
from lshv2.data.stream import TokenStream
from lshv2.data.streamed import language_stream
from lshv2.data.synthetic import chance

__all__ = [
    "JsonlDataset", "PackedDataset", "TokenStream", "chance", "ensure", "epoch_order", "language_dataset",
    "language_stream", "load_token_bytes", "load_tokenizer", "order2_bits_per_byte", "prepare", "prepared",
    "synthetic_dataset",
]
