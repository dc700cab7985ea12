"""The benchmark with real processes: limits, deaths, resuming, and what the rows say."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from lshv2.benchmark import run_benchmark
from lshv2.benchmark.meter import Meter
from lshv2.benchmark.process import MEMORY_ERROR, Outcome, run_limited
from lshv2.benchmark.suite import WORKER, _job, fit_rows
from lshv2.checkpoint import save_checkpoint
from lshv2.config import ModelConfig
from lshv2.model import LSHModel
from lshv2.runs import Run, open_run, read_json, write_json

SUMMARY = "benchmark_summary.json"


def script(code: str, *, timeout_seconds: float = 20, max_memory_gb: float = 1) -> Outcome:
    """A process of our own instead of the worker."""
    command = [sys.executable, "-c", code]
    return run_limited(command, {}, timeout_seconds=timeout_seconds, max_memory_gb=max_memory_gb)


def gone(pid: int, *, seconds: float) -> bool:
    """Whether the process ends within this time; one that its adopter has not reaped yet has ended."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            if psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
                return True
        except psutil.NoSuchProcess:
            return True
        time.sleep(0.1)
    return False


def make_run(path: Path, **benchmark: Any) -> Run:
    values = {"sequence_lengths": [64, 128], **benchmark}
    return open_run(path, preset="test", overrides={f"benchmark.{k}": v for k, v in values.items()}, seed=3)


def test_results_are_merged_in_order_and_torn_lines_are_skipped() -> None:
    lines = ['{"a": 1}', "not JSON", '{"a": 2, "status": "ok"}', '{"b"']
    outcome = script(f"print(*{lines!r}, sep='\\n', end='')")
    assert (outcome.status, outcome.result) == ("ok", {"a": 2})


def test_a_timeout_kills_the_whole_group_and_keeps_what_was_measured() -> None:
    code = (
        "import subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        "print('{\"grandchild\": %d}' % child.pid, flush=True)\n"
        "time.sleep(60)"
    )
    began = time.monotonic()
    outcome = script(code, timeout_seconds=1.0)
    assert outcome.status == "timeout" and "1 s (benchmark.timeout_seconds)" in (outcome.reason or "")
    assert time.monotonic() - began < 5
    assert gone(outcome.result["grandchild"], seconds=5), "the worker's own child survived the timeout"


def test_resident_memory_beyond_the_limit_is_killed_by_the_watchdog() -> None:
    outcome = script("import time; x = b'1' * 300_000_000; time.sleep(60)", max_memory_gb=0.1)
    assert outcome.status == "out of memory" and "0.1 GB (benchmark.max_memory_gb)" in (outcome.reason or "")


@pytest.mark.parametrize(
    ("code", "status", "reason"),
    [
        ("import os; os.kill(os.getpid(), 9)", "error", "killed by SIGKILL"),
        ("import os; os.abort()", "error", "killed by SIGABRT"),
        ("raise SystemExit(3)", "error", "exit code 3"),
        ("pass", "error", "no result"),
        ("1 / 0", "error", "ZeroDivisionError"),
        ("raise MemoryError", "out of memory", "MemoryError"),
        ("import os; os.write(2, b'std::bad_alloc'); os.abort()", "out of memory", "bad_alloc"),
    ],
)
def test_every_death_is_an_outcome_with_its_reason(code: str, status: str, reason: str) -> None:
    outcome = script(code)
    assert outcome.status == status and reason in (outcome.reason or ""), outcome


def test_the_memory_limit_makes_an_allocation_fail_cleanly_and_is_lifted_afterwards() -> None:
    limit_gb = psutil.Process().memory_info().rss / 2**30 + 0.25
    with Meter(torch.device("cpu")).limited(limit_gb):
        small = torch.ones(1 << 20)  # 4 MB: within
        with pytest.raises((RuntimeError, MemoryError)) as caught:
            torch.empty(1 << 28)  # 1 GB: beyond
    assert small.sum() == 1 << 20 and MEMORY_ERROR.search(str(caught.value))
    assert torch.empty(1 << 28).shape == (1 << 28,)


