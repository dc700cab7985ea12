"""torchrun on this machine, for a person who said NPROC=: output passed on, stops obeyed, the outcome told in one line.

    outcome = run_torchrun("lshv2.train", ["--config", path], nproc=2)   # {}: done

The outcome comes through a file, as torchrun exits with 1 whatever its processes exited with.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from lshv2.errors import UserError

OUTCOME = "LSHV2_OUTCOME"  # where the first process tells how it ended
GRACE = 60  # seconds for a checkpoint after a signal


def under_torchrun() -> bool:
    """Whether torchrun started this process."""
    return "RANK" in os.environ


def told_to() -> bool:
    """Whether `run_torchrun` started this process."""
    return OUTCOME in os.environ


def tell_outcome(line: str, signalled: int) -> None:
    """For the first process: why it ends, to whoever called `run_torchrun`."""
    if told_to():
        Path(os.environ[OUTCOME]).write_text(json.dumps({"line": line, "signal": signalled}), encoding="utf-8")


def run_torchrun(module: str, arguments: list[str], nproc: int) -> dict[str, Any]:
    """Run `python -m module` in nproc processes: {} when all succeeded, else `line` and `signal` (0: a mistake).

    A KeyboardInterrupt here becomes a SIGTERM there. Raises UserError when they failed otherwise: their traceback was
    printed.
    """
    with tempfile.TemporaryDirectory(prefix="lshv2-") as folder:
        outcome = Path(folder) / "outcome.json"
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={nproc}"]
        with subprocess.Popen(
            [*command, "-m", module, *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            env={**os.environ, OUTCOME: str(outcome), "OMP_NUM_THREADS": _threads(nproc)},
        ) as process:
            try:
                assert process.stdout
                for line in process.stdout:
                    print(line, end="", flush=True)
                process.wait()
            except KeyboardInterrupt:
                process.send_signal(signal.SIGTERM)
                print(process.communicate(timeout=GRACE)[0], end="", flush=True)
            finally:
                if process.poll() is None:
                    process.kill()
        if outcome.exists():
            return json.loads(outcome.read_text(encoding="utf-8"))
        if process.returncode:
            raise UserError(f"torchrun with {nproc} processes failed (exit status {process.returncode}); see above")
        return {}


def _threads(nproc: int) -> str:
    return os.environ.get("OMP_NUM_THREADS") or str(max(1, (os.cpu_count() or 1) // nproc))
