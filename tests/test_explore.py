"""explore: what a visible set catches of dense attention's mass, and which run is looked at."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from lshv2.checkpoint import save_checkpoint
from lshv2.errors import UserError
from lshv2.explore import MAX_ROUNDS, Explorer, open_subject
from lshv2.explore.figures import LEVELS, mass_levels
from lshv2.explore.pattern import TOP_K, Pattern
from lshv2.explore.subject import capture
from lshv2.model import LSHModel
from lshv2.presets import make_settings
from lshv2.runs import Run, open_run

LENGTH = 48


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LSHV2_RUNS", str(tmp_path))
    return tmp_path


@pytest.fixture(scope="module")
def explorer(tmp_path_factory: pytest.TempPathFactory) -> Explorer:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LSHV2_RUNS", str(tmp_path_factory.mktemp("no-runs")))
        return Explorer(open_subject(length=LENGTH, seed=3))


def pattern(explorer: Explorer, **changes: Any) -> Pattern:
    return explorer.pattern(**{**explorer.start, "n_buckets": 8, "window": 5, "bucket_size": 4, **changes})


def trained(name: str, age: int, step: int = 7, **overrides: Any) -> Run:
    """A run of the test preset with a checkpoint, made `age` seconds ago; its weights come from seed 11."""
    run = open_run(name, preset="test", overrides=overrides)
    model = LSHModel(run.settings.model, seed=11)
    save_checkpoint(run.checkpoints / "language_model", step, model, torch.optim.SGD(model.parameters()), {}, keep=1)
    changed = run.config.stat().st_mtime - age
    os.utime(run.config, (changed, changed))
    return run


def damage(run: Run) -> None:
    folder = run.checkpoints / "language_model"
    (folder / json.loads((folder / "last.json").read_text())["file"]).write_bytes(b"torn")


def test_shares_equal_a_count_by_hand(explorer: Explorer) -> None:
    """Every share by loops over queries and keys, from the definition of S(t) and of the baselines."""
    p = pattern(explorer, head=1, layer=1, n_rounds=3)
    n_global, mass = explorer.config.n_global, p.mass.tolist()
    shares, recall = p.shares(p.mass), p.shares(p.top)
    for t in range(LENGTH):
        near = {s for s in range(t + 1) if t - s < 5 or s < n_global}
        seen = set(near)
        for r in range(3):
            same = [s for s in range(t + 1) if int(p.k_ids[r, s]) == int(p.q_ids[r, t])]
            seen |= set(same[-4:])
        far = sorted((mass[t][s] for s in range(t + 1) if s not in near), reverse=True)
        found = len(seen - near)
        near_mass = sum(mass[t][s] for s in near)
        expected = {
            "near": near_mass, "visible": sum(mass[t][s] for s in seen),
            "random": near_mass + (sum(far) * found / len(far) if far else 0), "best": near_mass + sum(far[:found]),
        }
        for name, value in expected.items():
            assert float(getattr(shares, name)[t]) == pytest.approx(value, abs=1e-5), (name, t)
        top = sorted(range(t + 1), key=lambda s: -mass[t][s])[:TOP_K]
        assert float(recall.visible[t]) == pytest.approx(len(seen & set(top)) / len(top), abs=1e-5)


def test_random_share_is_the_mean_over_random_keys(explorer: Explorer) -> None:
    p = pattern(explorer)
    g = torch.Generator().manual_seed(0)
    t = int((p.visible & p.far).sum(-1).argmax())
    far, found = p.far[t].nonzero()[:, 0], int((p.visible & p.far)[t].sum())
    assert 0 < found < len(far)
    near = float((p.mass[t] * p.seen[0][t]).sum())
    draws = [float(p.mass[t, far[torch.randperm(len(far), generator=g)[:found]]].sum()) for _ in range(4000)]
    assert near + sum(draws) / len(draws) == pytest.approx(float(p.shares(p.mass).random[t]), rel=0.02)


def test_a_window_over_everything_catches_everything(explorer: Explorer) -> None:
    p = pattern(explorer, window=LENGTH)
    assert torch.allclose(p.shares(p.mass).visible, torch.ones(LENGTH), atol=1e-5)
    assert p.keys_per_query()[0] == p.keys_per_query()[1]
    assert p.records()[2]["visible"] == 0.0  # nothing lies beyond the window


def test_more_rounds_never_catch_less(explorer: Explorer) -> None:
    p = pattern(explorer, n_buckets=4)
    caught = torch.stack([p.shares(p.mass, r).visible for r in range(MAX_ROUNDS + 1)])
    assert (caught.diff(dim=0) >= -1e-6).all()
    assert float(caught[-1].sum()) > float(caught[0].sum()) + 1e-3
    fewer = pattern(explorer, n_buckets=4, n_rounds=2)
    assert torch.equal(fewer.visible, p.seen[2])


def test_one_bucket_with_room_for_all_is_dense(explorer: Explorer) -> None:
    p = pattern(explorer, n_buckets=1, bucket_size=LENGTH, n_rounds=1)
    assert torch.equal(p.visible, torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril())


@pytest.mark.parametrize("scale", ["constant", "log_length"])
def test_captured_q_and_k_are_what_the_layer_attends_with(scale: str) -> None:
    """The visible set's softmax over captured q and k gives the attention's own output: none of its steps is missed."""
    changes = {"attention": "dense", "use_ponder": False, "softmax_scale": scale}
    config = make_settings("test").model.model_copy(update=changes)
    model = LSHModel(config, seed=1).eval()
    with torch.no_grad():
        for block in model.blocks:
            block.attention.log_temperature.fill_(0.7)  # type: ignore[operator,union-attr]
    outs: list[tuple[torch.Tensor, torch.Tensor]] = []
    hook = model.blocks[0].attention.register_forward_hook(lambda m, args, out: outs.append((args[0], out)))  # type: ignore[union-attr]
    layers = capture(model, torch.arange(20)[None])
    hook.remove()
    assert len(layers) == config.n_layers == len(outs)
    for layer, (x, out) in zip(layers, outs, strict=True):
        v = layer.attention.project(x)[2][0]
        heads = [layer.mass(h) @ v[h * config.n_kv_heads // config.n_heads] for h in range(config.n_heads)]
        assert torch.allclose(layer.attention.out(torch.cat(heads, -1)), out[0], atol=1e-5)


@pytest.mark.parametrize("placed", [False, True])
def test_captured_q_and_k_are_what_the_model_hashes(placed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    changes = {"use_ponder": False, "hash_positions": placed, "rotary_heads": 0.5}
    model = LSHModel(make_settings("test").model.model_copy(update=changes), seed=1).eval()
    hashed: list[tuple[torch.Tensor, torch.Tensor]] = []
    for block in model.blocks:
        ids_of = block.attention.hash  # type: ignore[union-attr]
        monkeypatch.setattr(block.attention, "hash", lambda q, k, f=ids_of: hashed.append((q, k)) or f(q, k))
    ids = torch.arange(20)[None]
    with torch.no_grad():
        model(ids)
    of_the_model = list(hashed)
    layers = capture(model, ids)
    assert len(layers) == len(of_the_model) == model.config.n_layers
    for layer, (q, k) in zip(layers, of_the_model, strict=True):
        assert torch.allclose(layer.q, q[0], atol=1e-5) and torch.allclose(layer.k, k[0], atol=1e-5)


def test_own_tables_come_first_and_others_are_named_untrained(runs: Path) -> None:
    run = trained("own", age=0, **{"model.hashing": "codebooks"})
    explorer = Explorer(open_subject(length=32))
    start = explorer.start
    table = explorer.subject.model.blocks[0].attention.tables[0]  # type: ignore[union-attr]
    own = explorer.pattern(**start)
    assert own.own_rounds == run.settings.model.n_rounds and "untrained" not in own.caption()
    assert int(own.q_ids[:4].max()) < table.shape[2]
    more = explorer.pattern(**{**start, "n_rounds": 6})
    assert torch.equal(more.q_ids[:4], own.q_ids[:4]) and "rounds 1–4; <b>the tables of the others" in more.caption()
    for other in ({"n_buckets": 2}, {"hashing": "cross_polytope"}, {"hashing": "inverted_file"}):
        fresh = explorer.pattern(**{**start, **other})
        assert fresh.own_rounds == 0 and "these hash tables are untrained" in fresh.caption()


@pytest.mark.parametrize("centroids", ["unit", "mean"])
def test_an_inverted_file_shows_the_models_own_cells(runs: Path, centroids: str) -> None:
    """Rounds are the cells a query looks in: with all of a model's own, S(t) is what its attention sees."""
    trained("cells", age=0, **{"model.hashing": "inverted_file", "model.n_buckets": 4, "model.centroids": centroids})
    explorer = Explorer(open_subject(length=32))
    for table in explorer.subject.model.blocks[0].attention.tables:  # type: ignore[union-attr,operator]
        table *= torch.arange(1, 5)[:, None] if centroids == "mean" else 1  # keys do not care how long, queries do
    shown = explorer.pattern(**explorer.start)
    assert "untrained" not in shown.caption() and shown.q_ids.shape == shown.k_ids.shape
    attention = explorer.subject.model.blocks[0].attention  # type: ignore[union-attr]
    layer = capture(explorer.subject.model, next(iter(explorer.subject.texts.values())))[0]
    q_ids, k_ids = attention.hash(layer.q[None], layer.k[None])  # type: ignore[operator,union-attr]
    rounds = q_ids.shape[2]
    assert torch.equal(shown.q_ids[:rounds], q_ids[0, 0]) and torch.equal(shown.k_ids[0], k_ids[0, 0, 0])