def test_a_worker_ends_when_its_parent_is_gone(tmp_path: Path) -> None:
    run = make_run(tmp_path / "r", num_samples_per_length=100_000, timeout_seconds=6000)  # half an hour of work
    job = tmp_path / "job.json"
    job.write_text(json.dumps({**_job(run), "seq_len": 64}) + "\n")
    parent = (
        "import os, subprocess\n"
        f"child = subprocess.Popen({list(WORKER)!r}, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL)\n"
        f"child.stdin.write(open({str(job)!r}, 'rb').read()); child.stdin.flush()\n"
        "print(child.pid, flush=True)\n"
        "os._exit(0)"
    )
    pid = int(subprocess.run([sys.executable, "-c", parent], capture_output=True, timeout=30, check=True).stdout)
    if not gone(pid, seconds=30):
        psutil.Process(pid).kill()
        pytest.fail(f"worker {pid} outlived its parent")


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, LSHModel, dict[str, Any]]:
    """A run with a checkpoint that differs from fresh weights, benchmarked for LSH and dense."""
    run = make_run(tmp_path_factory.mktemp("runs") / "bench")
    model = LSHModel(run.settings.model, seed=99)
    folder = run.checkpoints / "language_model"
    folder.mkdir(parents=True)
    save_checkpoint(folder, 7, model, torch.optim.AdamW(model.parameters()), {}, keep=1)
    return run, model, run_benchmark(run)


def test_each_row_has_what_the_contract_names(measured: tuple[Run, LSHModel, dict[str, Any]]) -> None:
    run, _, summary = measured
    assert summary == read_json(run.file(SUMMARY))[0] and summary["state"] == "done"
    order = [(row["seq_len"], row["attention"]) for row in summary["rows"]]
    assert order == [(64, "lsh"), (64, "dense"), (128, "lsh"), (128, "dense")]
    for row in summary["rows"]:
        assert row["status"] == "ok", row
        for prefix in ("", "train_"):
            samples = row[f"{prefix}latency_samples_ms"]
            assert len(samples) == row[f"{prefix}n_samples"] <= 2
            middle = row[f"{prefix}latency_ms"]
            assert row[f"{prefix}latency_ms_p20"] <= middle <= row[f"{prefix}latency_ms_p80"]
            assert row[f"{prefix}tokens_per_sec"] == pytest.approx(1e3 * row["seq_len"] / middle, rel=1e-3)
        assert row["activation_mb"] == pytest.approx(row["rss_mb"] - row["fixed_mb"], abs=0.02)
        assert row["rss_mb"] >= row["forward_rss_mb"] > 50
    assert summary["weights"] == "checkpoint step_00000007.safetensors" and summary["tokens"] == "random"
    assert summary["longest_ok"] == {"lsh": 128, "dense": 128} and summary["alpha_interval"] is None
    assert summary["alpha"] == summary["fits"]["lsh"]["train_latency"]["exponent"]


@torch.no_grad()
def test_what_is_measured_is_the_checkpoint_s_model(measured: tuple[Run, LSHModel, dict[str, Any]]) -> None:
    run, model, summary = measured
    ids = torch.randint(run.settings.model.vocab_size, (1, 128), generator=torch.Generator().manual_seed(3))
    loss = float(model.eval()(ids, labels=ids).loss)
    fresh = float(LSHModel(run.settings.model, seed=3).eval()(ids, labels=ids).loss)
    row = next(r for r in summary["rows"] if (r["attention"], r["seq_len"]) == ("lsh", 128))
    assert row["loss"] == pytest.approx(loss, abs=1e-3) and abs(fresh - loss) > 5e-3


