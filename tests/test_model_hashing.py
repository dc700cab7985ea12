"""What moves the hash of a model while it trains, and by what queries and keys choose."""

from __future__ import annotations

import pytest
import torch
from model_cases import backend, ids, small

from lshv2.layers import rotary_angles

__all__ = ["backend"]  # of model_cases: every test here twice


def test_codebooks_move_while_training_only() -> None:
    model, x = small(), ids()
    before = [t.clone() for t in model.blocks[0].attention.tables]
    model.eval()(x)
    model.update_hash()
    assert all(torch.equal(a, b) for a, b in zip(before, model.blocks[0].attention.tables, strict=True))
    model.train()(x)
    model.update_hash()
    assert not torch.equal(before[0], model.blocks[0].attention.tables[0])
    fixed = small(hashing="cross_polytope").train()
    before = [t.clone() for t in fixed.blocks[0].attention.tables]
    fixed(x)
    fixed.update_hash()
    assert torch.equal(before[0], fixed.blocks[0].attention.tables[0])


def test_an_inverted_file_follows_the_keys_alone() -> None:
    """Centroids and mean move with the keys, whatever the queries are; without training nothing moves."""
    model, x = small(hashing="inverted_file", n_layers=2), ids()  # each block is applied once
    attention = model.blocks[0].attention
    states = []
    for queries in (1.0, -1.0):
        other = small(hashing="inverted_file").train()
        with torch.no_grad():
            other.blocks[0].attention.query.weight.mul_(queries)
            other.blocks[0](other.embedding(x), *rotary_angles(x.shape[1], other.config, x.device))
        other.update_hash()
        states.append([other.blocks[0].attention.table0.clone(), other.blocks[0].attention.key_mean.clone()])
    assert all(torch.equal(a, b) for a, b in zip(*states, strict=True))
    assert states[0][1].any() and not torch.equal(states[0][0], attention.table0)
    model.eval()(x)
    model.update_hash()
    assert not attention.key_mean.any()
    model.train()
    for _ in range(300):
        model(x)
        model.update_hash()
    k = attention.project(model.blocks[0].attention_norm(model.embedding(x)))[1]
    assert torch.allclose(attention.key_mean[:, 0], k.float().mean((0, 2)), atol=1e-4)


def test_an_inverted_file_places_keys_by_what_sets_them_apart() -> None:
    """What all keys have in common moves none of them to another cell once the mean is known; before, it does."""
    attention = small(hashing="inverted_file").blocks[0].attention.eval()
    generator = torch.Generator().manual_seed(0)
    k, common = torch.randn(1, 2, 200, 8, generator=generator), 5 * torch.randn(2, 1, 8, generator=generator)
    q = torch.randn(1, 4, 200, 8, generator=generator)
    want = attention.hash(q, k)[1]
    assert (attention.hash(q, k + common)[1] == want).float().mean() < 0.5
    attention.key_mean.copy_(common)
    assert (attention.hash(q, k + common)[1] == want).float().mean() > 0.99


@torch.no_grad()
def test_queries_weigh_a_cells_length_and_keys_its_direction() -> None:
    """A cell of long keys is looked into before one of short keys that points as well; keys lie where they lay."""
    attention = small(hashing="inverted_file", centroids="mean", n_rounds=1).blocks[0].attention.eval()
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, heads, 500, 8, generator=generator) for heads in (4, 2))
    cells, places = attention.hash(q, k)
    attention.table0[:, :, 3] *= 4
    longer, same = attention.hash(q, k)
    assert torch.equal(places, same) and (longer == 3).float().mean() > 2 * (cells == 3).float().mean()
    assert (longer == 3)[cells == 3].float().mean() > 0.95, "who looked there still does, unless all cells are behind"


@torch.no_grad()
def test_mean_centroids_become_the_means_of_their_cells_keys() -> None:
    model, x = small(hashing="inverted_file", centroids="mean", n_layers=2, codebook_decay=0.5), ids()
    attention = model.blocks[0].attention
    model.train()
    for _ in range(100):  # the weights stay: cells and mean settle
        model(x)
        model.update_hash()
    k = attention.project(model.blocks[0].attention_norm(model.embedding(x)))[1] - attention.key_mean
    places = attention.hash(*attention.project(model.blocks[0].attention_norm(model.embedding(x)))[:2])[1]
    model.update_hash()
    full = 0
    for head in range(k.shape[1]):
        for cell in range(attention.table0.shape[2]):
            caught = k[:, head][places[:, head, 0] == cell]
            if len(caught):
                full += 1
                assert torch.allclose(attention.table0[head, 0, cell], caught.mean(0), atol=1e-3)
    assert full > 4 and not attention.caught.any(), "noted once, spent once"


@torch.no_grad()
@pytest.mark.parametrize("hashing", ["inverted_file", "codebooks"])
def test_what_is_found_may_go_by_positions_in_the_heads_that_have_them(hashing: str) -> None:
    """Heads without positions keep their ids; in the others a key that comes later lies elsewhere."""
    shape = {"hashing": hashing, "rotary_heads": 0.5, "n_buckets": 64}
    plain, placed = (small(**shape, hash_positions=on).blocks[0].attention.eval() for on in (False, True))
    x = torch.randn(1, 1, plain.config.d_model, generator=torch.Generator().manual_seed(0)).expand(1, 64, -1)
    angles = rotary_angles(64, plain.config, x.device)
    *_, q_ids, k_ids = plain.prepare(x, *angles)
    *_, q_placed, k_placed = placed.prepare(x, *angles)
    content = plain.config.n_content_kv_heads
    assert 0 < content < k_ids.shape[1] and torch.equal(k_placed[:, :content], k_ids[:, :content])
    assert (k_ids[:, content:, :, 1:] == k_ids[:, content:, :, 1:2]).all(), "one token, one place"
    assert (k_placed[:, content:, 0].unique().numel() > 4) and not torch.equal(q_placed, q_ids)
