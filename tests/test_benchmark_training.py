"""Training's benchmark: the command end to end, its FLOP against torch's count, rows that are not measured twice."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from lshv2.benchmark.parallel import SMALL
from lshv2.benchmark.training import beside_twins, flops_a_token, line, measure, settings_of, visible_keys
from lshv2.config import ModelConfig
from lshv2.model import LSHModel
from lshv2.presets import make_settings
from lshv2.runs import repo_root

CASE: dict[str, Any] = {
    "attention": "lsh", "seq_len": 64, "batch_size": 2, "ponder": False, "gradient_checkpoint": False, "compile": False,
    "seed": 0,
}


def run(out: Path, *more: str) -> tuple[str, dict[str, Any]]:
    command = [sys.executable, "-m", "lshv2.benchmark.training", "--preset", "test", "--lengths", "64", "--tokens",
               "128", "--samples", "3", "--warm-up", "1", "--out", str(out), *more]
    said = subprocess.run(command, cwd=repo_root(), check=True, capture_output=True, text=True, timeout=120).stdout
    return said, json.loads(out.read_text())


def test_all_exits_answer_in_every_measured_step() -> None:
    """A training may begin at full depth alone; a step of that kind has less to do."""
    late = make_settings("full")
    assert late.train.ponder_to > 0, "there is nothing to undo"
    for settings in (settings_of("full", {**CASE, "ponder": True}), make_settings("full", SMALL)):
        assert (settings.train.ponder_from, settings.train.ponder_to) == (0.0, 0.0)


def test_the_command_measures_each_row_once(tmp_path: Path) -> None:
    out = tmp_path / "training.json"
    said, first = run(out, "--attentions", "lsh", "dense")
    assert [row["attention"] for row in first["rows"]] == ["lsh", "dense"] and said.count("tokens/s") == 2
    for row in first["rows"]:
        assert row["status"] == "ok" and len(row["samples_ms"]) == 3 and row["batch_size"] == 2
        assert row["step_ms_p20"] <= row["step_ms"] <= row["step_ms_p80"]
        assert row["tokens_per_sec"] == pytest.approx(128e3 / row["step_ms"])
        assert row["mfu"] is None and row["peak_mb"] > 10, "a CPU's peak is not known"
        assert row["commit"] == first["environment"]["commit"] and "over_dense_commit" not in row
    said, second = run(out, "--attentions", "lsh", "dense", "--ponder", "off", "on", "--checkpoint", "feed_forward")
    assert said.count("tokens/s") == 4 and second["rows"][:2] == first["rows"]
    said, third = run(out, "--attentions", "lsh", "dense")
    assert not said and third["rows"] == second["rows"]


def test_a_row_stands_beside_the_twin_of_its_settings() -> None:
    rows = [{**CASE, "status": "ok", "tokens_per_sec": 300.0}, {**CASE, "status": "out of memory", "seq_len": 128},
            {**CASE, "status": "ok", "tokens_per_sec": 200.0, "ponder": True}]
    rows += [{**CASE, "attention": "dense", "status": "ok", "tokens_per_sec": 100.0, "seq_len": n} for n in (64, 128)]
    assert [row.get("over_dense") for row in beside_twins(rows)] == [3.0, None, None, None, None]


def test_a_twin_of_another_commit_is_named() -> None:
    rows = [{**CASE, "attention": name, "status": "ok", "tokens_per_sec": rate, "commit": commit}
            for name, rate, commit in (("lsh", 300.0, "later"), ("dense", 100.0, "early"))]
    across = beside_twins(rows)
    assert across[0]["over_dense"] == 3.0 and across[0]["over_dense_commit"] == "early"
    again = beside_twins([across[0], {**rows[1], "tokens_per_sec": 150.0, "commit": "later"}])
    assert again[0]["over_dense"] == 2.0 and "over_dense_commit" not in again[0]
    failed = {**CASE, "attention": "dense", "status": "out of memory", "commit": "later"}
    assert "over_dense" not in beside_twins([again[0], failed])[0]


def test_what_does_not_fit_is_a_row_that_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate\n2 GiB")

    monkeypatch.setattr("lshv2.trainer.Trainer._train_step", full)
    row = measure(CASE, "test", 1, 1, False)
    assert row["status"] == "out of memory" and "step_ms" not in row and row["reason"].endswith("allocate 2 GiB")
    assert line(row).endswith("out of memory")


def test_a_longer_capacity_is_asked_for_only_beyond_the_presets() -> None:
    sizes = [settings_of("test", {**CASE, "seq_len": n}).model.max_seq_len for n in (64, 512, 2048)]
    assert sizes == [512, 512, 2048]


@pytest.mark.parametrize("ponder", [False, True])
def test_matrix_products_are_counted_as_torch_counts_them(ponder: bool) -> None:
    """Of a dense model, attention aside."""
    config = ModelConfig(vocab_size=50, d_model=32, n_layers=6, n_heads=4, n_kv_heads=2, max_seq_len=64, d_ff=48,
                         weight_tied_layers=2, attention="dense", use_ponder=ponder)
    model, x = LSHModel(config).train(), torch.arange(40)[None]
    with FlopCounterMode(display=False) as counter:
        model(x, labels=x).loss.backward()
    seen = sum(n for op, n in counter.get_flop_counts()["Global"].items() if "attention" not in str(op))
    exits = 3 if ponder else 1
    halting = 3 * 2 * 32 * 40 * exits if ponder else 0  # λ of each step
    attention = 3 * 4 * visible_keys(config, 40) * 32 * 6
    assert (flops_a_token(model, 40) - attention) * 40 == pytest.approx(seen - halting, rel=1e-3)


def test_keys_seen_are_the_triangle_or_what_the_settings_allow() -> None:
    dense = ModelConfig(attention="dense")
    assert visible_keys(dense, 100) == pytest.approx(101 / 2)
    lsh = ModelConfig(window=8, n_global=2, n_rounds=2, bucket_size=5)
    assert visible_keys(lsh, 10) == pytest.approx(11 / 2) and visible_keys(lsh, 10_000) == pytest.approx(20, rel=1e-3)
    assert visible_keys(ModelConfig(attention="window", window=8, n_global=2), 10_000) == pytest.approx(10, rel=1e-3)
