"""What every test shares: no test writes into the checkout, and two workers do not fight for two cores."""

from __future__ import annotations

import os
import tempfile

# Before torch is imported anywhere: pytest-xdist runs two workers, and bits depend on the thread count.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("MPLBACKEND", "Agg")
os.environ["LSHV2_RUNS"] = tempfile.mkdtemp(prefix="lshv2-test-runs-")
os.environ.pop("LSHV2_RUNNER", None)

import shutil

import hypothesis
import pytest

# Deterministic examples, and no deadline: a shared machine's pauses are no finding.
hypothesis.settings.register_profile("lshv2", deadline=None, derandomize=True, database=None)
hypothesis.settings.load_profile("lshv2")


def pytest_sessionfinish(session: pytest.Session) -> None:
    shutil.rmtree(os.environ["LSHV2_RUNS"], ignore_errors=True)
