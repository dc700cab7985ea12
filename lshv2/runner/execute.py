"""Execute one notebook through papermill, in this process, and find out what truly happened.

Papermill runs in a worker thread, the kernel in its own process group: the main thread stays free for signals and
the progress bar. A notebook counts as executed only if its kernel printed a token from a cell put after the last
one and every code cell has its execution count; papermill's own verdict is not enough (see `guard`).
"""

from __future__ import annotations

import os
import re
import secrets
import signal
import sys
import tempfile
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from lshv2.runs import atomic_path, repo_root

TAG = "lshv2-guard"  # the cells the runner adds; they are not kept in the saved notebook
ANSI = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")
FOREIGN = re.compile(r"site-packages|/lib/python3")  # frames that explain nothing to a person
TICK = 0.1  # seconds between looks at the worker
GRACE = 60.0  # seconds a kernel gets to end by itself after an interrupt: training writes a checkpoint first


@dataclass(frozen=True)
class Failure:
    """error: one line; excerpt: where it happened; user_error: the person can mend it, the line says how."""

    error: str
    excerpt: str = ""
    user_error: bool = False


def execute(
    notebook: Path, parameters: dict[str, Any], output: Path, log: TextIO, tick: Callable[[], None]
) -> Failure | None:
    """Run the notebook with typed parameters and save it executed to `output`, also when it fails.

    log takes what the cells print. tick is called about every TICK seconds. Whatever is raised in the calling
    thread meanwhile (`Interrupted`) stops the kernel and passes on.
    """
    import nbformat
    import papermill
    import psutil
    from jupyter_core.utils import ensure_event_loop

    try:
        source = nbformat.read(notebook, as_version=4)
        known = papermill.inspect_notebook(notebook)
    except (OSError, ValueError, nbformat.ValidationError) as error:
        return Failure(f"{notebook} is not a readable notebook: {str(error).splitlines()[0]}")
    unknown = [name for name in parameters if name not in known]
    if unknown:
        return Failure(
            f"{notebook.name} does not know the parameter {', '.join(unknown)}: "
            f"its parameters cell has {', '.join(known) or 'none (no cell is tagged parameters)'}"
        )
    token = secrets.token_hex(8)
    _add_guards(source, token)
    before = set(psutil.Process().children())
    raised: list[BaseException] = []
    done = threading.Event()  # not Thread.join: in Python 3.11 an interrupted join takes a running thread for ended
    with tempfile.TemporaryDirectory(prefix=f".{notebook.stem}.", dir=output.parent) as folder:
        running = Path(folder) / notebook.name

        def work() -> None:
            try:
                papermill.execute_notebook(
                    source, running, parameters=parameters, kernel_name="python3", progress_bar=False,
                    stdout_file=log, stderr_file=log, cwd=notebook.parent, extra_arguments=["--log-level=40"],
                )
            except BaseException as error:
                raised.append(error)
            finally:
                ensure_event_loop().close()  # this thread's own, which nobody else would close
                done.set()

        threading.Thread(target=work, daemon=True, name="papermill").start()
        try:
            while not done.wait(TICK):
                tick()
        finally:  # by now idle, unless an interrupt came
            if not done.is_set():
                _stop_kernels(done, [c for c in psutil.Process().children() if c not in before])
            executed = nbformat.read(running, as_version=4) if running.exists() else source
            printed = _take_guards(executed)
            with atomic_path(output) as temporary:
                nbformat.write(executed, temporary)
    return _judge(executed, printed == token, raised[0] if raised else None)


def _add_guards(notebook: Any, token: str) -> None:
    import nbformat

    start = (
        f"import sys\nsys.path.insert(0, {str(repo_root())!r})\n"
        f"import lshv2.runner.guard\nlshv2.runner.guard.start({os.getpid()}, {sys.prefix!r})\ndel lshv2, sys"
    )
    finish = f"import lshv2.runner.guard\nlshv2.runner.guard.finish({token!r})"
    metadata = {"tags": [TAG]}
    notebook.cells.insert(0, nbformat.v4.new_code_cell(start, metadata=metadata))
    notebook.cells.append(nbformat.v4.new_code_cell(finish, metadata=metadata))


def _take_guards(notebook: Any) -> str:
    """Remove the runner's cells, unless one of them failed; the text that the last one printed."""
    guards = [cell for cell in notebook.cells if TAG in cell.metadata.get("tags", [])]
    outputs = guards[-1].get("outputs", []) if guards else []
    keep = [cell for cell in guards if any(o.output_type == "error" for o in cell.get("outputs", []))]
    notebook.cells = [cell for cell in notebook.cells if cell not in guards or cell in keep]
    return "".join(o.text for o in outputs if o.output_type == "stream" and o.name == "stdout").strip()


def _stop_kernels(done: threading.Event, kernels: list[Any]) -> None:
    """Interrupt, wait, then kill the kernels' process groups: nothing that they started survives."""
    for kernel in kernels:
        with suppress(Exception):
            kernel.send_signal(signal.SIGINT)
    done.wait(GRACE)
    for kernel in kernels:
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(kernel.pid, signal.SIGKILL)
    done.wait(GRACE)


def _judge(executed: Any, finished: bool, raised: BaseException | None) -> Failure | None:
    """The failure, from the cells themselves first and from papermill's exception second."""
    cells = [cell for cell in executed.cells if cell.cell_type == "code" and cell.source.strip()]
    errors = [o for cell in cells for o in cell.get("outputs", []) if o.output_type == "error"]
    if errors and errors[0].ename != "SystemExit":
        error = errors[0]
        text = f"{error.ename}: {error.evalue}"
        if error.ename == "UserError":
            return Failure(" ".join(error.evalue.split()), user_error=True)
        return Failure(text.splitlines()[0], excerpt(error.traceback))
    if raised is not None and type(raised).__name__ != "PapermillExecutionError":
        line = (str(raised).strip().splitlines() or [""])[0]
        if type(raised).__name__ == "DeadKernelError":
            line = "the kernel died: out of memory, a crash, or a cell that ended the process"
        return Failure(f"{type(raised).__name__}: {line}")
    skipped = [number for number, cell in enumerate(cells, 1) if cell.get("execution_count") is None]
    if skipped or errors:
        why = "sys.exit() in a cell" if errors else "the kernel stopped"
        return Failure(f"ended early ({why}): {len(skipped)} of {len(cells)} code cells did not run")
    if not finished:
        return Failure("the kernel did not confirm that it reached the notebook's end")
    return None


def excerpt(traceback: list[str], frames: int = 3) -> str:
    """The last frames of this project's own code, the line at fault of each, and the error."""
    parts = [ANSI.sub("", part).rstrip() for entry in traceback for part in entry.split("\n\n")]
    shown = []
    for part in parts:
        lines = part.splitlines()
        own = lines and lines[0].startswith(("Cell In", "File ")) and not FOREIGN.search(lines[0])
        if own:
            arrow = [line for line in lines[1:] if line.lstrip().startswith("-")]
            shown.append("\n".join([lines[0], *arrow[:1]]))
    return "\n".join([*shown[-frames:], parts[-1] if parts else ""]).strip()
