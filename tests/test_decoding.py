"""Decoding with a cache gives the full forward's logits, at a cost that does not know the context's length."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from attention_cases import TABLES, draw
from small_models import PONDER, ids, small
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lshv2.attention import lsh_attention
from lshv2.benchmark import decoding as benchmark
from lshv2.decoding import Cache
from lshv2.graphs import GraphedStep
from lshv2.layers import rotary_angles
from lshv2.model import LSHModel


def decoding_error(model: LSHModel, x: Tensor, lengths: list[int]) -> float:
    """Largest distance from the full forward's logits: prefill to `lengths`, then x's other tokens one by one."""
    with torch.no_grad():
        full = model(x).logits
    padded = x[:, : max(lengths)].clone()
    for row, length in zip(padded, lengths, strict=True):
        row[length:] = 0
    logits, cache = model.prefill(padded, lengths, capacity=x.shape[1])
    at = torch.tensor(lengths) - 1
    worst = 0.0
    while True:
        expected = full[torch.arange(len(x)), at]
        worst = max(worst, (logits - expected).abs().max().item())
        if at.max() + 1 == x.shape[1]:
            return worst
        at += 1
        logits = model.step(x[torch.arange(len(x)), at], cache)


CONFIGURATIONS = {
    "plain": {},
    "cross_polytope": dict(hashing="cross_polytope"),
    "codebooks": dict(hashing="codebooks"),
    "mean_centroids": dict(centroids="mean"),
    "hash_positions": dict(hash_positions=True, rotary_heads=0.5),
    "hash_positions_ponder": dict(**PONDER, hash_positions=True),
    "fewer_cells_than_rounds": dict(n_buckets=2, n_rounds=4),
    "ponder": PONDER,
    "ponder_cross_polytope": dict(**PONDER, hashing="cross_polytope"),
    "one_bucket": dict(n_buckets=1),
    "product_of_codebooks": dict(hashing="codebooks", n_buckets=128, bucket_size=2),
    "more_cells_than_slots": dict(n_buckets=128, bucket_size=2),
    "no_groups_no_sinks": dict(n_kv_heads=4, n_global=0),
    "one_key_head": dict(n_kv_heads=1, n_rounds=1),
    "window_1": dict(window=1, n_global=5),
    "ring_of_one": dict(bucket_size=1),
    "window_over_everything": dict(window=300),
    "ring_over_everything": dict(bucket_size=300, n_buckets=2),
    "no_rotary": dict(rotary_fraction=0.0),
    "short_conv": dict(short_conv=3),
    "short_conv_ponder": dict(**PONDER, short_conv=3),
    "dense": dict(attention="dense"),
    "dense_ponder": dict(**PONDER, attention="dense"),
    "dense_log_length": dict(attention="dense", softmax_scale="log_length"),
    "dense_log_length_ponder": dict(**PONDER, attention="dense", softmax_scale="log_length"),
    "window": dict(attention="window"),
    "window_ponder": dict(**PONDER, attention="window"),
}


@pytest.mark.parametrize("lengths", [[1, 4], [90, 41]], ids=str)
@pytest.mark.parametrize("changes", CONFIGURATIONS.values(), ids=CONFIGURATIONS)
def test_decoding_equals_the_full_forward(changes: dict[str, Any], lengths: list[int]) -> None:
    """Prompts of one token, below and far above the window, rows of two lengths; rings wrap many times."""
    error = decoding_error(small(**changes), ids(2, 130), lengths)
    assert error < 1e-12, f"logits differ by {error:.1e}"


@pytest.mark.parametrize("lengths", [[1, 4], [90, 41]], ids=str)
@pytest.mark.parametrize("one_table", [False, True], ids=TABLES)
@pytest.mark.parametrize("n_buckets", [4, 64])
def test_a_layers_cache_equals_the_operator(n_buckets: int, one_table: bool, lengths: list[int]) -> None:
    """On drawn buckets: a table a round, or one that every query probes three times, often twice at the same bucket."""
    config, length = small(n_buckets=n_buckets).config, 130
    drawn = draw(1, 2, 4, 2, length, 8, 3, n_buckets, one_table=one_table)
    q, k, v, _, q_ids, k_ids = (x.detach().cpu() for x in drawn)
    expected = lsh_attention(
        q, k, v, q_ids, k_ids, n_buckets=n_buckets, bucket_size=config.bucket_size, window=config.window,
        n_global=config.n_global, backend="reference",
    )
    cache = Cache(config, lengths, rotary_angles(length, config, q.device))
    layer, cursor, x = cache.layers[0], cache.cursor, torch.zeros(2, max(lengths), config.d_model)
    layer.fill(x, *(y[:, :, : max(lengths)] for y in (k, v)), k_ids[..., : max(lengths)])
    assert len(layer.rings) == len(layer.slot) == 2 * 2 * (1 if one_table else 3) * n_buckets + 1
    rows = torch.arange(2)
    for step in range(length - max(lengths)):
        at = torch.tensor(lengths) + step
        cursor.claim()
        cursor.begin()
        new = (y[rows, :, at][:, :, None] for y in (q, k, v))
        ids = (y[rows, :, :, at][..., None] for y in (q_ids, k_ids))
        error = (layer.attend(x[:, :1], *new, *ids)[:, :, 0] - expected[rows, :, at]).abs().max().item()
        assert error < 1e-12, f"step {step}: {error:.1e}"
        cursor.end()


def test_tokens_of_these_models_halt_at_every_step() -> None:
    """Else the ponder configurations above would show nothing about kept states."""
    with torch.no_grad():
        steps = small(**PONDER)(ids()).ponder_steps
    assert set(steps.flatten().tolist()) == {1.0, 2.0, 3.0}


def test_decoding_goes_on_where_the_full_forward_stops_early() -> None:
    """A prompt whose tokens all halt at step one, then a token that does not: it attends to them at step two."""
    model = small(**PONDER)
    with torch.no_grad():
        model.halt.bias.fill_(1.0)
        steps = {seed: model(ids(1, 6, seed)).ponder_steps[0] for seed in range(200)}
    found = [seed for seed, n in steps.items() if (n[:4] == 1).all() and n[4] > 1]
    assert found, "none of 200 sequences begins like that"
    for seed in found:
        assert decoding_error(model, ids(1, 6, seed), [4]) < 1e-12


def test_float32_differs_by_rounding_only() -> None:
    """In float32 a bucket may be tied; with these seeds none is."""
    model = small(**PONDER).float()
    assert decoding_error(model, ids(), [50, 20]) < 2e-5


@pytest.mark.parametrize(("attention", "tolerance"), [("window", 0.03), ("dense", 0.03), ("lsh", 0.3)])
def test_under_bfloat16_autocast_the_cache_is_bfloat16(attention: str, tolerance: float) -> None:
    """Both ways round; with lsh, rounding also moves vectors that lie between two buckets."""
    model, x = small(attention=attention).float(), ids(1, 120)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        full = model(x).logits.float()
        error = decoding_error(model, x, [60])
        cache = model.prefill(x, [120], capacity=120)[1]
    assert cache.layers[0].k.dtype == cache.layers[0].v.dtype == torch.bfloat16
    assert error < tolerance * full.abs().max(), f"{error:.3f} of {full.abs().max():.2f}"


class _Watch(TorchDispatchMode):
    """New memory of one step, what reads the cache, and what makes the host wait."""

    WAITS = ("_local_scalar_dense", "lift_fresh", "nonzero", "masked_select", "unique", "item")
    CACHE_OPS = ("index_select", "index_copy_", "view", "detach", "alias", "_unsafe_view")

    def __init__(self, cache: Cache) -> None:
        super().__init__()
        layers = [x for layer in cache.layers for x in (layer.k, layer.v, layer.rings, layer.slot)]
        self.stores = {x.untyped_storage().data_ptr() for x in [*layers, *cache.cursor.angles] if x.numel()}
        self.largest = 0
        self.waits: set[str] = set()
        self.readers: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        name = func.__name__.split(".")[0]
        masks = [m for x in args if isinstance(x, list | tuple) for m in x if isinstance(m, Tensor)]
        if name in self.WAITS or torch.Tag.data_dependent_output in func.tags or (
            torch.Tag.dynamic_output_shape in func.tags and any(m.dtype == torch.bool for m in masks)
        ):
            self.waits.add(name)
        inputs = [x for x in args if isinstance(x, Tensor)] + masks
        if name not in self.CACHE_OPS and any(x.untyped_storage().data_ptr() in self.stores for x in inputs):
            self.readers.add(name)
        for x in out if isinstance(out, tuple | list) else (out,):
            if isinstance(x, Tensor) and x.untyped_storage().data_ptr() not in self.stores:
                self.largest = max(self.largest, x.numel())
        return out


@pytest.mark.parametrize("attention", ["lsh", "window"])
def test_a_step_makes_nothing_that_grows_and_reads_nothing_back(attention: str) -> None:
    """The same work at 100 and at 10,000 tokens of context; the cache is touched by index alone."""
    model = small(**PONDER, attention=attention, max_seq_len=20_000)
    largest = []
    for context in (100, 10_000):
        cache = benchmark.random_cache(model, 2, context, context + 10, torch.Generator().manual_seed(0))
        token = torch.tensor([3, 4])
        with torch.no_grad(), _Watch(cache) as watch:
            model.step(token, cache)
        assert not watch.waits, f"the host would wait for {watch.waits}"
        assert not watch.readers, f"{watch.readers} go over the cache"
        largest.append(watch.largest)
    assert largest[0] == largest[1], f"largest tensors: {largest}"


def test_the_watch_sees_what_it_is_to_see() -> None:
    """The dense twin reads all keys, and a boolean index makes the host wait."""
    model = small(attention="dense")
    _, cache = model.prefill(ids(), [100, 70], capacity=200)
    with torch.no_grad(), _Watch(cache) as watch:
        model.step(torch.tensor([1, 2]), cache)
        cache.layers[0].k[cache.layers[0].k[:, 0] > 0].sum().item()
    assert {"index", "_local_scalar_dense"} <= watch.waits and watch.readers - {"index"}


@pytest.mark.parametrize(("hashing", "tables"), [("codebooks", 3), ("inverted_file", 1)])
def test_memory_is_the_keys_the_values_and_the_rings(hashing: str, tables: int) -> None:
    model = small(max_seq_len=4096, hashing=hashing)
    _, cache = model.prefill(ids(), [100, 70], capacity=4000)
    for layer in cache.layers:
        assert layer.k.shape == layer.v.shape == (2 * 2 * 4000, 8)
        assert layer.rings.shape == (2 * 2 * tables * 4 + 1, 8) and layer.slot.shape == (2 * 2 * tables * 4 + 1,)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: CUDA graphs")
@pytest.mark.parametrize("attention", ["lsh", "window"])
def test_a_captured_step_equals_the_eager_one(attention: str) -> None:
    model, x = small(**PONDER, attention=attention).cuda(), ids(2, 60).cuda()
    caches = [model.prefill(x[:, :20], [20, 20], capacity=60)[1] for _ in range(2)]
    graphed = GraphedStep(lambda token: model.step(token, caches[0]), x.device)
    for t in range(20, 60):
        captured = graphed(x[:, t])
        error = (captured - model.step(x[:, t], caches[1])).abs().max().item()
        assert error < 1e-12, f"token {t}: {error:.1e}"


@pytest.mark.parametrize("fill", ["prefill", "random"])
def test_the_benchmark_measures_both_and_writes_its_rows(
    fill: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "decoding.json"
    options = ["--preset", "test", "--contexts", "40", "600", "--steps", "2", "--samples", "3", "--fill", fill]
    monkeypatch.setattr(sys, "argv", ["decoding", *options, "--out", str(out)])
    benchmark.main()
    found = json.loads(out.read_text())
    assert [(row["attention"], row["context"]) for row in found["rows"]] == [
        (name, n) for name in ("lsh", "dense") for n in (40, 600)
    ]
    assert all(len(row["eager_samples_ms"]) == 3 for row in found["rows"]) and found["environment"]["torch"]
    assert set(found["longest_over_shortest"]) >= {"lsh_eager", "dense_eager"}
