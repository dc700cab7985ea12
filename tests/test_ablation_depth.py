"""The study of depth: thresholds from quantiles, the budget's loss, and what may be said of made-up rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from lshv2.ablation import depth_variants
from lshv2.ablation.depth import (
    MEAN_STEPS,
    BudgetModel,
    halting_at,
    halting_probabilities,
    steps_by_loss,
    thresholds,
)
from lshv2.ablation.depth_summary import against, interpolated, statements
from lshv2.ablation.heads import build_model
from lshv2.ablation.job import run_job
from lshv2.ablation.material import prepare
from lshv2.ablation.pool import RESULTS
from lshv2.ablation.report import write_report
from lshv2.ablation.summary import summarise, table
from lshv2.ablation.variants import VARIANTS, Job
from lshv2.backbone import NEVER
from lshv2.config import ModelConfig
from lshv2.ponder import halting_log_probs, ponder_loss, prior_divergence, truncated_geometric
from lshv2.runs import append_jsonl, repo_root

TINY = {
    "data.source": str(repo_root() / "lshv2" / "attention"), "model.d_model": 32, "model.d_ff": 32,
    "train.batch_size": 2, "train.num_eval_sequences": 4,
}
TASK = "depth-2048"


def job(variant: str, task: str = "depth-288", steps: int = 2) -> Job:
    return Job(variant, task, 0, steps, tuple(TINY.items()))


def no_autocast() -> Any:
    return torch.autocast("cpu", enabled=False)


def pondering(name: str, spread: float = 1.0) -> Any:
    """A model whose tokens differ in when they halt, and token ids of it [2,64]."""
    model = build_model(job(name, "depth-64").settings(), VARIANTS[name])
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        model.halt.weight.normal_(0, spread, generator=generator)
        model.halt.bias.fill_(-1.0)
    return model, torch.randint(0, 257, (2, 64), generator=generator)


def test_a_training_is_asked_at_many_thresholds(tmp_path: Path) -> None:
    prepare(tmp_path, job("ponder_flat"))
    row = run_job(job("ponder_flat"), tmp_path)
    *curve, full = row["curve"]
    assert [point["wanted"] for point in curve] == list(MEAN_STEPS) and full["threshold"] == 2.0
    assert full["ponder_steps"] == 4 and full["bits_per_byte"] == pytest.approx(row["bits_per_byte"], abs=1e-6)
    assert all(1 <= point["ponder_steps"] <= 4 and 6 < point["bits_per_byte"] < 10 for point in curve), curve
    steps = [point["ponder_steps"] for point in row["curve"]]
    assert steps == sorted(steps) and steps[0] < steps[-1], steps
    assert curve[0]["train_bits_per_byte"] != curve[0]["bits_per_byte"] and 6 < full["train_bits_per_byte"] < 10
    assert row["layers"] == [] and len(row["steps_by_loss"]) == 4 and sum(row["halting"]["mean_p"]) == pytest.approx(1)
    assert row["settings"]["model.ponder_beta"] == 0.1
    json.dumps(row, allow_nan=False)
    fixed = run_job(job("fixed_3"), tmp_path)
    assert [point["ponder_steps"] for point in fixed["curve"]] == [3.0] and fixed["settings"]["model.n_layers"] == 6
    assert fixed["curve"][0]["bits_per_byte"] == pytest.approx(fixed["bits_per_byte"], abs=1e-6)


def test_thresholds_give_the_steps_that_were_asked_for() -> None:
    cumulative = torch.rand(3, 5000, generator=torch.Generator().manual_seed(0)).sort(0).values
    wanted = (1.25, 2.0, 2.9, 3.5)
    for steps, threshold in zip(wanted, thresholds(cumulative, wanted), strict=True):
        assert 1 + (cumulative < threshold).float().sum(0).mean().item() == pytest.approx(steps, abs=1e-3)
    assert thresholds(torch.ones(3, 10), (1.0, 4.0)) == [1.0, 1.0], "the settings allow no more than 1"
    assert min(thresholds(torch.zeros(3, 10), (2.0,))) > 0


def test_probabilities_at_full_depth_are_those_of_the_training_forward() -> None:
    """And a threshold from them halts the tokens that it should: those that halted first see what training saw."""
    model, ids = pondering("ponder_flat")
    log_p = halting_probabilities(model, [(ids, ids)], no_autocast)
    caught: list[torch.Tensor] = []
    hook = model.halt.register_forward_hook(lambda module, inputs, output: caught.append(output.squeeze(-1)))
    model.train()(ids)
    hook.remove()
    assert torch.allclose(log_p, halting_log_probs(torch.stack(caught)).flatten(1), atol=1e-4)
    at = thresholds(log_p.exp().cumsum(0)[:-1], (2.0,))[0]
    model.eval()
    with halting_at(model, at):
        steps = model(ids).ponder_steps.flatten()
    assert model.config.ponder_threshold == ModelConfig().ponder_threshold, "as it was"
    first = log_p[0].exp() >= at
    assert 0 < first.sum() < len(first) and torch.equal(steps == 1, first)
    assert steps.mean().item() == pytest.approx(2.0, abs=0.3), "halted tokens change what the others see, a little"


def test_full_depth_is_full_depth_for_tokens_that_are_sure() -> None:
    """λ that rounds to one reaches a threshold of 1 at the first step."""
    model, ids = pondering("ponder_flat", spread=300.0)
    steps = []
    for threshold in (1.0, NEVER):
        with halting_at(model.eval(), threshold):
            steps.append(model(ids).ponder_steps)
    assert steps[0].min() == 1 and (steps[1] == 4).all()


def test_steps_by_loss_orders_tokens_by_what_they_cost() -> None:
    model, ids = pondering("ponder_flat")
    with halting_at(model, 0.6):
        quarters = steps_by_loss(model, [(ids, ids)], no_autocast)
        out = model(ids, labels=ids)
    pairs = sorted(
        (out.cross_entropy[b, t].item(), out.ponder_steps[b, t - 1].item()) for b in range(2) for t in range(1, 64))
    sizes = [32, 32, 31, 31]  # 126 in four
    for i, size in enumerate(sizes):
        part = pairs[sum(sizes[:i]) :][:size]
        assert quarters[i] == pytest.approx(sum(steps for _, steps in part) / size)


def test_the_budget_is_kept_by_all_tokens_together() -> None:
    """Its divergence is that of the mean distribution; the rest of the loss is the product's."""
    model, ids = pondering(depth_variants.BUDGET)
    assert isinstance(model, BudgetModel)
    generator = torch.Generator().manual_seed(0)
    log_p = halting_log_probs(3 * torch.randn(4, 2, 9, generator=generator))
    scored = torch.rand(2, 9, generator=generator) < 0.7
    prior = truncated_geometric(4, model.config.ponder_prior).float()
    mean = log_p.exp()[:, scored].mean(1)
    want = (mean * (mean.log() - prior.log())).sum()
    have = model._divergence(log_p, scored, scored.sum())
    assert torch.allclose(have, want, atol=1e-6)
    each = prior_divergence(log_p, model.config.ponder_prior)[scored].mean()
    assert have < each / 2, "tokens that differ cost as much as with the product's loss: nothing is tested"
    plain, _ = pondering("ponder_flat")
    assert not torch.allclose(model.train()(ids, labels=ids).loss, plain.train()(ids, labels=ids).loss, atol=1e-3)
    assert torch.allclose(
        plain._divergence(log_p, scored, scored.sum()),
        ponder_loss(torch.zeros_like(log_p), log_p, scored, prior=0.05, beta=1.0), atol=1e-6,
    )


