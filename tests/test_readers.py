"""Readers take whatever lies in a run folder, name what is wrong with it and return the rest."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from example_runs import done_run, failed_run, running_run, training_events, write_bar

from lshv2.benchmark_results import read_benchmark
from lshv2.curves import read_training
from lshv2.readers import read_manifest, read_profile, read_settings
from lshv2.run_state import find_runs, log_tail, read_bar, run_status
from lshv2.runs import Run, append_jsonl, write_json
from lshv2.tolerant import MAX_BYTES, text

READERS: dict[str, Callable[[Path], tuple[Any, Any]]] = {
    "config.json": read_settings, "training_metrics.json": read_training, "component_profiles.json": read_profile,
    "benchmark_summary.json": read_benchmark, "pipeline_results.json": read_manifest, "progress.json": read_bar,
}
BROKEN: dict[str, bytes] = {
    "torn": b'{"schema": 1, "rows": [{"a": 1}, ',
    "empty": b"",
    "a list": b"[1, 2]",
    "too deep": b"[" * 100_000,
    "not UTF-8": b'{"schema": "\xff\xfe"}',
    "an endless integer": b'{"schema": ' + b"9" * 5000 + b"}",
}


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return done_run(tmp_path / "quick", steps=30)


@pytest.mark.parametrize("kind", BROKEN)
@pytest.mark.parametrize("name", READERS)
def test_a_broken_file_is_a_problem_that_names_it(run: Run, name: str, kind: str) -> None:
    run.file(name).write_bytes(BROKEN[kind])
    run.metrics.unlink()
    content, problems = READERS[name](run.path)
    assert not content
    assert [problem.file for problem in problems] == [name], problems


@pytest.mark.parametrize("name", [name for name in READERS if name != "progress.json"])
def test_a_missing_file_is_told_from_a_broken_one(run: Run, name: str) -> None:
    run.file(name).unlink()
    run.metrics.unlink()
    content, problems = READERS[name](run.path)
    assert not content and problems[0].missing and str(problems[0]) == f"{name} is missing"


@pytest.mark.parametrize("name", READERS)
def test_links_folders_and_pipes_are_not_opened(run: Run, name: str, tmp_path: Path) -> None:
    outside = tmp_path / "outside.json"
    outside.write_text('{"settings": {"secret": 1}}')
    path = run.file(name)
    run.metrics.unlink()
    for make in (lambda: path.symlink_to(outside), lambda: os.mkfifo(path), path.mkdir):
        path.unlink(missing_ok=True)
        make()
        content, problems = READERS[name](run.path)
        assert not content and len(problems) == 1, (make, content, problems)


def test_a_file_of_absurd_size_is_not_read(run: Run) -> None:
    with open(run.file("benchmark_summary.json"), "wb") as file:
        file.truncate(MAX_BYTES + 1)
    content, problems = read_benchmark(run.path)
    assert content is None and "above" in str(problems[0])


def test_a_good_run_has_no_problems(run: Run) -> None:
    assert {name: reader(run.path)[1] for name, reader in READERS.items()} == dict.fromkeys(READERS, ())


def test_values_that_are_not_numbers_become_gaps_and_are_counted(run: Run) -> None:
    content = json.loads(run.file("training_metrics.json").read_text())
    content["loss_train"][3:7] = [math.nan, None, "2.5", 10**400]
    content["grad_norm"] = content["grad_norm"][:-2]
    run.file("training_metrics.json").write_text(json.dumps(content))
    run.metrics.unlink()
    training, problems = read_training(run.path)
    assert training and np.isnan(training.language_model.train["loss_train"][3:7]).all()
    assert {len(column) for column in training.language_model.train.values()} == {28}
    assert "loss_train: 3 of 30 values are not numbers" in str(problems[0])
    assert "differ in length (28 to 30)" in str(problems[1])


def test_the_newer_of_lines_and_columns_is_read(run: Run) -> None:
    training, _ = read_training(run.path)
    assert training and training.source == "training_metrics.json"
    append_jsonl(run.metrics, {"task": "language_model", "event": "train", "step": 31, "loss_train": 1.25, "time": 0})
    training, problems = read_training(run.path)
    assert training and training.source == "metrics.jsonl" and problems == ()
    assert training.language_model.last("loss_train") == 1.25
    assert training.order2_bits_per_byte == 2.31, "scalars come from training_metrics.json all the same"


def test_lines_and_columns_of_one_run_agree(run: Run) -> None:
    by_columns, _ = read_training(run.path)
    run.file("training_metrics.json").unlink()
    by_lines, problems = read_training(run.path)
    assert by_columns and by_lines and [problem.missing for problem in problems] == [True]
    for task in ("language_model", "recall"):
        for part in ("train", "eval"):
            expected, found = (getattr(getattr(t, task), part) for t in (by_columns, by_lines))
            for key in expected:
                np.testing.assert_array_equal(expected[key], found[key], err_msg=f"{task} {part} {key}")


def test_a_resume_replaces_what_was_logged_beyond_its_step(run: Run) -> None:
    run.file("training_metrics.json").unlink()
    append_jsonl(run.metrics, {"task": "language_model", "event": "resume", "step": 20, "time": 0})
    append_jsonl(run.metrics, {"task": "language_model", "event": "train", "step": 21, "loss_train": 9.0, "time": 0})
    training, _ = read_training(run.path)
    assert training
    assert training.language_model.train["step"].tolist() == [*range(1, 22)]
    assert training.language_model.train["loss_train"][-1] == 9.0
    assert len(training.recall.train["step"]) == 30, "the other task is untouched"


def test_a_torn_last_line_is_no_problem_and_a_broken_one_is_named(run: Run) -> None:
    run.file("training_metrics.json").unlink()
    lines = run.metrics.read_text().splitlines()
    run.metrics.write_text("\n".join([*lines[:4], '{"task": "langu', *lines[4:], '{"task": "lang']))
    training, problems = read_training(run.path)
    assert training and len(training.language_model.train["step"]) == 30
    assert [str(p)[:30] for p in problems if not p.missing] == ["metrics.jsonl line 5 is broken"]


def test_strings_come_out_clean(run: Run) -> None:
    assert text("a\ud800b\x1b[31mred\x00" + "x" * 900).startswith("a?bred")
    assert len(text("x" * 900)) == 500
    content = json.loads(run.file("pipeline_results.json").read_text())
    content["verdict"] = "lone \ud800 surrogate"
    run.file("pipeline_results.json").write_text(json.dumps(content))
    manifest, _ = read_manifest(run.path)
    assert manifest and manifest.verdict.encode() == b"lone ? surrogate"


def test_rows_of_a_benchmark_that_make_no_sense_are_named(run: Run) -> None:
    content = json.loads(run.file("benchmark_summary.json").read_text())
    content["rows"] += [{"attention": "lsh"}, 7, {"attention": "magic", "seq_len": 4}]
    write_json(run.file("benchmark_summary.json"), content)
    benchmark, problems = read_benchmark(run.path)
    assert benchmark and len(benchmark.rows) == len(content["rows"]) - 3
    assert len(problems) == 3 and all(problem.file == "benchmark_summary.json" for problem in problems)


def test_fixed_tokens_are_read_as_of_one_sequence_and_all_that_was_fitted_is_there(tmp_path: Path) -> None:
    overrides = {"benchmark.fixed_tokens": 16_384, "benchmark.processes_per_length": 3}
    done = done_run(tmp_path / "quick", steps=5, overrides=overrides)
    content = json.loads(done.file("benchmark_summary.json").read_text())
    benchmark, problems = read_benchmark(done.path)
    assert benchmark and benchmark.fixed_tokens and problems == ()
    assert math.isnan(benchmark.tokens) and benchmark.fixed_tokens.tokens == 16_384
    short = ("lsh", 1024)
    written = next(row for row in content["fixed_tokens"]["rows"] if (row["attention"], row["seq_len"]) == short)
    read = next(row for row in benchmark.fixed_tokens.rows if (row.attention, row.seq_len) == short)
    assert written["batch_size"] == 16
    for column in ("latency_ms", "train_latency_ms_p20", "attention_latency_ms_p80", "activation_mb"):
        assert read.get(column) == pytest.approx(written[column] / 16), column
    assert read.get("tokens_per_sec") == written["tokens_per_sec"] and read.get("rss_mb") == written["rss_mb"]
    entry = content["fits"]["lsh"]["train_latency"]
    fit, scaling = (getattr(benchmark, name)["lsh", "train_latency"] for name in ("fits", "scaling"))
    assert (fit.bootstrap_low, fit.upper) == (entry["bootstrap_low"], entry["upper"])
    assert scaling.resampled == "processes" and set(scaling.ranges) == {"all", "longest_decade"}
    assert scaling.ranges["longest_decade"].upper == content["alpha_upper"]
    assert [one.ratio for one in scaling.doublings] == [one["ratio"] for one in entry["doublings"]]
    assert scaling.fixed_part and scaling.fixed_part.exponent == entry["fixed_part"]["exponent"]


def test_a_benchmark_of_before_there_were_ranges_is_read_and_broken_ones_are_left_out(run: Run) -> None:
    content = json.loads(run.file("benchmark_summary.json").read_text())
    for fits in content["fits"].values():
        for fit in filter(None, fits.values()):
            for key in ("ranges", "doublings", "fixed_part", "resampled", "upper", "bootstrap_low", "bootstrap_high"):
                del fit[key]
    for row in content["rows"]:
        del row["processes"]
    del content["fixed_tokens"], content["alpha_upper"]
    write_json(run.file("benchmark_summary.json"), content)
    benchmark, problems = read_benchmark(run.path)
    assert benchmark and problems == () and benchmark.fixed_tokens is None
    fit, scaling = benchmark.fits["lsh", "train_latency"], benchmark.scaling["lsh", "train_latency"]
    assert fit.upper == fit.high and math.isnan(fit.bootstrap_high)
    assert (scaling.ranges, scaling.doublings, scaling.fixed_part) == ({}, (), None)
    content["fits"]["lsh"]["train_latency"] |= {"ranges": {"all": 3, "longest_decade": {"exponent": "x"}},
                                                "doublings": [{"ratio": 2}, 7, {"seq_len": 8, "ratio": -1}]}
    content["fixed_tokens"] = {"rows": "none"}
    write_json(run.file("benchmark_summary.json"), content)
    benchmark, problems = read_benchmark(run.path)
    assert benchmark and benchmark.scaling["lsh", "train_latency"] == scaling and benchmark.fixed_tokens is None
    assert [str(problem) for problem in problems] == ["benchmark_summary.json has no list 'rows'"]


def test_states_follow_markers_and_signs_of_life(tmp_path: Path) -> None:
    now = time.time()
    done = done_run(tmp_path / "done", steps=5)
    running = running_run(tmp_path / "running", steps=5)
    assert run_status(done.path).state == "done"
    assert run_status(failed_run(tmp_path / "failed").path).state == "failed"
    status = run_status(running.path)
    assert (status.state, status.detail) == ("running", "03_train") and status.bar
    assert status.bar.fraction == pytest.approx(5 / 250)
    later = run_status(running.path, now + 600)
    assert later.state == "partial" and "stopped at 5 of 250 steps" in later.detail
    write_bar(done, done=1, total=9, age_s=3600)
    assert run_status(done.path).state == "done", "a bar older than the marker belongs to the finished phase"


def test_training_without_the_runner_is_done_when_it_says_so(tmp_path: Path) -> None:
    def phase(state: str, done: int) -> tuple[str, float]:
        write_json(tmp_path / "training_metrics.json", {"state": state, "seconds": 8.0, "recall": {"seconds": 2.5}})
        write_json(tmp_path / "progress.json", {"phase": "03_train", "done": done, "total": 5, "elapsed_s": 1.0,
                                                "time": 0.0, "label": "recall", "unit": "step"})
        found = next(p for p in run_status(tmp_path).phases if p.name == "03_train")
        return found.state, found.seconds

    assert phase("done", 5) == ("ok", 10.5)
    assert phase("running", 5) == ("stopped", 1.0)
    assert phase("done", 3) == ("stopped", 1.0), "begun again since, and stopped"


def test_a_living_runner_is_running_however_silent_and_a_dead_one_is_not(tmp_path: Path) -> None:
    run = running_run(tmp_path / "run", steps=5)
    write_bar(run, done=5, total=9, age_s=900)
    os.utime(run.log("03_train"), (0, 0))
    assert run_status(run.path).state == "partial"
    write_json(run.path / "03_train.STARTED", {"phase": "03_train", "finished": None, "inputs": {}})
    write_json(run.path / ".holder.json", {"pid": os.getpid(), "since": "", "command": ""})
    assert run_status(run.path).state == "running"
    write_json(run.path / ".holder.json", {"pid": 2**22 + 5, "since": "", "command": ""})
    write_bar(run, done=5, total=9, age_s=30)
    assert run_status(run.path).state == "partial"


def test_the_list_keeps_to_run_folders_inside_the_root(tmp_path: Path) -> None:
    root = tmp_path / "runs"
    done_run(root / "quick", steps=5)
    done_run(root / "reference-h200" / "full", steps=5)
    outside = done_run(tmp_path / "elsewhere", steps=5)
    (root / "link").symlink_to(outside.path)
    (root / "<img src=x>").mkdir()
    (root / "<img src=x>" / "config.json").write_text("{}")
    (root / "notes").mkdir()
    os.unlink(root / "quick" / "config.json")
    entries, problems = find_runs(root)
    assert [(entry.key, entry.reference) for entry in entries] == [("quick", False), ("reference-h200/full", True)]
    assert sorted(problem.file for problem in problems) == ["<img src=x>", "link"]
    assert find_runs(tmp_path / "nowhere") == ([], ())


def test_only_the_end_of_a_log_is_read(run: Run) -> None:
    log = run.log("03_train")
    log.write_bytes(b"first\n" + b"\x1b[32mfiller\x1b[0m \xff line\n" * 200_000 + b"0%\r50%\r100%\nlast\n")
    tail, size, problems = log_tail(run.path, "03_train", lines=50)
    assert problems == () and size == log.stat().st_size
    assert tail.splitlines()[-3:] == ["filler � line", "100%", "last"] and len(tail.splitlines()) == 50
    log.unlink()
    log.symlink_to("/etc/hostname")
    assert log_tail(run.path, "03_train")[2][0].reason.startswith("is a link")


def test_the_example_loss_falls() -> None:
    """The examples are what these tests rest on: they must look like training."""
    losses = [event["loss_train"] for event in training_events(300, 0, "language_model") if event["event"] == "train"]
    assert np.mean(losses[-20:]) < 0.6 * np.mean(losses[:20])
