"""The Python environment: find one that has the packages, or build `.venv` from the lock.

    python3 -m lshv2.environment          prints the interpreter to use; the Makefile calls this
    python3 -m lshv2.environment test     the same, with the test tools
    python3 -m lshv2.environment lock     writes .requirements.lock and environment.yml from pyproject.toml

Runs before anything is installed, so it needs the standard library alone. Everything it says goes to standard
error. An active virtual or conda environment that has the packages is used as it is and never changed.
Left out: Windows without WSL, hash-checked wheels (a lock that serves CPU, CUDA and macOS builds has no one hash).
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
import tomllib
from importlib import metadata
from pathlib import Path

from lshv2.errors import UserError

ROOT = Path(__file__).resolve().parent.parent
PYPROJECT, LOCK, CONDA = ROOT / "pyproject.toml", ROOT / ".requirements.lock", ROOT / "environment.yml"
VENV = ROOT / ".venv"
BUILDING, BUILT = ".building", ".built"  # marks inside .venv: interrupted, or made from this lock
REQUIREMENT = re.compile(r"([A-Za-z0-9][A-Za-z0-9._-]*)([^;]*)(; platform_system == '(\w+)')?")


def canonical(name: str) -> str:
    """The package index's one spelling of a name."""
    return re.sub(r"[-_.]+", "-", name).lower()


def direct_dependencies(*, test: bool) -> list[re.Match[str]]:
    """Each as a match of REQUIREMENT: name, version specifier, marker or None, the marker's system or None."""
    project = tomllib.loads(PYPROJECT.read_text())["project"]
    lines = project["dependencies"] + (project["optional-dependencies"]["test"] if test else [])
    matches = [REQUIREMENT.fullmatch(line) for line in lines]
    assert all(matches), "a dependency in pyproject.toml is written in another way"
    return [match for match in matches if match]


def requirements(*, test: bool) -> dict[str, str]:
    """This system's direct dependencies: canonical name -> version specifier such as `==2.4.6`."""
    return {
        canonical(match[1]): match[2] for match in direct_dependencies(test=test)
        if match[4] in (None, platform.system())
    }


def satisfies(version: str, specifier: str) -> bool:
    """Enough of PEP 440 for this project's own specifiers: `==`, `>=`, `<` on release numbers."""

    def release(text: str) -> tuple[int, ...]:
        return tuple(int(part) for part in re.findall(r"\d+", text.split("+")[0])[:3])

    for clause in specifier.split(","):
        match = re.fullmatch(r"(==|>=|<)(.+)", clause)
        assert match, f"specifier {clause!r} in pyproject.toml is of another kind"
        have, want = release(version), release(match[2])
        if not {"==": have == want, ">=": have >= want, "<": have < want}[match[1]]:
            return False
    return True


def inspect_packages(*, test: bool) -> tuple[list[str], list[str]]:
    """In the running interpreter: names that are missing, and `name version (wanted)` of other versions."""
    missing, other = [], []
    for name, specifier in requirements(test=test).items():
        try:
            version = metadata.version(name)
        except metadata.PackageNotFoundError:
            missing.append(name)
            continue
        if not satisfies(version, specifier):
            other.append(f"{name} {version} ({specifier} wanted)")
    return missing, other


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def active_environment() -> Path | None:
    """The interpreter of the active virtual or conda environment, this project's own `.venv` left aside."""
    for variable in ("VIRTUAL_ENV", "CONDA_PREFIX"):
        prefix = os.environ.get(variable)
        if prefix and Path(prefix).resolve() != VENV.resolve() and (Path(prefix) / "bin/python").exists():
            return Path(prefix) / "bin/python"
    return None


def usable(python: Path, *, test: bool) -> bool:
    """Whether that environment has the packages; says what it lacks, or which versions differ."""
    command = [str(python), "-m", "lshv2.environment", "inspect", *(["test"] if test else [])]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if result.returncode:
        reason = (result.stderr.strip().splitlines() or ["no message"])[-1]
        say(f"{python.parent.parent} cannot be used ({reason}); taking .venv instead")
        return False
    missing, other = json.loads(result.stdout)
    if missing:
        say(f"{python.parent.parent} lacks {', '.join(missing)}; taking .venv instead")
        return False
    if other:
        say(f"warning: {python.parent.parent} has {', '.join(other)}; used as it is")
    return True


def find_or_build(*, test: bool) -> Path:
    """The interpreter to use."""
    active = active_environment()
    if active and usable(active, test=test):
        return active
    python = VENV / "bin/python"
    with open(PYPROJECT) as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # two makes at once build one environment, the second waits
        recipe = hashlib.sha256(f"{LOCK.read_text()}\n{ROOT}".encode()).hexdigest()
        built = VENV / BUILT
        if not (built.exists() and built.read_text() == recipe):
            build(recipe)
    return python


