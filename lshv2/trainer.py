"""One training loop for every task and size: AdamW, warm-up and cosine, clipping, evaluation, checkpoints, metrics.

    trainer = Trainer(run, task, model)
    trainer.fit()          # resumes from the newest sound checkpoint by itself

The data position is the step alone: step n reads batch n of a sequence order drawn from (seed, epoch), so a killed
run goes on with exactly the batches that it would have read. Lines of `metrics.jsonl` past the checkpoint are
superseded by a `resume` line, never rewritten.

Not here: several processes, trackers, streaming.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lshv2.checkpoint import find_checkpoint, load_model, load_optimizer, read_checkpoint, save_checkpoint
from lshv2.data import epoch_order
from lshv2.evaluation import Batch, Evaluation, evaluate
from lshv2.model import LSHModel
from lshv2.profiling import Profiler, region
from lshv2.progress import Progress
from lshv2.runs import Run, append_jsonl, read_jsonl

PROFILED_STEPS = 10  # ordinary training steps whose parts are timed, spread over the first half of a run
WARM_STEPS = 3  # not profiled: allocators and caches fill


@dataclass(frozen=True)
class Task:
    """What to learn, and how. Datasets yield (input_ids [T], labels [T]); the model shifts labels itself."""

    name: str
    train: Dataset[Batch]
    evaluation: Dataset[Batch]
    batch_size: int
    epochs: int
    learning_rate: float
    eval_every: int
    token_bytes: Tensor | None = None
    profile: bool = False
    gradient_checkpoint: bool = False


def pick_device() -> torch.device:
    """The GPU if there is one, else the CPU: the one place that asks."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


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

    def __init__(self, run: Run, task: Task, model: LSHModel) -> None:
        self.run, self.task = run, task
        self.settings = run.settings.train
        self.device = pick_device()
        self.model = model.to(self.device)
        self.model.gradient_checkpoint = task.gradient_checkpoint
        self.optimizer = self._optimizer()
        self.steps_per_epoch = len(task.train) // task.batch_size  # type: ignore[arg-type]
        self.total_steps = self.steps_per_epoch * task.epochs
        if self.total_steps == 0:
            raise ValueError(f"{task.name}: {len(task.train)} sequences do not fill one batch of {task.batch_size}")  # type: ignore[arg-type]
        self.step = self.tokens = 0
        self.seconds = 0.0
        self.profiles: list[dict[str, float]] = []
        self.window = _Window()
        self.folder = run.checkpoints / task.name

    def _optimizer(self) -> torch.optim.AdamW:
        decayed = [p for p in self.model.parameters() if p.ndim >= 2]
        plain = [p for p in self.model.parameters() if p.ndim < 2]  # norms, shifts, temperatures, biases
        decay = self.settings.weight_decay
        groups = [{"params": decayed, "weight_decay": decay}, {"params": plain, "weight_decay": 0.0}]
        betas = (self.settings.adam_beta1, self.settings.adam_beta2)
        return torch.optim.AdamW(groups, lr=self.task.learning_rate, betas=betas, fused=self.device.type == "cuda")

    @property
    def autocast_dtype(self) -> torch.dtype | None:
        precision = self.settings.precision
        return torch.bfloat16 if precision == "bfloat16" or (precision, self.device.type) == ("auto", "cuda") else None

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        if self.autocast_dtype is None:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, self.autocast_dtype)

    def learning_rate(self, step: int) -> float:
        """Linear warm-up, then a cosine down to `min_learning_rate_ratio` of the peak."""
        peak, warm = self.task.learning_rate, max(1, round(self.settings.warmup_fraction * self.total_steps))
        if step < warm:
            return peak * (step + 1) / warm
        low = self.settings.min_learning_rate_ratio
        progress = (step - warm) / max(1, self.total_steps - warm)
        return peak * (low + (1 - low) * 0.5 * (1 + math.cos(math.pi * progress)))

    def fit(self) -> Evaluation:
        """Train to the last step, from the newest checkpoint if there is one; returns the last evaluation."""
        resumed = self._resume()
        last = None if resumed else self._evaluate()
        label = self.task.name.replace("_", " ")
        with Progress(self.run, "03_train", label, self.total_steps, "step", start=self.step) as bar:
            window = self.window
            self.model.train()
            for input_ids, labels in self._batches():
                loss, ponder, norm = self._train_step(input_ids, labels)
                window.loss, window.ponder = window.loss + loss, window.ponder + ponder
                window.steps, window.tokens = window.steps + 1, window.tokens + input_ids.numel()
                done = self.step == self.total_steps
                if self.step % self.settings.log_every == 0 or done:
                    window = self._log(window, norm, bar)
                bar.update(1)
                paused = time.perf_counter()
                if self.step % self.task.eval_every == 0 or done:
                    last = self._evaluate()
                if self.step % self.settings.checkpoint_every == 0 or done:
                    self._save(window, paused, norm)
                window.began += time.perf_counter() - paused  # neither is training time
        return last or self._evaluate(write=False)

    def _batches(self) -> Iterator[Batch]:
        """From the current step to the end: the order of each epoch follows from (seed, epoch) alone."""
        size, data = self.task.batch_size, self.task.train
        while self.step < self.total_steps:
            epoch, at = divmod(self.step, self.steps_per_epoch)
            order = epoch_order(len(data), epoch, self.run.settings.seed)  # type: ignore[arg-type]
            batches = [order[i * size : (i + 1) * size].tolist() for i in range(at, self.steps_per_epoch)]
            workers = min(self.settings.num_workers, len(batches))
            generator = torch.Generator().manual_seed(self.run.settings.seed)  # else it draws from the global one
            yield from DataLoader(
                data, batch_sampler=batches, num_workers=workers, generator=generator,
                pin_memory=self.device.type == "cuda",
            )

    def _train_step(self, input_ids: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        profiled = self.task.profile and self._profiles_now()
        profiler = Profiler(self.device) if profiled else contextlib.nullcontext()
        began = time.perf_counter()
        with profiler:
            with region("forward_other"), self.autocast():
                out = self.model(input_ids.to(self.device), labels=labels.to(self.device))
            with region("backward_other"):
                out.loss.backward()
            with region("optimizer"):
                norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.grad_clip)
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
        self.tokens += input_ids.numel()
        return out.loss.detach(), out.ponder_steps.mean(), norm

    def _profiles_now(self) -> bool:
        every = max(1, self.total_steps // (2 * PROFILED_STEPS))
        return self.step >= min(WARM_STEPS, self.total_steps - 1) and self.step % every == 0 and (
            len(self.profiles) < PROFILED_STEPS
        )

    def _log(self, window: _Window, norm: Tensor, bar: Progress) -> _Window:
        loss, ponder = float(window.loss) / window.steps, float(window.ponder) / window.steps  # synchronises
        self._check_finite(loss, float(norm))
        elapsed = time.perf_counter() - window.began
        self.seconds += elapsed
        rate = window.tokens / elapsed
        self._write(
            "train", loss_train=loss, learning_rate=self.learning_rate(self.step - 1), tokens_per_sec=rate,
            ponder_steps=ponder, grad_norm=float(norm), tokens=self.tokens,
        )
        bar.update(0, loss=round(loss, 4), tokens_per_sec=round(rate))
        return _Window()

    def _check_finite(self, loss: float, norm: float) -> None:
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise FloatingPointError(
                f"{self.task.name}: the loss became {loss} (gradient norm {norm:.3g}) at step {self.step}: lower the "
                f"learning rate ({self.task.learning_rate}); the newest checkpoint is from before"
            )

    def _evaluate(self, write: bool = True) -> Evaluation:
        data, size = self.task.evaluation, self.task.batch_size
        count = len(data)  # type: ignore[arg-type]
        batches = ([data[i] for i in range(at, min(at + size, count))] for at in range(0, count, size))
        stacked = ((torch.stack([b[0] for b in rows]), torch.stack([b[1] for b in rows])) for rows in batches)
        result = evaluate(self.model, stacked, self.autocast, self.task.token_bytes)
        if write:
            self._check_finite(result.loss, 0.0)
            figures = {"loss_eval": result.loss, "accuracy": result.accuracy, "ponder_steps": result.ponder_steps}
            if result.bits_per_byte is not None:
                figures["bits_per_byte"] = result.bits_per_byte
            self._write("eval", **figures)
        return result

    def _write(self, event: str, **figures: float) -> None:
        record = {"task": self.task.name, "event": event, "step": self.step, "time": time.time(), **figures}
        append_jsonl(self.run.metrics, record)

    def _save(self, window: _Window, now: float, norm: Tensor) -> None:
        self._check_finite(float(window.loss), float(norm))
        state = {
            "task": self.task.name, "tokens": self.tokens, "seconds": self.seconds, "profiles": self.profiles,
            "window": [float(window.loss), float(window.ponder), window.steps, window.tokens, now - window.began],
        }
        keep = self.settings.keep_checkpoints
        save_checkpoint(self.folder, self.step, self.model, self.optimizer, state, keep)

    def _resume(self) -> bool:
        path, notes = find_checkpoint(self.folder)
        for note in notes:
            print(note)
        if path is None:
            if any(record.get("task") == self.task.name for record in read_jsonl(self.run.metrics)[0]):
                self._write("restart")  # stopped before its first checkpoint: those lines are computed again
            return False
        tensors, state = read_checkpoint(path)
        load_model(self.model, tensors, path)
        load_optimizer(self.optimizer, tensors)
        self.step, self.tokens, self.seconds = state["step"], state["tokens"], state["seconds"]
        self.profiles = state["profiles"]
        loss, ponder, steps, tokens, elapsed = state["window"]
        self.window = _Window(loss, ponder, steps, tokens, time.perf_counter() - elapsed)
        print(f"{self.task.name}: resuming from {path.name}, step {self.step} of {self.total_steps}")
        if self.step < self.total_steps:
            self._write("resume")
        return True
