"""Runs inside the kernel: makes it impossible to finish a notebook without having run it.

The runner puts `start(...)` before the notebook's first cell and `finish(token)` after its last one. Papermill
alone reports success when a cell calls `sys.exit(0)`, when a `!command` fails and when a thread dies.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

from lshv2.progress import RUNNER_ENV

POLL = 0.2  # seconds between looks at the runner
PATIENCE = 2.0  # seconds for threads that are still at work when the last cell is done

_thread_errors: list[str] = []
_threads_before: set[threading.Thread] = set()


def start(runner: int, prefix: str) -> None:
    """runner: process id of the parent; prefix: its environment, which this kernel must share."""
    if sys.prefix != prefix:
        raise RuntimeError(f"the kernel python3 belongs to {sys.prefix}, the runner to {prefix}: reinstall ipykernel")
    root = str(Path(__file__).resolve().parents[2])
    os.environ[RUNNER_ENV] = "1"
    os.environ["PYTHONPATH"] = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
    threading.Thread(target=_die_with, args=(runner,), daemon=True, name="lshv2-guard").start()
    _fail_on_shell_errors()
    _threads_before.update(threading.enumerate())
    threading.excepthook = _note_thread_error


def finish(token: str) -> None:
    """Print the token, which the runner looks for, unless a thread has failed."""
    deadline = time.monotonic() + PATIENCE
    for thread in threading.enumerate():
        if thread not in _threads_before and not thread.daemon:
            thread.join(max(0.0, deadline - time.monotonic()))
    if _thread_errors:
        raise RuntimeError(f"an exception in a thread: {_thread_errors[0]}")
    print(token)


def _die_with(runner: int) -> None:
    """A killed runner leaves no kernel behind, nor the processes the kernel started."""
    while os.getppid() == runner:
        time.sleep(POLL)
    if os.getpgrp() == os.getpid():
        os.killpg(os.getpid(), signal.SIGKILL)
    os._exit(1)


def _note_thread_error(arguments: threading.ExceptHookArgs) -> None:
    if arguments.exc_type is SystemExit:
        return
    name = arguments.thread.name if arguments.thread else "unknown"
    _thread_errors.append(f"{arguments.exc_type.__name__}: {arguments.exc_value} (thread {name})")
    threading.__excepthook__(arguments)


def _fail_on_shell_errors() -> None:
    """`!command` and `x = !command` raise when the command fails; tried out, as older kernels ignore the option."""
    from IPython.core.getipython import get_ipython

    shell = get_ipython()
    assert shell is not None, "the guard runs in a notebook's kernel"
    shell.system_raise_on_error = True
    try:
        shell.system("false")
    except subprocess.CalledProcessError:
        return
    raise RuntimeError("this kernel hides failing !commands: install the ipykernel and ipython of .requirements.lock")
