"""What a training consists of and where it stands, and the way of both into a checkpoint and back.

`lshv2.trainer` moves it on. A killed run goes on with exactly the batches that it would have read (`lshv2.batches`).
Lines of `metrics.jsonl` past the checkpoint are superseded by a `resume` line, never rewritten.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from lshv2 import checkpoint
from lshv2.batches import Task
from lshv2.data import TokenStream
from lshv2.model import LSHModel
from lshv2.optimizer import make_optimizer
from lshv2.parallel.layout import WHOLE, Layout
from lshv2.parallel.ranks import ALONE, Ranks
from lshv2.parallel.sharding import Sharded
from lshv2.parallel.share import Share
from lshv2.ponder import ponder_share
from lshv2.runs import Run, append_jsonl, read_jsonl
from lshv2.stopping import StopRequest
from lshv2.tracking import Tracking


@dataclass
class Window:
    """What is summed between two lines of metrics."""

    loss: Tensor | float = 0.0
    ponder: Tensor | float = 0.0
    steps: int = 0
    tokens: int = 0
    began: float = field(default_factory=time.perf_counter)


class TrainingState:
    """A model on its device with its optimizer, the task's position, and the run folder that says so."""

    def __init__(
        self, run: Run, task: Task, model: LSHModel, ranks: Ranks = ALONE, layout: Layout = WHOLE
    ) -> None:
        self.run, self.task, self.ranks = run, task, ranks
        self.settings = run.settings.train
        self.device = ranks.device
        self.model = model.to(self.device)
        self.model.gradient_checkpoint = task.gradient_checkpoint
        self.share = Share.of(ranks, layout)
        if ranks.world > 1:
            self.model.take_share(self.share)
        if task.compile and self.device.type == "cuda":
            self.model.compile_blocks()
        self.parameters = model.count_parameters()
        self.sharded = Sharded(self.model, ranks)
        self.optimizer = make_optimizer(self.model, self.settings, task.learning_rate)
        self.total_steps = task.steps_per_epoch * task.epochs
        self.step = self.tokens = 0
        self.seconds = 0.0
        self.profiles: list[dict[str, float]] = []
        self.window = Window()
        self.norm: Tensor | float = 0.0  # of the newest gradient
        self.evaluated = False  # whether the evaluation that is due at this step was made
        self.stop = StopRequest()
        self.folder = run.checkpoints / task.name
        self.tracking = Tracking(run, task.name)

    def _means(self, window: Window) -> list[float]:
        """The window's loss and steps, over all processes."""
        return [x / self.ranks.world for x in self.ranks.total([float(window.loss), float(window.ponder)])]

    def _say(self, line: str) -> None:
        if self.ranks.first:
            print(line, flush=True)

    def _check_finite(self, loss: float, norm: float) -> None:
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise FloatingPointError(
                f"{self.task.name}: the loss became {loss} (gradient norm {norm:.3g}) at step {self.step}: lower the "
                f"learning rate ({self.task.learning_rate}); the newest checkpoint is from before"
            )

    def _write(self, event: str, **figures: Any) -> None:
        if not self.ranks.first:
            return
        record = {"task": self.task.name, "event": event, "step": self.step, "time": time.time(), **figures}
        append_jsonl(self.run.metrics, record)
        self.tracking.log(record)

    def _ponder_share(self) -> float:
        """A function of the step alone, so that a resumed training has it too; at the end all steps answer."""
        progress = min(1.0, self.step / max(1, self.total_steps))
        return ponder_share(progress, self.settings.ponder_from, self.settings.ponder_to)

    def _save(self, now: float, loss_eval: float | None) -> None:
        window = self.window
        loss, ponder = self._means(window)
        self._check_finite(loss, float(self.norm))
        state = {
            "task": self.task.name, "tokens": self.tokens, "seconds": self.seconds, "profiles": self.profiles,
            "evaluated": self.evaluated, "ponder_share": self._ponder_share(),
            "stream": self._stream_state(),
            "window": [loss, ponder, window.steps, window.tokens, now - window.began],
        }
        checkpoint.save_checkpoint(
            self.folder, self.step, self.model, self.optimizer, state, self.settings.keep_checkpoints,
            every=self.settings.keep_every, loss_eval=loss_eval, suffix="" if self.evaluated else "_unevaluated",
            ranks=self.ranks,
        )

    def _stream_state(self) -> Any:
        """Where the stream stands; with several processes a list, by the processes' place along "data"."""
        if not isinstance(self.task.train, TokenStream):
            return None
        states = self.ranks.gathered(self.task.train.state())
        return states[0] if self.ranks.world == 1 else states[:: self.share.layout.sequence]

    def _restore_stream(self, state: Any) -> None:
        if isinstance(self.task.train, TokenStream):
            self.task.train.restore(state[self.share.data % len(state)] if isinstance(state, list) else state)

    def _resume(self) -> None:
        path, notes = checkpoint.find_checkpoint(self.folder)
        for note in notes:
            self._say(note)
        if path is None:
            if any(record.get("task") == self.task.name for record in read_jsonl(self.run.metrics)[0]):
                self._write("restart")  # stopped before its first checkpoint: those lines are computed again
            return
        self.ranks.wait()  # all have chosen
        if self.ranks.first:
            checkpoint.forget_newer(self.folder, path)
        tensors, state = checkpoint.read_checkpoint(path, checkpoint.owners(self.model, self.optimizer))
        checkpoint.load_model(self.model, tensors, path)
        checkpoint.load_optimizer(self.optimizer, tensors)
        self._restore_stream(state.get("stream"))
        self.step, self.tokens, self.seconds = state["step"], state["tokens"], state["seconds"]
        self.profiles, self.evaluated = state["profiles"], state.get("evaluated", True)
        loss, ponder, steps, tokens, elapsed = state["window"]
        self.window = Window(loss, ponder, steps, tokens, time.perf_counter() - elapsed)
        self._say(f"{self.task.name}: resuming from {path.name}, step {self.step} of {self.total_steps}")
        if self.step < self.total_steps:
            self._write("resume")
