"""Bucket ids depend on one vector and stored tables; alike vectors collide; codebooks follow the data."""

from __future__ import annotations

import pytest
import torch
from attention_cases import DEVICE
from torch.nn.functional import pad

from lshv2.hashing import (
    best_cells,
    bucket_ids,
    cell_sums,
    cell_table,
    codebook_sums,
    codebook_tables,
    cross_polytope_tables,
    has_triton,
    parts_for,
    slots,
    update_cells,
    update_codebooks,
)

# Triton's interpreter multiplies bfloat16 as integers.
KERNEL_DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if DEVICE == "cuda" else [])]
MAKERS = {"cross_polytope": cross_polytope_tables, "codebooks": codebook_tables}


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
@pytest.mark.parametrize("n_buckets", [1, 2, 64, 128, 1024])
def test_ids_are_in_range_and_use_the_range(make, n_buckets: int) -> None:  # type: ignore[no-untyped-def]
    tables = make(2, 3, n_buckets, 16, generator())
    ids = bucket_ids(torch.randn(2, 4, 3000, 16, generator=generator(1)), tables)
    assert ids.shape == (2, 4, 3, 3000)
    assert ids.min() >= 0 and ids.max() < n_buckets
    assert ids.unique().numel() >= 0.9 * n_buckets


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_a_bucket_is_a_function_of_one_vector_and_its_group(make) -> None:  # type: ignore[no-untyped-def]
    tables = make(2, 3, 256, 16, generator())
    x = torch.randn(1, 4, 50, 16, generator=generator(1))
    whole = bucket_ids(x, tables)
    assert torch.equal(whole[..., 20:30], bucket_ids(x[:, :, 20:30], tables))
    same = x[:, :1].expand(1, 4, 50, 16)
    ids = bucket_ids(same, tables)
    assert torch.equal(ids[:, 0], ids[:, 1]) and torch.equal(ids[:, 2], ids[:, 3])  # heads of one group share a table
    assert not torch.equal(ids[:, 0], ids[:, 2])


def test_positive_scale_does_not_matter() -> None:
    tables = codebook_tables(1, 2, 32, 16, generator())
    x = torch.randn(1, 1, 100, 16, generator=generator(1))
    assert torch.equal(bucket_ids(x, tables), bucket_ids(7 * x, tables))


@pytest.mark.parametrize(("cosine", "expected"), [(1.0, 1.0), (0.9, 0.30), (0.7, 0.09), (0.5, 0.03)])
def test_collision_probability_of_the_product_form(cosine: float, expected: float) -> None:
    """1,024 buckets as 32 x 32 at head dim 64, against the values measured for the design (DESIGN-level reference)."""
    n = 4000
    a = torch.nn.functional.normalize(torch.randn(1, 1, n, 64, generator=generator(1)), dim=-1)
    noise = torch.randn(1, 1, n, 64, generator=generator(2))
    noise = torch.nn.functional.normalize(noise - (noise * a).sum(-1, keepdim=True) * a, dim=-1)
    b = cosine * a + (1 - cosine**2) ** 0.5 * noise
    tables = cross_polytope_tables(1, 8, 1024, 64, generator())
    rate = (bucket_ids(a, tables) == bucket_ids(b, tables)).float().mean().item()
    assert abs(rate - expected) < 0.03, f"{rate:.3f} at cosine {cosine}"


