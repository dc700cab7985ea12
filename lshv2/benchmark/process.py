"""One job in its own process, with a time limit and a memory limit that nothing it does can escape.

    outcome = run_limited([sys.executable, "worker.py"], job, timeout_seconds=300, max_memory_gb=16)
    outcome.status      # "ok", "out of memory", "timeout" or "error"; outcome.reason says why, in one line

The job goes in as one JSON line on standard input, which then stays open: a worker that reads its end knows that
its parent is gone. Results come back as JSON objects, one a line, on standard output, merged in order: what was
measured before a limit struck is kept. An object with `status` decides the outcome; a process that ends without
one is judged by how it ended. The whole process group dies with the job, whatever happens here.

Memory is limited twice. The worker limits itself where that gives a clean error (its own docstring says how); the
watchdog here looks at resident memory, mapped files aside, ten times a second and kills what got past that.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import IO, Any, Literal

import psutil

from lshv2.runs import repo_root

Status = Literal["ok", "out of memory", "timeout", "error"]
POLL_SECONDS = 0.1
MEMORY_ERROR = re.compile(r"allocate memory|bad_alloc|out of memory|MemoryError", re.I)


@dataclass(frozen=True)
class Outcome:
    """How a job ended and all that it reported until then."""

    status: Status
    reason: str | None = None
    result: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0


def run_limited(
    command: Sequence[str], job: dict[str, Any], *, timeout_seconds: float, max_memory_gb: float
) -> Outcome:
    """Run `command` with `job` on its standard input; never raises for what the process does or how it dies.

    timeout_seconds counts from the process's start, imports included; max_memory_gb is GiB of resident memory.
    """
    # The child must import this very package, also from a notebook's folder and without an installation.
    path = os.pathsep.join(p for p in (str(repo_root()), os.environ.get("PYTHONPATH")) if p)
    began = time.monotonic()
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        child = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=out, stderr=err, start_new_session=True,
            env={**os.environ, "PYTHONPATH": path},
        )
        try:
            _send(child, job)
            limit = _watch(child.pid, began + timeout_seconds, timeout_seconds, max_memory_gb)
        finally:
            # Not reaped yet, so its id cannot have become somebody else's.
            os.killpg(child.pid, signal.SIGKILL)
            child.wait()
            if child.stdin:
                child.stdin.close()
        result, errors = _results(out), _text(err)
    seconds = time.monotonic() - began
    said: Status | None = result.pop("status", None)
    reason = result.pop("reason", None)
    if limit is not None:
        return Outcome(*limit, result, seconds)
    if said is not None:
        return Outcome(said, reason, result, seconds)
    return Outcome(*_judge(child.returncode, errors), result, seconds)


def _send(child: subprocess.Popen[bytes], job: dict[str, Any]) -> None:
    assert child.stdin is not None
    try:
        child.stdin.write(json.dumps(job).encode() + b"\n")
        child.stdin.flush()
    except BrokenPipeError:
        pass  # it died before reading: how it died is judged like any other end


def _watch(pid: int, deadline: float, timeout_seconds: float, max_memory_gb: float) -> tuple[Status, str] | None:
    """Wait for the end of `pid` without reaping it; the limit that it broke, or None."""
    process = psutil.Process(pid)
    while os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        if time.monotonic() > deadline:
            return "timeout", f"not finished within {timeout_seconds:g} s (benchmark.timeout_seconds)"
        try:
            memory = process.memory_info()
            resident = memory.rss - getattr(memory, "shared", 0)  # CUDA maps gigabytes of library files
        except psutil.Error:
            resident = 0
        if resident > max_memory_gb * 2**30:
            return "out of memory", f"resident memory passed {max_memory_gb:g} GB (benchmark.max_memory_gb)"
        time.sleep(POLL_SECONDS)
    return None


def _judge(code: int, errors: str) -> tuple[Status, str]:
    """Status and reason of a process that ended without saying how it went."""
    last = next((line.strip() for line in reversed(errors.splitlines()) if line.strip()), "no message")[:300]
    if MEMORY_ERROR.search(errors):
        return "out of memory", last
    if code < 0:
        name = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
        by_system = " (the system's out-of-memory killer does that)" if code == -signal.SIGKILL else ""
        return "error", f"the worker was killed by {name}{by_system}: {last}"
    return "error", f"the worker ended with exit code {code} and no result: {last}"


def _results(out: IO[bytes]) -> dict[str, Any]:
    """All reported objects merged; a line torn by a kill is skipped."""
    merged: dict[str, Any] = {}
    for line in _text(out).splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict):
            merged.update(record)
    return merged


def _text(file: IO[bytes]) -> str:
    file.seek(0)
    return file.read().decode(errors="replace")