def test_the_newest_run_with_a_checkpoint_is_chosen(runs: Path) -> None:
    trained("older", age=100, step=5)
    newest = trained("newer", age=50, step=9)
    open_run("newest-but-untrained", preset="test")
    broken = trained("broken", age=10)
    broken.config.write_text("{}")
    damage(trained("damaged", age=5))
    subject = open_subject(length=32)
    about = subject.about
    assert about.startswith("run newer, checkpoint of step 9, on synthetic ids; passed over "), about
    assert "passed over broken: " in about and "passed over damaged: no sound checkpoint" in about, about
    assert torch.equal(subject.model.head.weight, LSHModel(newest.settings.model, seed=11).head.weight)
    assert open_subject("older", length=32).about.startswith("run older, checkpoint of step 5")


def test_without_a_trained_run_the_weights_are_untrained(runs: Path) -> None:
    subject = open_subject(length=32)
    assert subject.about.startswith("untrained weights of the quick preset") and "synthetic ids" in subject.about
    assert subject.tokenizer is None and all(ids.shape == (1, 32) for ids in subject.texts.values())


@pytest.mark.parametrize(
    ("run_dir", "length", "said"),
    [
        ("nosuch", 32, "is not a run folder"), ("bare", 32, "has no language_model checkpoint: train it"),
        ("damaged", 32, "no sound checkpoint is left"), ("", 1, "length=1 is not between 2 and 512"),
        ("short", 400, "length=400 is above this model's max_seq_len=300"),
    ],
)
def test_a_bad_subject_is_one_clear_line(runs: Path, run_dir: str, length: int, said: str) -> None:
    open_run("bare", preset="test")
    trained("short", age=5, **{"model.max_seq_len": 300})
    damage(trained("damaged", age=10))
    with pytest.raises(UserError, match=said) as caught:
        open_subject(run_dir, length=length)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"head": 4}, "head=4 is not between 0 and 3"), ({"layer": 99}, "layer=99 is not between 0 and 3"),
        ({"n_rounds": 9}, "n_rounds=9 is not between 0 and 8"),
        ({"n_buckets": 12, "hashing": "codebooks"}, "n_buckets=12 is not a power of two"),
        ({"hashing": "md5"}, "hashing='md5' is unknown; allowed: codebooks, cross_polytope, inverted_file"),
        ({"text": "Hamlet"}, "text='Hamlet' is unknown; allowed: random ids"), ({"window": 0}, "window=0 is not"),
    ],
)
def test_a_bad_choice_is_one_clear_line(
    explorer: Explorer, change: dict[str, Any], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UserError, match=said):
        pattern(explorer, **change)
    explorer.draw(**{**explorer.start, **change})
    assert said in capsys.readouterr().out


def test_heat_map_shades_and_parts(explorer: Explorer) -> None:
    p = pattern(explorer)
    levels = mass_levels(p)
    parts = torch.from_numpy(levels // LEVELS)
    assert torch.equal(parts > 0, p.visible) and torch.equal(parts == 1, p.local)
    assert torch.equal(parts == 3, p.visible & p.far)
    assert not levels[torch.ones(LENGTH, LENGTH).triu(1).bool().numpy()].any(), "the future is drawn"
    assert levels[0, 0] % LEVELS == LEVELS - 1, "the first query's whole mass is on itself"
