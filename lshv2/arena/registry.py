"""Tasks by name: the arena's own, and those of a person's own files."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterable
from pathlib import Path

import lshv2.arena.tasks  # noqa: F401 - registers its own
from lshv2.arena.task import REGISTERED, ArenaTask
from lshv2.errors import UserError


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
    """Run Python files that register tasks of their own; raises UserError where one cannot be run."""
    for given in paths:
        path = Path(given).expanduser()
        name = f"lshv2_arena_plugin_{path.stem}"
        spec = importlib.util.spec_from_file_location(name, path)
        if spec is None or spec.loader is None or not path.is_file():
            raise UserError(f"arena.plugins: {path} is not a Python file")
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        try:
            spec.loader.exec_module(module)
        except Exception as error:
            raise UserError(f"arena.plugins: {path} cannot be run: {type(error).__name__}: {error}") from error
