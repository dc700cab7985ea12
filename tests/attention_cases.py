"""What the attention's tests share: shapes and data to draw, the comparison with the oracle, watchers of torch's calls.

On a machine with a GPU every backend runs there. Elsewhere Triton's interpreter runs the kernels (tests/conftest.py
asks for it), slowly, and without bfloat16: its dot multiplies the raw 16-bit patterns.
Legend: B batch, K key/value heads, G heads of a group, T tokens, D head dim, R rounds (or probes of one table),
C buckets, W bucket size.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lshv2.attention import BACKENDS, lsh_attention
from lshv2.hashing import has_triton

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FAST = sorted(name for name in BACKENDS if name != "reference" and (name != "triton" or has_triton()))
LINEAR = [name for name in FAST if name != "masked"]
TABLES = ["table_a_round", "one_table"]
# What the rounding of one dtype may do to an element of size one: some ten units in the last place.
TOLERANCES = {torch.float64: 1e-12, torch.float32: 2e-6, torch.float16: 4e-3, torch.bfloat16: 2e-2}


def best_dtype(backend: str) -> torch.dtype:
    """The most precise dtype of a backend: where one wrong key shows clearest."""
    return torch.float32 if backend == "triton" else torch.float64


def draw(
    seed: int, b: int, h: int, k: int, t: int, d: int, r: int, n: int, dtype: torch.dtype = torch.float64, *,
    one_table: bool = False,
) -> list[Tensor]:
    """q, k, v, grad, q_buckets, k_buckets: random, with h query and k key/value heads and n buckets, on DEVICE.

    r rounds with a table each, or one table that is probed r times, now and then twice at the same bucket.
    """
    g = torch.Generator().manual_seed(seed)
    q, key, v = (torch.randn(b, x, t, d, generator=g, dtype=dtype) for x in (h, k, k))
    grad = torch.randn(b, h, t, d, generator=g, dtype=dtype)
    ids = [torch.randint(0, n, (b, x, y, t), generator=g) for x, y in ((h, r), (k, min(1, r) if one_table else r))]
    return [*(x.to(DEVICE).requires_grad_() for x in (q, key, v)), grad.to(DEVICE), *(x.to(DEVICE) for x in ids)]


def laid_out(x: Tensor, *order: int) -> Tensor:
    """The same values, the memory in another order of the dimensions."""
    inverse = [order.index(i) for i in range(x.ndim)]
    return x.detach().permute(order).contiguous().permute(inverse).requires_grad_(x.requires_grad)


def out_and_grads(backend: str, tensors: list[Tensor], **sizes: Any) -> list[Tensor]:
    """out, dq, dk, dv."""
    q, k, v, grad, q_ids, k_ids = tensors
    out = lsh_attention(q, k, v, q_ids, k_ids, backend=backend, **sizes)
    return [out.detach(), *torch.autograd.grad(out, (q, k, v), grad)]


def oracle(tensors: list[Tensor], **sizes: Any) -> list[Tensor]:
    """out, dq, dk, dv of the definition in float64, on the very same rounded inputs."""
    exact = [x.detach().double().requires_grad_(x.requires_grad) if x.is_floating_point() else x for x in tensors]
    return out_and_grads("reference", exact, **sizes)


RESULTS = ("out", "dq", "dk", "dv")


def assert_close(
    got: list[Tensor], want: list[Tensor], tolerance: float, names: tuple[str, ...] = RESULTS
) -> None:
    for name, a, b in zip(names, got, want, strict=True):
        assert a.shape == b.shape, f"{name}: {tuple(a.shape)}, not {tuple(b.shape)}"
        scale = b.abs().max().clamp_min(1.0)
        worst, mean = (a - b).abs().max() / scale, (a - b).abs().mean() / scale
        assert worst <= tolerance and mean <= tolerance / 4, f"{name}: max error {worst:.2e}, mean {mean:.2e}"


def assert_is_the_oracle(backend: str, tensors: list[Tensor], **sizes: Any) -> None:
    """Outputs and all gradients, by the tolerance of q's dtype."""
    got = out_and_grads(backend, tensors, **sizes)
    assert [x.dtype for x in got] == [tensors[i].dtype for i in (0, 0, 1, 2)]
    assert_close(got, oracle(tensors, **sizes), TOLERANCES[tensors[0].dtype])


@dataclass(frozen=True)
class Variant:
    """One backend and what is drawn for it; what a Triton kernel is compiled for has one value a variant."""

    backend: str
    dtype: torch.dtype
    dims: tuple[int, ...]
    rounds: tuple[int, ...]
    groups: tuple[int, ...]
    examples: int
    rows: int  # T·B·K·G·R at most
    one_table: tuple[bool, ...] = (False,)

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        compiled = f"-{dtype}-D{self.dims[0]}-R{self.rounds[0]}-G{self.groups[0]}" if self.backend == "triton" else ""
        return self.backend + compiled + ("-one_table" if self.one_table == (True,) else "")


