"""Trackers hold what metrics.jsonl holds, each step once, through a kill; and never cost a training. Real packages."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from lshv2.data import ensure
from lshv2.errors import UserError
from lshv2.metrics import standing
from lshv2.model import LSHModel
from lshv2.presets import make_settings
from lshv2.runner.phases import PHASE_TABLE
from lshv2.runs import Run, append_jsonl, load_run, open_run, read_json, read_jsonl
from lshv2.tracking import HEAD, Held, TensorBoardTracker, Tracking
from lshv2.train import language_task, train_run
from lshv2.trainer import Trainer

ALL = {"tracking.trackers": "wandb,mlflow,tensorboard", "tracking.project": "long"}
TASKS = ("language_model", "recall")
QUIET = {"WANDB_MODE": "offline", "WANDB_ERROR_REPORTING": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
KILLED_AFTER_STEP = """
import os, signal, sys
from lshv2 import train, trainer
real = trainer.Trainer._train_step
def step(self, *batch):
    result = real(self, *batch)
    if self.step == int(sys.argv[2]):
        os.kill(os.getpid(), signal.SIGKILL)
    return result
trainer.Trainer._train_step = step
sys.exit(train.main(["--config", sys.argv[1]]))
"""
Points = dict[tuple[str, int], list[float]]  # (scalar, step) -> its values, of which there must be one


def train(run: Run, until: int) -> subprocess.CompletedProcess[str]:
    changed = {**os.environ, **QUIET, "LSHV2_RUNNER": "1"}
    command = [sys.executable, "-c", KILLED_AFTER_STEP, str(run.config), str(until)]
    return subprocess.run(command, env=changed, capture_output=True, text=True, timeout=240)


def expected(run: Run, task: str) -> Points:
    records = standing(read_jsonl(run.metrics)[0], task)
    points: Points = {}
    for r in records:
        figures = {k: v for k, v in r.items() if k not in (*HEAD, "halted_at")}
        figures |= {f"halted_at_{n}": part for n, part in zip((1, 2), r.get("halted_at", ()), strict=False)}
        points |= {(f"{r['event']}/{k}", r["step"]): [v] for k, v in figures.items()}
    assert len({step for _, step in points}) == 5, "steps 0, 4 and 8 are evaluated; 2, 4, 6 and 8 are logged"
    assert (task == TASKS[0]) == (("eval/halted_at_2", 8) in points), "only the language model ponders"
    return points


def test_through_a_kill_every_tracker_goes_on_in_its_run_with_every_step_once(tmp_path: Path) -> None:
    """8 steps, killed after step 7 (line of step 6, checkpoint of step 4) and resumed; then each store is read back."""
    run = open_run(tmp_path / "tracked", preset="test", overrides=ALL)
    ids = []
    for until, status in ((7, -signal.SIGKILL), (0, 0)):
        done = train(run, until)
        assert done.returncode == status and "is off from here" not in done.stdout, done.stdout + done.stderr
        ids.append(read_json(run.checkpoints / TASKS[0] / "tracking.json")[0])
    assert any(r["event"] == "resume" for r in read_jsonl(run.metrics)[0]), "not resumed: nothing was proven"
    assert ids[0] == ids[1] and set(ids[0]) == {"wandb", "mlflow", "tensorboard"}
    for task in TASKS:
        wanted = expected(run, task)
        assert read_wandb(run, task) == wanted
        for read in (read_mlflow, read_events):
            points = read(run, task)
            assert points.keys() == wanted.keys()
            for key, values in points.items():  # MLflow keeps the clock figures of step 6 from before the kill
                same = "tokens_per_sec" in key[0] or values[0] == pytest.approx(wanted[key][0], rel=1e-6)
                assert len(values) == 1 and same, (read.__name__, key, values, wanted[key])


def read_wandb(run: Run, task: str) -> Points:
    """The one offline folder of the task, through W&B's own reader."""
    from wandb.proto import wandb_internal_pb2
    from wandb.sdk.internal.datastore import DataStore

    identity = read_json(run.checkpoints / task / "tracking.json")[0]["wandb"]
    (file,) = run.path.glob(f"tracking/wandb/offline-run-*/run-{identity}.wandb")
    reader, points, about = DataStore(), Points(), None
    reader.open_for_scan(str(file))
    while data := reader.scan_data():
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        if record.HasField("run"):
            about = record.run
        if record.HasField("history"):
            row = {item.key or "/".join(item.nested_key): float(item.value_json) for item in record.history.item}
            for key in row:
                if not key.startswith("_"):
                    points.setdefault((key, int(row["_step"])), []).append(row[key])
    reader.close()
    assert about and (about.project, about.run_group, about.display_name) == ("long", "tracked", f"tracked/{task}")
    return points


