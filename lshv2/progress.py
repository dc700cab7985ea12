"""Progress of anything over a few seconds: one bar, three places to see it.

    with Progress(run, "03_train", "language model", total=500, unit="step") as bar:
        bar.update(1, loss=2.1, tokens_per_sec=9000)

writes `progress.json` in the run folder (atomically, at most four times a second): the runner draws it in the
terminal and the dashboard on its page. In a notebook opened by a person it draws tqdm's bar as well.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

from lshv2.runs import Run, write_json

RUNNER_ENV = "LSHV2_RUNNER"  # set by the runner, which draws the bar itself
PERIOD = 0.25  # seconds between writes


class Progress:
    """A bar with a total, a rate, an ETA and named figures; without a run nothing is shown. One writer a run."""

    def __init__(self, run: Run | None, phase: str, label: str, total: int, unit: str = "it", start: int = 0) -> None:
        self.path: Path | None = run.progress if run else None
        self.phase, self.label, self.total, self.unit = phase, label, total, unit
        self.start = self.done = start
        self.figures: dict[str, Any] = {}
        self.began, self.written = time.monotonic(), 0.0
        self.bar: Any = None

    def __enter__(self) -> Progress:
        if self.path and not os.environ.get(RUNNER_ENV):
            from tqdm.auto import tqdm

            self.bar = tqdm(total=self.total, initial=self.start, desc=self.label, unit=self.unit,
                            unit_scale=self.unit == "B")
        self._write(force=True)
        return self

    def update(self, n: int = 1, **figures: float | str) -> None:
        """Advance by n and show the figures, such as `loss=2.1`."""
        self.done += n
        self.figures.update(figures)
        if self.bar is not None:
            shown = {k: f"{v:.4g}" if isinstance(v, float) else v for k, v in self.figures.items()}
            self.bar.set_postfix(shown, refresh=False)
            self.bar.update(n)
        self._write()

    def __exit__(self, *_: object) -> None:
        self._write(force=True)
        if self.bar is not None:
            self.bar.close()

    def _write(self, force: bool = False) -> None:
        now = time.monotonic()
        if self.path is None or not (force or now - self.written >= PERIOD):
            return
        self.written = now
        elapsed, advanced = now - self.began, self.done - self.start
        eta = elapsed / advanced * (self.total - self.done) if advanced else None
        write_json(
            self.path,
            {
                "phase": self.phase, "label": self.label, "done": self.done, "total": self.total, "unit": self.unit,
                "elapsed_s": round(elapsed, 2), "eta_s": None if eta is None else round(eta, 1),
                "figures": self.figures, "time": time.time(),
            },
        )
