"""What attention may cost: linear work and memory, no waiting host, equal bits again, and what autograd is promised."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from attention_cases import (
    ADVERSARIES,
    DEVICE,
    FAST,
    LINEAR,
    TABLES,
    TOLERANCES,
    Largest,
    NoHostRead,
    Storages,
    assert_close,
    best_dtype,
    draw,
    laid_out,
    out_and_grads,
)
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lshv2.attention import lsh_attention
from lshv2.attention.far import FarTiles
from lshv2.attention.intervals import build_intervals


@pytest.mark.parametrize("one_table", [False, True], ids=TABLES)
@pytest.mark.parametrize("spoil", [None, *ADVERSARIES], ids=lambda f: f.__name__ if f else "uniform")
def test_work_of_the_tiles_is_linear_whatever_the_data(
    spoil: Callable[[Tensor, Tensor], None] | None, one_table: bool
) -> None:
    """Score elements computed a query and round: bounded by W, the tile and the key step, not by the bucket's size."""
    per_query = []
    for length in (2048, 8192):
        _, _, _, _, q_ids, k_ids = draw(3, 1, 2, 1, length, 4, 2, 8, one_table=one_table)
        if spoil:
            spoil(q_ids, k_ids)
        tables = build_intervals(q_ids, k_ids, bucket_size=32, window=16, n_global=0)
        work = sum(batch.hidden.numel() for batch in FarTiles(tables))
        per_query.append(work / (2 * 2 * length))
    assert max(per_query) < 32 + 64 + 2 * 32 + 32, f"{per_query} scores a query and round"
    assert per_query[1] <= 1.25 * per_query[0]


@pytest.mark.parametrize("one_table", [False, True], ids=TABLES)
@pytest.mark.parametrize("backend", LINEAR)
def test_memory_is_linear(backend: str, one_table: bool) -> None:
    """No tensor grows faster than T, forward or backward; none is near T·T / W, nor T x n_buckets a head."""
    if backend == "torch" and DEVICE == "cuda":
        pytest.skip("on a GPU its tiles are worked on by the gigabyte, whatever the length")
    lengths = (8192, 16_384)
    heads, rounds, buckets, dim = 2, 4, 64, 16
    if backend == "triton" and DEVICE == "cpu":
        lengths, heads, rounds, buckets = (256, 512), 1, 2, 1024
    largest = []
    for length in lengths:
        tensors = draw(7, 1, heads, 1, length, dim, rounds, buckets, dtype=torch.float32, one_table=one_table)
        with Largest() as seen:
            out_and_grads(backend, tensors, n_buckets=buckets, bucket_size=32, window=64, n_global=4)
        largest.append(seen.bytes)
    assert largest[1] <= 2.1 * largest[0], largest
    # the largest there need be: a float32 partial result for each round; rows may be padded by a tile or two
    assert largest[1] <= 2 * heads * rounds * (lengths[1] + 256) * dim * 4, largest


@pytest.mark.parametrize("backend", LINEAR)
def test_65536_tokens_forward_and_backward(backend: str) -> None:
    if backend == "triton" and DEVICE == "cpu":
        pytest.skip("hours in Triton's interpreter")
    tensors = draw(8, 1, 3, 1, 65_536, 64, 4, 512, dtype=torch.float32)
    results = out_and_grads(backend, tensors, n_buckets=512, bucket_size=128, window=256, n_global=4)
    assert all(x.isfinite().all() for x in results)
    # the last query against its visible set, by hand
    q, k, v, _, q_ids, k_ids = (x.detach() for x in tensors)
    seen = set(range(65_536 - 256, 65_536)) | set(range(4))
    for r in range(4):
        seen |= set((k_ids[0, 0, r] == q_ids[0, 1, r, -1]).nonzero().flatten()[-128:].tolist())
    at = torch.tensor(sorted(seen), device=DEVICE)
    expected = ((k[0, 0, at] @ q[0, 1, -1]) / 8).softmax(0) @ v[0, 0, at]
    assert (results[0][0, 1, -1] - expected).abs().max() < 1e-5


waiting = pytest.mark.filterwarnings("default:Synchronization debug mode:UserWarning")  # that it is a prototype


@contextmanager
def host_that_must_not_wait() -> Iterator[None]:
    """On a GPU torch itself refuses to synchronise; elsewhere the operations that would are refused by name."""
    if DEVICE == "cpu":
        with NoHostRead():
            yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.skipif("triton" not in FAST, reason="Triton is not installed")
@waiting
@pytest.mark.parametrize("one_table", [False, True], ids=TABLES)
@pytest.mark.parametrize("packed", [False, True], ids=["one_document", "packed"])
def test_the_host_never_waits_for_the_kernels(packed: bool, one_table: bool) -> None:
    tensors = draw(10, 1, 2, 1, 100, 16, 2, 4, dtype=torch.float32, one_table=one_table)
    sizes: dict[str, Any] = dict(n_buckets=4, bucket_size=8, window=9, n_global=2)
    if packed:
        sizes["cu_seqlens"] = torch.tensor([0, 10, 60, 100], device=DEVICE)
    want = out_and_grads("triton", tensors, **sizes)  # compiled and warm
    with host_that_must_not_wait():
        got = out_and_grads("triton", tensors, **sizes)
    assert_close(got, want, TOLERANCES[torch.float32])


@waiting
def test_the_watch_on_the_host_sees_what_waits() -> None:
    x = torch.ones(3, device=DEVICE)
    for wait in (lambda: x.sum().item(), lambda: x.nonzero()):
        with pytest.raises((AssertionError, RuntimeError), match="synchroni"), host_that_must_not_wait():
            wait()