def row(variant: str, seed: int, bits: float, curve: list[tuple[float, float]] | None = None) -> dict[str, Any]:
    """curve: (mean steps, bits per byte) of a Ponder model's thresholds below full depth, whose bits are `bits`; on
    training text the one nearest to 2.4 steps is best."""
    settings = Job(variant, TASK, seed, 1500).overrides()
    depth = settings["model.n_layers"] / settings["model.weight_tied_layers"]
    points = [{"ponder_steps": steps, "bits_per_byte": value, "train_bits_per_byte": (steps - 2.4) ** 2}
              for steps, value in [*(curve or []), (depth, bits)]]
    return {"variant": variant, "task": TASK, "seed": seed, "steps": 1500, "bits_per_byte": bits, "backend": "triton",
            "late_bits_per_byte": bits - 0.05, "step_ms": None, "layers": [], "seconds": 60.0, "curve": points,
            "settings": settings}


ROWS = [
    *(row("full_depth", seed, 1.0 + seed / 10) for seed in range(3)),
    *(row("fixed_3", seed, 1.02 * (1.0 + seed / 10)) for seed in range(3)),
    *(row("fixed_2", seed, 1.06 * (1.0 + seed / 10)) for seed in range(3)),
    *(row("ponder_budget", seed, 1.001 * (1 + seed / 10), [(2.5, 1.009 * (1 + seed / 10)), (2.0, 1.0), (2.9, 1.0)])
      for seed in range(3)),
    *(row("ponder_flat", seed, 1.02, [(2.9, 1.03), (3.5, 1.02)]) for seed in range(2)),
    row("ponder_product", 0, 1.1, [(3.1, 1.02)]),
    row("ponder_late_weak", 7, 0.1, [(2.0, 0.1)]),
]


