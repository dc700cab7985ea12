"""The arena's processes when one or all of them are sent a signal: real ones, and none is left."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import BrokenExecutor, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import psutil
import pytest
from arena_plugins import DRAWS
from project_files import ROOT

from lshv2.arena.pool import _Slot


@contextmanager
def drawing(out: Path, *arguments: str | Path) -> Iterator[tuple[subprocess.Popen[str], list[psutil.Process]]]:
    """The arena's command in a session of its own, and what it started, once processes draw for one that trains."""
    command = [sys.executable, "-m", "lshv2.arena", str(out), "--small", "--seeds", "0", *map(str, arguments)]
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    job = subprocess.Popen(command, env=environment, start_new_session=True, stdout=subprocess.PIPE,
                           stderr=subprocess.PIPE, text=True)
    process, until = psutil.Process(job.pid), time.monotonic() + 60
    try:
        while not any(child.children() for child in process.children()):
            assert time.monotonic() < until and job.poll() is None, "nothing was drawn"
            time.sleep(0.1)
        time.sleep(3)
        yield job, process.children(recursive=True)
    finally:
        if job.poll() is None:
            os.killpg(job.pid, signal.SIGKILL)
            job.communicate()


@pytest.mark.parametrize("number, group", [
    (signal.SIGINT, True), (signal.SIGINT, False), (signal.SIGTERM, False), (signal.SIGKILL, False)])
def test_an_interrupt_is_one_line_and_leaves_no_process(number: int, group: bool, tmp_path: Path) -> None:
    """As a terminal sends it, to all processes, and as `kill` and `timeout` do, to one."""
    some = ("--attentions", "lsh", "dense", "--tasks", "listops", "--steps", "100000")
    with drawing(tmp_path / "out", *some) as (job, started):
        (os.killpg if group else os.kill)(job.pid, number)
        out, err = job.communicate(timeout=60)
        said, begun = "stopped; the same command goes on\n", out.splitlines()
        assert (job.returncode, err) == ((-9, err) if number == signal.SIGKILL else (128 + number, said))
        assert begun and all(re.fullmatch(r"listops \w+ seed 0: begins, 100,000 steps .*", line) for line in begun), out
        assert not psutil.wait_procs(started, timeout=10)[1]


def _interrupted_as_it_sends() -> int:
    """As a process that is interrupted when its result has arrived, before it knows."""
    send = Connection.send_bytes

    def send_and_interrupt(self: Connection, *arguments: Any) -> None:
        send(self, *arguments)
        os.kill(os.getpid(), signal.SIGINT)

    Connection.send_bytes = send_and_interrupt  # type: ignore[method-assign]
    return os.getpid()


@pytest.mark.parametrize("work", [os.getpid, _interrupted_as_it_sends])
def test_an_interrupted_process_that_waits_ends_without_a_word(
    work: Callable[[], int], capfd: pytest.CaptureFixture[str],
) -> None:
    """In a thread, as slots are, since it hears no interrupts afterwards."""
    slot = _Slot("", shared=False)
    with ThreadPoolExecutor(1) as thread:
        waiting = thread.submit(slot.run, work).result(60)
        if work is os.getpid:
            os.kill(waiting, signal.SIGINT)
        with suppress(psutil.NoSuchProcess):  # it has ended already
            psutil.Process(waiting).wait(30)
        with pytest.raises(BrokenExecutor):
            thread.submit(slot.run, abs, -1).result(60)
        assert thread.submit(slot.run, abs, -1).result(60) == 1, "the slot was lost with its process"
        slot.end()
    assert capfd.readouterr().err == ""


def _leaves() -> str:
    os.kill(os.getpid(), signal.SIGTERM)
    return "unheard"


def test_a_job_whose_process_alone_was_sent_a_signal_has_failed_and_the_next_one_runs() -> None:
    slot = _Slot("", shared=False)
    with ThreadPoolExecutor(1) as thread:
        with pytest.raises(RuntimeError, match="a signal ended its process"):
            thread.submit(slot.run, _leaves).result(60)
        assert thread.submit(slot.run, abs, -1).result(60) == 1
        slot.end()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_processes_that_draw_for_a_while_end_with_the_command(number: int, tmp_path: Path) -> None:
    slow = DRAWS.format(wrong="__import__('time').sleep(4 if self.split == 'train' and n > 8 else 0)")
    (tmp_path / "mine.py").write_text(slow + "    in_processes = True\n")
    some = ("--attentions", "lsh", "--plugins", tmp_path / "mine.py", "--tasks", "mine", "--lengths", "64")
    with drawing(tmp_path / "out", *some) as (job, started):
        os.kill(job.pid, number)
        job.communicate(timeout=100)
        assert not psutil.wait_procs(started, timeout=30)[1]
