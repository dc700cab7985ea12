"""A run folder trained by several processes: the same results, one writer, one agreed stop, any number goes on."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks_at_work import Ranks

from lshv2.checkpoint import listed_checkpoints
from lshv2.data import ensure
from lshv2.errors import UserError
from lshv2.metrics import standing
from lshv2.parallel.launch import run_torchrun
from lshv2.runner.phases import PHASE_TABLE, check_artifact, find_artifacts
from lshv2.runs import Run, open_run, read_jsonl
from lshv2.train import sample_text, train_run

SETTINGS = {
    "train.num_train_sequences": 24, "train.num_epochs": 1, "train.batch_size": 4, "train.seq_length": 64,
    "train.num_eval_sequences": 3, "train.log_every": 1, "train.checkpoint_every": 4, "train.eval_every": 3,
    "model.n_kv_heads": 2, "train.precision": "float32",
}


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    with Ranks() as ranks:
        yield ranks


def prepared(folder: Path, **more: Any) -> Run:
    run = open_run(folder, preset="test", overrides={**SETTINGS, **more})
    ensure(run)
    return run


def lines(run: Run) -> list[dict[str, Any]]:
    return standing(read_jsonl(run.metrics)[0], "language_model")


def close(a: list[dict[str, Any]], b: list[dict[str, Any]]) -> None:
    """Float32 over a few steps: the first differences come from the order of sums."""
    assert [(x["event"], x["step"]) for x in a] == [(x["event"], x["step"]) for x in b]
    for x, y in zip(a, b, strict=True):
        for name in x.keys() - {"time", "tokens_per_sec", "halted_at"}:
            assert x[name] == y[name] or abs(x[name] - y[name]) < 1e-4 * abs(x[name]), f"{name}: {x} and {y}"


def test_a_stop_for_one_is_a_stop_for_all_and_another_number_goes_on(ranks: Ranks, tmp_path: Path) -> None:
    whole, run = prepared(tmp_path / "whole"), prepared(tmp_path / "run")
    expected = ranks.run(1, "fit", folder=str(whole.path))[0]
    stopped = ranks.run(2, "fit", folder=str(run.path), stop_rank=1)
    assert {said["step"] for said in stopped} == {3} and all("SIGTERM" in said["stopped"] for said in stopped)
    files = [entry["file"] for entry in listed_checkpoints(run.checkpoints / "language_model")]
    assert files[-1].startswith("step_00000003") and files[-1].endswith(".pieces")
    again = ranks.run(1, "fit", folder=str(run.path))[0]
    assert again["step"] == expected["step"] == 6
    close(lines(run), lines(whole))
    assert abs(again["bits_per_byte"] - expected["bits_per_byte"]) < 1e-4


def test_nproc_trains_both_tasks_and_everything_reads_the_result(tmp_path: Path) -> None:
    run = prepared(tmp_path / "run", **{"parallel.nproc": 2, "parallel.sequence": 2, "recall.num_train_sequences": 64})
    metrics = train_run(run)
    assert metrics["state"] == "done" and metrics["processes"] == 2
    assert metrics["tokens"] == [4 * 64 * (i + 1) for i in range(6)], "tokens of all processes, each once"
    assert len(metrics["recall"]["loss_train"]) > 0
    prompt, continuation = sample_text(run)
    assert prompt and continuation
    training = next(phase for phase in PHASE_TABLE if phase.name == "03_train")
    assert find_artifacts(training, run)[1] == []
    assert check_artifact(run.checkpoints / "language_model" / "last.json") is None
    assert json.loads(run.file("component_profiles.json").read_text())["n_steps"] > 0


def test_a_mistake_in_a_process_is_one_line_here(tmp_path: Path) -> None:
    run = open_run(tmp_path / "run", preset="test", overrides={**SETTINGS, "data.source": str(tmp_path / "none.txt")})
    outcome = run_torchrun("lshv2.train", ["--config", str(run.config)], 2)
    assert outcome["signal"] == 0 and "none.txt" in outcome["line"] and "\n" not in outcome["line"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="of a machine without GPUs")
def test_uneven_processes_stop_before_any_phase(tmp_path: Path) -> None:
    from lshv2.runner import Pipeline

    overrides = {**SETTINGS, "parallel.nproc": 4, "parallel.sequence": 4}
    with pytest.raises(UserError, match="n_kv_heads=2 is not a multiple of 4"):
        Pipeline(tmp_path / "run", preset="test", overrides=overrides).run()
    assert not (tmp_path / "run").exists()
