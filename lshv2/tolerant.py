"""Reading what may be broken: every helper returns clean values and names what was wrong, none raises.

    content, problems = read_object(run_path, "config.json")

Strings come out valid UTF-8, short and without control codes, numbers finite or NaN. A file that is not a regular one
inside its run folder (a link to elsewhere, a pipe) is not opened. The typed readers are in `lshv2.readers`.
"""

import json
import math
import os
import re
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lshv2.runs import read_json

MAX_BYTES = 256 << 20  # a JSON file above this is not one of ours
NAN = float("nan")
ANSI = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")  # colours, as in IPython's tracebacks
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f]")


@dataclass(frozen=True)
class Problem:
    """One defect of one file, as a sentence that begins with the file's name."""

    file: str
    reason: str
    missing: bool = False

    def __str__(self) -> str:
        return f"{self.file} {self.reason}"


Problems = tuple[Problem, ...]


def text(value: object, limit: int = 500) -> str:
    """Any value as valid UTF-8 without control characters, at most `limit` characters; None is ''."""
    if value is None:
        return ""
    if not isinstance(value, str):
        try:
            value = json.dumps(value)
        except (TypeError, ValueError, RecursionError):
            value = f"({type(value).__name__})"
    shown = value.encode("utf-8", "replace").decode("utf-8")
    shown = CONTROL.sub("", ANSI.sub("", shown))
    return shown if len(shown) <= limit else shown[: limit - 1] + "…"


def number(value: object) -> float:
    """A finite float, or NaN for everything else (None, strings, booleans, infinities)."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return NAN
    try:
        return float(value) if math.isfinite(value) else NAN
    except OverflowError:
        return NAN


def refusal(run: Path, name: str) -> Problem | None:
    """Why `run / name` is not opened, or None."""
    path = run / name
    try:
        status = os.stat(path)
    except FileNotFoundError:
        return Problem(name, "is missing", missing=True)
    except (OSError, ValueError) as error:
        return Problem(name, f"is unreadable: {error.__class__.__name__}")
    if not path.resolve().is_relative_to(run.resolve()):
        return Problem(name, "is a link out of its run folder: not followed")
    if not stat.S_ISREG(status.st_mode):
        return Problem(name, "is not a regular file")
    if name.endswith(".json") and status.st_size > MAX_BYTES:
        return Problem(name, f"has {status.st_size:,} bytes: above the {MAX_BYTES:,} that are read")
    return None


def read_object(run: Path, name: str) -> tuple[dict[str, Any], Problems]:
    """A JSON file that must hold an object; `{}` with a problem otherwise."""
    if problem := refusal(run, name):
        return {}, (problem,)
    content, reason = read_json(run / name)
    if reason:
        return {}, (Problem(name, reason.removeprefix(f"{Path(name).name} ")),)
    if not isinstance(content, dict):
        return {}, (Problem(name, f"holds a {type(content).__name__}, not an object"),)
    return content, ()


def objects(content: dict[str, Any], key: str, name: str) -> tuple[list[dict[str, Any]], Problems]:
    """`content[key]` as a list of objects, other entries left out and named."""
    value = content.get(key)
    if not isinstance(value, list):
        return [], (Problem(name, f"has no list {key!r}"),)
    good = [item for item in value if isinstance(item, dict)]
    wrong = len(value) - len(good)
    return good, (Problem(name, f"{key}: {wrong} of {len(value)} entries are not objects"),) if wrong else ()


def mapping(content: dict[str, Any], key: str) -> dict[str, Any]:
    value = content.get(key)
    return value if isinstance(value, dict) else {}
