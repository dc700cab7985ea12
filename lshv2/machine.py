"""What a measurement was made on: processor, memory, GPU, versions, commit. Needs no torch until `environment()`.

A figure without its machine cannot be compared: the benchmark keys its rows by `machine()`, the manifest lists
`environment()`.
"""

from __future__ import annotations

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil

from lshv2 import __version__
from lshv2.runs import repo_root, sha256


def cpu_model() -> str:
    """The processor's marketing name, or its architecture where the system does not tell."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            names = [line.split(":", 1)[1].strip() for line in file if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()


def usable_cores() -> int:
    """Physical cores that this process may run on (a container's affinity can be narrower than the machine)."""
    physical = psutil.cpu_count(logical=False) or os.cpu_count() or 1
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else physical
    return min(physical, allowed)


def torch_version() -> str | None:
    """Installed torch, read from its metadata: importing it takes seconds."""
    try:
        return version("torch")
    except PackageNotFoundError:
        return None


def machine() -> dict[str, Any]:
    """What decides a timing besides the code: figures of two different answers must not be mixed."""
    return {
        "cpu": cpu_model(), "cores": usable_cores(), "system": platform.system(), "torch": torch_version(),
        "visible_gpus": os.environ.get("CUDA_VISIBLE_DEVICES"), "omp_threads": os.environ.get("OMP_NUM_THREADS"),
    }


def git_state() -> dict[str, Any]:
    """`commit` and `dirty`: `$LSHV2_COMMIT` where given (a copy without its history), else the checkout that runs."""
    if given := os.environ.get("LSHV2_COMMIT"):
        return {"commit": given, "dirty": None}
    try:
        commit = _git("rev-parse", "HEAD")
        return {"commit": commit, "dirty": bool(_git("status", "--porcelain", "--untracked-files=no"))}
    except (OSError, subprocess.SubprocessError):
        return {"commit": None, "dirty": None}


def environment() -> dict[str, Any]:
    """Everything about the machine and the software that a reader of the manifest may need. Imports torch."""
    import torch

    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "lshv2": __version__, **git_state(), "python": platform.python_version(), "torch": torch.__version__,
        "cuda": torch.version.cuda, "platform": platform.platform(), "cpu": cpu_model(), "cores": usable_cores(),
        "threads": torch.get_num_threads(), "ram_gb": round(psutil.virtual_memory().total / 2**30, 1), "gpus": gpus,
    }


def source_hashes() -> dict[str, str]:
    """Path below the checkout -> sha256 of every Python file of the package that runs."""
    package = Path(__file__).resolve().parent
    return {path.relative_to(package.parent).as_posix(): sha256(path) for path in sorted(package.rglob("*.py"))}


def _git(*arguments: str) -> str:
    """Standard output of git in the checkout, with its answer limited to this checkout and not a parent's."""
    root = repo_root()
    if not (root / ".git").exists():
        raise OSError(f"{root} is not a git checkout")
    done = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, timeout=20, check=True)
    return done.stdout.strip()
