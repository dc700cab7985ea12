"""The kernels where they belong: compiled, captured, under autocast, at full width. Skipped without a GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from attention_cases import (
    DEVICE,
    RESULTS,
    TABLES,
    TOLERANCES,
    assert_close,
    assert_is_the_oracle,
    draw,
    laid_out,
    out_and_grads,
)
from torch import Tensor

from lshv2.attention import choose_backend, lsh_attention
from lshv2.hashing import bucket_ids, codebook_tables

pytestmark = [
    pytest.mark.skipif(DEVICE != "cuda", reason="needs a GPU"),
    pytest.mark.usefixtures("poisoned_memory"),
    pytest.mark.filterwarnings("default::UserWarning"),  # torch.compile and graph capture remark on this and that
]

SIZES: dict[str, Any] = dict(n_buckets=32, bucket_size=64, window=96, n_global=4)


def attend(q: Tensor, k: Tensor, v: Tensor, q_ids: Tensor, k_ids: Tensor) -> Tensor:
    return lsh_attention(q, k, v, q_ids, k_ids, backend="triton", **SIZES)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("dim", [32, 64, 128])
@pytest.mark.parametrize("bucket_size", [32, 128, 256])
def test_equals_the_oracle_at_full_width(dtype: torch.dtype, dim: int, bucket_size: int) -> None:
    """The reference's head counts and rounds, a ragged length beyond many tiles, and the longest rows of tiles."""
    tensors = draw(1, 1, 12, 4, 1999, dim, 4, 16, dtype=dtype)
    assert_is_the_oracle("triton", tensors, **{**SIZES, "n_buckets": 16, "bucket_size": bucket_size})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_one_table_equals_the_oracle_at_full_width(dtype: torch.dtype) -> None:
    """The same, of one table that every query probes four times; with 16 buckets, one query in three twice alike."""
    tensors = draw(9, 1, 12, 4, 1999, 64, 4, 16, dtype=dtype, one_table=True)
    assert_is_the_oracle("triton", tensors, **{**SIZES, "n_buckets": 16, "bucket_size": 128})


def test_the_kernels_are_chosen_here() -> None:
    assert choose_backend(torch.empty(1, 4, 4096, 64, dtype=torch.bfloat16, device=DEVICE)) == "triton"
    assert choose_backend(torch.empty(1, 4, 4096, 48, dtype=torch.bfloat16, device=DEVICE)) == "torch"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_torch_compile_changes_nothing(dtype: torch.dtype) -> None:
    """Compiled, between operations that Inductor would like to fuse with."""

    def layer(q: Tensor, k: Tensor, v: Tensor, q_ids: Tensor, k_ids: Tensor) -> Tensor:
        return attend(q * 1.5, k + 0.1, v.sin(), q_ids, k_ids) * 2

    q, k, v, grad, q_ids, k_ids = draw(2, 2, 6, 2, 777, 64, 4, 32, dtype=dtype)
    q, k, v = (laid_out(x, 0, 2, 1, 3) for x in (q, k, v))  # as a model splits its heads
    results = []
    for function in (layer, torch.compile(layer, fullgraph=True)):
        out = function(q, k, v, q_ids, k_ids)
        results.append([out.detach(), *torch.autograd.grad(out, (q, k, v), grad)])
    assert_close(*reversed(results), TOLERANCES[dtype])


def test_torch_compile_with_hashing_and_autocast() -> None:
    """As in a model: float32 vectors, bfloat16 products, buckets from the vectors themselves."""
    tables = [x.to(DEVICE) for x in codebook_tables(2, 4, 32, 64, torch.Generator().manual_seed(0))]
    q, k, v, grad, _, _ = draw(3, 1, 6, 2, 600, 64, 4, 32, dtype=torch.float32)

    def layer(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x @ torch.eye(64, device=DEVICE) for x in (q, k, v))
        return attend(q, k, v, bucket_ids(q, tables), bucket_ids(k, tables)).float()

    results = []
    with torch.autocast(DEVICE, torch.bfloat16):
        for function in (layer, torch.compile(layer)):
            out = function(q, k, v)
            results.append([out.detach(), *torch.autograd.grad(out, (q, k, v), grad)])
    assert_close(*reversed(results), TOLERANCES[torch.bfloat16])


@pytest.mark.parametrize("packed", [False, True], ids=["one_document", "packed"])
def test_a_captured_graph_replays_with_other_inputs(packed: bool) -> None:
    """Forward and backward captured once; replayed on other data and documents they equal a plain call, to the bit."""
    static = draw(4, 1, 6, 2, 1000, 64, 4, 32, dtype=torch.bfloat16)
    sizes = dict(SIZES)
    if packed:
        sizes["cu_seqlens"] = torch.tensor([0, 100, 101, 700, 1000], device=DEVICE)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            out_and_grads("triton", static, **sizes)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replayed = out_and_grads("triton", static, **sizes)
    for seed in (5, 6):
        other = draw(seed, 1, 6, 2, 1000, 64, 4, 32, dtype=torch.bfloat16)
        with torch.no_grad():
            for into, new in zip(static, other, strict=True):
                into.copy_(new)
            if packed:
                sizes["cu_seqlens"].copy_(torch.tensor([0, 1, 64 * seed, 900, 1000]))
        graph.replay()
        for name, a, b in zip(RESULTS, replayed, out_and_grads("triton", other, **sizes), strict=True):
            assert torch.equal(a, b), f"{name} differs after replay with seed {seed}"


def test_addresses_beyond_two_to_the_31st_element() -> None:
    """The last of 130 equal heads has the bits of that head alone, outputs and gradients: addresses are of 64 bits."""
    heads, length, dim = 130, 1 << 17, 128
    one = draw(7, 1, 1, 1, length, dim, 1, 1024, dtype=torch.bfloat16)
    many = [x.detach().expand(1, heads, *x.shape[2:]).contiguous().requires_grad_(x.requires_grad) for x in one]
    assert many[0].numel() > 1 << 31
    sizes = {**SIZES, "n_buckets": 1024}
    alone = out_and_grads("triton", one, **sizes)
    for name, a, b in zip(RESULTS, alone, out_and_grads("triton", many, **sizes), strict=True):
        assert torch.equal(a[:, 0], b[:, -1]), f"{name} of the last head differs"


@pytest.mark.parametrize("one_table", [False, True], ids=TABLES)
def test_a_million_tokens_forward_and_backward(one_table: bool) -> None:
    tensors = draw(8, 1, 2, 1, 1 << 20, 64, 4, 8192, dtype=torch.bfloat16, one_table=one_table)
    results = out_and_grads("triton", tensors, **{**SIZES, "n_buckets": 8192, "bucket_size": 128})
    assert all(x.isfinite().all() for x in results)
    # the first query sees one key, and its weight is one whatever the query: no gradient
    assert all(x[:, :, 1:].abs().sum(-1).ne(0).all() for x in results), "a token without a result or gradient"
