"""One training loop for every task and size: AdamW, warm-up and cosine, clipping, evaluation, checkpoints, metrics.

    trainer = Trainer(run, task, model)
    trainer.fit()          # resumes from the newest sound checkpoint by itself

`lshv2.training_state` has what it moves on, and how that is saved and found again. SIGTERM and SIGINT are obeyed at the
end of the step, after a checkpoint, by raising `Stopped`.

Of several processes (`lshv2.parallel`) each runs this loop on its share of every batch; all agree on figures and stops,
and the first alone writes metrics, progress and trackers.
"""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Generator
from typing import Any

import torch
from torch import Tensor

from lshv2 import checkpoint
from lshv2.batches import evaluation_batches, training_batches
from lshv2.evaluation import Batch, Evaluation, evaluate
from lshv2.optimizer import scheduled
from lshv2.parallel.ranks import ALONE
from lshv2.profiling import Profiler, region
from lshv2.progress import Progress
from lshv2.stopping import Stopped, StopRequest
from lshv2.tracking import MlflowTracker, TensorBoardTracker, WandbTracker
from lshv2.training_state import TrainingState, Window

PROFILED_STEPS = 10  # ordinary training steps whose parts are timed, spread over half of a run
WARM_STEPS = 3  # not profiled: allocators and caches fill


def pick_device() -> torch.device:
    """The GPU if there is one, else the CPU."""
    return ALONE.device


class Trainer(TrainingState):
    """Trains `model` on `task`, writing metrics, checkpoints and component timings into the run folder."""

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
        self.model.ponder_share = self._ponder_share()
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
        """Once warm, and once all ponder steps answer: before that a step has less to do."""
        every = max(1, self.total_steps // (2 * PROFILED_STEPS))
        ponders = int(self.settings.ponder_from * self.total_steps) + 1 if self.model.config.use_ponder else 0
        # a training that never comes to it has a profile too
        begin = min(ponders, max(0, self.total_steps - PROFILED_STEPS * every))
        return self.step >= min(max(WARM_STEPS, begin), self.total_steps - 1) and self.step % every == 0 and (
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
        self.window = Window()

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
        self.model.ponder_share = self._ponder_share()
        batches = evaluation_batches(self.task, lambda: self.stop.requested, self.ranks)
        with self.sharded.whole():
            return evaluate(self.model, batches, self.autocast, self.task.token_bytes, ranks=self.ranks)