def test_codebook_sums_equal_a_loop() -> None:
    tables = codebook_tables(2, 2, 128, 8, generator())
    x = torch.randn(2, 4, 30, 8, generator=generator(1))
    ids = bucket_ids(x, tables)
    sums = codebook_sums(x, ids, tables)
    sizes, dims = parts_for(128), (4, 4)
    expected = [torch.zeros_like(t) for t in tables]
    for b, h, r, t in torch.cartesian_prod(*(torch.arange(n) for n in (2, 4, 2, 30))).tolist():
        codes = divmod(int(ids[b, h, r, t]), sizes[1])
        for p in range(2):
            piece = x[b, h, t, p * dims[0] : p * dims[0] + dims[p]]
            expected[p][h // 2, r, codes[p]] += piece / piece.norm()
    for got, want in zip(sums, expected, strict=True):
        assert (got - want).abs().max() < 1e-5


def test_codebooks_move_to_the_clusters_and_stay_unit() -> None:
    """Vectors in 8 tight clusters: after updates a centroid points at nearly every vector; at the start it did not."""
    centres = torch.nn.functional.normalize(torch.randn(8, 16, generator=generator(3)), dim=-1)
    x = centres.repeat(40, 1)[None, None] + 0.1 * torch.randn(1, 1, 320, 16, generator=generator(4))
    tables = codebook_tables(1, 1, 16, 16, generator())

    def fit() -> float:
        return (torch.nn.functional.normalize(x, dim=-1) @ tables[0][0, 0].T).amax(-1).mean().item()

    before = fit()
    for _ in range(50):
        update_codebooks(tables, codebook_sums(x, bucket_ids(x, tables), tables), decay=0.9)
    assert (tables[0].norm(dim=-1) - 1).abs().max() < 1e-5
    assert before < 0.6 < 0.85 < fit(), f"mean cosine {before:.2f} -> {fit():.2f}"


def test_centroids_that_caught_nothing_stay() -> None:
    tables = codebook_tables(1, 1, 8, 4, generator())
    old = [t.clone() for t in tables]
    update_codebooks(tables, [torch.zeros_like(t) for t in tables], decay=0.5)
    assert all(torch.equal(a, b) for a, b in zip(tables, old, strict=True))


def test_cells_move_to_the_mean_of_what_they_caught() -> None:
    """Against a loop; a cell that caught nothing stays as it is."""
    x, table = torch.randn(2, 3, 40, 8, generator=generator(1)), cell_table(3, 16, 8, generator())
    ids = torch.randint(0, 12, (2, 3, 1, 40), generator=generator(2))
    total, count = cell_sums(x, ids, 16)
    before = table.clone()
    update_cells(table, total, count, decay=0.75)
    for head in range(3):
        for cell in range(16):
            caught = [x[b, head, t] for b in range(2) for t in range(40) if ids[b, head, 0, t] == cell]
            assert len(caught) == count[head, 0, cell]
            want = before[head, 0, cell]
            if caught:
                want = 0.75 * want + 0.25 * torch.stack(caught).mean(0)
            assert torch.allclose(table[head, 0, cell], want, atol=1e-6)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(cell_sums(x, ids, 16)[0], total), "sums are not rounded"
    assert (count[:, 0, 12:] == 0).all() and torch.equal(table[:, :, 12:], before[:, :, 12:])


def test_a_bucket_count_that_is_no_power_of_two_is_refused() -> None:
    with pytest.raises(ValueError, match="power of two"):
        parts_for(48)


def test_hashing_in_pieces_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    tables = codebook_tables(2, 3, 256, 16, generator())
    x = torch.randn(2, 4, 301, 16, generator=generator(1))
    whole = bucket_ids(x, tables)
    monkeypatch.setattr("lshv2.hashing.SCORES", 1000)
    assert torch.equal(whole, bucket_ids(x, tables))


def clear_winners(x: torch.Tensor, tables: list[torch.Tensor]) -> torch.Tensor:
    """Whether the best direction of each part leads by more than float32 sums may err: bool [B,H,R,T].

    Both ways of hashing round the directions to x's dtype; products are exact in float64.
    """
    clear = torch.tensor(True)
    own = sum(table.shape[-1] for table in tables) == x.shape[-1]  # each part reads its own slice
    for piece, table in zip(x.chunk(len(tables), dim=-1) if own else [x] * len(tables), tables, strict=True):
        heads = x.shape[1] // table.shape[0]
        directions = table.to(x.dtype).double().repeat_interleave(heads, dim=0)  # [H,R,C,Dp]
        scores = torch.einsum("bhtd,hrcd->bhrtc", piece.double(), directions)
        if scores.shape[-1] > 1:
            first, second = scores.topk(2, dim=-1).values.unbind(-1)
            clear = clear & (first - second > 1e-5 * piece.double().norm(dim=-1)[:, :, None])
    return clear.expand(x.shape[0], x.shape[1], tables[0].shape[1], x.shape[2])


@pytest.mark.skipif(not has_triton(), reason="Triton is not installed")
@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
@pytest.mark.parametrize(
    ("n_buckets", "rounds", "groups", "dim"),
    [(1, 1, 1, 32), (4, 3, 2, 32), (64, 5, 3, 32), (512, 1, 4, 32), (1024, 3, 1, 64), (16_384, 4, 2, 64)],
)
def test_the_kernel_finds_the_same_buckets(  # type: ignore[no-untyped-def]
    make, n_buckets: int, rounds: int, groups: int, dim: int, dtype: torch.dtype
) -> None:
    from lshv2.hashing_kernel import bucket_ids_triton, supported

    tables = make(2, rounds, n_buckets, dim, generator())
    x = torch.randn(2, 130, 2 * groups, dim, generator=generator(1)).to(dtype).transpose(1, 2)  # heads split, T ragged
    want, clear = bucket_ids(x, tables), clear_winners(x, tables)
    for laid_out in (x, x.mT.contiguous().mT):
        on_device = laid_out.to(DEVICE), [table.to(DEVICE) for table in tables]
        assert supported(*on_device)
        got = bucket_ids_triton(*on_device).cpu()
        assert got.dtype == torch.int32 and got.shape == want.shape
        assert clear.float().mean() > 0.98
        assert torch.equal(got[clear], want[clear]), f"{(got != want).float().mean().item():.4f} of the ids differ"


def by_hand(x: torch.Tensor, table: torch.Tensor, n: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Cells in falling order of exact products, and whether no two of the first n + 1 are near: [B,H,n,T], [B,H,T]."""
    centroids = table[:, 0].to(x.dtype).double().repeat_interleave(x.shape[1] // table.shape[0], dim=0)
    scores = torch.einsum("bhtd,hcd->bhtc", x.double(), centroids)
    columns = 64 if n <= 8 else 128
    if scores.shape[-1] > columns:  # only the best of cells c, c + columns, c + 2 columns, ... is looked into
        at = pad(scores, (0, -scores.shape[-1] % columns), value=-torch.inf).unflatten(-1, (-1, columns))
        loses = (at < at.amax(-2, keepdim=True)).flatten(-2)[..., : scores.shape[-1]]
        scores = scores.masked_fill(loses, -torch.inf)
    values, order = scores.sort(dim=-1, descending=True)
    gaps = values[..., :-1] - values[..., 1:]
    clear = (gaps[..., :n] > 2e-3 * values[..., :1].abs()).all(-1)  # 13 bits of a product are compared
    return order[..., :n].transpose(-1, -2).int(), clear


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("n_cells", "n"), [(1, 1), (2, 2), (100, 3), (1024, 1), (1024, 8), (1024, 16)])
def test_the_best_cells_come_first(n_cells: int, n: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    table, x = cell_table(2, n_cells, 16, generator()), torch.randn(2, 6, 200, 16, generator=generator(1)).to(dtype)
    want, clear = by_hand(x, table, n)
    got = best_cells(x, table, n)
    assert got.dtype == torch.int32 and got.shape == (2, 6, n, 200)
    seen = clear[:, :, None].expand(got.shape)
    assert clear.float().mean() > (0.3 if n <= 8 else 0.03) and torch.equal(got[seen], want[seen])
    assert all(len(set(cells)) == n for cells in got.movedim(2, 3).reshape(-1, n).tolist()), "a cell twice"
    monkeypatch.setattr("lshv2.hashing.SCORES", 1000)
    assert (got != best_cells(x, table, n)).float().mean() < 1e-3, "in pieces"


@pytest.mark.skipif(not has_triton(), reason="Triton is not installed")
@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
@pytest.mark.parametrize(
    ("n_cells", "n", "groups", "dim"),
    [(1, 1, 1, 16), (40, 3, 2, 32), (256, 4, 3, 64), (100, 8, 1, 128), (300, 16, 2, 16)],
)
def test_the_kernel_finds_the_same_cells(n_cells: int, n: int, groups: int, dim: int, dtype: torch.dtype) -> None:
    from lshv2.hashing_kernel import best_cells_triton, cells_supported

    table = cell_table(2, n_cells, dim, generator())
    x = torch.randn(2, 130, 2 * groups, dim, generator=generator(1)).to(dtype).transpose(1, 2)
    want, (_, clear) = best_cells(x, table, n), by_hand(x, table, n)
    assert cells_supported(x.to(DEVICE))
    got = best_cells_triton(x.to(DEVICE), table.to(DEVICE), n, slots(n)).cpu()
    seen = clear[:, :, None].expand(got.shape)
    assert clear.float().mean() > (0.3 if n <= 8 else 0.03) and torch.equal(got[seen], want[seen])
    assert got.min() >= 0 and got.max() < n_cells and (got != want).float().mean() < 0.02


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast_changes_no_id(dtype: torch.dtype) -> None:
    """Products rounded to bfloat16 would tie, and have no last 32 bits to hold a number."""
    tables, cells = codebook_tables(2, 3, 1024, 32, generator()), cell_table(2, 100, 32, generator())
    x = torch.randn(1, 4, 300, 32, generator=generator(1)).to(dtype)
    want = bucket_ids(x, tables), best_cells(x, cells, 4)
    with torch.autocast("cpu", torch.bfloat16):
        got = bucket_ids(x, tables), best_cells(x, cells, 4)
    assert all(torch.equal(a, b) for a, b in zip(want, got, strict=True))
