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
from lshv2.benchmark.rows import Case, Row, add_process, fit_rows
from lshv2.benchmark.suite import REPEAT_SHARE, WORKER, _blocker, _job, _wants_another
from lshv2.benchmark.worker import Measurement, load_ids
from lshv2.checkpoint import save_checkpoint
from lshv2.config import ModelConfig
from lshv2.machine import torch_version
from lshv2.model import LSHModel
from lshv2.profiling import Profiler
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
    job.write_text(json.dumps({**_job(run), "seq_len": 64, "batch_size": 1}) + "\n")
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
    assert summary["environment"]["torch"] == torch_version() and "commit" in summary["environment"]
    order = [(row["seq_len"], row["attention"]) for row in summary["rows"]]
    assert order == [(64, "lsh"), (64, "dense"), (128, "lsh"), (128, "dense")]
    for row in summary["rows"]:
        assert row["status"] == "ok", row
        for prefix in ("", "train_", "attention_", "attention_train_"):
            samples = row[f"{prefix}latency_samples_ms"]
            assert len(samples) == row[f"{prefix}n_samples"] <= 2
            middle = row[f"{prefix}latency_ms"]
            assert row[f"{prefix}latency_ms_p20"] <= middle <= row[f"{prefix}latency_ms_p80"]
            if prefix in ("", "train_"):
                assert row[f"{prefix}tokens_per_sec"] == pytest.approx(1e3 * row["seq_len"] / middle, rel=1e-3)
        assert [process["train_latency_ms"] for process in row["processes"]] == [row["train_latency_ms"]]
        assert row["activation_mb"] == pytest.approx(row["rss_mb"] - row["fixed_mb"], abs=0.02)
        assert row["rss_mb"] >= row["forward_rss_mb"] > 50
    assert summary["weights"] == "checkpoint step_00000007.safetensors" and summary["tokens"] == "random"
    assert summary["longest_ok"] == {"lsh": 128, "dense": 128} and summary["alpha_interval"] is None
    assert summary["fixed_tokens"] is None and summary["alpha_upper"] is None
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


