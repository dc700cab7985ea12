"""Trackers: W&B, MLflow and TensorBoard as mirrors of `metrics.jsonl`. Optional: `pip install -e '.[tracking]'`.

    trainer.enable_wandb(project="lsh_v2")     # WANDB_MODE=offline: in runs/<run>/tracking/wandb, for `wandb sync`
    trainer.enable_mlflow()                    # SQLite below runs/<run>/tracking/, or MLFLOW_TRACKING_URI
    trainer.enable_tensorboard()               # event files below runs/<run>/tracking/tensorboard/<task>

A tracker's scalars are the fields of the `train` and `eval` lines, as `train/loss_train`, `eval/loss_eval`. When a
session starts, the standing lines that the tracker does not hold yet are sent first: a resumed run goes on in the same
run of the tracker, whatever a kill has lost there, and no step is logged twice. A tracker that fails says so in one
line and is off from there; the training goes on.

Left out: artifacts, pictures and system metrics of its own.
"""

from __future__ import annotations

import importlib.util
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

from lshv2.errors import UserError
from lshv2.metrics import standing
from lshv2.runs import Run, read_json, read_jsonl, write_json
from lshv2.stopping import Stopped

STATE = "tracking.json"  # in the task's checkpoint folder: tracker -> its own id of the run
EVENTS = ("train", "eval")
HEAD = ("task", "event", "step", "time")  # what every line of metrics.jsonl has besides its figures
Held = dict[str, int]  # event -> the last step that a tracker holds already


class Tracker(Protocol):
    """One service. `start` returns its id of the run (kept for the next session) and what it holds of it."""

    name: str

    def start(self, run: Run, task: str, known: str | None) -> tuple[str, Held]: ...
    def log(self, figures: dict[str, float], step: int, time: float) -> None: ...
    def finish(self, state: str) -> None: ...  # done, stopped or failed


@dataclass
class WandbTracker:
    """A W&B run. Online it is resumed by its id. Offline W&B starts a folder a session, of which a sync would overwrite
    the one before: there each session writes the whole history anew, and the older folder goes."""

    project: str
    name: str = field(default="wandb", init=False)

    def start(self, run: Run, task: str, known: str | None) -> tuple[str, Held]:
        import wandb

        identity, folder = known or secrets.token_hex(4), run.path / "tracking"
        folder.mkdir(exist_ok=True)
        self._run = wandb.init(
            project=self.project, id=identity, name=f"{run.name}/{task}", group=run.name, job_type=task, dir=folder,
            resume=None if os.environ.get("WANDB_MODE") == "offline" else "allow",  # offline it only warns
            config={"task": task, **run.settings.model_dump(mode="json")},
            settings=wandb.Settings(silent=True, console="off"),
        )
        if self._run.offline:
            own = os.path.dirname(self._run.dir)
            for older in folder.glob(f"wandb/offline-run-*-{identity}"):
                if not os.path.samefile(older, own):
                    shutil.rmtree(older)
        return identity, dict.fromkeys(EVENTS, self._run.starting_step - 1)

    def log(self, figures: dict[str, float], step: int, time: float) -> None:
        self._run.log(figures, step=step)

    def finish(self, state: str) -> None:
        self._run.finish(exit_code=0 if state == "done" else 1)


@dataclass
class MlflowTracker:
    """An MLflow run, resumed by its id; the store says which steps it holds."""

    tracking_uri: str | None
    experiment: str
    name: str = field(default="mlflow", init=False)

    def start(self, run: Run, task: str, known: str | None) -> tuple[str, Held]:
        from mlflow import MlflowClient
        from mlflow.entities import Param

        folder = run.path / "tracking"
        folder.mkdir(exist_ok=True)
        uri = self.tracking_uri or os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{folder / 'mlflow.db'}"
        self._client = MlflowClient(tracking_uri=uri)
        if known:
            self._id = known
            self._client.update_run(known, status="RUNNING")
            return known, {event: self._last_step(event) for event in EVENTS}
        experiment = self._client.get_experiment_by_name(self.experiment)
        place = (folder / "mlflow_artifacts").as_uri() if uri.startswith("sqlite:") else None
        number = experiment.experiment_id if experiment else self._client.create_experiment(self.experiment, place)
        self._id = self._client.create_run(number, run_name=f"{run.name}/{task}").info.run_id
        self._client.log_batch(self._id, params=[Param(key, str(value)) for key, value in _flat(run).items()])
        return self._id, {}

    def _last_step(self, event: str) -> int:
        history = self._client.get_metric_history(self._id, f"{event}/loss_{event}")
        return max((metric.step for metric in history), default=-1)

    def log(self, figures: dict[str, float], step: int, time: float) -> None:
        from mlflow.entities import Metric

        metrics = [Metric(key, value, int(time * 1e3), step) for key, value in figures.items()]
        self._client.log_batch(self._id, metrics=metrics)

    def finish(self, state: str) -> None:
        self._client.set_terminated(self._id, {"done": "FINISHED", "stopped": "KILLED"}.get(state, "FAILED"))