@pytest.mark.parametrize("backend", LINEAR)
def test_the_same_call_gives_the_same_bits(backend: str) -> None:
    """No float atomics: gradients of keys that many queries share are summed in one order."""
    if backend == "torch" and DEVICE == "cuda":
        pytest.skip("the plain-torch tiles add with atomics on a GPU, where they are not the path")
    length = 90 if DEVICE == "cpu" else 5000
    tensors = draw(11, 1, 2, 1, length, 16, 2, 2, dtype=best_dtype(backend))
    sizes = dict(n_buckets=2, bucket_size=32, window=16, n_global=4)
    for one, other in zip(*(out_and_grads(backend, tensors, **sizes) for _ in range(2)), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("backend", LINEAR)
def test_a_second_derivative_is_refused(backend: str) -> None:
    """The backward keeps out and lse as constants: differentiating it again must not give a wrong number."""
    q, k, v, _, q_ids, k_ids = draw(9, 1, 2, 1, 50, 16, 2, 4, dtype=best_dtype(backend))
    out = lsh_attention(q, k, v, q_ids, k_ids, n_buckets=4, bucket_size=4, window=4, backend=backend)
    (dq,) = torch.autograd.grad(out.sin().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice|does not require grad"):
        dq.pow(2).sum().backward()


@pytest.mark.parametrize("backend", FAST)
def test_gradient_checkpointing_changes_nothing(backend: str) -> None:
    q, k, v, grad, q_ids, k_ids = draw(12, 1, 2, 1, 60, 16, 2, 4, dtype=best_dtype(backend))

    def layer(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return lsh_attention(
            q, k, v, q_ids, k_ids, n_buckets=4, bucket_size=8, window=9, n_global=2, backend=backend
        ).sin()

    plain, recomputed = layer(q, k, v), checkpoint(layer, q, k, v, use_reentrant=False)
    results = [[out.detach(), *torch.autograd.grad(out, (q, k, v), grad)] for out in (plain, recomputed)]
    assert_close(*results, TOLERANCES[q.dtype])


@pytest.mark.parametrize("one_table", [False, True], ids=TABLES)
@pytest.mark.parametrize("backend", LINEAR)
def test_all_that_is_kept_for_the_backward_is_autograds_to_give_away(
    backend: str, one_table: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Checkpointing drops what was saved; a table that hangs elsewhere would stay, once for each layer of a model."""
    if backend == "triton":  # a recording makes nothing but what it gives
        monkeypatch.setattr("lshv2.attention.kernels.replay.SHORT", 0)
    q, k, v, _, q_ids, k_ids = draw(15, 1, 2, 1, 60, 16, 2, 4, dtype=best_dtype(backend), one_table=one_table)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: None, lambda _: None), Storages() as made:
        out = lsh_attention(q, k, v, q_ids, k_ids, n_buckets=4, bucket_size=8, window=9, n_global=2, backend=backend)
    gc.collect()
    given = {x.untyped_storage().data_ptr() for x in (q, k, v, q_ids, k_ids, out)}  # views of these are made too
    assert out.requires_grad and len(made.seen) > 5
    left = [storage.nbytes() for storage in made.alive() if storage.data_ptr() not in given]
    assert not left, f"buffers of {left} bytes are still there"


@pytest.mark.skipif("triton" not in FAST, reason="Triton is not installed")
@pytest.mark.filterwarnings("default::UserWarning")  # torch.compile remarks on this and that, by version
def test_compiled_the_kernels_are_one_operator() -> None:
    """In one graph without a break, on heads split from [B,T,H,D] as a model has them."""
    q, k, v, grad, q_ids, k_ids = draw(13, 1, 4, 2, 50, 16, 2, 4, dtype=torch.float32)
    q, k, v = (laid_out(x, 0, 2, 1, 3) for x in (q, k, v))

    def layer(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return lsh_attention(
            q * 1.5, k + 0.1, v.sin(), q_ids, k_ids, n_buckets=4, bucket_size=8, window=9, n_global=2, backend="triton"
        ).sin()

    results = []
    for function in (layer, torch.compile(layer, fullgraph=True, backend="aot_eager")):
        out = function(q, k, v)
        results.append([out.detach(), *torch.autograd.grad(out, (q, k, v), grad)])
    assert_close(*results, TOLERANCES[torch.float32])


@pytest.mark.skipif("triton" not in FAST, reason="Triton is not installed")
@pytest.mark.parametrize(("rounds", "probes"), [(0, 0), (2, 1), (1, 3)])
@pytest.mark.parametrize("packed", [False, True], ids=["one_document", "packed"])
def test_the_operator_keeps_what_torch_asks_of_one(rounds: int, probes: int, packed: bool) -> None:
    """torch's own examination: schema, autograd, and that the shapes and strides foretold are those that come."""
    from lshv2.attention.kernels import compiled

    q, k, v, _, q_ids, k_ids = draw(
        14, 1, 4, 2, 40, 16, rounds * probes, 4, dtype=torch.float32, one_table=rounds == 1
    )
    q, k, v = (laid_out(x, 0, 2, 1, 3) for x in (q, k, v))
    cu_seqlens = torch.tensor([0, 10, 40], device=DEVICE) if packed else None
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(compiled.attention, (q, k, v, q_ids, k_ids, cu_seqlens, 4, 8, 9, 2), test_utils=checks)
    inputs = [x.detach() for x in (q, k, v)]
    saved = compiled.attention(*inputs, q_ids, k_ids, cu_seqlens, 4, 8, 9, 2)
    grad = torch.ones_like(saved[0])
    arguments = (grad, *inputs, saved, cu_seqlens, rounds, probes, 4, 8, 9, 2)
    torch.library.opcheck(compiled.attention_backward, arguments, test_utils=checks[::2])