def test_without_notebooks_it_is_a_command_on_a_run_s_settings(tmp_path: Path) -> None:
    run = make_run(tmp_path / "r", timeout_seconds=0.3, attentions=["lsh"])
    command = [sys.executable, "-m", "lshv2.benchmark", "--config"]
    done = subprocess.run([*command, run.path / "config.json"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert [row["status"] for row in read_json(run.file(SUMMARY))[0]["rows"]] == ["timeout", "skipped"]
    wrong = subprocess.run([*command, run.path], capture_output=True, text=True, timeout=60)
    assert wrong.returncode == 2 and wrong.stderr.count("\n") == 1 and "not a config.json" in wrong.stderr


def test_a_length_out_of_memory_is_a_row(tmp_path: Path) -> None:
    summary = run_benchmark(make_run(tmp_path / "r", max_memory_gb=0.05, attentions=["lsh"]))
    assert [row["status"] for row in summary["rows"]] == ["out of memory", "skipped"], json.dumps(summary["rows"])


def rows_of(
    attention: str, lengths: list[int], exponent: float, memory: float = 1.0, batch: int = 1, scatter: float = 0.0
) -> list[Row]:
    """Rows of three processes each; scatter: how much they differ."""
    rows = []
    for n in lengths:
        row: Row | None = None
        for factor in (1.0, 1 - scatter, 1 + scatter):
            ms = batch * n**exponent * factor
            times: dict[str, Any] = {}
            for prefix, share in (("", 1), ("train_", 3), ("attention_", 0.1), ("attention_train_", 0.3)):
                times |= {f"{prefix}latency_ms": share * ms, f"{prefix}latency_samples_ms": [share * ms] * 2}
            size = {"fixed_mb": 100.0, "forward_rss_mb": 150.0, "rss_mb": 100 + batch * 0.01 * n**memory,
                    "activation_mb": batch * 0.01 * n**memory}
            fresh = {"attention": attention, "seq_len": n, "batch_size": batch, "status": "ok", "reason": None,
                     "seconds": 5.0, **times, **size}
            row = add_process(row, fresh)
        assert row
        rows.append(row)
    return rows


def test_alpha_and_beta_are_lsh_s_and_failed_rows_are_left_out() -> None:
    lengths = [1024, 2048, 4096]
    failed = {"attention": "lsh", "seq_len": 8192, "status": "timeout", "latency_ms": 1.0, "processes": []}
    fits = fit_rows([*rows_of("lsh", lengths, 1.1), *rows_of("dense", lengths, 1.9), failed])
    assert fits["alpha"] == pytest.approx(1.1) and fits["beta"] == pytest.approx(1.0)
    assert fits["alpha_interval"] == pytest.approx([1.1, 1.1]) and fits["alpha_upper"] == pytest.approx(1.1)
    assert fits["longest_ok"] == {"lsh": 4096, "dense": 4096}
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


def test_a_dense_model_scaled_by_the_length_is_measured_beside_its_twins(tmp_path: Path) -> None:
    changes = {"model.attention": "dense", "model.softmax_scale": "log_length", "benchmark.sequence_lengths": [64],
               "benchmark.attentions": ["lsh", "dense", "window"]}
    rows = run_benchmark(open_run(tmp_path / "r", preset="test", overrides=changes, seed=3))["rows"]
    assert [(row["attention"], row["status"]) for row in rows] == [("lsh", "ok"), ("dense", "ok"), ("window", "ok")]


def test_both_layouts_and_every_process_are_measured_and_a_shared_case_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """32 and 64 tokens at batch 1, and again as 64 tokens: 2 x 32 and the 1 x 64 that is there."""
    run = make_run(tmp_path / "r", sequence_lengths=[32, 64], attentions=["lsh"], fixed_tokens=64,
                   processes_per_length=2, timeout_seconds=600.0)
    summary = run_benchmark(run)
    both = [(row["seq_len"], row["batch_size"]) for row in summary["fixed_tokens"]["rows"]]
    assert [(row["seq_len"], row["batch_size"]) for row in summary["rows"]] == [(32, 1), (64, 1)]
    assert both == [(32, 2), (64, 1)] and summary["fixed_tokens"]["tokens"] == 64
    assert summary["fixed_tokens"]["rows"][1] == summary["rows"][1]
    printed = [line for line in capsys.readouterr().out.splitlines() if "forward" in line]
    assert len(printed) == 6 and "lsh      32 x 2 tokens" in printed[2] and "2 processes" in printed[3]
    for row in [*summary["rows"], *summary["fixed_tokens"]["rows"]]:
        medians = [process["train_latency_ms"] for process in row["processes"]]
        assert len(medians) == 2 and row["train_latency_ms"] == pytest.approx(sum(medians) / 2, abs=1e-3)
        assert len(row["train_latency_samples_ms"]) == row["train_n_samples"] <= 4
        assert row["tokens_per_sec"] == pytest.approx(
            1e3 * row["seq_len"] * row["batch_size"] / row["latency_ms"], rel=1e-3)
    assert summary["fits"]["lsh"]["train_latency"]["resampled"] == "processes"
    assert summary["fixed_tokens"]["fits"]["lsh"]["attention_train_latency"]["n"] == 2
    halved = summary["rows"][0]
    cut = {**halved, "processes": halved["processes"][:1], "latency_ms": 123.0}
    fixed = {"tokens": 64, "rows": summary["fixed_tokens"]["rows"]}
    write_json(run.file(SUMMARY), {**summary, "state": "running", "rows": [cut], "fixed_tokens": fixed})
    again = run_benchmark(run)
    said = capsys.readouterr().out
    assert "resuming: 3 rows" in said and said.count("forward") == 1, "one process was missing"
    assert len(again["rows"][0]["processes"]) == 2 and again["rows"][1] == summary["rows"][1]


def test_attention_alone_is_a_part_of_the_model_s_time(tmp_path: Path) -> None:
    """At 1,024 tokens and four layers, where one block's attention is well below the whole and well above nothing."""
    run = open_run(tmp_path / "r", preset="test", seed=3, overrides={
        "benchmark.sequence_lengths": [1024], "benchmark.num_samples_per_length": 3, "model.max_seq_len": 1024,
        "benchmark.attentions": ["lsh", "dense", "window"]})
    for row in run_benchmark(run)["rows"]:
        assert 0 < row["attention_latency_ms"] < row["latency_ms"], row
        assert 0 < row["attention_train_latency_ms"] < row["train_latency_ms"], row


@pytest.mark.parametrize(("attention", "parts"), [("lsh", {"hashing", "bucket_attn"}), ("dense", {"dense_attn"})])
def test_attention_alone_hashes_and_attends_and_does_nothing_else(
    tmp_path: Path, attention: str, parts: set[str]
) -> None:
    job = {**_job(make_run(tmp_path / "r")), "seq_len": 128, "batch_size": 2}
    job["model"] = {**job["model"], "attention": attention}
    measurement = Measurement(job, lambda record: None)
    step = measurement._attention(load_ids(job).to(measurement.device), train=True)
    noted = [note.clone() for note in measurement.model.blocks[0].attention.notes]  # hashing in training adds to them
    with Profiler() as profiler:
        step()
    changed = [not before.equal(now) for before, now in zip(
        noted, measurement.model.blocks[0].attention.notes, strict=True)]
    assert all(changed) and bool(changed) == (attention == "lsh")
    assert parts <= set(profiler.milliseconds()) <= {*parts, "sorting", "global"}, profiler.milliseconds()
    assert all(parameter.grad is None for parameter in measurement.model.parameters())


@pytest.mark.parametrize(("left_s", "samples"), [
    (100.0, [4000.0, 2800.0, 2900.0]), (10.5, [4000.0, 2800.0]), (8.5, [])])
def test_the_first_pass_counts_only_where_no_other_fits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, left_s: float, samples: list[float]
) -> None:
    """Passes of 6 s, 4 s and then about 3 s, of which each uses up the time that was left."""
    measurement = Measurement({**_job(make_run(tmp_path / "r")), "samples": 3}, lambda record: None)
    passes = iter([6000.0, 4000.0, 2800.0, 2900.0])
    monkeypatch.setattr(measurement, "deadline", time.monotonic() + 6 + left_s)

    def taken(step: object) -> float:
        milliseconds = next(passes)
        measurement.deadline -= milliseconds / 1e3
        return milliseconds

    monkeypatch.setattr(measurement.meter, "milliseconds", taken)
    assert measurement._samples(lambda: None, 1e9) == (samples or [6000.0])


def test_processes_join_by_their_medians_and_the_spread_is_of_all_samples() -> None:
    row = rows_of("lsh", [1024], 1.0, scatter=0.1)[0]
    assert row["latency_samples_ms"] == pytest.approx([1024] * 2 + [921.6] * 2 + [1126.4] * 2)
    assert row["latency_ms"] == 1024
    assert row["latency_ms_p20"] == pytest.approx(921.6) and row["latency_ms_p80"] == pytest.approx(1126.4)
    assert row["n_samples"] == 6 and row["seconds"] == 15.0 and len(row["processes"]) == 3
    dead = {"attention": "lsh", "seq_len": 1024, "batch_size": 1, "status": "timeout", "reason": "slow", "seconds": 9.0}
    joined = add_process(row, dead)
    assert joined["status"] == "ok" and joined["latency_ms"] == row["latency_ms"] and joined["seconds"] == 24.0
    assert joined["processes"][3] == {"status": "timeout", "seconds": 9.0, "reason": "slow"}
    assert fit_rows([joined, *rows_of("lsh", [2048], 1.0)])["alpha"] == pytest.approx(1.0)


def test_at_fixed_tokens_the_exponent_is_that_of_one_sequence() -> None:
    rows = [row for n in (1024, 2048, 4096, 8192) for row in rows_of("lsh", [n], 1.3, batch=8192 // n)]
    fits = fit_rows(rows)
    assert fits["alpha"] == pytest.approx(1.3) and fits["beta"] == pytest.approx(1.0)
    fit = fit_rows([row for n in (1024, 2048, 4096, 8192) for row in rows_of("lsh", [n], 1.3, scatter=0.05)])["fits"]
    assert fit["lsh"]["attention_train_latency"]["bootstrap_high"] > 1.3 > fit["lsh"]["latency"]["bootstrap_low"]
    assert fit["lsh"]["memory"]["resampled"] == "processes"


def test_what_asks_for_more_than_what_failed_is_not_attempted() -> None:
    rows = {Case("lsh", 4096, 4): {"attention": "lsh", "seq_len": 4096, "batch_size": 4, "status": "timeout"},
            Case("lsh", 1024, 1): {"attention": "lsh", "seq_len": 1024, "batch_size": 1, "status": "error"}}
    for case in (Case("lsh", 8192, 2), Case("lsh", 4096, 8), Case("lsh", 16_384, 1)):
        assert _blocker(rows, case) is rows[Case("lsh", 4096, 4)], case
    for case in (Case("dense", 8192, 2), Case("lsh", 2048, 8), Case("lsh", 8192, 1), Case("lsh", 1024, 2)):
        assert _blocker(rows, case) is None, case


def test_a_slow_length_is_not_repeated() -> None:
    row = rows_of("lsh", [1024], 1.0)[0]
    assert not _wants_another(row, 2, 300) and _wants_another(row, 3, 300)
    assert not _wants_another(row, 3, 4.9 / REPEAT_SHARE) and not _wants_another({**row, "status": "error"}, 3, 300)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_a_sample_finds_an_empty_cache_and_the_meter_weighs_nothing() -> None:
    device = torch.device("cuda")
    meter = Meter(device)
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    assert meter.over_cache is not None and 2 * cache <= meter.own_bytes <= 2 * cache + (4 << 20)
    meter.over_cache.fill_(1)
    left: list[int] = []
    assert meter.milliseconds(lambda: left.append(int(meter.over_cache.count_nonzero()))) > 0  # type: ignore[union-attr]
    assert left == [0], "written over before the step, not after"
    meter.reset_peak()
    before = torch.cuda.memory_allocated() / 2**20
    assert meter.peak_mb() == pytest.approx(before - meter.own_bytes / 2**20, abs=0.01)