def test_what_may_be_said_of_depth() -> None:
    lines = against(ROWS, TASK, "ponder_budget")
    assert [line.saved for line in lines] == [0.375] * 3, "the best on training text of those that save a quarter"
    assert [line.excess for line in lines] == pytest.approx([0.009] * 3)
    assert [line.control for line in lines] == pytest.approx([1.009 / 1.04 - 1] * 3), "between two and three steps"
    assert [line.whole for line in lines] == pytest.approx([0.001] * 3)
    said = statements(ROWS, TASK)
    assert said[0] == "2 of 4 applications, always: +6.00 % bits per byte against full depth, 3 seeds."
    assert said[1] == "3 of 4 applications, always: +2.00 % bits per byte against full depth, 3 seeds."
    assert said[4] == (
        "`ponder_budget`, 3 seeds: at full depth +0.10 % bits per byte; 37.5 % fewer mean steps for +0.90 %: target "
        "(at least 25% for at most +1%) met; -2.98 % against fixed depths at the same mean steps, better on 3 of 3: "
        "ahead.")
    assert "27.5 % fewer mean steps for -1.68 % (-6.36 to +3.00): target (at least 25% for at most +1%) met, a" in (
        said[2]), "each seed is held against its own"
    assert said[2].endswith("better on 1 of 2: no ranking, a lead.")
    assert said[3].startswith("`ponder_product`, one seed") and said[3].endswith("asked saves 25%: missed.")
    assert len(said) == 5, "a seed without full depth is compared with nothing"
    alone = [one for one in ROWS if not one["variant"].startswith("fixed")]
    assert statements(alone, TASK)[0].endswith("at the same mean steps: not measured.")
    shallow = [row("full_depth", 0, 1.0), row("fixed_3", 0, 1.005)]
    assert statements(shallow, TASK) == [
        "3 of 4 applications, always: +0.50 % bits per byte against full depth, one seed: within the target without "
        "any pondering."]


def test_fixed_depths_are_interpolated_between_neighbours_only() -> None:
    depths = {1: 1.3, 2: 1.2, 4: 1.0}
    assert interpolated(depths, 1.5) == pytest.approx(1.25) and interpolated(depths, 4.0) == 1.0
    assert interpolated(depths, 2.5) is None and interpolated(depths, 3.5) is None


def test_the_report_shows_depth(tmp_path: Path) -> None:
    for one in ROWS:
        append_jsonl(tmp_path / RESULTS, one)
    page = write_report(tmp_path)
    assert "## depth-2048" in page and "- `ponder_budget`, 3 seeds: " in page and "What limits it" not in page
    assert (tmp_path / "ablation_depth.png").read_bytes().startswith(b"\x89PNG")
    shown = table(summarise(ROWS, TASK), TASK)
    line = "| `ponder_budget` | 3 | 1.101 (1.001 to 1.201) | 1.051 (0.951 to 1.151) | 1.110 (1.009 to 1.211) | 2.5"
    assert line in shown, shown
    assert json.loads((tmp_path / "ablation.json").read_text())["statements"][TASK] == statements(ROWS, TASK)


def test_the_grid_is_what_it_says() -> None:
    for name in depth_variants.SETTINGS:
        config = job(name).settings().model
        assert config.hashing == "inverted_file" and (config.weight_tied_layers, config.n_kv_heads) == (2, 4)
        assert config.use_ponder == (name in depth_variants.PONDER)
    depths = {name: job(name).settings().model.n_ponder_steps for name in depth_variants.SETTINGS}
    fixed = {"fixed_1": 1, "fixed_2": 2, "fixed_3": 3, "full_depth": 4}
    assert depths == {**dict.fromkeys(depth_variants.PONDER, 4), **fixed}
    means = {prior: (truncated_geometric(4, prior) * torch.arange(1, 5)).sum().item() for prior in (0.05, 0.3)}
    assert means == pytest.approx({0.05: 2.44, 0.3: 2.07}, abs=0.005), "what depth_variants says of the priors"
