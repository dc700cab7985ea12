"""One training loop for every task and size: AdamW, warm-up and cosine, clipping, evaluation, checkpoints, metrics.

    trainer = Trainer(run, task, model)
    trainer.fit()          # resumes from the newest sound checkpoint by itself

A killed run goes on with exactly the batches that it would have read (`lshv2.batches`). Lines of `metrics.jsonl` past
the checkpoint are superseded by a `resume` line, never rewritten. SIGTERM and SIGINT are obeyed at the end of the step,
after a checkpoint, by raising `Stopped`.

Of several processes (`lshv2.parallel`) each runs this loop on its share of every batch; all agree on figures and stops,
and the first alone writes metrics, progress and trackers.
"""

from __future__ import annotations

import contextlib
import math
import signal
import time
from collections.abc import Generator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lshv2 import checkpoint
from lshv2.batches import Task, evaluation_batches, training_batches
from lshv2.data import TokenStream
from lshv2.evaluation import Batch, Evaluation, evaluate
from lshv2.model import LSHModel
from lshv2.optimizer import make_optimizer, scheduled
from lshv2.parallel.layout import WHOLE, Layout
from lshv2.parallel.ranks import ALONE, Ranks
from lshv2.parallel.sharding import Sharded
from lshv2.parallel.share import Share
from lshv2.profiling import Profiler, region
from lshv2.progress import Progress
from lshv2.runs import Run, append_jsonl, read_jsonl
from lshv2.stopping import Stopped, StopRequest
from lshv2.tracking import MlflowTracker, TensorBoardTracker, Tracking, WandbTracker

PROFILED_STEPS = 10  # ordinary training steps whose parts are timed, spread over the first half of a run
WARM_STEPS = 3  # not profiled: allocators and caches fill


def pick_device() -> torch.device:
    """The GPU if there is one, else the CPU."""
    return ALONE.device


@dataclass
class _Window:
    """What is summed between two lines of metrics."""

    loss: Tensor | float = 0.0
    ponder: Tensor | float = 0.0
    steps: int = 0
    tokens: int = 0
    began: float = field(default_factory=time.perf_counter)


