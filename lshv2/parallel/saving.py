"""The tensors of a checkpoint, written by every process its own and read by any number of them.

torch.distributed.checkpoint, in its safetensors form: a file a process, `shard-0000N-model-00001-of-00001.safetensors`
with the offsets of its pieces in the header. No code and no pickles, unlike DCP's own format. `lshv2.checkpoint` names,
seals and finds the folders.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.tensor import DTensor, distribute_tensor


def write_pieces(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Each process its pieces of sharded tensors, and one of them those that all have; every process must call it."""
    dcp.save(dict(tensors), storage_writer=HuggingFaceStorageWriter(str(folder), save_distributed=True))


def read_pieces(folder: Path, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """All tensors, on the CPU; of those named in `like` with the same shape only the piece that this process has there.

    Needs no other process. Raises what safetensors and DCP raise on files that are not theirs.
    """
    reader = HuggingFaceStorageReader(str(folder))
    tensors = {}
    for name, stored in reader.read_metadata().state_dict_metadata.items():
        assert isinstance(stored, TensorStorageMetadata)  # this form has no other
        own = like.get(name)
        if isinstance(own, DTensor) and own.shape == stored.size:
            tensors[name] = torch.empty_like(own, dtype=stored.properties.dtype)
        else:
            tensors[name] = torch.empty(stored.size, dtype=stored.properties.dtype)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")  # as it is meant
        dcp.load(tensors, storage_reader=reader, no_dist=True)
    return tensors


def as_own(x: Tensor, own: Tensor) -> Tensor:
    """A whole tensor as `own` lies over the processes; every process has all of x."""
    if not isinstance(own, DTensor) or isinstance(x, DTensor):
        return x
    return distribute_tensor(x.to(own.device), own.device_mesh, own.placements, src_data_rank=None)
