"""A folder that is replaced as a whole or not at all.

    with replacing(run.data) as folder:
        (folder / "train.bin").write_bytes(...)

Works in a hidden folder beside the target, named after the process; what a killed process left there is removed by the
next call. Between the two renames at the end a kill leaves the former folder hidden; the next call puts it back.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """A fresh folder beside `target` that replaces it on success and vanishes on failure."""
    _sweep(target)
    folder = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    former = folder.with_suffix(".old")
    folder.mkdir(parents=True)
    try:
        yield folder
        for path in (*folder.rglob("*"), folder):
            _sync(path)
        if target.exists():
            os.replace(target, former)
        os.replace(folder, target)
        _sync(target.parent)
    finally:
        if former.exists() and not target.exists():
            os.replace(former, target)
        for left in (folder, former):
            shutil.rmtree(left, ignore_errors=True)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _sweep(target: Path) -> None:
    """Remove what killed processes left; a former folder whose replacement never came goes back to its place."""
    for left in sorted(target.parent.glob(f".{target.name}.*")):
        process = left.name.split(".")[-2]
        if not process.isdigit() or left.suffix not in (".tmp", ".old") or _alive(int(process)):
            continue
        if left.suffix == ".old" and not target.exists():
            os.replace(left, target)
        else:
            shutil.rmtree(left)


def _alive(process: int) -> bool:
    if process == os.getpid():
        return False
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
