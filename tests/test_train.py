"""Training learns, measures and refuses what is damaged. Real text, a real process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from lshv2.checkpoint import find_checkpoint, load_model, read_checkpoint
from lshv2.data import ensure
from lshv2.errors import UserError
from lshv2.metrics import TRAIN_COLUMNS, write_training_metrics
from lshv2.model import LSHModel
from lshv2.runs import Run, append_jsonl, hold, load_run, open_run
from lshv2.train import language_task, main, sample_text, train_run
from lshv2.trainer import PROFILED_STEPS, WARM_STEPS, Trainer

SCRIPT = """
import sys
from lshv2.runs import load_run
from lshv2.train import train_run
train_run(load_run(sys.argv[1]))
"""
# 288 tokens: long enough for the tiled backend
MORE = {"train.num_train_sequences": 120, "train.num_epochs": 2, "train.batch_size": 2, "train.checkpoint_every": 21,
        "train.eval_every": 40, "train.seq_length": 288, "train.num_eval_sequences": 2}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """An uninterrupted run of 120 steps in a process of its own."""
    run = open_run(tmp_path_factory.mktemp("runs") / "whole", preset="test", overrides=MORE)
    subprocess.run([sys.executable, "-c", SCRIPT, str(run.path)], check=True, env=_environment(), capture_output=True)
    return run


def _environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "LSHV2_RUNNER": "1"}


def test_it_learns_and_measures(finished: Run) -> None:
    metrics = json.loads(finished.file("training_metrics.json").read_text())
    assert metrics["state"] == "done" and metrics["step"][-1] == 120
    assert metrics["environment"]["torch"] == torch.__version__
    assert metrics["bits_per_byte"][-1] < 0.85 * metrics["bits_per_byte"][0], metrics["bits_per_byte"]
    rows = {len(metrics[c]) for c in TRAIN_COLUMNS}
    assert len(rows) == 1 and metrics["eval_step"] == [0, 40, 80, 120]
    assert max(metrics["learning_rate"]) <= 3e-3 and metrics["learning_rate"][-1] < 0.11 * 3e-3
    assert metrics["recall"]["chance"] == pytest.approx(1 / 16)
    assert len(metrics["recall"]["accuracy"]) >= 2


def test_a_training_that_begins_says_nothing_of_metrics_and_a_broken_line_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = open_run(tmp_path / "run", preset="test")
    write_training_metrics(run, "running", {}, {})
    assert capsys.readouterr().out == ""
    run.metrics.write_text("{broken\n{}\n")
    write_training_metrics(run, "running", {}, {})
    assert capsys.readouterr().out.startswith("metrics.jsonl line 1 is broken")


def test_the_trained_model_goes_on_from_held_out_text(finished: Run) -> None:
    prompt, continuation = sample_text(finished)
    assert prompt and continuation and (prompt, continuation) == sample_text(finished)
    (finished.path / "empty").mkdir()
    with pytest.raises(UserError, match="03_train"):
        sample_text(Run(finished.path / "empty", finished.settings))


def test_profile_parts_add_up_to_the_step(finished: Run) -> None:
    profile = json.loads(finished.file("component_profiles.json").read_text())
    assert profile["n_steps"] == 10
    assert min(profile["hashing_ms"], profile["bucket_attn_ms"], profile["global_ms"]) > 0
    assert 0.9 <= profile["sum_ms"] / profile["step_ms"] <= 1.1, profile


def test_a_damaged_newest_checkpoint_falls_back_and_says_so(finished: Run, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    for path in (finished.checkpoints / "language_model").iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    newest, notes = find_checkpoint(folder)
    assert newest is not None and not notes
    broken = bytearray(newest.read_bytes())
    broken[-100] ^= 1  # one bit of a weight: safetensors itself would accept it
    newest.write_bytes(broken)
    before, notes = find_checkpoint(folder)
    assert before is not None and before != newest and newest.name in notes[0] and "damaged" in notes[0]


def test_another_shape_is_one_line(finished: Run) -> None:
    wider = open_run(finished.path.parent / "other", preset="test", overrides={**MORE, "model.d_ff": 96})
    other = Run(finished.path, wider.settings)
    with pytest.raises(UserError, match="another model shape"):
        train_run(other)


def test_the_command_refuses_another_file_and_a_run_that_somebody_writes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = open_run(tmp_path / "run", preset="test")
    (run.path / "mine.json").write_text("{}")
    assert main(["--config", str(run.path / "mine.json")]) == 2
    assert main(["--config", str(tmp_path / "config.json")]) == 2
    with hold(run.path, "make quick"):
        assert main(["--config", str(run.config)]) == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 3 and "not a config.json of a run folder" in said[0] and "is not a run folder" in said[1], said
    assert f"is being written by process {os.getpid()}" in said[2] and "(make quick)" in said[2], said
    assert not run.metrics.exists() and not (run.path / ".holder.json").exists()


def test_a_stop_before_the_first_checkpoint_starts_again_without_doubled_rows(tmp_path: Path) -> None:
    run = open_run(tmp_path / "early", preset="test")
    for step in (0, 2, 4):
        line = {"task": "language_model", "event": "eval", "step": step, "time": 0.0, "loss_eval": 9.0}
        append_jsonl(run.metrics, line)
    metrics = train_run(run)
    assert metrics["eval_step"] == [0, 4, 8] and metrics["step"] == [2, 4, 6, 8]


def test_too_few_sequences_for_a_batch_are_one_line(tmp_path: Path) -> None:
    run = open_run(tmp_path / "few", preset="test", overrides={"train.num_train_sequences": 3, "train.batch_size": 4})
    with pytest.raises(UserError, match=r"3 sequences \(num_train_sequences\) do not fill one batch of 4"):
        train_run(run)


def test_weights_that_are_not_finite_are_never_saved(tmp_path: Path) -> None:
    """The checkpoint before the poison stays the newest, and the line names the loss."""
    run = open_run(tmp_path / "nan", preset="test", overrides={"train.checkpoint_every": 3, "train.log_every": 8})
    ensure(run)
    trainer = Trainer(run, language_task(run), LSHModel(run.settings.model))
    step = trainer._train_step

    def poisoned(*batch: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        result = step(*batch)
        if trainer.step == 4:
            with torch.no_grad():
                trainer.model.head.weight.fill_(float("nan"))
        return result

    trainer._train_step = poisoned  # type: ignore[method-assign]
    with pytest.raises(FloatingPointError, match="loss became nan"):
        trainer.fit()
    path, _ = find_checkpoint(run.checkpoints / "language_model")
    assert path is not None and path.name == "step_00000003.safetensors"


def test_a_damaged_list_of_checkpoints_throws_nothing_away(finished: Run, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    (folder / "last.json").write_text("{")
    with pytest.raises(UserError, match="last.json is damaged"):
        find_checkpoint(folder)


@pytest.mark.parametrize("total", [8, 40, 128, 130, 5000])
@pytest.mark.parametrize("begin", [0.0, 0.25, 0.95, 1.0])
def test_what_is_profiled_is_warm_and_of_the_whole_loss_where_there_is_time(total: int, begin: float) -> None:
    def profiled(ponders: bool) -> list[int]:
        trainer = SimpleNamespace(
            total_steps=total, step=0, profiles=[], settings=SimpleNamespace(ponder_from=begin),
            model=SimpleNamespace(config=SimpleNamespace(use_ponder=ponders)),
        )
        for trainer.step in range(total):
            if Trainer._profiles_now(trainer):  # type: ignore[arg-type]
                trainer.profiles.append(trainer.step)
        return trainer.profiles

    with_ponder, without = profiled(True), profiled(False)
    assert with_ponder and min(with_ponder) >= min(WARM_STEPS, total - 1)
    assert len(without) == min(PROFILED_STEPS, total - WARM_STEPS) and min(without) < total / 5 + WARM_STEPS
    if begin <= 0.25:
        assert min(with_ponder) > begin * total or begin == 0.0, "before that a step has one answer"
        assert len(with_ponder) >= min(PROFILED_STEPS, total // 2)


def test_a_checkpoint_from_before_pondering_answers_at_full_depth(tmp_path: Path) -> None:
    """No early answer has been trained yet: what is drawn or evaluated from it must not use one."""
    early = {"train.ponder_from": 0.5, "train.ponder_to": 1.0, "train.checkpoint_every": 2, "train.keep_every": 2,
             "train.num_train_sequences": 8, "train.eval_every": 100}
    run = open_run(tmp_path / "early", preset="test", overrides=early)
    ensure(run)
    Trainer(run, language_task(run), LSHModel(run.settings.model)).fit()
    shares = {}
    for path in sorted((run.checkpoints / "language_model").glob("step_*")):
        tensors, state = read_checkpoint(path)
        model = LSHModel(run.settings.model)
        load_model(model, tensors, path, state)
        shares[state["step"]] = model.ponder_share
        load_model(model, tensors, path)
        assert model.ponder_share == shares[state["step"]], "weights alone change nothing"
    assert shares == {2: 0.0, 4: 1.0}, shares


def test_a_run_of_before_pondering_could_begin_late_goes_on_with_its_loss(tmp_path: Path) -> None:
    run = open_run(tmp_path / "old", preset="test")
    content = json.loads(run.config.read_text())
    for name in ("ponder_from", "ponder_to"):
        del content["settings"]["train"][name]
    run.config.write_text(json.dumps(content))
    train = load_run(run.path).settings.train
    assert (train.ponder_from, train.ponder_to) == (0.0, 0.0) != (run.settings.train.ponder_from, 0.0)