def build(recipe: str) -> None:
    """Make `.venv`, or bring it to the lock; one that was interrupted is made again from nothing."""
    began = time.monotonic()
    interrupted = (VENV / BUILDING).exists()
    torch = re.search(r"^torch==\S+", LOCK.read_text(), re.M)
    if not torch:
        raise UserError(f"{LOCK.name} pins no torch; run `make lock`")
    say(f"building .venv with Python {platform.python_version()} (about a minute, once; downloads up to 2 GB)")
    run_step([sys.executable, "-m", "venv", *(["--clear"] if interrupted else []), str(VENV)])
    (VENV / BUILDING).touch()
    (VENV / BUILT).unlink(missing_ok=True)
    pip = [str(VENV / "bin/python"), "-m", "pip", "--disable-pip-version-check", "install", "-qq"]
    index = os.environ.get("TORCH_INDEX")
    if not index and sys.platform == "linux" and not shutil.which("nvidia-smi"):
        say("  no GPU here: TORCH_INDEX=https://download.pytorch.org/whl/cpu takes the smaller CPU build of torch")
    # Alone and first: resolved together with the rest, pip may fetch gigabytes of CUDA libraries before it decides.
    say(f"  installing {torch[0]} ...")
    run_step([*pip, torch[0], *(["--extra-index-url", index] if index else [])])
    pins = len(re.findall(r"^[A-Za-z0-9].*==", LOCK.read_text(), re.M))
    say(f"  installing the {pins} packages of {LOCK.name} ...")
    run_step([*pip, "--requirement", str(LOCK)])
    say("  installing lshv2 from this checkout ...")
    run_step([*pip, "--no-deps", "--editable", str(ROOT)])
    (VENV / BUILT).write_text(recipe)
    (VENV / BUILDING).unlink()
    say(f"  .venv is ready after {time.monotonic() - began:.0f} s")


def run_step(command: list[str]) -> None:
    """Run one command of the build with its output on standard error; `UserError` if it fails."""
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME", "PIP_USER")}
    if subprocess.run(command, stdout=sys.stderr, env=environment, cwd=ROOT).returncode:
        raise UserError(f"building .venv failed at `{' '.join(command)}` (see above); mend it and run make again")


def write_lock() -> None:
    """Resolve the direct dependencies afresh and write the lock and environment.yml."""
    project = tomllib.loads(PYPROJECT.read_text())
    torch = f"torch=={project['tool']['lshv2']['locked-torch']}"
    wanted = [name + spec for name, spec in requirements(test=True).items() if name != "torch"]
    say("resolving every package of pyproject.toml (about a minute) ...")
    options = ["-qq", "--dry-run", "--ignore-installed", "--report", "-"]
    command = [sys.executable, "-m", "pip", "install", *options, torch, *wanted]
    result = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if result.returncode:
        raise UserError("pip could not resolve pyproject.toml's dependencies together (see above)")
    found = [entry["metadata"] for entry in json.loads(result.stdout)["install"]]
    versions = {canonical(entry["name"]): entry["version"].split("+")[0] for entry in found}
    commented = re.findall(r'^ +"([\w-]+)[=><][^"]*", *# (.+)$', PYPROJECT.read_text(), re.M)
    uses = {canonical(name): use for name, use in commented}
    markers = {canonical(match[1]): match[3] or "" for match in direct_dependencies(test=True)}
    lines = [(name, f"{name}=={version}{markers.get(name, '')}") for name, version in sorted(versions.items())]
    pins = [f"{line:<39} # {uses[name]}" if name in uses else line for name, line in lines]
    head = "# Written by `make lock` from pyproject.toml: change versions there. Direct dependencies say who uses them."
    LOCK.write_text("\n".join([head, *pins]) + "\n")
    python = re.sub(r"[^\d.]", "", project["project"]["requires-python"])
    conda = [head, "# conda env create -f environment.yml && conda activate lshv2", "name: lshv2", "channels:",
             "  - conda-forge", "dependencies:", f"  - python={python}", "  - pip", "  - pip:"]
    CONDA.write_text("\n".join([*conda, *(f"      - {pin}" for pin in pins), "      - --editable ."]) + "\n")
    say(f"wrote {LOCK.name} and {CONDA.name}: {len(pins)} packages")


def main(arguments: list[str]) -> int:
    test = "test" in arguments
    try:
        if arguments[:1] == ["inspect"]:
            print(json.dumps(inspect_packages(test=test)))
        elif arguments == ["lock"]:
            write_lock()
        else:
            print(find_or_build(test=test))
    except UserError as error:
        say(str(error))
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
