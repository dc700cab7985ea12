"""Stopping by signal: the first SIGTERM or SIGINT is noted, and the work ends where nothing is lost.

    with StopRequest() as stop:
        for batch in batches:
            ...
            if stop.requested:
                save(); raise Stopped(...)

Handlers stand only inside the `with`, and only in the main thread: elsewhere Python allows none and nothing is noted.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)
GRACE = 5  # seconds that a process gets to end by itself
IMPATIENT = 1.0  # seconds: a person's second Ctrl-C, not a supervisor that signals the process and then its group


class Stopped(KeyboardInterrupt):
    """Ended on a signal after a checkpoint: `str()` is one line, `number` the signal. An exit status is 128 + number.

    A KeyboardInterrupt, so that nothing which handles mere errors takes it for one.
    """

    def __init__(self, message: str, number: int) -> None:
        super().__init__(message)
        self.number = number


class StopRequest:
    """Notes SIGINT and SIGTERM. A second SIGINT after IMPATIENT seconds raises KeyboardInterrupt at once."""

    def __init__(self) -> None:
        self.number: signal.Signals | None = None
        self._since = 0.0
        self._before: dict[signal.Signals, object] = {}

    @property
    def requested(self) -> bool:
        return self.number is not None

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        if kind is None and self.number is not None:
            signal.raise_signal(self.number)  # came too late to be seen here: whoever is next must not miss it

    def _note(self, number: int, _: FrameType | None) -> None:
        if self.number is None:
            self.number, self._since = signal.Signals(number), time.monotonic()
        elif number == signal.SIGINT and time.monotonic() - self._since > IMPATIENT:
            raise KeyboardInterrupt


def ignore_signals(_: int = 0) -> None:
    """For a DataLoader's workers: a signal to the whole process group must not take the data from the last step.

    They end with their parent all the same, which tells them so, or whose death they notice.
    """
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def end_with_parent() -> None:
    """For a process of multiprocessing: end when the one that started it has, within GRACE seconds, however that was.

    Else it would wait for more, or work on beside whoever is next; what it started itself ends with it.
    """
    threading.Thread(target=_outlive_no_parent, daemon=True).start()


def _outlive_no_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        signal.alarm(GRACE)  # should an operation of PyTorch's not come back to Python in time
        os.kill(os.getpid(), signal.SIGTERM)