@dataclass
class TensorBoardTracker:
    """Event files; each session writes them anew, as a killed writer leaves a torn end that hides what follows."""

    name: str = field(default="tensorboard", init=False)

    def start(self, run: Run, task: str, known: str | None) -> tuple[str, Held]:
        from torch.utils.tensorboard import SummaryWriter

        folder = run.path / "tracking" / "tensorboard" / task
        for older in folder.glob("events.out.tfevents.*"):
            older.unlink()
        self._writer = SummaryWriter(str(folder), purge_step=0)  # a page that is open forgets the older files too
        return task, {}

    def log(self, figures: dict[str, float], step: int, time: float) -> None:
        for key, value in figures.items():
            self._writer.add_scalar(key, value, step, walltime=time)
        self._writer.flush()

    def finish(self, state: str) -> None:
        self._writer.close()


class Tracking:
    """The trackers of one task: started together, fed together, each dropped alone when it fails."""

    def __init__(self, run: Run, task: str) -> None:
        self.run, self.task = run, task
        self.state = run.checkpoints / task / STATE
        self.chosen: list[Tracker] = []
        self._live: dict[str, tuple[Tracker, Held]] = {}

    def add(self, tracker: Tracker) -> None:
        """To be started with the next session. UserError when its package is missing."""
        if importlib.util.find_spec(tracker.name) is None:
            raise UserError(
                f"tracking with {tracker.name} needs the package {tracker.name}, which is not installed: "
                "pip install -e '.[tracking]', or leave it out of tracking.trackers"
            )
        self.chosen = [other for other in self.chosen if other.name != tracker.name] + [tracker]

    @contextmanager
    def session(self) -> Iterator[None]:
        """From the start of the trackers to their end, told how the work inside ended."""
        for tracker in self.chosen:
            self._attempt(tracker, lambda: self._start(tracker))  # noqa: B023 - called at once
        state = "failed"
        try:
            yield
            state = "done"
        except Stopped:
            state = "stopped"
            raise
        finally:
            for tracker, _ in list(self._live.values()):
                self._attempt(tracker, lambda: tracker.finish(state))  # noqa: B023 - called at once
            self._live.clear()

    def log(self, record: dict[str, Any]) -> None:
        """A line of metrics.jsonl to every tracker that does not hold its step yet."""
        if record["event"] in EVENTS:
            for tracker, held in list(self._live.values()):
                self._attempt(tracker, lambda: _send(tracker, held, record))  # noqa: B023 - called at once

    def _start(self, tracker: Tracker) -> None:
        ids = read_json(self.state)[0] or {}
        identity, held = tracker.start(self.run, self.task, ids.get(tracker.name))
        write_json(self.state, {**ids, tracker.name: identity})
        for record in standing(read_jsonl(self.run.metrics)[0], self.task):
            if record["event"] in EVENTS:
                _send(tracker, held, record)
        self._live[tracker.name] = tracker, held

    def _attempt(self, tracker: Tracker, action: Callable[[], None]) -> None:
        try:
            action()
        except Exception as error:  # whatever a third party's code raises: the training is worth more than its mirror
            self._live.pop(tracker.name, None)
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            print(f"{self.task}: {tracker.name} failed and is off from here ({reason}); the training goes on")


def _send(tracker: Tracker, held: Held, record: dict[str, Any]) -> None:
    event, step = record["event"], record["step"]
    if step > held.get(event, -1):
        tracker.log(scalars(record), step, record["time"])
        held[event] = step


def scalars(record: dict[str, Any]) -> dict[str, float]:
    """A line's figures as a tracker takes them: `eval/loss_eval`; of a list `eval/halted_at_1`, `_2`, .."""
    flat: dict[str, float] = {}
    for key, value in record.items():
        if isinstance(value, list | tuple):
            flat |= {f"{record['event']}/{key}_{n}": part for n, part in enumerate(value, 1)}
        elif key not in HEAD:
            flat[f"{record['event']}/{key}"] = value
    return flat


def _flat(run: Run) -> dict[str, Any]:
    """`section.key` -> value, of every setting; MLflow takes a hundred of them at a time."""
    flat: dict[str, Any] = {}
    for section, values in run.settings.model_dump(mode="json").items():
        flat |= {f"{section}.{key}": v for key, v in values.items()} if isinstance(values, dict) else {section: values}
    return flat
