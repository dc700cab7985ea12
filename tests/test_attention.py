"""Every backend equals the dense masked softmax over S(t), outputs and gradients, whatever the shapes and the data."""

from __future__ import annotations

import importlib
from collections.abc import Callable

import pytest
import torch
from attention_cases import (
    ADVERSARIES,
    DEVICE,
    FAST,
    RESULTS,
    TABLES,
    TOLERANCES,
    Case,
    Variant,
    assert_close,
    assert_is_the_oracle,
    best_dtype,
    cases,
    draw,
    laid_out,
    oracle,
    out_and_grads,
    variants,
)
from hypothesis import Phase, given, settings
from torch import Tensor

from lshv2.attention import BACKENDS, lsh_attention, visible_set

pytestmark = pytest.mark.usefixtures("poisoned_memory")


@pytest.mark.parametrize("variant", variants(), ids=str)
def test_equals_the_oracle_on_random_shapes(variant: Variant) -> None:
    # Shrinking a failure would take minutes where kernels are interpreted, or compiled again and again.
    phases = [Phase.generate] if variant.backend == "triton" else list(Phase)

    @settings(max_examples=variant.examples, phases=phases)
    @given(case=cases(variant))
    def check(case: Case) -> None:
        assert_is_the_oracle(variant.backend, draw(**case.tensors, dtype=variant.dtype), **case.sizes)

    check()


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_equals_the_oracle_in_lower_precision(backend: str, dtype: torch.dtype) -> None:
    """Against the oracle in float64 on the same rounded inputs: only the backend's own rounding is left."""
    if backend == "triton" and DEVICE == "cpu":
        pytest.skip("in the random shapes, as far as the interpreter knows the dtype")
    tensors = draw(1, 1, 6, 2, 400, 32, 4, 8, dtype=dtype)
    assert_is_the_oracle(backend, tensors, n_buckets=8, bucket_size=16, window=32, n_global=4)


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize(("bucket_size", "one_table"), [(1, False), (16, False), (16, True)])
@pytest.mark.parametrize("spoil", ADVERSARIES, ids=lambda f: f.__name__)
def test_equals_the_oracle_on_adversarial_buckets(
    backend: str, spoil: Callable[[Tensor, Tensor], None], bucket_size: int, one_table: bool
) -> None:
    if bucket_size == 1 or (backend == "triton" and DEVICE == "cpu"):
        tensors = draw(2, 1, 2, 1, 70 if one_table else 150, 16, 3, 8, dtype=best_dtype(backend), one_table=one_table)
    else:
        tensors = draw(2, 1, 4, 2, 700, 16, 3, 8, dtype=best_dtype(backend), one_table=one_table)
    spoil(tensors[4], tensors[5])
    assert_is_the_oracle(backend, tensors, n_buckets=8, bucket_size=bucket_size, window=16, n_global=2)


