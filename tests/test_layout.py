"""What lies where: the tree in CONTRIBUTING against the files, imports one way, no torch where none is due."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

import pytest
from project_files import FILES, ROOT, page

pytestmark = pytest.mark.skipif(not FILES, reason="not a git checkout: which files belong to the project is unknown")



def tree() -> list[str]:
    """The paths that CONTRIBUTING's tree names, in its order; folders end with a slash."""
    block = re.search(r"^```\n(lshv2/\n.*?)^```", page("CONTRIBUTING.md"), re.M | re.S)
    assert block, "CONTRIBUTING.md has no tree that begins with lshv2/"
    paths: list[str] = []
    folders: list[str] = []
    for line in block[1].splitlines():
        depth = (len(line) - len(line.lstrip())) // 2
        cells = re.split(r"\s{2,}", line.strip())
        entries = [cell for cell in cells if re.fullmatch(r"[\w.-]*\.[\w.]+/?|[\w-]+/|LICENSE|Makefile", cell)]
        assert entries, f"no name in the tree's line {line!r}"
        folders = folders[:depth]
        paths += ["".join(folders) + entry for entry in entries]
        if len(entries) == 1 and entries[0].endswith("/"):
            folders = [*folders, entries[0]]
    return paths


def test_the_tree_names_what_there_is() -> None:
    named = tree()
    assert len(named) == len(set(named)), "named twice"
    gone = [path for path in named if not any(f == path or (path.endswith("/") and f.startswith(path)) for f in FILES)]
    assert not gone, f"CONTRIBUTING's tree names what does not exist: {gone}"
    top = {name.split("/")[0] + ("/" if "/" in name else "") for name in FILES}
    modules = {name for name in FILES if re.fullmatch(r"(lshv2|notebooks)/.*\.(py|ipynb)", name)}
    missing = (top | modules) - set(named)
    assert not missing, f"missing in CONTRIBUTING's tree: {sorted(missing)}"


def test_the_top_level_is_as_agreed() -> None:
    allowed = {
        "notebooks", "lshv2", "dashboard", "runs", "tests", "environment.yml", "Makefile", "pyproject.toml",
        "README.md", "CONTRIBUTING.md", "CHANGELOG.md", "LICENSE",
    }
    other = {name.split("/")[0] for name in FILES} - allowed
    assert all(name.startswith(".") for name in other), sorted(other)


def imports(name: str, *, lazy: bool = True) -> Iterator[str]:
    """Modules of lshv2 and torch that a file imports, as `lshv2.runs`; lazy: also those inside functions."""
    body = ast.parse(page(name))
    for node in ast.walk(body) if lazy else body.body:
        found: list[str] = []
        if isinstance(node, ast.Import):
            found = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            inner = [f"{node.module}.{alias.name}" for alias in node.names]
            found = [path if module_file(path) else node.module for path in inner]
        yield from (path for path in found if path.split(".")[0] in ("lshv2", "torch", "dashboard", "ui"))


def module_file(path: str) -> str | None:
    """`lshv2.data` -> `lshv2/data/__init__.py`."""
    stem = path.replace(".", "/")
    return next((name for name in (f"{stem}.py", f"{stem}/__init__.py") if name in FILES), None)


def test_imports_point_one_way() -> None:
    """Reading order is import order; a package's own __init__ comes after its modules."""
    named = tree()
    order = {path: i for i, path in enumerate(p for p in named if not p.endswith("__init__.py"))}

    def place(file: str) -> int:
        return order[file.removesuffix("__init__.py")]

    wrong = []
    for name in FILES:
        if not fnmatch(name, "lshv2/*.py"):
            continue
        for target in filter(None, (module_file(path) for path in imports(name) if path.startswith("lshv2."))):
            own_init = name.endswith("__init__.py") and Path(target).is_relative_to(Path(name).parent)
            if not own_init and place(target) >= place(name):
                wrong.append(f"{name} imports {target}")
        wrong += [f"{name} imports {path}" for path in imports(name) if path.split(".")[0] in ("dashboard", "ui")]
    assert not wrong, wrong


WITHOUT_TORCH = (
    "lshv2.config", "lshv2.presets", "lshv2.sizes", "lshv2.runs", "lshv2.progress", "lshv2.readers", "lshv2.curves",
    "lshv2.run_state", "lshv2.flags", "lshv2.plots", "lshv2.scaling", "lshv2.machine", "lshv2.environment",
    "lshv2.runner", "lshv2.arena_plots", "lshv2.arena_targets", "lshv2.readme", "lshv2.__main__",
)


def test_readers_runner_and_settings_start_without_torch() -> None:
    code = f"import importlib, sys\nfor name in {WITHOUT_TORCH}: importlib.import_module(name)\n"
    code += "print(sorted({'torch', 'pandas', 'streamlit', 'papermill'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


def test_the_dashboard_reaches_no_torch() -> None:
    """Through everything that its files import, and what that imports."""
    seen: set[str] = set()
    queue = [name for name in FILES if fnmatch(name, "dashboard/*.py")]
    assert queue
    while queue:
        name = queue.pop()
        for path in imports(name, lazy=False):
            assert path.split(".")[0] != "torch", f"{name} imports {path}"
            target = module_file(path)
            if target and target not in seen:
                seen.add(target)
                queue.append(target)
    assert "lshv2/readers.py" in seen


def test_no_file_names_a_machines_path() -> None:
    own = re.compile(rb"(?<![\w.])/(?:work|home|root|Users)/\w")
    found = [(name, match[0]) for name in FILES for match in [own.search((ROOT / name).read_bytes())] if match]
    assert not found, f"paths of somebody's machine: {found}"
