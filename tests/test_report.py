"""Plots, flags and manifest from run folders that are whole, partial, empty or broken."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import matplotlib.image
import pytest
from example_runs import done_run, running_run

from lshv2.errors import UserError
from lshv2.flags import success_flags, verdict
from lshv2.plots import DRAWERS, plot_png
from lshv2.report import write_manifest, write_report
from lshv2.runs import PHASES, Run, open_run, read_json, sha256, write_json

FILES = ("training_metrics.json", "component_profiles.json", "benchmark_summary.json", "metrics.jsonl")


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return done_run(tmp_path / "done")


def change(run: Run, name: str, **values: Any) -> None:
    write_json(run.file(name), {**read_json(run.file(name))[0], **values})


def flag(run: Run, name: str) -> dict[str, Any]:
    return next(f for f in success_flags(run.path) if f["name"] == name)


def lsh_fit(run: Run, measure: str, **values: Any) -> dict[str, Any]:
    """The flag after changing the LSH fit that it is judged by: of memory, or of time over the longest decade."""
    fits = read_json(run.file("benchmark_summary.json"))[0]["fits"]
    fit = fits["lsh"][measure]
    (fit if measure == "memory" else fit["ranges"]["longest_decade"]).update(values)
    change(run, "benchmark_summary.json", fits=fits)
    return flag(run, {"train_latency": "alpha", "memory": "beta"}[measure])


@pytest.mark.parametrize(
    ("estimate", "low", "high", "bootstrap", "passed"),
    [(1.0, 0.95, 1.05, None, True), (1.1, 1.0, 1.2, None, True), (1.1, 0.99, 1.21, None, False),
     (1.5, 1.4, 1.6, None, False), (1.0, None, None, None, None), (0.14, -0.89, 1.17, None, None),
     (1.1, 1.0, 1.19, 1.15, True), (1.1, 1.0, 1.19, 1.21, False), (1.1, 1.0, 1.21, 1.15, False)],
)
def test_alpha_is_judged_by_the_larger_upper_end_over_the_longest_decade(
    run: Run, estimate: float, low: float | None, high: float | None, bootstrap: float | None, passed: bool | None
) -> None:
    found = lsh_fit(run, "train_latency", exponent=estimate, low=low, high=high, bootstrap_low=estimate - 0.01,
                    bootstrap_high=bootstrap)
    assert found["passed"] is passed and found["value"] == estimate, found
    assert "4 lengths, 2,048 to 16,384 tokens" in found["detail"]
    assert (passed is None) == ("not measured" in found["detail"])


def test_alpha_over_all_lengths_decides_nothing(run: Run) -> None:
    """Overheads of short lengths flatten the whole; a file without the longest decade is not judged by it."""
    fits = read_json(run.file("benchmark_summary.json"))[0]["fits"]
    fits["lsh"]["train_latency"] |= {"exponent": 2.0, "low": 1.9, "high": 2.1}
    change(run, "benchmark_summary.json", fits=fits)
    assert flag(run, "alpha")["passed"] is not False
    del fits["lsh"]["train_latency"]["ranges"]
    change(run, "benchmark_summary.json", fits=fits)
    found = flag(run, "alpha")
    assert found["passed"] is None and "not measured: this file was written before" in found["detail"]
    fits["lsh"]["train_latency"] = None
    change(run, "benchmark_summary.json", fits=fits)
    assert flag(run, "alpha")["detail"] == "not measured: too few lengths succeeded"


@pytest.mark.parametrize(
    ("estimate", "low", "high", "passed"),
    [(1.0, 0.95, 1.05, True), (0.87, 0.85, 0.95, False), (1.12, 1.1, 1.14, False), (1.0, 0.7, 1.3, False),
     (1.0, None, None, None)],
)
def test_beta_is_two_sided_and_no_lucky_estimate_passes(
    run: Run, estimate: float, low: float | None, high: float | None, passed: bool | None
) -> None:
    assert lsh_fit(run, "memory", exponent=estimate, low=low, high=high)["passed"] is passed


def test_65536_is_feasible_only_if_it_was_benchmarked_and_ended_well(run: Run) -> None:
    found = flag(run, "65536_feasible")
    assert found["passed"] is None and found["value"] is None and "16,384" in found["detail"]
    rows = read_json(run.file("benchmark_summary.json"))[0]["rows"]
    long = {**rows[0], "seq_len": 65_536}
    change(run, "benchmark_summary.json", rows=[*rows, long])
    assert flag(run, "65536_feasible")["passed"] is True
    change(run, "benchmark_summary.json", rows=[*rows, {**long, "status": "out of memory", "reason": "16 GB"}])
    found = flag(run, "65536_feasible")
    assert found["passed"] is False and "out of memory: 16 GB" in found["detail"]


def test_throughput_is_lsh_s_at_4096_and_names_its_device(run: Run) -> None:
    content = read_json(run.file("benchmark_summary.json"))[0]
    row = next(r for r in content["rows"] if (r["attention"], r["seq_len"]) == ("lsh", 4096))
    found = flag(run, "throughput")
    assert found["value"] == pytest.approx(row["tokens_per_sec"]) and "cpu" in found["detail"]
    assert found["passed"] is (row["tokens_per_sec"] > 10_000)
    change(run, "benchmark_summary.json", rows=[r for r in content["rows"] if r["seq_len"] != 4096])
    assert flag(run, "throughput")["passed"] is None


@pytest.mark.parametrize(
    ("bits", "order2", "passed"),
    [([3.0, 2.0], 2.5, True), ([3.0, 2.6], 2.7, False), ([3.0, 2.0], 1.9, False), ([3.0], 2.5, None),
     ([3.0, 2.0], None, None)],
)
def test_learning_needs_15_percent_and_to_beat_order_2(
    run: Run, bits: list[float], order2: float | None, passed: bool | None
) -> None:
    run.metrics.unlink()
    change(run, "training_metrics.json", bits_per_byte=bits, loss_eval=bits, eval_step=list(range(len(bits))),
           order2_bits_per_byte=order2)
    assert flag(run, "learns")["passed"] is passed


FOREIGN = '{"rows": 3, "fits": [], "bits_per_byte": "x", "recall": 7}'


@pytest.mark.parametrize("damage", [None, "", "{", "[1]", FOREIGN, "\x00"])
def test_nothing_in_the_files_stops_the_manifest(run: Run, damage: str | None) -> None:
    for name in FILES:
        if damage is None:
            run.file(name).unlink()
        else:
            run.file(name).write_text(damage)
    manifest = write_manifest(run)
    assert [f["passed"] for f in manifest["flags"]] == [None] * 6
    assert all(f["detail"].startswith("not measured: ") for f in manifest["flags"])
    assert manifest["verdict"] == "Nothing of the 6 targets was measured in this run."


def test_the_verdict_follows_from_the_flags() -> None:
    def made(name: str, passed: bool | None) -> dict[str, Any]:
        return {"name": name, "value": 1.5, "passed": passed, "detail": f"{name}'s figures"}

    assert verdict([made("alpha", True), made("beta", False), made("recall", None)]) == (
        "1 of the 2 targets measured are met (alpha); missed: beta (beta's figures); not measured: recall."
    )
    assert verdict([made("alpha", False)]) == "None of the 1 targets measured is met; missed: alpha (alpha's figures)."


def test_the_manifest_is_what_the_contract_says(run: Run) -> None:
    manifest = write_manifest(run)
    assert manifest == read_json(run.file("pipeline_results.json"))[0]
    assert manifest["state"] == "ok" and [p["phase"] for p in manifest["phases"]] == list(PHASES)
    listed = {entry["path"]: entry for entry in manifest["artifacts"]}
    assert "logs/03_train.log" in listed and "pipeline_results.json" not in listed and "05_report.OK" not in listed
    assert all(entry["sha256"] == sha256(run.path / path) for path, entry in listed.items())
    told = {"python", "torch", "cpu", "cores", "ram_gb", "gpus", "commit", "dirty", "lshv2"}
    assert told <= manifest["environment"].keys()


def test_states_come_from_the_markers_or_from_the_runner(run: Run) -> None:
    run.marker("05_report").unlink()
    manifest = write_manifest(run)
    assert manifest["state"] == "incomplete" and manifest["phases"][-1]["state"] == "not run"
    assert "logs/05_report.log" not in {entry["path"] for entry in manifest["artifacts"]}  # still being written
    write_json(run.path / "04_benchmark.FAILED", {"phase": "04_benchmark", "error": "boom"})
    manifest = write_manifest(run)
    assert manifest["state"] == "failed" and manifest["phases"][3]["error"] == "boom"
    given = [{"phase": name, "state": "skipped", "seconds": 1.0, "notebook": "", "log": "", "error": None}
             for name in PHASES]
    assert write_manifest(run, given)["phases"] == given and write_manifest(run, given)["state"] == "ok"


@pytest.mark.parametrize("name", DRAWERS)
def test_plots_are_pictures_of_their_file(run: Run, name: str) -> None:
    picture = plot_png(run.path, name)
    pixels = matplotlib.image.imread(io.BytesIO(picture), format="png")
    colours = {tuple(pixel) for pixel in pixels[::7, ::7].reshape(-1, 4)}
    assert pixels.shape[1] >= 800 and pixels.min() < 0.2 and len(colours) > 5
    assert plot_png(run.path, name) == picture, "the same file must give the same bytes"
    run.file(f"{name}.json").unlink()
    run.metrics.unlink()
    with pytest.raises(UserError, match=f"no plot of {name}: {name}.json is missing"):
        plot_png(run.path, name)


def test_a_run_without_training_and_benchmark_still_gets_its_report(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = open_run(tmp_path / "bare", preset="test")
    manifest = write_report(run)
    assert not list(run.path.glob("*.png")) and run.file("lsh_v2_complete_package.zip").is_file()
    assert "lsh_v2_complete_package.zip" in {entry["path"] for entry in manifest["artifacts"]}
    assert "no plot of benchmark_summary: benchmark_summary.json is missing" in capsys.readouterr().out


def test_plots_of_partial_files_are_drawn(tmp_path: Path) -> None:
    run = running_run(tmp_path / "running")
    assert plot_png(run.path, "training_metrics")
    rows = [{"attention": "lsh", "seq_len": n, "status": "timeout", "reason": "300 s"} for n in (64, 128)]
    run.file("benchmark_summary.json").write_text(json.dumps({"state": "running", "rows": rows, "device": "cpu"}))
    assert plot_png(run.path, "benchmark_summary")
