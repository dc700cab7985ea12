"""Tasks by name: the arena's own, and those of a person's own files."""

from __future__ import annotations

import hashlib
import importlib.util
import sys
from collections.abc import Iterable
from pathlib import Path

import lshv2.arena.tasks  # noqa: F401 - registers its own
from lshv2.arena.task import REGISTERED, ArenaTask
from lshv2.errors import UserError

_LOADED: dict[Path, bytes] = {}  # plugins that were run, as they were: a second run would make other classes


def task_names() -> list[str]:
    """Every known task, in the order of registration."""
    return list(REGISTERED)


def get_task(name: str) -> ArenaTask:
    """A task by its name; raises UserError with the names there are."""
    names = task_names()
    if name not in names:
        raise UserError(f"arena task {name!r} is unknown; there are: {', '.join(names)} (your own: arena.plugins)")
    return REGISTERED[name]()


def load_plugins(paths: Iterable[str]) -> None:
    """Run Python files that register tasks of their own, a file as it stands once a process.

    Raises UserError where one cannot be run or registers nothing.
    """
    for given in paths:
        path = Path(given).expanduser().resolve()
        if path.suffix != ".py" or not path.is_file():
            raise UserError(f"arena.plugins: {path} is not a Python file")
        content = path.read_bytes()
        if _LOADED.get(path) != content:
            _load(path, content)
            _LOADED[path] = content


def _load(path: Path, content: bytes) -> None:
    # two files of one name are two modules, and of a file the same one in every process
    name = f"lshv2_arena_plugin_{path.stem}_{hashlib.sha256(bytes(path)).hexdigest()[:8]}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    before = dict(REGISTERED)
    try:
        spec.loader.exec_module(module)
    except UserError as error:
        raise UserError(f"arena.plugins: {path}: {error}") from error
    except Exception as error:
        raise UserError(f"arena.plugins: {path} cannot be run: {type(error).__name__}: {error}") from error
    new = [task for task in REGISTERED.values() if before.get(task.name) is not task]
    if not new:
        raise UserError(f"arena.plugins: {path} registers no task: put @register above its class")
    for task in new:
        task.code = hashlib.sha256(content).hexdigest()[:16]
        if task.source:  # else it would be looked for where the process happens to run
            task.source = str(path.parent / Path(task.source).expanduser())