def test_a_killed_benchmark_keeps_its_rows_and_a_changed_one_does_not(
    measured: tuple[Run, LSHModel, dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    run, _, summary = measured
    rows = [{**row, "latency_ms": 123.0} for row in summary["rows"][:3]]
    write_json(run.file(SUMMARY), {**summary, "state": "running", "rows": rows})
    again = run_benchmark(run)
    assert "resuming: 3 rows" in capsys.readouterr().out
    assert [row["latency_ms"] == 123.0 for row in again["rows"]] == [True, True, True, False]
    assert again["state"] == "done" and again["rows"][3]["status"] == "ok"
    other = make_run(run.path, timeout_seconds=0.3)  # another limit: nothing measured under the old one is kept
    write_json(run.file(SUMMARY), {**again, "state": "running"})
    assert {row["status"] for row in run_benchmark(other)["rows"]} == {"timeout", "skipped"}


def test_a_length_out_of_time_settles_the_longer_ones_and_never_ends_the_phase(tmp_path: Path) -> None:
    summary = run_benchmark(make_run(tmp_path / "r", timeout_seconds=0.3, attentions=["lsh"]))
    first, second = summary["rows"]
    assert first["status"] == "timeout" and "0.3 s" in first["reason"]
    assert second["status"] == "skipped" and second["reason"] == "not attempted: 64 tokens already ended in timeout"
    assert summary["state"] == "done" and summary["alpha"] is None and summary["longest_ok"] == {"lsh": None}


def test_a_length_out_of_memory_is_a_row(tmp_path: Path) -> None:
    summary = run_benchmark(make_run(tmp_path / "r", max_memory_gb=0.05, attentions=["lsh"]))
    assert [row["status"] for row in summary["rows"]] == ["out of memory", "skipped"], json.dumps(summary["rows"])


def rows_of(attention: str, lengths: list[int], exponent: float, memory: float = 1.0) -> list[dict[str, Any]]:
    return [{"attention": attention, "seq_len": n, "status": "ok", "latency_ms": n**exponent,
             "train_latency_ms": 3 * n**exponent, "activation_mb": 0.01 * n**memory} for n in lengths]


def test_alpha_and_beta_are_lsh_s_and_failed_rows_are_left_out() -> None:
    lengths = [1024, 2048, 4096]
    failed = {"attention": "lsh", "seq_len": 8192, "status": "timeout", "latency_ms": 1.0}
    fits = fit_rows([*rows_of("lsh", lengths, 1.1), *rows_of("dense", lengths, 1.9), failed])
    assert fits["alpha"] == pytest.approx(1.1) and fits["beta"] == pytest.approx(1.0)
    assert fits["alpha_interval"] == pytest.approx([1.1, 1.1]) and fits["longest_ok"] == {"lsh": 4096, "dense": 4096}
    assert fits["fits"]["dense"]["latency"]["exponent"] == pytest.approx(1.9)


def test_short_lengths_do_not_flatter_the_exponent_once_three_long_ones_are_there() -> None:
    rows = rows_of("lsh", [16_384, 32_768, 65_536], 1.5) + rows_of("lsh", [1024, 2048], 0.0)
    fit = fit_rows(rows)["fits"]["lsh"]["latency"]
    assert fit["exponent"] == pytest.approx(1.5) and (fit["n"], fit["min_seq_len"]) == (3, 16_384)
    assert fit_rows(rows[1:])["fits"]["lsh"]["latency"]["n"] == 4


def test_memory_below_the_resolution_is_no_point() -> None:
    rows = rows_of("lsh", [16, 64, 1024, 2048], 1.0)  # 0.16, 0.64, 10 and 20 MB
    assert fit_rows(rows)["fits"]["lsh"]["memory"]["n"] == 2
    assert fit_rows(rows[:2])["beta"] is None


def test_capacity_grows_to_the_longest_length_and_the_hash_tables_stay(tmp_path: Path) -> None:
    run = make_run(tmp_path / "r", sequence_lengths=[64, 4096])
    model = ModelConfig(**_job(run)["model"])
    assert model.max_seq_len == 4096 and model.resolved_n_buckets == run.settings.model.resolved_n_buckets
