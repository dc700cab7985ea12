"""What a person sees while a phase runs: one bar on a terminal, a plain line every ten seconds elsewhere."""

from __future__ import annotations

import shutil
import sys
import time
from typing import Any

from lshv2.runs import Run, read_json

DRAW_EVERY, LINE_EVERY = 0.25, 10.0  # seconds, on a terminal and elsewhere


class Watcher:
    """Draws `progress.json` of the phase that is running. Used as a context manager around it."""

    def __init__(self, run: Run, phase: str) -> None:
        self.run, self.phase = run, phase
        self.began = time.time()
        self.shown = time.monotonic()
        self.on_terminal = sys.stdout.isatty()
        self.bar: Any = None
        self.label: str | None = None

    def __enter__(self) -> Watcher:
        return self

    def __exit__(self, *_: object) -> None:
        self._close()

    def tick(self) -> None:
        """Draw, if it is time to."""
        if time.monotonic() - self.shown < (DRAW_EVERY if self.on_terminal else LINE_EVERY):
            return
        self.shown = time.monotonic()
        state = read_json(self.run.progress)[0]
        if not isinstance(state, dict) or state.get("phase") != self.phase or state.get("time", 0) < self.began:
            state = None
        if self.on_terminal:
            self._draw(state)
        else:
            print(self._line(state), flush=True)

    def _draw(self, state: dict[str, Any] | None) -> None:
        from tqdm import tqdm

        label = f"{self.phase}: {state['label']}" if state else f"{self.phase}: running"
        if label != self.label:
            self._close()
            self.label = label
            style = {} if state else {"bar_format": "{desc} {elapsed}"}
            total = state["total"] if state else None
            self.bar = tqdm(total=total, desc=label, leave=False, file=sys.stdout, **style)
            self.bar.start_t = time.time() - (state["elapsed_s"] if state else time.time() - self.began)
        if state:
            self.bar.unit, self.bar.n, self.bar.total = f" {state['unit']}", state["done"], state["total"]
            self.bar.set_postfix_str(_figures(state), refresh=False)
        self.bar.ncols = shutil.get_terminal_size().columns  # tqdm's own way draws nothing where the size is not known
        self.bar.refresh()

    def _line(self, state: dict[str, Any] | None) -> str:
        if not state:
            return f"{self.phase}: running, {time.time() - self.began:.0f} s"
        eta = f", about {state['eta_s']:.0f} s left" if state["eta_s"] is not None else ""
        figures = _figures(state)
        elapsed = state["elapsed_s"] + time.time() - state["time"]  # a long step writes nothing meanwhile
        return (
            f"{self.phase}: {state['label']} {state['done']}/{state['total']} {state['unit']}, "
            f"{elapsed:.0f} s{eta}{', ' + figures if figures else ''}"
        )

    def _close(self) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar = None


def _figures(state: dict[str, Any]) -> str:
    return ", ".join(
        f"{name} {value:,.4g}" if isinstance(value, float) and value < 1e4 else
        f"{name} {value:,.0f}" if isinstance(value, int | float) else f"{name} {value}"
        for name, value in state["figures"].items()
    )
