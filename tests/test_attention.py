"""Every backend equals the dense masked softmax over S(t), outputs and gradients, whatever the shapes and the data."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lshv2.attention import BACKENDS, lsh_attention, visible_set
from lshv2.attention.far import FarTiles
from lshv2.attention.intervals import build_intervals

FAST = sorted(set(BACKENDS) - {"reference"})


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """torch fills uninitialised memory with NaN, so that an element nobody wrote cannot pass."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def draw(
    seed: int, b: int, h: int, k: int, t: int, d: int, r: int, n: int, dtype: torch.dtype = torch.float64
) -> list[Tensor]:
    """q, k, v, grad, q_buckets, k_buckets."""
    g = torch.Generator().manual_seed(seed)
    q, key, v = (torch.randn(b, x, t, d, generator=g, dtype=dtype).requires_grad_() for x in (h, k, k))
    grad = torch.randn(b, h, t, d, generator=g, dtype=dtype)
    ids = [torch.randint(0, n, (b, x, r, t), generator=g) for x in (h, k)]
    return [q, key, v, grad, *ids]


def out_and_grads(backend: str, tensors: list[Tensor], **sizes: object) -> list[Tensor]:
    q, k, v, grad, q_ids, k_ids = tensors
    out = lsh_attention(q, k, v, q_ids, k_ids, backend=backend, **sizes)  # type: ignore[arg-type]
    return [out.detach(), *torch.autograd.grad(out, (q, k, v), grad)]


def assert_close(got: list[Tensor], want: list[Tensor], tolerance: float) -> None:
    for name, a, b in zip(("out", "dq", "dk", "dv"), got, want, strict=True):
        scale = b.abs().max().clamp_min(1.0)
        worst, mean = (a - b).abs().max() / scale, (a - b).abs().mean() / scale
        assert worst <= tolerance and mean <= tolerance / 4, f"{name}: max error {worst:.2e}, mean {mean:.2e}"


shapes = st.fixed_dictionaries(
    dict(
        seed=st.integers(0, 10**6), b=st.integers(1, 2), k=st.integers(1, 3), groups=st.integers(1, 4),
        t=st.integers(1, 200), d=st.sampled_from([4, 8, 12]), r=st.integers(0, 4), n=st.sampled_from([1, 2, 8, 64]),
        w=st.sampled_from([1, 4, 32, 300]),
        window=st.sampled_from([1, 7, 32, 300]), n_global=st.sampled_from([0, 1, 5]),
    )
)


@pytest.mark.parametrize("backend", FAST)
@settings(max_examples=60, deadline=None)
@given(shape=shapes)
def test_equals_the_oracle_on_random_shapes(backend: str, shape: dict[str, int]) -> None:
    s = shape
    tensors = draw(s["seed"], s["b"], s["k"] * s["groups"], s["k"], s["t"], s["d"], s["r"], s["n"])
    sizes = dict(n_buckets=s["n"], bucket_size=s["w"], window=s["window"], n_global=s["n_global"])
    assert_close(out_and_grads(backend, tensors, **sizes), out_and_grads("reference", tensors, **sizes), 1e-12)


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 2e-2)])
def test_equals_the_oracle_in_lower_precision(backend: str, dtype: torch.dtype, tolerance: float) -> None:
    """Against the oracle in float64 on the same rounded inputs: only the backend's own rounding is left."""
    tensors = draw(1, 1, 6, 2, 400, 32, 4, 8, dtype=dtype)
    exact = [x.detach().double().requires_grad_(x.requires_grad) if x.is_floating_point() else x for x in tensors]
    sizes = dict(n_buckets=8, bucket_size=16, window=32, n_global=4)
    got = [x.double() for x in out_and_grads(backend, tensors, **sizes)]
    assert_close(got, out_and_grads("reference", exact, **sizes), tolerance)


@pytest.mark.parametrize("backend", FAST)
def test_autocast_changes_precision_only(backend: str) -> None:
    """Under bfloat16 autocast, from float32 inputs and from bfloat16 ones, as in a model."""
    for dtype in (torch.float32, torch.bfloat16):
        tensors = draw(1, 1, 4, 2, 300, 16, 2, 4, dtype=dtype)
        sizes = dict(n_buckets=4, bucket_size=16, window=32, n_global=2)
        want = out_and_grads("reference", tensors, **sizes)
        with torch.autocast("cpu", torch.bfloat16):
            got = out_and_grads(backend, tensors, **sizes)
        assert [x.dtype for x in got] == [dtype] * 4
        assert_close([x.float() for x in got], [x.float() for x in want], 1e-5 if dtype == torch.float32 else 3e-2)