def read_mlflow(run: Run, task: str) -> Points:
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{run.path / 'tracking' / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("long")
    (found,) = client.search_runs([experiment.experiment_id], f"attributes.run_name = 'tracked/{task}'")
    assert found.info.status == "FINISHED" and found.data.params["train.batch_size"] == "2"
    points = Points()
    for key in found.data.metrics:
        for metric in client.get_metric_history(found.info.run_id, key):
            points.setdefault((key, metric.step), []).append(metric.value)
    return points


def read_events(run: Run, task: str) -> Points:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run.path / "tracking" / "tensorboard" / task))
    events.Reload()
    points = Points()
    for key in events.Tags()["scalars"]:
        for event in events.Scalars(key):
            points.setdefault((key, event.step), []).append(event.value)
    return points


def test_an_evaluation_that_a_resume_makes_once_more_is_sent_once(tmp_path: Path) -> None:
    """Written, then killed before a checkpoint knew of it: it is among the standing lines, and comes again."""
    run = open_run(tmp_path / "again", preset="test")
    record = {"task": TASKS[0], "event": "eval", "step": 4, "time": 1.0, "loss_eval": 2.0}
    append_jsonl(run.metrics, record)
    tracking = Tracking(run, TASKS[0])
    tracking.add(TensorBoardTracker())
    with tracking.session():
        tracking.log({**record, "time": 2.0})
        tracking.log({**record, "step": 8})
    assert read_events(run, TASKS[0]) == {("eval/loss_eval", 4): [2.0], ("eval/loss_eval", 8): [2.0]}


class FullDisk:
    """A tracker that writes where there is no space."""

    name = "json"  # any package that is there

    def start(self, run: Run, task: str, known: str | None) -> tuple[str, Held]:
        return "here", {}

    def log(self, figures: dict[str, float], step: int, time: float) -> None:
        if step:
            with open("/dev/full", "w") as file:
                file.write(str(figures))

    def finish(self, state: str) -> None:
        raise AssertionError("it is off: nothing is asked of it any more")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_a_tracker_that_fails_is_one_line_and_the_training_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One whose disk is full, and one whose folder cannot be made."""
    monkeypatch.setenv("LSHV2_RUNNER", "1")
    run = open_run(tmp_path / "run", preset="test")
    ensure(run)
    Trainer(run, language_task(run), LSHModel(run.settings.model)).fit()
    losses = [r["loss_train"] for r in standing(read_jsonl(run.metrics)[0], TASKS[0]) if r["event"] == "train"]
    other = open_run(tmp_path / "other", preset="test")
    (other.path / "tracking").write_text("not a folder")
    (tmp_path / "run" / "data").rename(other.data)
    trainer = Trainer(other, language_task(other), LSHModel(other.settings.model))
    trainer.tracking.add(FullDisk())
    trainer.enable_tensorboard()
    capsys.readouterr()
    trainer.fit()
    said = [line for line in capsys.readouterr().out.splitlines() if "is off from here" in line]
    assert len(said) == 2 and "tensorboard failed" in said[0] and "No space left on device" in said[1], said
    assert losses == [r["loss_train"] for r in read_jsonl(other.metrics)[0] if r["event"] == "train"]


def test_a_missing_package_is_one_line_that_names_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)  # what an import finds where it is not installed
    run = open_run(tmp_path / "run", preset="test", overrides={"tracking.trackers": "tensorboard,wandb"})
    with pytest.raises(UserError, match=r"needs the package wandb, .*pip install -e '\.\[tracking\]'"):
        train_run(run)
    assert not run.checkpoints.exists() and not run.metrics.exists(), "something was trained"


def test_the_settings_name_them() -> None:
    typed = make_settings("quick", ["tracking.trackers=wandb,tensorboard"])
    assert typed.tracking.trackers == ("wandb", "tensorboard") == make_settings(
        "quick", ['tracking.trackers=["wandb","tensorboard"]']).tracking.trackers
    with pytest.raises(UserError, match=r"^tracking\.trackers.*tensorbored.*'mlflow'"):
        make_settings("quick", ["tracking.trackers=tensorbored"])
    assert not [p.name for p in PHASE_TABLE if any(name.startswith("tracking") for name in p.settings)]


def test_the_settings_survive_the_run_folder(tmp_path: Path) -> None:
    run = open_run(tmp_path / "run", preset="test", overrides=ALL)
    assert load_run(run.path).settings == run.settings
