"""The study of attention variants: every variant trains, emulations and measures are exact."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lshv2.ablation.heads import CentredAttention, TwoWayAttention, attentions, build_model
from lshv2.ablation.job import run_job
from lshv2.ablation.lookup import found, measure_layers, visible_rows
from lshv2.ablation.material import prepare, tails
from lshv2.ablation.summary import statements
from lshv2.ablation.variants import SHORT, VARIANTS, Job, Variant
from lshv2.attention import visible_set
from lshv2.config import Settings
from lshv2.layers import rotary_angles, rotate
from lshv2.losses import IGNORE
from lshv2.runs import repo_root
from lshv2.trainer import Trainer

TINY = {
    "data.source": str(repo_root() / "lshv2" / "attention"), "model.d_model": 32, "model.d_ff": 32,
    "train.batch_size": 2, "train.num_eval_sequences": 2, "recall.n_pairs": 4,
}


def job(variant: str, task: str, seed: int = 0, steps: int = 2, **extra: Any) -> Job:
    return Job(variant, task, seed, steps, tuple({**TINY, **extra}.items()))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("material")
    prepare(folder, job("codebooks_half", "language-288"))
    return folder


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_trains(name: str, data: Path) -> None:
    short = {"recall": "recall-32", "depth": "depth-288", "language-16384": f"language-{SHORT}"}
    task = short.get(VARIANTS[name].only, "language-288")
    row = run_job(job(name, task), data)
    assert row["steps"] == 2 and len(row["loss_train"]) == 2 and row["settings"] == job(name, task).overrides()
    if task != "recall-32":
        assert 6 < row["bits_per_byte"] < 10 and 6 < row["late_bits_per_byte"] < 10, row
    else:
        assert all(0 <= row[f"accuracy_{n}x"] <= 1 for n in (1, 2, 4, 8))
    assert len(row["layers"]) in ((0,) if task == "depth-288" else (2, 4))
    assert all(0 < layer["mass"] <= 1.0001 for layer in row["layers"])
    dense_mask = VARIANTS[name].special == "two_way"
    assert (row["backend"] == "emulated") == dense_mask
    json.dumps(row, allow_nan=False)


def test_a_longer_context_is_held_against_the_same_positions_without_it(
    data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lshv2.ablation.job.CUT", 64)
    row = run_job(job("dense_half", "language-288"), data)
    assert row["tail_bits_per_byte"] != row["tail_bits_per_byte_cut"]
    ids = torch.arange(20).view(2, 10)
    (seen, labels), = tails([(ids, ids)], 6, 3)
    assert seen.tolist() == ids[:, 4:].tolist() and (labels[:, :3] == IGNORE).all()
    assert labels[:, 3:].tolist() == ids[:, 7:].tolist() and (ids >= 0).all(), "the caller's labels were changed"
    rows = [{**row, "tail_bits_per_byte": 0.9, "tail_bits_per_byte_cut": 1.0, "layers": []}]
    assert "`dense_half` 10.00 % fewer bits on the last 2,048" in "\n".join(statements(rows, "language-288"))


def test_short_windows_first_are_the_same_tokens(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def seen(variant: str) -> list[Tensor]:
        steps: list[Tensor] = []
        real = Trainer._train_step

        def watched(self: Trainer, input_ids: Tensor, labels: Tensor) -> Any:
            steps.append(input_ids)
            return real(self, input_ids, labels)

        with monkeypatch.context() as patch:
            patch.setattr(Trainer, "_train_step", watched)
            run_job(job(variant, f"language-{2 * SHORT}", steps=3, **{"train.num_eval_sequences": 1}), data)
        return steps

    long, short = seen("dense_half"), seen("dense_half_short_first")
    assert [x.shape for x in long] == 3 * [(2, 2 * SHORT)]
    assert [x.shape for x in short] == [(4, SHORT), (4, SHORT), (2, 2 * SHORT)]
    for a, b in zip(long, short, strict=True):
        assert torch.equal(a.flatten(), b.flatten())


def test_a_study_row_repeats_and_seeds_differ(data: Path) -> None:
    """Same job, same figures; all variants of a seed start from the same weights, another seed from others."""
    rows = [run_job(job("centred_half", "recall-32", seed), data) for seed in (0, 0, 1)]
    assert rows[0]["loss_train"] == rows[1]["loss_train"] != rows[2]["loss_train"]
    weights = [build(name)[0].query.weight for name in ("codebooks_half", "centred_half", "codebooks_r2_w128")]
    assert torch.equal(weights[0], weights[1]) and torch.equal(weights[0], weights[2])


def test_a_job_states_what_its_variant_is_about(data: Path) -> None:
    """Defaults of the product move; a variant that leaned on one would become another under the same name."""
    for name in VARIANTS:
        stated = job(name, "depth-64" if VARIANTS[name].only == "depth" else "language-64").overrides()
        assert {"model.hashing", "model.rotary_fraction", "model.rotary_heads", "model.n_rounds", "model.bucket_size",
                "model.window", "model.n_heads", "model.n_kv_heads", "model.use_ponder"} <= set(stated), name


def test_specials_do_what_they_say(data: Path) -> None:
    centred, = {type(one) for one in build("centred_half")}
    ways, = {(type(one), one.far) for one in build("codebooks_two_way_content")}  # type: ignore[attr-defined]
    assert (centred, ways) == (CentredAttention, (TwoWayAttention, 0.0))
    unshifted = build("dense_no_shift")[0]
    assert not unshifted.shift.requires_grad and not unshifted.shift.any()


def test_centring_is_stored_state_that_follows_the_queries_and_keys() -> None:
    attention = build("centred_half")[0]
    generator = torch.Generator().manual_seed(0)
    common = 3 * torch.randn(8, generator=generator)
    q, k = (common + torch.randn(3, 4, 64, 8, generator=generator) for _ in range(2))
    assert "query_mean" in attention.state_dict() and not attention.query_mean.any()
    crowded = attention.eval().hash(q, k)[1]
    attention.train()
    for _ in range(2000):
        attention.hash(q, k)
        attention.update_hash()
    assert torch.allclose(attention.key_mean[:, 0], k.mean((0, 2)), atol=1e-5)
    before = attention.key_mean.clone()
    spread = attention.eval().hash(q, k)[1]
    attention.update_hash()
    assert torch.allclose(attention.key_mean, before, atol=1e-5)
    used = [len(ids[0, 0, 0].unique()) for ids in (crowded, spread)]
    assert used[1] > used[0], f"buckets used before and after centring: {used}"


def settings_of(name: str, **extra: Any) -> Settings:
    return job(name, "language-64", **extra).settings()


def build(name: str, **extra: Any) -> list[Any]:
    return list(attentions(build_model(settings_of(name, **extra), VARIANTS[name])))


def direct(attention: Any, x: Tensor, near: Any, far: Any) -> Tensor:
    """One query at a time from the definition; near, far: (head, vectors) -> rotated vectors."""
    config = attention.config
    q, k, v = attention.project(x)
    visible = torch.ones(x.shape[1], x.shape[1]).tril().bool().expand(1, config.n_heads, -1, -1)
    if config.attention == "lsh":
        visible = visible_set(*attention.hash(q, k), bucket_size=config.bucket_size, window=config.window,
                              n_global=config.n_global)
    out = torch.zeros_like(q)
    for h in range(config.n_heads):
        turned = [[turn(h, y[:, h : h + 1])[0, 0] for y in (q, k)] for turn in (near, far)]
        for t in range(x.shape[1]):
            seen = visible[0, h, t].nonzero()[:, 0].tolist()
            logits = []
            for s in seen:
                a, b = turned[0] if t - s < config.window else turned[1]
                logits.append(a[t] @ b[s] / math.sqrt(config.head_dim) * attention.log_temperature[h].exp())
            by_count = math.log(t + 1) / math.log(1024) if config.softmax_scale == "log_length" else 1
            out[0, h, t] = (torch.stack(logits) * by_count).softmax(0) @ v[0, h, seen]
    return attention.out(out.transpose(1, 2).flatten(2))


def turner(attention: Any, fraction: float) -> Any:
    config = attention.config.model_copy(update={"rotary_fraction": fraction})
    angles = rotary_angles(48, config, torch.device("cpu"))
    return lambda h, y: rotate(y, *angles)


SMALL = {"model.window": 9, "model.bucket_size": 4, "model.n_buckets": 4}
BOTH = ({"model.attention": "lsh"}, {"model.attention": "dense"},
        {"model.attention": "dense", "model.softmax_scale": "log_length"})


@pytest.mark.parametrize("which", BOTH, ids=lambda which: "-".join(which.values()))
@pytest.mark.parametrize("far", [0.5, 0.0])
def test_two_way_logits_equal_the_definition(which: dict[str, Any], far: float) -> None:
    variant = Variant({**which, "model.rotary_fraction": 1.0}, "two_way", far=far)
    attention, x, angles = example(variant)
    want = direct(attention, x, turner(attention, 1.0), turner(attention, far))
    assert torch.allclose(attention(x, *angles), want, atol=1e-5)
    one_way = direct(attention, x, turner(attention, 1.0), turner(attention, 1.0))
    assert not torch.allclose(want, one_way, atol=1e-3), "far logits make no difference here: the test sees nothing"


@pytest.mark.parametrize("which", BOTH, ids=lambda which: "-".join(which.values()))
def test_mixed_heads_equal_the_definition(which: dict[str, Any]) -> None:
    attention, x, angles = example(Variant({**which, "model.rotary_fraction": 0.5, "model.rotary_heads": 0.5}))
    half, none = turner(attention, 0.5), turner(attention, 0.0)

    def by_head(h: int, y: Tensor) -> Tensor:
        return none(h, y) if h < 2 else half(h, y)

    assert torch.allclose(attention(x, *angles), direct(attention, x, by_head, by_head), atol=1e-5)


def example(variant: Variant) -> tuple[Any, Tensor, tuple[Tensor, Tensor]]:
    """An attention with temperatures that are not one, an input [1,48,d], and the angles the model would give."""
    settings = settings_of("codebooks_half")
    model = settings.model.model_copy(update={k.removeprefix("model."): v for k, v in {
        **SMALL, **variant.settings}.items()})
    settings = settings.model_copy(update={"model": model})
    attention = attentions(build_model(settings, variant))[0].eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        attention.log_temperature.normal_(0.5, 0.3, generator=generator)
    x = torch.randn(1, 48, settings.model.d_model, generator=generator)
    return attention.requires_grad_(False), x, rotary_angles(48, settings.model, x.device)


def test_visible_rows_are_the_oracles_rows() -> None:
    generator = torch.Generator().manual_seed(0)
    q_ids, k_ids = (torch.randint(0, 5, (2, heads, 3, 70), generator=generator) for heads in (4, 2))
    at = torch.tensor([0, 3, 41, 69])
    pattern = {"bucket_size": 6, "window": 7, "n_global": 2}
    assert torch.equal(visible_rows(q_ids, k_ids, at, **pattern), visible_set(q_ids, k_ids, **pattern)[:, :, at])


def test_what_is_found_by_hand() -> None:
    """The query at 4 weighs its keys 1 2 3 4 0; window 1, so keys 0 to 3 are far; 1 and 3 are visible beside itself."""
    weights = torch.tensor([1.0, 2.0, 3.0, 4.0, 1e-30, 7.0])
    visible = torch.tensor([False, True, False, True, True, True])
    figures = found(weights.log()[None, None, None], visible[None, None, None], torch.tensor([4]), window=1, top=3)
    assert figures["mass"].item() == pytest.approx(0.6)
    assert figures["top_far"].item() == pytest.approx(2 / 3), "of the keys weighing 4, 3 and 2"


def test_a_window_that_covers_everything_finds_everything() -> None:
    settings = settings_of("codebooks_half", **{"model.window": 64, "train.seq_length": 64})
    model = build_model(settings, VARIANTS["codebooks_half"])
    ids = torch.randint(0, 257, (1, 64), generator=torch.Generator().manual_seed(0))
    samples = [(ids, torch.tensor([40, 63]))]
    for layer in measure_layers(model, samples, lambda: torch.autocast("cpu", enabled=False)):
        assert layer["mass"] == pytest.approx(1.0, abs=1e-6) and layer["top_far"] == 1.0, layer
    model.config = settings.model  # the same with a window of 8: less is found
    for attention in attentions(model):
        attention.config = settings.model.model_copy(update={"window": 8, "bucket_size": 2})
    for layer in measure_layers(model, samples, lambda: torch.autocast("cpu", enabled=False)):
        assert layer["local_mass"] <= layer["mass"] < 0.9 and layer["top_far"] < 0.9, layer