def _collapse(q_ids: Tensor, k_ids: Tensor) -> None:
    q_ids.zero_()
    k_ids.zero_()


def _no_queries_where_keys_are(q_ids: Tensor, k_ids: Tensor) -> None:
    q_ids.remainder_(2).mul_(7)  # buckets 0 and 7 ask; what lies between in the sorted order holds most of the keys
    k_ids.copy_(torch.where(k_ids == 1, 7, torch.where(k_ids == 0, 0, k_ids.clamp(2, 6))))


def _one_giant(q_ids: Tensor, k_ids: Tensor) -> None:
    k_ids[..., : k_ids.shape[-1] * 9 // 10] = 5
    q_ids[..., ::2] = 5


def _same_in_every_round(q_ids: Tensor, k_ids: Tensor) -> None:
    q_ids.copy_(q_ids[:, :, :1].expand_as(q_ids).clone())
    k_ids.copy_(k_ids[:, :, :1].expand_as(k_ids).clone())


ADVERSARIES = [_collapse, _no_queries_where_keys_are, _one_giant, _same_in_every_round]


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("spoil", ADVERSARIES, ids=lambda f: f.__name__.strip("_"))
def test_equals_the_oracle_on_adversarial_buckets(backend: str, spoil: Callable[[Tensor, Tensor], None]) -> None:
    tensors = draw(2, 1, 4, 2, 1500, 8, 3, 8)
    spoil(tensors[4], tensors[5])
    sizes = dict(n_buckets=8, bucket_size=16, window=16, n_global=2)
    assert_close(out_and_grads(backend, tensors, **sizes), out_and_grads("reference", tensors, **sizes), 1e-11)


@pytest.mark.parametrize("spoil", [None, *ADVERSARIES], ids=lambda f: f.__name__.strip("_") if f else "uniform")
def test_work_is_linear_whatever_the_data(spoil: Callable[[Tensor, Tensor], None] | None) -> None:
    """Score elements computed a query and round: bounded by W, the tile and the key step, not by the bucket's size."""
    per_query = []
    for length in (2048, 8192):
        _, _, _, _, q_ids, k_ids = draw(3, 1, 2, 1, length, 4, 2, 8)
        if spoil:
            spoil(q_ids, k_ids)
        tables = build_intervals(q_ids, k_ids, bucket_size=32, window=16, n_global=0)
        work = sum(batch.hidden.numel() for batch in FarTiles(tables))
        per_query.append(work / (2 * 2 * length))
    assert max(per_query) < 32 + 64 + 2 * 32 + 32, f"{per_query} scores a query and round"
    assert per_query[1] < 1.25 * per_query[0]


@pytest.mark.parametrize("backend", sorted(BACKENDS))
def test_packed_documents_see_nothing_of_each_other(backend: str) -> None:
    q, k, v, grad, q_ids, k_ids = draw(4, 1, 4, 2, 90, 8, 2, 2)
    bounds = [0, 17, 18, 60, 90]
    sizes = dict(n_buckets=2, bucket_size=8, window=6, n_global=2)
    packed = out_and_grads(backend, [q, k, v, grad, q_ids, k_ids], cu_seqlens=torch.tensor(bounds), **sizes)
    for a, b in zip(bounds, bounds[1:], strict=False):
        part = [x[:, :, a:b].detach().requires_grad_(x.requires_grad) for x in (q, k, v, grad)]
        alone = out_and_grads("reference", [*part, q_ids[..., a:b], k_ids[..., a:b]], **sizes)
        assert_close([x[:, :, a:b] for x in packed], alone, 1e-12)


@pytest.mark.parametrize("backend", sorted(BACKENDS))
def test_later_tokens_change_nothing_earlier(backend: str) -> None:
    """Prefix invariance: the same prefix, once alone and once with 100 other tokens behind it."""
    q, k, v, _, q_ids, k_ids = draw(5, 1, 4, 2, 300, 8, 4, 4)
    sizes = dict(n_buckets=4, bucket_size=8, window=16, n_global=2, backend=backend)
    whole = lsh_attention(q, k, v, q_ids, k_ids, **sizes)  # type: ignore[arg-type]
    cut = [x[:, :, :200] for x in (q, k, v)] + [x[..., :200] for x in (q_ids, k_ids)]
    error = (whole[:, :, :200] - lsh_attention(*cut, **sizes)).abs().max().item()  # type: ignore[arg-type]
    assert error < 1e-13, f"the prefix moved by {error:.1e}"


def test_the_oracle_is_the_definition() -> None:
    """`visible_set` against the set definition, read off with Python sets."""
    _, _, _, _, q_ids, k_ids = draw(6, 1, 2, 1, 40, 4, 2, 3)
    w, window, n_global = 4, 5, 2
    got = visible_set(q_ids, k_ids, bucket_size=w, window=window, n_global=n_global)
    for h in range(2):
        for t in range(40):
            expected = set(range(max(0, t - window + 1), t + 1)) | set(range(min(n_global, t + 1)))
            for r in range(2):
                matching = [s for s in range(t + 1) if k_ids[0, 0, r, s] == q_ids[0, h, r, t]]
                expected |= set(matching[-w:])
            assert set(got[0, h, t].nonzero().flatten().tolist()) == expected


class _Largest(TorchDispatchMode):
    """The most elements of any tensor that an operation made."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else (out,):
            if isinstance(x, Tensor):
                self.elements = max(self.elements, x.untyped_storage().nbytes() // x.element_size())
        return out


def test_memory_is_linear() -> None:
    """No tensor grows faster than T, forward or backward, and none is near T·T / W."""
    torch.use_deterministic_algorithms(False)
    largest = []
    for length in (8192, 16_384):
        tensors = draw(7, 1, 2, 1, length, 16, 4, 64, dtype=torch.float32)
        with _Largest() as seen:
            out_and_grads("torch", tensors, n_buckets=64, bucket_size=32, window=64, n_global=4)
        largest.append(seen.elements)
    assert largest[1] <= 2.1 * largest[0], largest
    assert largest[1] < 16_384 * 16_384 / 32


def test_65536_tokens_forward_and_backward() -> None:
    torch.use_deterministic_algorithms(False)
    tensors = draw(8, 1, 3, 1, 65_536, 64, 4, 512, dtype=torch.float32)
    results = out_and_grads("torch", tensors, n_buckets=512, bucket_size=128, window=256, n_global=4)
    assert all(x.isfinite().all() for x in results)
    # the last query against its visible set, by hand
    q, k, v, _, q_ids, k_ids = (x.detach() for x in tensors)
    seen = set(range(65_536 - 256, 65_536)) | set(range(4))
    for r in range(4):
        seen |= set((k_ids[0, 0, r] == q_ids[0, 1, r, -1]).nonzero().flatten()[-128:].tolist())
    at = torch.tensor(sorted(seen))
    expected = ((k[0, 0, at] @ q[0, 1, -1]) / 8).softmax(0) @ v[0, 0, at]
    assert (results[0][0, 1, -1] - expected).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(backend="fast"), "allowed: reference, torch"),
        (dict(bucket_size=0), "bucket_size=0"),
        (dict(cu_seqlens=torch.tensor([0, 5])), "cu_seqlens"),
        (dict(cu_seqlens=torch.tensor([0, 7, 5, 10])), "cu_seqlens"),
        (dict(q_buckets=torch.zeros(1, 2, 2, 9, dtype=torch.int64)), "q_buckets"),
        (dict(k_buckets=torch.zeros(1, 1, 2, 10)), "integers"),
        (dict(k=torch.zeros(1, 3, 10, 4), v=torch.zeros(1, 3, 10, 4)), "are not"),
    ],
)
def test_bad_arguments_are_named(change: dict[str, object], message: str) -> None:
    ids = torch.zeros(1, 2, 2, 10, dtype=torch.int64)
    good = dict(q=torch.zeros(1, 2, 10, 4), k=torch.zeros(1, 1, 10, 4), v=torch.zeros(1, 1, 10, 4), q_buckets=ids,
                k_buckets=ids[:, :1], n_buckets=4, bucket_size=4, window=4)
    with pytest.raises(ValueError, match=message):
        lsh_attention(**{**good, **change})  # type: ignore[arg-type]


def test_a_second_derivative_is_refused() -> None:
    """The tiled backward keeps out and lse as constants: differentiating it again must not give a wrong number."""
    q, k, v, _, q_ids, k_ids = draw(9, 1, 2, 1, 50, 4, 2, 4)
    out = lsh_attention(q, k, v, q_ids, k_ids, n_buckets=4, bucket_size=4, window=4, backend="torch")
    (dq,) = torch.autograd.grad(out.sin().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        dq.pow(2).sum().backward()