class Trainer:
    """Trains `model` on `task`, writing metrics, checkpoints and component timings into the run folder."""

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
        self.window = _Window()
        self.norm: Tensor | float = 0.0  # of the newest gradient
        self.evaluated = False  # whether the evaluation that is due at this step was made
        self.stop = StopRequest()
        self.folder = run.checkpoints / task.name
        self.tracking = Tracking(run, task.name)

    def enable_wandb(self, project: str = "lsh_v2") -> None:
        """Mirror the metrics in a W&B run, grouped by run folder; WANDB_MODE=offline keeps it there."""
        self.tracking.add(WandbTracker(project))

    def enable_mlflow(self, tracking_uri: str | None = None, experiment: str = "lsh_v2") -> None:
        """Mirror the metrics in MLflow. None: MLFLOW_TRACKING_URI, else `tracking/mlflow.db` in the run folder."""
        self.tracking.add(MlflowTracker(tracking_uri, experiment))

    def enable_tensorboard(self) -> None:
        """Mirror the metrics in event files, in `tracking/tensorboard/<task>` in the run folder."""
        self.tracking.add(TensorBoardTracker())

    @property
    def autocast_dtype(self) -> torch.dtype | None:
        precision = self.settings.precision
        return torch.bfloat16 if precision == "bfloat16" or (precision, self.device.type) == ("auto", "cuda") else None

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        if self.autocast_dtype is None:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, self.autocast_dtype)

    def learning_rate(self, step: int) -> float:
        """The learning rate of a step."""
        return scheduled(step, self.total_steps, self.task.learning_rate, self.settings)

    def fit(self) -> Evaluation:
        """Train to the last step, from the newest checkpoint if there is one; returns the last evaluation.

        Raises `Stopped` on SIGTERM or SIGINT, at the end of the step and after a checkpoint.
        """
        self._resume()
        label = self.task.name.replace("_", " ")
        with (
            StopRequest() as self.stop,
            Progress(
                self.run if self.ranks.first else None, "03_train", label, self.total_steps, "step", start=self.step
            ) as bar,
            self.tracking.session() if self.ranks.first else contextlib.nullcontext(),
            contextlib.closing(self._batches()) as batches,  # ends the workers at once, whatever ends the loop
        ):
            last = None if self.evaluated else self._settle()
            self.model.train()
            for input_ids, labels in batches:
                loss, ponder, self.norm = self._train_step(input_ids, labels)
                window = self.window
                window.loss, window.ponder = window.loss + loss, window.ponder + ponder
                window.steps, window.tokens = window.steps + 1, window.tokens + labels.numel() * self.share.layout.data
                if self._due(self.settings.log_every):
                    self._log(bar)
                bar.update(1)
                self.evaluated = not self._due(self.task.eval_every)
                last = self._settle() or last
        return last or self._held_out()

    def _due(self, every: int | None) -> bool:
        return self.step == self.total_steps or (every is not None and self.step % every == 0)

    def _settle(self) -> Evaluation | None:
        """What is due after a step: the evaluation, a checkpoint, and the end where a signal asks for it."""
        paused = time.perf_counter()
        result = None if self.evaluated else self._evaluate()
        self.evaluated = self.evaluated or result is not None
        number = int(self.ranks.most(self.stop.number or 0))
        stopping = signal.Signals(number) if number else None
        if stopping or (self.step and (self._is_best(result) or self._due(self.settings.checkpoint_every)
                                       or self._due(self.settings.keep_every))):
            self._save(paused, result.loss if result else None)
        if stopping:
            line = f"{self.task.name}: stopped at step {self.step} on {stopping.name}: run the same command again"
            self._say(line)
            raise Stopped(line, stopping)
        self.window.began += time.perf_counter() - paused  # neither is training time
        return result

    def _is_best(self, result: Evaluation | None) -> bool:
        if result is None:
            return False
        before = checkpoint.lowest(checkpoint.listed_checkpoints(self.folder))  # written by the first, who waits
        return before is None or result.loss < before["loss_eval"]

    def _batches(self) -> Generator[Batch, None, None]:
        """From the current step to the end."""
        return training_batches(
            self.task, self.step, seed=self.run.settings.seed, num_workers=self.settings.num_workers,
            pin_memory=self.device.type == "cuda", rows=self.share.rows(self.task.batch_size),
        )

    def _train_step(self, input_ids: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        profiled = self.task.profile and self._profiles_now()
        profiler = Profiler(self.device) if profiled else contextlib.nullcontext()
        began = time.perf_counter()
        with profiler:
            with region("forward_other"), self.autocast():
                loss, steps = self.sharded(input_ids.to(self.device), labels.to(self.device))
            with region("backward_other"):
                loss.backward()
            with region("optimizer"):
                norm = self.sharded.clip(self.settings.grad_clip)
                for group in self.optimizer.param_groups:
                    group["lr"] = self.learning_rate(self.step)
                self.optimizer.step()
                self.optimizer.zero_grad(set_to_none=True)
                self.model.update_hash()
        if isinstance(profiler, Profiler):
            if self.device.type == "cuda":
                torch.cuda.synchronize()
            elapsed = (time.perf_counter() - began) * 1e3
            self.profiles.append({"step": elapsed, **profiler.milliseconds()})
        self.step += 1
        self.tokens += input_ids.numel() * self.share.layout.data
        return loss.detach(), steps, norm

    def _profiles_now(self) -> bool:
        every = max(1, self.total_steps // (2 * PROFILED_STEPS))
        return self.step >= min(WARM_STEPS, self.total_steps - 1) and self.step % every == 0 and (
            len(self.profiles) < PROFILED_STEPS
        )

    def _log(self, bar: Progress) -> None:
        window, norm = self.window, float(self.norm)  # synchronises
        loss, ponder = (x / window.steps for x in self._means(window))
        self._check_finite(loss, norm)
        elapsed = time.perf_counter() - window.began
        self.seconds += elapsed
        rate = window.tokens / elapsed
        self._write(
            "train", loss_train=loss, learning_rate=self.learning_rate(self.step - 1), tokens_per_sec=rate,
            ponder_steps=ponder, grad_norm=norm, tokens=self.tokens,
        )
        bar.update(0, loss=round(loss, 4), tokens_per_sec=round(rate))
        self.window = _Window()

    def _means(self, window: _Window) -> list[float]:
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

    def _evaluate(self) -> Evaluation | None:
        """The held-out loss, written down; None, and nothing written, when a signal came before its end."""
        result = self._held_out()
        if self.ranks.most(self.stop.requested):
            return None
        self._check_finite(result.loss, 0.0)
        figures: dict[str, Any] = {
            "loss_eval": result.loss, "accuracy": result.accuracy, "ponder_steps": result.ponder_steps,
        }
        if self.model.config.use_ponder:
            figures["halted_at"] = result.halted_at
        if result.bits_per_byte is not None:
            figures["bits_per_byte"] = result.bits_per_byte
        self._write("eval", **figures)
        return result

    def _held_out(self) -> Evaluation:
        """The held-out sequences' figures; of a part of them when a signal came."""
        batches = evaluation_batches(self.task, lambda: self.stop.requested, self.ranks)
        with self.sharded.whole():
            return evaluate(self.model, batches, self.autocast, self.task.token_bytes, ranks=self.ranks)

    def _write(self, event: str, **figures: Any) -> None:
        if not self.ranks.first:
            return
        record = {"task": self.task.name, "event": event, "step": self.step, "time": time.time(), **figures}
        append_jsonl(self.run.metrics, record)
        self.tracking.log(record)

    def _save(self, now: float, loss_eval: float | None) -> None:
        window = self.window
        loss, ponder = self._means(window)
        self._check_finite(loss, float(self.norm))
        state = {
            "task": self.task.name, "tokens": self.tokens, "seconds": self.seconds, "profiles": self.profiles,
            "evaluated": self.evaluated,
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
        self.window = _Window(loss, ponder, steps, tokens, time.perf_counter() - elapsed)
        self._say(f"{self.task.name}: resuming from {path.name}, step {self.step} of {self.total_steps}")
        if self.step < self.total_steps:
            self._write("resume")
