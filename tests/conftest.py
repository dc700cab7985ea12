"""What every test shares: no test writes into the checkout, and two workers do not fight for two cores."""

from __future__ import annotations

import os
import tempfile

# Before torch is imported anywhere: pytest-xdist runs two workers, and bits depend on the thread count.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("MPLBACKEND", "Agg")
os.environ["LSHV2_RUNS"] = tempfile.mkdtemp(prefix="lshv2-test-runs-")
os.environ.pop("LSHV2_RUNNER", None)
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it cuBLAS refuses under `poisoned_memory`

import importlib.util
import shutil
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import hypothesis
import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported and when a kernel is defined

# Deterministic examples, and no deadline: a shared machine's pauses are no finding.
hypothesis.settings.register_profile("lshv2", deadline=None, derandomize=True, database=None)
hypothesis.settings.load_profile("lshv2")


def pytest_report_header() -> str:
    """On what the tests ran: a record of a GPU run must say so."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU: kernels are interpreted"
    triton = metadata.version("triton") if importlib.util.find_spec("triton") else "none"
    commit = os.environ.get("LSHV2_COMMIT", "not given")
    return f"device: {device}; torch {torch.__version__}, triton {triton}; LSHV2_COMMIT {commit}"


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """torch fills uninitialised memory with NaN and large integers: an element nobody wrote cannot pass."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="module")
def examples(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run folders of every state, as the dashboard finds them."""
    from example_runs import example_runs

    return example_runs(tmp_path_factory.mktemp("examples"))


@pytest.fixture
def shown_runs(tmp_path: Path, examples: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A private copy of the examples, as the dashboard's runs folder."""
    runs = tmp_path / "runs"
    shutil.copytree(examples, runs)
    monkeypatch.setenv("LSHV2_RUNS", str(runs))
    return runs


@pytest.fixture
def dashboard_on_path(monkeypatch: pytest.MonkeyPatch) -> None:
    from dashboard_pages import DASHBOARD

    monkeypatch.syspath_prepend(str(DASHBOARD))  # `streamlit run` does the same
    # streamlit leaves its page as the main module, which a later test's spawned processes would begin with
    monkeypatch.setitem(sys.modules, "__main__", sys.modules["__main__"])


def pytest_sessionfinish(session: pytest.Session) -> None:
    shutil.rmtree(os.environ["LSHV2_RUNS"], ignore_errors=True)
