"""The dashboard through Streamlit's AppTest: every page, every state, every kind of broken file."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import numpy as np
import pytest
from dashboard_pages import BROKEN, DASHBOARD, VIEWS, page, table, warnings
from example_runs import done_run

from lshv2.benchmark_results import read_benchmark
from lshv2.presets import make_settings
from lshv2.runs import append_jsonl, repo_root

pytestmark = pytest.mark.usefixtures("dashboard_on_path")
CHARTS = {"training": 8, "components": 1, "scaling": 2, "arena": 3, "operator": 3}


@pytest.mark.parametrize("view", VIEWS)
def test_every_page_draws_every_state(shown_runs: Path, view: str) -> None:
    app = page(view, "quick", "quick-seed-1", "big-batch", "reference-h200/full")
    assert app.title[0].value == view.capitalize()
    assert len(app.get("plotly_chart")) == CHARTS.get(view, 0)


@pytest.mark.parametrize("view", VIEWS)
def test_no_runs_says_what_to_do(tmp_path: Path, view: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LSHV2_RUNS", str(tmp_path / "empty"))
    command = "python -m lshv2.benchmark.attention --out" if view == "operator" else "make quick"
    assert command in page(view).info[0].value


def test_length_axes_tick_powers_of_two_and_keep_the_points(shown_runs: Path) -> None:
    from ui.style import figure, length_axis

    chart = figure("tokens", "ms", log_x=True)
    length_axis(chart, [32_768, 49_152, 65_536, 98_304, 131_072])
    assert chart.layout.xaxis.ticktext == ("32k", "64k", "128k")
    one = figure("tokens", "", log_x=True)
    length_axis(one, [1024, 1024])
    low, high = one.layout.xaxis.range
    assert low < math.log10(1024) < high and list(one.layout.xaxis.ticktext) == ["1k"], "not on the edge of the axis"


def test_the_list_shows_state_device_and_figures(shown_runs: Path) -> None:
    rows = {row["run"]: row for row in table(page("overview", "quick"), "state")}
    assert {key: row["state"].split(maxsplit=1)[1] for key, row in rows.items()} == {
        "quick": "done", "quick-small-buckets": "done", "big-batch": "failed", "quick-seed-1": "running",
        "reference-h200/full": "done (reference)",
    }
    assert rows["reference-h200/full"]["device"] == "NVIDIA H200"
    benchmark = read_benchmark(shown_runs / "quick")[0]
    assert rows["quick"]["α"] == f"{benchmark.fits['lsh', 'train_latency'].exponent:.2f}"
    assert rows["quick-seed-1"]["α"] == "—"


def test_flags_tell_reached_missed_and_not_measured_apart(shown_runs: Path) -> None:
    rows = {row["flag"]: row for row in table(page("overview", "quick", "big-batch"), "flag")}
    assert rows["65,536 tokens feasible"]["quick"] == "not measured"
    assert rows["alpha"]["quick"].startswith("✔") and rows["throughput"]["quick"] == "✖ 9,000"
    assert {row["big-batch"] for row in rows.values()} == {"not measured"}


def test_a_running_phase_has_its_bar_and_eta(shown_runs: Path) -> None:
    bars = page("overview", "quick").get("progress")
    assert len(bars) == 1
    words = bars[0].proto.text.replace("\\", "")
    assert "quick-seed-1" in words and "120 of 250 steps" in words and "52 s left" in words
    assert bars[0].proto.value == 48


def test_a_failed_phase_shows_error_traceback_and_how_to_resume(shown_runs: Path) -> None:
    app = page("logs", "big-batch")
    assert "not enough memory" in app.error[0].value
    code = [block.value for block in app.code]
    assert "loss = model(batch" in code[0] and code[1] == "make quick RUN=big-batch"
    assert code[2].splitlines()[-1] == "100%" and len(code[2].splitlines()) == 200


SHOWN_ON = {
    "config.json": "settings", "training_metrics.json": "training", "component_profiles.json": "components",
    "benchmark_summary.json": "scaling", "pipeline_results.json": "overview", "progress.json": "overview",
    "03_train.OK": "overview",
}


@pytest.mark.parametrize("kind", BROKEN)
@pytest.mark.parametrize("name", SHOWN_ON)
def test_a_broken_file_is_named_and_the_rest_still_draws(shown_runs: Path, name: str, kind: str) -> None:
    (shown_runs / "quick" / name).write_bytes(BROKEN[kind])
    app = page(SHOWN_ON[name], "quick", "quick-small-buckets")
    assert f"quick: {name} " in warnings(app)
    assert "quick-small-buckets" in str([app.get("plotly_chart"), *(shown.value for shown in app.dataframe)])
    assert len(app.get("plotly_chart")) == CHARTS.get(SHOWN_ON[name], 0)


@pytest.mark.parametrize("name", [name for name in SHOWN_ON if name not in ("progress.json", "03_train.OK")])
def test_a_missing_file_is_named(shown_runs: Path, name: str) -> None:
    (shown_runs / "quick" / name).unlink()
    assert f"quick: {name} is missing" in warnings(page(SHOWN_ON[name], "quick", "quick-small-buckets"))


def test_what_a_phase_has_yet_to_write_is_no_warning(shown_runs: Path) -> None:
    app = page("scaling", "quick-seed-1")
    assert not app.warning
    assert "not measured yet, 04_benchmark writes it (not run)" in app.info[0].value.replace("\\", "")


def test_a_broken_line_of_metrics_is_named_with_its_number(shown_runs: Path) -> None:
    with open(shown_runs / "quick" / "metrics.jsonl", "a") as file:
        file.write("{broken}\n" + json.dumps({"task": "language_model", "event": "train", "step": 251}) + "\n")
    lines = (shown_runs / "quick" / "metrics.jsonl").read_text().splitlines()
    assert f"quick: metrics.jsonl line {len(lines) - 1} is broken" in warnings(page("training", "quick"))


def test_hostile_strings_are_shown_as_text(shown_runs: Path) -> None:
    path = shown_runs / "quick" / "pipeline_results.json"
    content = json.loads(path.read_text())
    content["verdict"] = "<b>bold</b> \ud800 :red[x] [link](javascript:alert(1)) `code`"
    content["environment"]["\ud800"] = {"deep": "<script>"}
    path.write_text(json.dumps(content))
    app = page("overview", "quick")
    shown = next(element.value for element in app.markdown if "bold" in element.value)
    assert "\\<b\\>" in shown and "\\[link\\]\\(" in shown and "\\:red\\[" in shown
    assert not page("settings", "quick").exception


def test_the_address_chooses_runs_only_from_the_list(shown_runs: Path, tmp_path: Path) -> None:
    done_run(tmp_path / "outside", steps=5)
    app = page("settings", "quick", "../outside", "/etc", "reference-h200/full")
    assert app.multiselect(key="runs").value == ["quick", "reference-h200/full"]


def test_a_selection_outlives_a_new_run_and_keeps_its_colours(shown_runs: Path) -> None:
    app = page("training", "quick", "big-batch")
    before = app.session_state["slots"]
    done_run(shown_runs / "newest", steps=5)
    app.run()
    assert app.multiselect(key="runs").value == ["quick", "big-batch"]
    assert app.multiselect(key="runs").options[0] == "newest"
    assert app.session_state["slots"] == before
    shutil.rmtree(shown_runs / "big-batch")
    app.run()
    assert not app.exception and app.multiselect(key="runs").value == ["quick"]


def test_settings_can_show_only_what_differs(shown_runs: Path) -> None:
    app = page("settings", "quick", "quick-small-buckets")
    app.toggle(key="only_differences").set_value(True).run()
    found = {row["setting"]: (row["quick"], row["quick-small-buckets"]) for row in table(app, "setting")}
    quick = make_settings("quick")
    assert found == {
        "seed": ("0", "3"), "model.bucket_size": (str(quick.model.bucket_size), "32"),
        "train.learning_rate": (str(quick.train.learning_rate), "0.001"),
    }


def test_every_choice_redraws(shown_runs: Path) -> None:
    app = page("training", "quick", "big-batch")
    app.toggle(key="log_x").set_value(True)
    app.toggle(key="log_y").set_value(True)
    app.slider(key="smoothing").set_value(0.9)
    app.run()
    assert not app.exception
    layout = json.loads(app.get("plotly_chart")[0].proto.spec)["layout"]
    assert (layout["xaxis"]["type"], layout["yaxis"]["type"]) == ("log", "log")
    bits = json.loads(app.get("plotly_chart")[1].proto.spec)["layout"]
    assert bits["annotations"][0]["text"] == "order-2 byte model 2.310" and bits["shapes"][0]["y0"] == 2.31


def test_new_lines_are_drawn_on_the_next_redraw(shown_runs: Path) -> None:
    app = page("training", "quick-seed-1")
    append_jsonl(shown_runs / "quick-seed-1" / "metrics.jsonl",
                 {"task": "language_model", "event": "train", "step": 777, "loss_train": 1.2345, "time": time.time()})
    app.run()
    assert "1.234" in str(table(app, "loss, train")) and "777" in str(table(app, "loss, train"))


def test_thinning_keeps_spikes_and_ends() -> None:
    from ui.training_charts import smooth, thin

    x = np.arange(1.0, 20_001.0)
    y = np.sin(x / 500)
    y[12_345], y[77] = 9.0, -9.0
    for log_x in (False, True):
        short_x, short_y = thin(x, y, log_x=log_x)
        assert len(short_x) <= 1002 and {9.0, -9.0} <= set(short_y)
        assert (short_x[0], short_x[-1]) == (1.0, 20_000.0) and (np.diff(short_x) > 0).all()
    assert len(thin(x, np.full(20_000, np.nan))[0]) == 0
    noisy = np.random.default_rng(0).standard_normal(4000)
    assert smooth(noisy, 0.95).std() < 0.25 and smooth(np.ones(5), 0.9) == pytest.approx(np.ones(5))


def test_no_page_imports_torch(examples: Path) -> None:
    code = f"""
import sys
from streamlit.testing.v1 import AppTest
sys.path.insert(0, {str(DASHBOARD)!r})
app = AppTest.from_file({str(DASHBOARD / "app.py")!r}, default_timeout=60).run()
for view in {VIEWS!r}:
    app.switch_page(f"views/{{view}}.py").run()
    assert not app.exception and app.title[0].value == view.capitalize()
assert "plotly" in sys.modules
assert not {{"torch", "tokenizers", "safetensors"}} & set(sys.modules), "torch came in"
"""
    environment = {**os.environ, "LSHV2_RUNS": str(examples)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]


def test_the_server_is_local_and_quiet() -> None:
    config = tomllib.loads((repo_root() / ".streamlit" / "config.toml").read_text())
    assert config["server"]["address"] == "127.0.0.1" and config["server"]["headless"] is True
    assert config["browser"]["gatherUsageStats"] is False and config["client"]["showErrorDetails"] == "none"
    assert config["client"]["toolbarMode"] == "minimal" and config["runner"]["magicEnabled"] is False
