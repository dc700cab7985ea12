"""One source of truth for versions, and the environment that is chosen or built from it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
import venv
from importlib import metadata
from pathlib import Path

import pytest
import yaml

from lshv2 import environment


def pins(lines: list[str]) -> dict[str, str]:
    """`name==version; marker  # comment` -> name: version."""
    form = r"([a-z0-9][a-z0-9-]*)==([^\s;]+)(; platform_system == 'Linux')?(\s+#.*)?"
    found = [re.fullmatch(form, line) for line in lines]
    assert all(found), [line for line, match in zip(lines, found, strict=True) if not match]
    return {match[1]: match[2] for match in found if match}


@pytest.fixture(scope="module")
def locked() -> dict[str, str]:
    return pins([line for line in environment.LOCK.read_text().splitlines() if not line.startswith("#")])


def test_the_lock_has_every_direct_dependency_at_its_pin(locked: dict[str, str]) -> None:
    for name, specifier in environment.requirements(test=True).items():
        assert environment.satisfies(locked[name], specifier), f"{name}=={locked[name]} locked, {specifier} wanted"
        if name not in ("torch", "triton"):  # ranges, for a machine that brings its own
            assert specifier == f"=={locked[name]}"
    project = tomllib.loads(environment.PYPROJECT.read_text())
    assert locked["torch"] == project["tool"]["lshv2"]["locked-torch"]


def test_the_lock_is_closed_under_what_its_packages_require(locked: dict[str, str]) -> None:
    """Every installed requirement of a locked package is locked too: nothing is left to the day of installation."""
    for name in locked:
        for line in metadata.requires(name) or []:
            needed = re.match(r"[\w.-]+", line)
            if needed and ";" not in line:
                assert environment.canonical(needed[0]) in locked, f"{name} needs {line}"


def test_conda_makes_the_same_environment(locked: dict[str, str]) -> None:
    content = yaml.safe_load(environment.CONDA.read_text())
    assert content["dependencies"][:2] == ["python=3.11", "pip"]
    assert list(content["dependencies"][2]) == ["pip"]
    *conda_pins, last = content["dependencies"][2]["pip"]
    assert last == "--editable ."
    assert pins(conda_pins) == locked


def test_a_dependency_of_one_system_is_locked_for_that_system_alone() -> None:
    """Triton has no build for macOS: without its marker, installing the lock there would fail."""
    marked = {environment.canonical(m[1]): m[3] for m in environment.direct_dependencies(test=True) if m[3]}
    assert marked == {"triton": "; platform_system == 'Linux'"}
    for file in (environment.LOCK, environment.CONDA):
        assert re.search(rf"triton==[\d.]+{marked['triton']} ", file.read_text()), file.name


def test_each_direct_dependency_says_who_uses_it() -> None:
    text = environment.PYPROJECT.read_text()
    for file in (environment.LOCK, environment.CONDA):
        for name in environment.requirements(test=True):
            line = re.search(rf"^[ -]*{name}==.*$", file.read_text(), re.M)
            assert line and " # " in line[0], f"{file.name}: {name} has no comment"
            assert line[0].split(" # ")[1] in text


def test_satisfies() -> None:
    assert environment.satisfies("2.13.0+cpu", ">=2.11,<2.14")
    assert not environment.satisfies("2.14.0", ">=2.11,<2.14")
    assert not environment.satisfies("2.9.1", ">=2.11,<2.14"), "compared as text"
    assert environment.satisfies("2.4.6", "==2.4.6") and not environment.satisfies("2.4.60", "==2.4.6")


def find(active: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """What a shell with this environment active would be told; `.venv` is never built by a test."""
    code = (
        "import sys\nfrom lshv2 import environment\n"
        "environment.build = lambda recipe: environment.say('(would build)')\n"
        "environment.VENV = environment.Path('/nonexistent/.venv')\n"
        f"sys.exit(environment.main({list(arguments)!r}))"
    )
    changed = {**os.environ, "VIRTUAL_ENV": str(active), "PYTHONPATH": str(environment.ROOT)}
    changed.pop("CONDA_PREFIX", None)
    return subprocess.run([sys.executable, "-c", code], env=changed, capture_output=True, text=True, cwd="/")


def test_an_active_environment_with_the_packages_is_used() -> None:
    done = find(Path(sys.prefix), "test")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(Path(sys.prefix) / "bin/python")
    assert "would build" not in done.stderr


def test_an_active_environment_without_them_is_named_and_left_alone(tmp_path: Path) -> None:
    venv.create(tmp_path / "bare", with_pip=False)
    done = find(tmp_path / "bare")
    assert done.stdout.strip() == "/nonexistent/.venv/bin/python"
    assert f"{tmp_path / 'bare'} lacks torch, numpy, pydantic" in done.stderr
    assert "would build" in done.stderr


def test_another_version_is_one_warning(tmp_path: Path) -> None:
    """A distribution is known by its metadata: an environment with every name, and one version that is another."""
    venv.create(tmp_path / "own", with_pip=False)
    site = next((tmp_path / "own" / "lib").glob("python3*/site-packages"))
    for name, specifier in environment.requirements(test=False).items():
        version = {"numpy": "1.26.0", "torch": "2.12.1"}.get(name, specifier.removeprefix("=="))
        info = site / f"{name.replace('-', '_')}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    done = find(tmp_path / "own")
    assert done.stdout.strip() == str(tmp_path / "own/bin/python")
    assert done.stderr.count("\n") == 1 and "numpy 1.26.0 (" in done.stderr
