"""The run folder: its paths, atomic writes and tolerant readers. The contract is `runs/README.md`.

One writer a file, written through `write_json` (temp file, fsync, rename) or `append_jsonl`; readers
(`read_json`, `read_jsonl`) never raise on a missing, torn or broken file: they return what is readable and a line
that names the problem. Needs neither torch nor pandas: the dashboard imports it.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lshv2.config import Settings
from lshv2.errors import UserError
from lshv2.presets import make_settings, validate

PHASES = ("01_model", "02_data", "03_train", "04_benchmark", "04_arena", "05_report")
SCHEMA = 1
LOCK = ".lock"  # in the run folder: held by its one writer, whom `.holder.json` names


@dataclass(frozen=True)
class Run:
    """A run folder and the settings it was opened with."""

    path: Path
    settings: Settings

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def config(self) -> Path:
        return self.path / "config.json"

    @property
    def data(self) -> Path:
        return self.path / "data"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def progress(self) -> Path:
        return self.path / "progress.json"

    def file(self, name: str) -> Path:
        """A top-level artifact such as `training_metrics.json`."""
        return self.path / name

    def marker(self, phase: str) -> Path:
        return self.path / f"{phase}.OK"

    def log(self, phase: str) -> Path:
        return self.path / "logs" / f"{phase}.log"

    def notebook(self, phase: str) -> Path:
        return self.path / "notebooks" / f"{phase}.ipynb"


def repo_root() -> Path:
    """The checkout this package is installed from (editable): where `notebooks/` and `runs/` lie."""
    return Path(__file__).resolve().parent.parent


def runs_root() -> Path:
    """`$LSHV2_RUNS`, or `runs/` in the checkout."""
    return Path(os.environ.get("LSHV2_RUNS") or repo_root() / "runs")


def check_run_name(name: str) -> str:
    """A run's name is one plain folder name, so that no run is written or deleted elsewhere."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", name):
        raise UserError(f"RUN={name!r} is not a run name: letters, digits, '.', '_' and '-', starting with no dot")
    return name


def open_run(
    run_dir: str | Path,
    *,
    preset: str = "quick",
    overrides: list[str] | tuple[str, ...] | dict[str, Any] = (),
    seed: int = 0,
    data: str | None = None,
) -> Run:
    """Create or reopen a run folder with these settings and write its `config.json`.

    run_dir: a path, or a plain name below `runs/`. Raises `UserError` on bad settings, before anything is written.
    """
    settings = make_settings(preset, overrides, seed=seed, data=data)
    path = Path(run_dir)
    if not path.is_absolute():
        path = runs_root() / (check_run_name(str(run_dir)) if os.sep not in str(run_dir) else path)
    run = Run(path.resolve(), settings)
    for folder in (run.path, run.path / "logs", run.path / "notebooks"):
        folder.mkdir(parents=True, exist_ok=True)
    content = {"schema": SCHEMA, "run": run.name, "settings": settings.model_dump(mode="json")}
    if read_json(run.config)[0] != content:
        write_json(run.config, content)
    return run


def load_run(path: str | Path) -> Run:
    """Reopen an existing run folder with the settings in its `config.json`."""
    path = Path(path)
    content, problem = read_json(path / "config.json")
    if problem or not isinstance(content, dict) or "settings" not in content:
        raise UserError(f"{path} is not a run folder: {problem or 'config.json has no settings'}")
    settings = content["settings"]
    if isinstance(settings, dict) and isinstance(train := settings.get("train"), dict):
        # of before pondering could begin late: such a training goes on with the loss that it began with
        settings = {**settings, "train": {"ponder_from": 0.0, "ponder_to": 0.0, **train}}
    return Run(path.resolve(), validate(settings))


def run_of_config(path: Path) -> Run:
    """The run folder of a `config.json`, as commands name it."""
    if path.name != "config.json":
        raise UserError(f"--config {path}: not a config.json of a run folder, such as runs/quick/config.json")
    return load_run(path.parent)


def list_runs(root: Path | None = None) -> list[Path]:
    """Folders with a `config.json` below `root` (two levels: committed references are grouped), newest first."""
    root = root or runs_root()
    found = {p.parent for pattern in ("*/config.json", "*/*/config.json") for p in root.glob(pattern)}
    return sorted(found, key=lambda p: (p / "config.json").stat().st_mtime_ns, reverse=True)


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` that replaces it on success and vanishes on failure."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)  # mkstemp's 0600 would hide results from others on a shared machine
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, content: Any) -> None:
    """Atomic and strict: a NaN or infinity is an error here, not a broken file for the reader."""
    text = json.dumps(content, indent=1, allow_nan=False) + "\n"
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


@contextmanager
def hold(run_dir: Path, command: str) -> Iterator[None]:
    """One writer a run folder; `UserError` names who holds it. Released by the system when the holder dies."""
    import filelock

    note = run_dir / ".holder.json"
    try:
        with filelock.FileLock(run_dir / LOCK, timeout=0):
            write_json(note, {"pid": os.getpid(), "since": now(), "command": command})
            try:
                yield
            finally:
                note.unlink(missing_ok=True)
    except filelock.Timeout:
        holder = read_json(note)[0] or {}
        raise UserError(
            f"run {run_dir.name} is being written by process {holder.get('pid', '?')} since {holder.get('since', '?')} "
            f"({holder.get('command', '?')}): wait for it, or choose another folder (make: RUN=)"
        ) from None


def now() -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S")


def append_jsonl(path: Path, record: dict[str, Any]) -> None:
    """One line, one write: a kill leaves at most a torn last line, which readers skip and the next append ends."""
    line = json.dumps(record, allow_nan=False) + "\n"
    with open(path, "a+b") as file:
        if file.tell() > 0:
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                line = "\n" + line
        file.write(line.encode())


def read_json(path: Path) -> tuple[Any, str | None]:
    """`(content, None)`, or `(None, what is wrong with it)`."""
    try:
        return json.loads(path.read_text(encoding="utf-8")), None
    except FileNotFoundError:
        return None, f"{path.name} is missing"
    except (OSError, ValueError, RecursionError) as error:  # ValueError: not UTF-8, not JSON, an endless integer
        return None, f"{path.name} is unreadable: {error.__class__.__name__}: {str(error)[:200]}"


def read_jsonl(path: Path) -> tuple[list[dict[str, Any]], str | None]:
    """Every readable record, and a line naming the first broken one; a torn last line is no problem."""
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        return [], f"{path.name} is missing"
    except OSError as error:
        return [], f"{path.name} is unreadable: {error}"
    records, problem = [], None
    lines = raw.split(b"\n")
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            if not isinstance(record, dict):
                raise ValueError("not an object")
            records.append(record)
        except (ValueError, RecursionError) as error:
            if number < len(lines) and problem is None:
                problem = f"{path.name} line {number} is broken: {str(error)[:100]}"
    return records, problem


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def digest(path: Path) -> str:
    """sha256 of a file; of a folder, that of its files' names and sha256."""
    if path.is_file():
        return sha256(path)
    return hashlib.sha256("".join(f"{p.name} {sha256(p)}\n" for p in sorted(path.iterdir())).encode()).hexdigest()
