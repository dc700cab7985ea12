"""Which files of `lshv2` a notebook's results rest on: those it imports, and those that these import.

Read from the source without running it: import statements anywhere in a file, and strings that are nothing but a
module's name (as in `[sys.executable, "-m", "lshv2.benchmark.worker"]`). A name put together at run time is not seen.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from lshv2.runs import read_json, repo_root

MODULE_NAME = re.compile(r"lshv2(\.\w+)+")


def code_behind(notebook: Path) -> list[Path]:
    """Files below `lshv2/`, sorted. A cell that is no Python (a magic, a broken line) counts line by line."""
    content = read_json(notebook)[0]
    cells = content.get("cells", []) if isinstance(content, dict) else []
    names: set[str] = set()
    for cell in cells:
        if cell.get("cell_type") == "code":
            names |= _names_in_cell("".join(cell.get("source", "")))
    found: set[Path] = set()
    while names:
        files = {path for name in names for path in _files(name)} - found
        found |= files
        names = {name for path in files for name in _names_in_file(path)}
    return sorted(found)


def _names_in_cell(source: str) -> set[str]:
    try:
        return set(_names(ast.parse(source), ""))
    except SyntaxError:
        parsed = set()
        for line in source.splitlines():
            try:
                parsed |= set(_names(ast.parse(line.strip()), ""))
            except SyntaxError:
                parsed |= {match[0] for match in MODULE_NAME.finditer(line)}
        return parsed


@cache
def _names_in_file(path: Path) -> frozenset[str]:
    parts = path.relative_to(repo_root()).with_suffix("").parts
    return frozenset(_names(ast.parse(path.read_text(encoding="utf-8")), ".".join(parts[:-1])))


def _names(tree: ast.AST, package: str) -> Iterator[str]:
    """Dotted names that may be modules; `from a import b` gives both `a` and `a.b`. package: for relative imports."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            yield base
            yield from (f"{base}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and MODULE_NAME.fullmatch(node.value):
            yield node.value


@cache
def _files(name: str) -> tuple[Path, ...]:
    """The module's file and its packages' `__init__.py`; nothing for a name outside `lshv2`."""
    if name.split(".")[0] != "lshv2":
        return ()
    parts = name.split(".")
    steps = [repo_root().joinpath(*parts[:n]) for n in range(1, len(parts) + 1)]
    candidates = [step / "__init__.py" for step in steps] + [steps[-1].with_suffix(".py")]
    return tuple(path for path in candidates if path.is_file())