def variants() -> list[Variant]:
    """Every backend; the kernels for each dtype that runs here, each head dim, few and many rounds, each group."""
    half, whole, one = torch.float16, torch.float32, (True,)
    compiled: list[tuple[Any, ...]] = [
        (whole, 16, 0, 2), (whole, 16, 4, 2), (whole, 32, 1, 4), (whole, 32, 2, 3), (half, 16, 3, 1), (half, 16, 8, 1),
        (whole, 16, 4, 2, one), (whole, 32, 2, 3, one), (half, 16, 8, 1, one),
    ]
    examples, rows = 4, 450
    if DEVICE == "cuda":
        wide, examples, rows = torch.bfloat16, 8, 100_000
        compiled += [
            (whole, 64, 4, 3), (whole, 128, 1, 2), (half, 32, 8, 1), (half, 64, 4, 3), (half, 128, 2, 1),
            (wide, 32, 1, 4), (wide, 64, 4, 3), (wide, 64, 0, 3), (wide, 128, 8, 1), (wide, 128, 2, 2),
            (half, 32, 3, 4, one), (wide, 64, 4, 3, one), (wide, 128, 8, 1, one), (whole, 128, 4, 2, one),
        ]
    found = []
    for backend in FAST:
        if backend == "triton":
            found += [Variant(backend, dt, (d,), (r,), (g,), examples, rows, *o) for dt, d, r, g, *o in compiled]
        else:
            rounds, groups = (0, 1, 2, 3, 4, 8), (1, 2, 3, 4)
            found.append(Variant(backend, torch.float64, (4, 8, 12), rounds, groups, 80, 100_000, (False, True)))
    return found


@dataclass(frozen=True)
class Case:
    """Arguments of `draw`, and the operator's own."""

    tensors: dict[str, Any]
    sizes: dict[str, Any]


@st.composite
def cases(pick: st.DrawFn, variant: Variant) -> Case:
    """Ragged lengths down to one token, batches, groups, sizes from one up, documents that may be empty."""

    def one(values: tuple[Any, ...]) -> Any:
        return pick(st.sampled_from(values))

    b, k, groups, r = one((1, 2)), one((1, 2, 3)), one(variant.groups), one(variant.rounds)
    t = pick(st.integers(1, min(200, variant.rows // (b * k * groups * max(1, r)))))
    n = one((1, 2, 8, 64, 16_384))
    cuts = pick(st.none() | st.lists(st.integers(0, t), max_size=4))
    bounds = None if cuts is None else torch.tensor([0, *sorted(cuts), t], dtype=torch.int32, device=DEVICE)
    return Case(
        dict(seed=pick(st.integers(0, 10**6)), b=b, h=k * groups, k=k, t=t, d=one(variant.dims), r=r, n=n,
             one_table=one(variant.one_table)),
        dict(n_buckets=n, bucket_size=one((1, 32, 100, 256)), window=one((1, 7, 32, 300)), n_global=one((0, 1, 5)),
             cu_seqlens=bounds),
    )


def collapse(q_ids: Tensor, k_ids: Tensor) -> None:
    """All tokens in one bucket."""
    q_ids.zero_()
    k_ids.zero_()


def no_queries_where_keys_are(q_ids: Tensor, k_ids: Tensor) -> None:
    """Buckets 0 and 7 ask; what lies between in the sorted order holds most of the keys."""
    q_ids.remainder_(2).mul_(7)
    k_ids.copy_(torch.where(k_ids == 1, 7, torch.where(k_ids == 0, 0, k_ids.clamp(2, 6))))


def one_giant(q_ids: Tensor, k_ids: Tensor) -> None:
    """One enormous bucket among ordinary ones."""
    k_ids[..., : k_ids.shape[-1] * 9 // 10] = 5
    q_ids[..., ::2] = 5


def same_in_every_round(q_ids: Tensor, k_ids: Tensor) -> None:
    """Each round finds what the first has found."""
    q_ids.copy_(q_ids[:, :, :1].expand_as(q_ids).clone())
    k_ids.copy_(k_ids[:, :, :1].expand_as(k_ids).clone())


def all_queries_at_few_keys(q_ids: Tensor, k_ids: Tensor) -> None:
    """Every query asks one bucket, which holds a key in forty, and in every other round none."""
    q_ids.fill_(3)
    k_ids.copy_(torch.where(k_ids == 3, 4, k_ids))
    k_ids[:, :, ::2, ::40] = 3


def disjoint(q_ids: Tensor, k_ids: Tensor) -> None:
    """No query's bucket holds a key."""
    q_ids.remainder_(4)
    k_ids.remainder_(4).add_(4)


ADVERSARIES = [
    collapse, no_queries_where_keys_are, one_giant, same_in_every_round, all_queries_at_few_keys, disjoint,
]


class Largest(TorchDispatchMode):
    """The most bytes that any tensor made by an operation stands on."""

    bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else (out,):
            if isinstance(x, Tensor):
                self.bytes = max(self.bytes, x.untyped_storage().nbytes())
        return out


class Storages(TorchDispatchMode):
    """The memory that operations make, and what of it is still there."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[weakref.ref[torch.UntypedStorage]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else (out,):
            if isinstance(x, Tensor):
                self.seen.append(weakref.ref(x.untyped_storage()))
        return out

    def alive(self) -> list[torch.UntypedStorage]:
        """Each once."""
        return list({storage.data_ptr(): storage for ref in self.seen if (storage := ref()) is not None}.values())


class NoHostRead(TorchDispatchMode):
    """Fails on operations whose result the host would have to wait for."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        name = func.overloadpacket.__name__
        assert name not in ("_local_scalar_dense", "item", "nonzero", "masked_select", "unique"), f"{name} synchronises"
        return func(*args, **(kwargs or {}))