@pytest.mark.skipif("triton" not in FAST, reason="Triton is not installed")
@pytest.mark.parametrize("one_table", [False, True], ids=TABLES)
@pytest.mark.parametrize("spoil", ADVERSARIES, ids=lambda f: f.__name__)
def test_keys_that_many_queries_see_are_shared_out(
    spoil: Callable[[Tensor, Tensor], None], one_table: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks of queries that lie inside a stretch have programs of their own: here blocks of 32, usually 8,192."""
    monkeypatch.setattr(importlib.import_module("lshv2.attention.kernels.far_keys"), "BULK", 32)
    tensors = draw(15, 1, 3, 1, 100 if one_table else 170, 16, 2, 8, dtype=torch.float32, one_table=one_table)
    spoil(tensors[4], tensors[5])
    assert_is_the_oracle("triton", tensors, n_buckets=8, bucket_size=70, window=16, n_global=2)


@pytest.mark.parametrize("backend", sorted({"reference", *FAST}))
@pytest.mark.parametrize(
    ("window", "n_global", "bounds"),
    [
        (6, 2, [0, 17, 18, 60, 90]),
        (1, 0, [0, 45, 90]),
        (5, 20, [0, 3, 7, 30, 90]),  # documents shorter than their sinks would be; a window smaller than any tile
        (9, 3, [0, 0, 40, 40, 40, 90, 90]),  # empty documents, first and last too
    ],
)
def test_packed_documents_see_nothing_of_each_other(
    backend: str, window: int, n_global: int, bounds: list[int]
) -> None:
    """Each document, cut out and alone in the oracle, has the same outputs and gradients."""
    dtype = best_dtype(backend)
    q, k, v, grad, q_ids, k_ids = draw(4, 1, 4, 2, 90, 16, 2, 2, dtype=dtype)
    sizes = dict(n_buckets=2, bucket_size=8, window=window, n_global=n_global)
    cu_seqlens = torch.tensor(bounds, device=DEVICE)
    packed = out_and_grads(backend, [q, k, v, grad, q_ids, k_ids], cu_seqlens=cu_seqlens, **sizes)
    for a, b in zip(bounds, bounds[1:], strict=False):
        if a == b:
            continue
        part = [x[:, :, a:b].detach().requires_grad_(x.requires_grad) for x in (q, k, v, grad)]
        alone = oracle([*part, q_ids[..., a:b], k_ids[..., a:b]], **sizes)
        assert_close([x[:, :, a:b] for x in packed], alone, TOLERANCES[dtype])


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize(
    ("length", "rounds", "one_table", "window", "n_global"),
    [
        (1, 2, False, 4, 3), (1, 0, False, 1, 0), (100, 0, False, 9, 0), (100, 0, False, 9, 70), (130, 1, False, 1, 0),
        (40, 2, False, 300, 5), (1, 5, True, 4, 3), (40, 2, True, 1, 50),
    ],
)
def test_equals_the_oracle_at_the_edges(
    backend: str, length: int, rounds: int, one_table: bool, window: int, n_global: int
) -> None:
    """One token; no rounds; more sinks than a tile or than tokens; a window of one or beyond the sequence."""
    tensors = draw(7, 2, 3, 1, length, 16, rounds, 4, dtype=best_dtype(backend), one_table=one_table)
    assert_is_the_oracle(backend, tensors, n_buckets=4, bucket_size=8, window=window, n_global=n_global)


@pytest.mark.parametrize("backend", FAST)
def test_any_memory_layout_serves(backend: str) -> None:
    """Heads split from [B,T,H,D], a last dimension that is not the innermost, an expanded gradient."""
    q, k, v, grad, q_ids, k_ids = draw(8, 2, 2, 1, 40, 16, 2, 4, dtype=best_dtype(backend))
    sizes = dict(n_buckets=4, bucket_size=8, window=9, n_global=2)

    q, k, v = laid_out(q, 0, 2, 1, 3), laid_out(k, 0, 2, 1, 3), laid_out(v, 1, 0, 3, 2)
    q_ids, k_ids = laid_out(q_ids, 0, 3, 1, 2), laid_out(k_ids, 0, 3, 1, 2)
    for gradient in (laid_out(grad, 0, 2, 1, 3), laid_out(grad, 0, 1, 3, 2), grad[:1, :1, :1, :1].expand_as(grad)):
        assert_is_the_oracle(backend, [q, k, v, gradient, q_ids, k_ids], **sizes)


@pytest.mark.parametrize("backend", FAST)
def test_keys_and_values_may_be_of_another_dtype_than_queries(backend: str) -> None:
    q, k, v, grad, q_ids, k_ids = draw(9, 1, 4, 2, 60, 16, 2, 4, dtype=torch.float32)
    k, v = (x.detach().half().requires_grad_() for x in (k, v))
    tensors, sizes = [q, k, v, grad, q_ids, k_ids], dict(n_buckets=4, bucket_size=8, window=9, n_global=2)
    got, want = out_and_grads(backend, tensors, **sizes), oracle(tensors, **sizes)
    assert [x.dtype for x in got] == [torch.float32, torch.float32, torch.float16, torch.float16]
    assert_close(got[:2], want[:2], TOLERANCES[torch.float32], RESULTS[:2])
    assert_close(got[2:], want[2:], TOLERANCES[torch.float16], RESULTS[2:])


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast_changes_precision_only(backend: str, dtype: torch.dtype) -> None:
    """Under bfloat16 autocast, from float32 inputs and from bfloat16 ones, as in a model."""
    if backend == "triton" and DEVICE == "cpu" and dtype == torch.bfloat16:
        pytest.skip("Triton's interpreter multiplies bfloat16 as integers")
    length = 80 if backend == "triton" and DEVICE == "cpu" else 300
    tensors = draw(1, 1, 4, 2, length, 16, 2, 4, dtype=dtype)
    sizes = dict(n_buckets=4, bucket_size=16, window=32, n_global=2)
    want = out_and_grads("reference", tensors, **sizes)
    with torch.autocast(DEVICE, torch.bfloat16):
        got = out_and_grads(backend, tensors, **sizes)
    assert [x.dtype for x in got] == [dtype] * 4
    assert_close([x.float() for x in got], [x.float() for x in want], 1e-5 if dtype == torch.float32 else 3e-2)


@pytest.mark.parametrize("backend", sorted({"reference", *FAST}))
def test_later_tokens_change_nothing_earlier(backend: str) -> None:
    """Prefix invariance: the same prefix, once alone and once with other tokens behind it."""
    length, prefix = (150, 100) if backend == "triton" and DEVICE == "cpu" else (300, 200)
    q, k, v, _, q_ids, k_ids = draw(5, 1, 4, 2, length, 16, 4, 4, dtype=best_dtype(backend))
    sizes = dict(n_buckets=4, bucket_size=8, window=16, n_global=2, backend=backend)
    whole = lsh_attention(q, k, v, q_ids, k_ids, **sizes)  # type: ignore[arg-type]
    cut = [x[:, :, :prefix] for x in (q, k, v)] + [x[..., :prefix] for x in (q_ids, k_ids)]
    error = (whole[:, :, :prefix] - lsh_attention(*cut, **sizes)).abs().max().item()  # type: ignore[arg-type]
    assert error < TOLERANCES[q.dtype] / 4, f"the prefix moved by {error:.1e}"


@pytest.mark.parametrize("one_table", [False, True], ids=TABLES)
def test_the_oracle_is_the_definition(one_table: bool) -> None:
    """`visible_set` against the set definition, read off with Python sets."""
    q_ids, k_ids = (x.cpu() for x in draw(6, 1, 2, 1, 40, 4, 2, 3, one_table=one_table)[4:])
    w, window, n_global = 4, 5, 2
    got = visible_set(q_ids, k_ids, bucket_size=w, window=window, n_global=n_global)
    for h in range(2):
        for t in range(40):
            expected = set(range(max(0, t - window + 1), t + 1)) | set(range(min(n_global, t + 1)))
            for r in range(2):
                table = k_ids[0, 0, 0 if one_table else r]
                matching = [s for s in range(t + 1) if table[s] == q_ids[0, h, r, t]]
                expected |= set(matching[-w:])
            assert set(got[0, h, t].nonzero().flatten().tolist()) == expected


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(backend="fast"), f"allowed: {', '.join(BACKENDS)}"),
        (dict(bucket_size=0), "bucket_size=0"),
        (dict(cu_seqlens=torch.tensor([0, 5])), "cu_seqlens"),
        (dict(cu_seqlens=torch.tensor([0, 7, 5, 10])), "cu_seqlens"),
        (dict(q_buckets=torch.zeros(1, 2, 2, 9, dtype=torch.int64)), "q_buckets"),
        (dict(k_buckets=torch.zeros(1, 1, 2, 10)), "integers"),
        (dict(k_buckets=torch.zeros(1, 1, 3, 10, dtype=torch.int64)), "one table"),
        (dict(q_buckets=torch.zeros(1, 2, 0, 10, dtype=torch.int64)), "one table"),
        (dict(k=torch.zeros(1, 3, 10, 4), v=torch.zeros(1, 3, 10, 4)), "are not"),
    ],
)
def test_bad_arguments_are_named(change: dict[str, object], message: str) -> None:
    ids = torch.zeros(1, 2, 2, 10, dtype=torch.int64)
    good = dict(q=torch.zeros(1, 2, 10, 4), k=torch.zeros(1, 1, 10, 4), v=torch.zeros(1, 1, 10, 4), q_buckets=ids,
                k_buckets=ids[:, :1], n_buckets=4, bucket_size=4, window=4)
    with pytest.raises(ValueError, match=message):
        lsh_attention(**{**good, **change})  # type: ignore[arg-type]
