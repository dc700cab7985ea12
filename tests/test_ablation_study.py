"""The study's bookkeeping: what may be said of rows, which job comes next, and going on after a kill."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from lshv2.ablation.pool import RESULTS, _Queue, check_settings, estimate, finished_rows
from lshv2.ablation.report import write_report
from lshv2.ablation.summary import compare, statements, summarise, table
from lshv2.ablation.variants import TASKS, TIERS, VARIANTS, Job, plan
from lshv2.errors import UserError
from lshv2.runs import append_jsonl

TINY = {
    "model.d_model": 32, "model.d_ff": 32, "train.batch_size": 2, "train.num_eval_sequences": 2, "recall.n_pairs": 4,
}


def row(variant: str, seed: int, bits: float, task: str = "language-2048", **more: Any) -> dict[str, Any]:
    means = ({"mass": 0.9, "local_mass": 0.5, "top_far": 0.25}, {"mass": 0.7, "local_mass": 0.3, "top_far": 0.75})
    ends = {"": 0.0, "_low": -0.1, "_high": 0.1}
    layers = [{name + end: value + ends[end] for name, value in layer.items() for end in ends} for layer in means]
    return {"variant": variant, "task": task, "seed": seed, "steps": 1500, "bits_per_byte": bits, "backend": "masked",
            "late_bits_per_byte": bits - 0.05, "step_ms": 30.0, "layers": layers, "seconds": 60.0,
            "settings": Job(variant, task, seed, 1500).overrides(), **more}


ROWS = [
    row("dense_half", 0, 1.02, backend="sdpa", step_ms=10.0), row("dense_half", 1, 1.00, backend="sdpa", step_ms=12.0),
    row("dense_half", 2, 1.01, backend="sdpa", step_ms=11.0), row("codebooks_half", 0, 1.015),
    row("codebooks_half", 1, 1.005), row("codebooks_half", 2, 1.01), row("window_half", 0, 1.10),
    row("window_half", 1, 1.2), row("window_half", 2, 1.3), row("cross_polytope_half", 0, 1.25),
]


def test_what_may_be_said_of_rows() -> None:
    summary = summarise(ROWS, "language-2048")
    assert list(summary)[-1] == "cross_polytope_half" and summary["dense_half"]["seeds"] == 3
    mine = summary["codebooks_half"]
    assert (mine["bits_per_byte"], mine["bits_per_byte_low"], mine["bits_per_byte_high"]) == (
        pytest.approx(1.01), 1.005, 1.015)
    assert (mine["mass"], mine["mass_low"]) == (pytest.approx(0.8), 0.7) and "mass" not in summary["dense_half"]
    assert "step_ms" not in mine and summary["dense_half"]["step_ms"] == pytest.approx(11.0), "a mask's time is no time"
    shown = table(summary, "language-2048")
    assert "| `codebooks_half` | 3 | 1.010 (1.005 to 1.015) | 0.960 (0.955 to 0.965) |  | 0.400 (0.300 to 0.5" in shown
    said = "\n".join(statements(ROWS, "language-2048"))
    assert "Within 1% of the best dense twin (`dense_half`, 1.0100) on their common seeds: `codebooks_half`." in said
    assert "`codebooks_half` 1.0100 against `window_half` 1.2000: 15.83 % less, better on 3 of 3 common seeds" in said
    assert "on 3 of 3 common seeds (95 % interval -33.62 to +2.77 %); ranges apart." in said
    assert "`cross_polytope_half` 1.2500: 18.80 % less, better on 1 of 1 common seeds; ranges apart, but on few" in said
    close = compare(ROWS, "language-2048", "codebooks_half", "dense_half")
    assert "better on 1 of 3 common seeds (95 % interval" in close and close.endswith("ranges overlap: no ranking.")
    assert compare(ROWS, "language-2048", "codebooks_half", "dense_full").endswith("not measured on a common seed.")


def test_only_common_seeds_are_compared() -> None:
    """A dense twin that has run on the easy seed alone is no better for it."""
    rows = [row("codebooks_half", 0, 1.0), row("codebooks_half", 1, 1.2), row("codebooks_half", 2, 1.3),
            row("dense_half", 0, 0.995)]
    said = statements(rows, "language-2048")
    assert said[0].endswith("(`dense_half`, 0.9950) on their common seeds: `codebooks_half` (one seed).")
    assert said[1].startswith("`codebooks_half` 1.0000 against `dense_half` 0.9950: 0.50 % more, better on 0 of 1")


def test_recall_is_better_when_higher() -> None:
    rows = [
        row(name, seed, 0.0, "recall-256", accuracy_1x=1.0 if name == "dense_half" else 0.5 + seed / 10,
            accuracy_8x=0.995 if name == "codebooks_half" else 0.3)
        for name in ("dense_half", "codebooks_half", "centred_half") for seed in range(3)
    ]
    assert next(iter(summarise(rows, "recall-256"))) == "codebooks_half"
    said = statements(rows, "recall-256")
    assert said[0] == "At least 99% at 8× the training length on every seed: `codebooks_half`."
    assert said[1] == "At 1× no seed below any seed of the best dense twin there (1.0000): none."
    assert said[2].startswith("`codebooks_half` 0.995 against `dense_half` 0.300: 69.5 points more, better on 3 of 3")


def test_the_report_is_drawn_from_the_rows(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no finished job"):
        write_report(tmp_path)
    for one in ROWS:
        append_jsonl(tmp_path / RESULTS, one)
    page = write_report(tmp_path, {"commit": "abc"})
    assert "| `codebooks_half` | 2 | 0.300 (0.200 to 0.400) | 0.700 (0.600 to 0.800) | 0.750 (0.650 to 0.850) |" in page
    assert "## language-2048" in page and page == write_report(tmp_path) == (tmp_path / "ablation.md").read_text()
    content = json.loads((tmp_path / "ablation.json").read_text())
    assert content["environment"] == {"commit": "abc"}
    assert content["settings"]["language-2048"]["train.batch_size"] == 16
    assert content["summaries"]["language-2048"]["dense_half"]["seeds"] == 3
    assert (tmp_path / "ablation.png").read_bytes().startswith(b"\x89PNG")


def test_the_plan_puts_what_matters_first_and_nothing_twice() -> None:
    tiers = plan(list(TASKS), None, [0, 1, 2], 1500, {})
    first = {(one.variant, one.seed) for one in tiers[0]}
    core = ("inverted_file_r8_quarter", "dense_half", "window_512_half")
    assert {(name, seed) for name in core for seed in range(3)} <= first
    keys = [one.key for tier in tiers for one in tier]
    assert len(keys) == len(set(keys)) and {one.variant for tier in tiers for one in tier} == set(VARIANTS)
    for one in {(one.variant, one.task): one for tier in tiers for one in tier}.values():
        one.settings()
    visible = {name: VARIANTS[name].settings for _, names in TIERS for name in names if name.startswith("codebooks_r")}
    matched = {s["model.n_rounds"] * s["model.bucket_size"] + s["model.window"]
               for s in visible.values() if "model.bucket_size" in s}
    assert matched == {4 * 64 + 256}
    with pytest.raises(UserError, match="task 'languag-2048' is unknown"):
        plan(["languag-2048"], ["dense_half"], [0], 10, {})[0][0].settings()


def test_no_job_starts_that_would_not_end_in_time() -> None:
    todo = [Job(name, "language-2048", 3, 1500) for name in ("dense_half", "codebooks_half", "centred_half")]
    rows = [row("codebooks_half", 0, 1.0, seconds=80.0), row("dense_half", 0, 1.0, seconds=30.0)]
    assert [estimate(one, rows) for one in todo] == pytest.approx([30.0, 80.0, 80.0])
    assert estimate(Job("dense_full", "language-2048", 0, 750), rows) == pytest.approx(15.0)
    queue = _Queue([todo], rows, time.monotonic() + 60)
    assert queue.take(first=False) == todo[0] and queue.take(first=False) is None
    queue = _Queue([todo], rows, time.monotonic() + 1000)
    taken = [queue.take(first=False) for _ in range(4)]
    assert taken == [todo[1], todo[2], todo[0], None], "the longest first"
    assert _Queue([todo], rows, time.monotonic() + 40).take(first=True) is None
    done = Job("dense_half", "language-2048", 0, 1500)
    assert _Queue([[done]], rows, math.inf).take(first=False) is None


def test_rows_of_other_settings_are_not_mixed() -> None:
    other = [[Job("codebooks_half", "language-2048", 0, 800)]]
    with pytest.raises(UserError, match=r"measured with train.num_train_sequences=24000 instead of 12800: give this"):
        check_settings(other, ROWS)
    finer = row("inverted_file_fine_quarter", 0, 1.0)  # its settings hold what its name does not say: n_buckets
    check_settings(plan(["language-2048"], None, [0], 1500, {}), [*ROWS, finer])


def command(out: Path) -> list[str]:
    settings = [f"{key}={value}" for key, value in TINY.items()]
    return [sys.executable, "-m", "lshv2.ablation", str(out), "--tasks", "recall-32", "--seeds", "0", "1",
            "--steps", "30", "--variants", "codebooks_half", "dense_half", "window_half", "--set", *settings]


ON_CPU = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}


def test_a_killed_study_goes_on_without_doing_a_job_twice(tmp_path: Path) -> None:
    with open(tmp_path / "log", "wb") as log:
        study = subprocess.Popen(command(tmp_path), env=ON_CPU, stdout=log, stderr=log)
    deadline = time.monotonic() + 120
    while len(finished_rows(tmp_path)) < 2:
        assert study.poll() is None and time.monotonic() < deadline, (tmp_path / "log").read_text()
        time.sleep(0.05)
    workers = psutil.Process(study.pid).children()
    os.kill(study.pid, signal.SIGKILL)
    study.wait()
    assert psutil.wait_procs(workers, timeout=20)[1] == [], "a worker outlives its study"
    before = (tmp_path / RESULTS).read_text()
    assert 2 <= len(before.splitlines()) < 6, "killed too late to see anything"
    shared = [*command(tmp_path), "--jobs-a-gpu", "2"]
    again = subprocess.run(shared, env=ON_CPU, capture_output=True, text=True, timeout=120)
    assert again.returncode == 0, again.stdout + again.stderr
    after = (tmp_path / RESULTS).read_text()
    assert after.startswith(before)
    keys = [(one["variant"], one["seed"]) for one in map(json.loads, after.splitlines())]
    assert sorted(keys) == sorted({(name, seed) for name in ("codebooks_half", "dense_half", "window_half")
                                   for seed in (0, 1)})
    timed, left = len(before.splitlines()), 6 - len(before.splitlines())
    shown = [json.loads(line)["step_ms"] is not None for line in after.splitlines()]
    assert shown == [True] * timed + [False] * left, "a shared device's step was timed, or a lone one's was not"
    assert f"{left} jobs to run on 2 worker(s)" in again.stdout and "## recall-32" in again.stdout
    report = subprocess.run([*command(tmp_path)[:4], "--report"], capture_output=True, text=True, timeout=60)
    assert report.returncode == 0 and "## recall-32" in report.stdout


def test_a_failed_job_is_written_down_and_the_others_run(tmp_path: Path) -> None:
    """A learning rate that makes the loss infinite: one line saying so, exit code 1, nothing counted as done."""
    call = [*command(tmp_path), "train.learning_rate=1e30"]
    call[call.index("30")] = "4"
    done = subprocess.run(call, env=ON_CPU, capture_output=True, text=True, timeout=120)
    failed = [json.loads(line) for line in (tmp_path / "failures.jsonl").read_text().splitlines()]
    assert done.returncode == 1 and len(failed) == 6 and not finished_rows(tmp_path), done.stdout + done.stderr
    assert "FloatingPointError" in failed[0]["failed"] and "Traceback" not in done.stderr
