"""The dashboard through Streamlit's AppTest: every page, every state, every kind of broken file."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from example_arena import arena_rows, write_arena
from example_runs import done_run, example_runs
from streamlit.testing.v1 import AppTest

from lshv2.benchmark_results import read_benchmark
from lshv2.presets import make_settings
from lshv2.runs import append_jsonl, repo_root
from lshv2.scaling import fit_power

DASHBOARD = repo_root() / "dashboard"
VIEWS = ("overview", "training", "components", "scaling", "arena", "operator", "settings", "logs")
CHARTS = {"training": 8, "components": 1, "scaling": 2, "arena": 3, "operator": 3}


@pytest.fixture(scope="module")
def examples(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return example_runs(tmp_path_factory.mktemp("examples"))


@pytest.fixture(autouse=True)
def dashboard_on_path(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.syspath_prepend(str(DASHBOARD))  # `streamlit run` does the same
    yield


@pytest.fixture
def root(tmp_path: Path, examples: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A private copy of the examples, as the dashboard's runs folder."""
    root = tmp_path / "runs"
    shutil.copytree(examples, root)
    monkeypatch.setenv("LSHV2_RUNS", str(root))
    return root


def page(view: str, *runs: str) -> AppTest:
    app = AppTest.from_file(str(DASHBOARD / "app.py"), default_timeout=30)
    app.query_params["runs"] = list(runs)
    app.run()
    if view != "overview":
        app.switch_page(f"views/{view}.py").run()
    assert not app.exception, [error.value for error in app.exception]
    return app


def warnings(app: AppTest) -> str:
    return "\n".join(box.value for box in app.warning).replace("\\", "")


def table(app: AppTest, heading: str) -> list[dict[str, str]]:
    """The first table with this column."""
    frame = next(shown.value for shown in app.dataframe if heading in shown.value.columns)
    return frame.to_dict("records")


@pytest.mark.parametrize("view", VIEWS)
def test_every_page_draws_every_state(root: Path, view: str) -> None:
    app = page(view, "quick", "quick-seed-1", "big-batch", "reference-h200/full")
    assert app.title[0].value == view.capitalize()
    assert len(app.get("plotly_chart")) == CHARTS.get(view, 0)


@pytest.mark.parametrize("view", VIEWS)
def test_no_runs_says_what_to_do(tmp_path: Path, view: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LSHV2_RUNS", str(tmp_path / "empty"))
    command = "python -m lshv2.benchmark.attention --out" if view == "operator" else "make quick"
    assert command in page(view).info[0].value


def test_the_operator_is_shown_with_its_targets_and_reasons(root: Path) -> None:
    path = root / "reference-cpu" / "attention" / "attention.json"
    content = json.loads(path.read_text())
    lsh, dense = (content["rows"][0]["contenders"][name]["both_ms"] for name in ("lsh", "sdpa"))
    content["targets"][1] |= {"value": 2.5, "met": True, "stretch_met": False}
    content["targets"][2] |= {"value": 3.0, "met": False, "stretch_met": False}
    path.write_text(json.dumps(content))
    app = page("operator")
    said = {row["target"]: (row["measured"], row["result"]) for row in table(app, "stretch")}
    assert said == {"crossover, batch 1": ("—", "· not measured"), "speed-up at 16,384": ("2.5 ×", "✔ met"),
                    "speed-up at 65,536": ("3 ×", "✖ missed"),
                    **{f"{name}, inverted file": ("—", "· not measured") for name in (
                        "crossover, batch 1", "speed-up at 16,384", "speed-up at 65,536")}}
    line = next(row for row in table(app, "batch") if row["tokens"] == "160")
    assert line["LSH, ms"] == f"{lsh:.4g}" and line["dense, SDPA, ms"] == f"{dense:.4g}"
    reasons = {(row["tokens"], row["attention"]): row["reason"] for row in table(app, "reason")}
    assert reasons["160", "dense, cuDNN"] == "only timed on cuda"
    hurt = {line["bucket ids"]: line["over uniform"] for line in table(app, "over uniform")}
    assert len(hurt) == 14 and hurt["uniform"] == hurt["uniform, one table"] == "1 ×"
    charts = drawn(app)
    assert {trace["name"] for trace in charts[0]["data"]} == {"LSH", "LSH, clustered data", "LSH, inverted file",
                                                        "inverted file, clustered data", "dense, SDPA"}
    parts = {trace["name"] for trace in charts[2]["data"]}
    assert {"forward: hashing", "forward: bucket_attn", "backward: other"} <= parts
    app.segmented_control(key="layout").set_value("batch 1, CUDA graph").run()
    assert not app.exception and len(app.get("plotly_chart")) == 2


def test_the_first_operator_file_and_a_broken_one_still_draw(root: Path) -> None:
    path = root / "reference-cpu" / "attention" / "attention.json"
    path.write_text(json.dumps({"schema": 1, "environment": {"gpus": [], "cpu": "a CPU"}, "rows": [
        {"seq_len": 4096, "dtype": "torch.float32", "lsh_ms": 4.0, "dense_ms": 6.0, "speedup": 1.5}]}))
    app = page("operator")
    assert "written before there were targets" in app.info[0].value and len(app.get("plotly_chart")) == 2
    path.write_bytes(BROKEN["torn"])
    assert "reference-cpu/attention: attention.json " in warnings(page("operator"))


def drawn(app: AppTest) -> list[dict[str, Any]]:
    return [json.loads(chart.proto.spec) for chart in app.get("plotly_chart")]


def test_the_arena_shows_twins_chance_shortcuts_and_targets(root: Path) -> None:
    app = page("arena", "quick")
    by_length, by_gap, by_keys = drawn(app)
    lines = {trace["name"]: trace["x"] for trace in by_length["data"] if trace.get("name")}
    assert lines["LSH"] == [1024, 4096, 16_384, 131_072] and lines["dense"] == [1024, 4096, 16_384], "out of memory"
    assert {"window only", "chance 0.024 %", "best shortcut 0.098 %: guess a value shown"} <= set(lines)
    assert by_length["layout"]["annotations"][0]["text"] == "trained at 2k"
    assert [trace["name"] for trace in by_gap["data"]] == ["LSH", "window only"], "dense has nothing at 131,072"
    keys = {trace["name"]: trace["x"] for trace in by_keys["data"]}
    assert keys["LSH, rounds 4"] == [128, 192, 320] and keys["LSH, rounds 1"] == [96] and keys["dense"] == [96, 320]
    cells = next(row for row in table(app, "evaluated") if (row["model"], row["tokens"]) == ("dense", "131,072"))
    assert (cells["seeds"], cells["status"], cells["mean"]) == ("0", "out of memory", "—")
    assert cells["best shortcut"] == "0.098 % (guess a value shown)" and cells["chance"] == "0.024 %"
    tasks = {row["task"]: (row["LSH"], row["best shortcut"]) for row in table(app, "window only")}
    assert tasks["my_own_task"] == ("96.8 % (96.4 to 97.2 %)", "60.0 % (guess a value shown)") and len(tasks) == 7
    said = {row["target"]: row["result"] for row in table(app, "stretch")}
    assert said["induction heads, trained at 256, at 131,072"] == "✔ met" and len(said) == 17
    assert said["passkey, every depth and length to 131,072"] == "✖ missed" and said["ListOps"] == "· not measured"


@pytest.mark.parametrize("task, charts", {"passkey": 4, "variable_tracking": 2, "bytes": 3, "my_own_task": 1}.items())
def test_every_task_of_the_arena_draws_what_it_has(root: Path, task: str, charts: int) -> None:
    app = page("arena", "quick")
    app.selectbox(key="task").set_value(task).run()
    assert not app.exception and len(app.get("plotly_chart")) == charts
    app.selectbox(key=f"arena length {task}").set_value(1024).run()
    assert not app.exception and len(app.get("plotly_chart")) == charts
    if task == "passkey":
        assert [(len(chart["data"][0]["y"]), chart["data"][0]["x"]) for chart in drawn(app)[1:]] == [
            (10, ["1k", "4k", "16k", "128k"])] * 3, "a map a model, with an empty column where there was no memory"
    if task == "bytes":
        assert drawn(app)[0]["layout"]["yaxis"]["range"][1] < 3, "chance does not press the curves flat"


def test_a_run_without_an_arena_says_how_to_make_one(root: Path) -> None:
    app = page("arena", "big-batch", "quick-small-buckets", "reference-h200/full")
    said = [box.value.replace("\\", "") for box in app.info]
    assert said[0] == "**big-batch has no arena yet.** Measure it with `make arena RUN=big-batch`."
    assert "`make arena RUN=quick-small-buckets`" in said[1] and "`make arena RUN=name`" in said[2]
    assert app.selectbox(key="arena").options == ["quick"], "another run's is offered"
    (root / "quick" / "arena.jsonl").unlink()
    app = page("arena", "big-batch")
    assert len(app.info) == 1 and not app.get("plotly_chart") and not app.selectbox


def test_a_growing_or_broken_arena_still_draws(root: Path) -> None:
    path = root / "quick" / "arena.jsonl"
    app = page("arena", "quick")
    write_arena(root / "quick", [{**arena_rows()[0], "task": "<b>new</b>", "by": {"<i>": {"<u>": 0.5}}}])
    app.run()
    assert "<b>new</b>" in app.selectbox(key="task").options
    app.selectbox(key="task").set_value("<b>new</b>").run()
    assert not app.exception and "<i>" not in str(drawn(app)[1]["layout"])
    path.write_bytes(b'{"task": 1}\n' + path.read_bytes() + b'{"task": "mq')
    app = page("arena", "quick")
    assert "quick: arena.jsonl 1 of " in warnings(app) and len(app.get("plotly_chart")) == 3
    path.write_bytes(b"{}\n")
    assert "have no task, model or seq_len" in warnings(page("arena", "quick"))


def test_length_axes_tick_powers_of_two_and_keep_the_points(root: Path) -> None:
    from ui.style import figure, length_axis

    chart = figure("tokens", "ms", log_x=True)
    length_axis(chart, [32_768, 49_152, 65_536, 98_304, 131_072])
    assert chart.layout.xaxis.ticktext == ("32k", "64k", "128k")


def test_the_list_shows_state_device_and_figures(root: Path) -> None:
    rows = {row["run"]: row for row in table(page("overview", "quick"), "state")}
    assert {key: row["state"].split(maxsplit=1)[1] for key, row in rows.items()} == {
        "quick": "done", "quick-small-buckets": "done", "big-batch": "failed", "quick-seed-1": "running",
        "reference-h200/full": "done (reference)",
    }
    assert rows["reference-h200/full"]["device"] == "NVIDIA H200"
    benchmark = read_benchmark(root / "quick")[0]
    assert rows["quick"]["α"] == f"{benchmark.fits['lsh', 'train_latency'].exponent:.2f}"
    assert rows["quick-seed-1"]["α"] == "—"


def test_flags_tell_reached_missed_and_not_measured_apart(root: Path) -> None:
    rows = {row["flag"]: row for row in table(page("overview", "quick", "big-batch"), "flag")}
    assert rows["65,536 tokens feasible"]["quick"] == "not measured"
    assert rows["alpha"]["quick"].startswith("✔") and rows["throughput"]["quick"] == "✖ 9,000"
    assert {row["big-batch"] for row in rows.values()} == {"not measured"}


def test_a_running_phase_has_its_bar_and_eta(root: Path) -> None:
    bars = page("overview", "quick").get("progress")
    assert len(bars) == 1
    words = bars[0].proto.text.replace("\\", "")
    assert "quick-seed-1" in words and "120 of 250 steps" in words and "52 s left" in words
    assert bars[0].proto.value == 48


def test_a_failed_phase_shows_error_traceback_and_how_to_resume(root: Path) -> None:
    app = page("logs", "big-batch")
    assert "not enough memory" in app.error[0].value
    code = [block.value for block in app.code]
    assert "loss = model(batch" in code[0] and code[1] == "make quick RUN=big-batch"
    assert code[2].splitlines()[-1] == "100%" and len(code[2].splitlines()) == 200


BROKEN = {"torn": b'{"schema": 1, "rows": [', "deep": b"[" * 100_000}  # test_readers has every kind
SHOWN_ON = {
    "config.json": "settings", "training_metrics.json": "training", "component_profiles.json": "components",
    "benchmark_summary.json": "scaling", "pipeline_results.json": "overview", "progress.json": "overview",
    "03_train.OK": "overview",
}


@pytest.mark.parametrize("kind", BROKEN)
@pytest.mark.parametrize("name", SHOWN_ON)
def test_a_broken_file_is_named_and_the_rest_still_draws(root: Path, name: str, kind: str) -> None:
    (root / "quick" / name).write_bytes(BROKEN[kind])
    app = page(SHOWN_ON[name], "quick", "quick-small-buckets")
    assert f"quick: {name} " in warnings(app)
    assert "quick-small-buckets" in str([app.get("plotly_chart"), *(shown.value for shown in app.dataframe)])
    assert len(app.get("plotly_chart")) == CHARTS.get(SHOWN_ON[name], 0)


@pytest.mark.parametrize("name", [name for name in SHOWN_ON if name not in ("progress.json", "03_train.OK")])
def test_a_missing_file_is_named(root: Path, name: str) -> None:
    (root / "quick" / name).unlink()
    assert f"quick: {name} is missing" in warnings(page(SHOWN_ON[name], "quick", "quick-small-buckets"))


def test_what_a_phase_has_yet_to_write_is_no_warning(root: Path) -> None:
    app = page("scaling", "quick-seed-1")
    assert not app.warning
    assert "not measured yet, 04_benchmark writes it (not run)" in app.info[0].value.replace("\\", "")


def test_a_broken_line_of_metrics_is_named_with_its_number(root: Path) -> None:
    with open(root / "quick" / "metrics.jsonl", "a") as file:
        file.write("{broken}\n" + json.dumps({"task": "language_model", "event": "train", "step": 251}) + "\n")
    lines = (root / "quick" / "metrics.jsonl").read_text().splitlines()
    assert f"quick: metrics.jsonl line {len(lines) - 1} is broken" in warnings(page("training", "quick"))


def test_hostile_strings_are_shown_as_text(root: Path) -> None:
    path = root / "quick" / "pipeline_results.json"
    content = json.loads(path.read_text())
    content["verdict"] = "<b>bold</b> \ud800 :red[x] [link](javascript:alert(1)) `code`"
    content["environment"]["\ud800"] = {"deep": "<script>"}
    path.write_text(json.dumps(content))
    app = page("overview", "quick")
    shown = next(element.value for element in app.markdown if "bold" in element.value)
    assert "\\<b\\>" in shown and "\\[link\\]\\(" in shown and "\\:red\\[" in shown
    assert not page("settings", "quick").exception


def test_the_address_chooses_runs_only_from_the_list(root: Path, tmp_path: Path) -> None:
    done_run(tmp_path / "outside", steps=5)
    app = page("settings", "quick", "../outside", "/etc", "reference-h200/full")
    assert app.multiselect(key="runs").value == ["quick", "reference-h200/full"]


def test_a_selection_outlives_a_new_run_and_keeps_its_colours(root: Path) -> None:
    app = page("training", "quick", "big-batch")
    before = app.session_state["slots"]
    done_run(root / "newest", steps=5)
    app.run()
    assert app.multiselect(key="runs").value == ["quick", "big-batch"]
    assert app.multiselect(key="runs").options[0] == "newest"
    assert app.session_state["slots"] == before
    shutil.rmtree(root / "big-batch")
    app.run()
    assert not app.exception and app.multiselect(key="runs").value == ["quick"]


def test_settings_can_show_only_what_differs(root: Path) -> None:
    app = page("settings", "quick", "quick-small-buckets")
    app.toggle(key="only_differences").set_value(True).run()
    found = {row["setting"]: (row["quick"], row["quick-small-buckets"]) for row in table(app, "setting")}
    quick = make_settings("quick")
    assert found == {
        "seed": ("0", "3"), "model.bucket_size": (str(quick.model.bucket_size), "32"),
        "train.learning_rate": (str(quick.train.learning_rate), "0.001"),
    }


def test_every_choice_redraws(root: Path) -> None:
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


def test_new_lines_are_drawn_on_the_next_redraw(root: Path) -> None:
    app = page("training", "quick-seed-1")
    append_jsonl(root / "quick-seed-1" / "metrics.jsonl",
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


def test_the_band_of_a_fit_is_the_textbook_one() -> None:
    """Against fit_power's own residuals and t: half width = t·s·√(1/n + (x − x̄)²/Sxx)."""
    from ui.scaling_charts import fitted

    from lshv2.benchmark_results import Fit, Row
    from lshv2.scaling import student_t_quantile

    lengths = np.array([1024, 2048, 4096, 8192, 16384])
    values = 0.02 * lengths**1.1 * np.exp([0.02, -0.04, 0.03, 0.0, -0.01])
    fit = fit_power(lengths, values)
    rows = [Row("lsh", int(n), "ok", "", {"latency_ms": float(v)}) for n, v in zip(lengths, values, strict=True)]
    read = Fit(**{k: float(v) for k, v in vars(fit).items() if k in Fit.__dataclass_fields__})
    x, line, low, high = fitted(rows, read, "latency_ms")
    log_x = np.log(lengths)
    residuals = np.log(values) - fit.intercept - fit.exponent * log_x
    scale = student_t_quantile(3) * np.sqrt((residuals**2).sum() / 3)
    half = scale * np.sqrt(1 / 5 + (np.log(x) - log_x.mean()) ** 2 / ((log_x - log_x.mean()) ** 2).sum())
    np.testing.assert_allclose(np.log(line), fit.intercept + fit.exponent * np.log(x), rtol=1e-12)
    np.testing.assert_allclose(np.log(high / line), half, rtol=1e-9)
    np.testing.assert_allclose(np.log(line / low), half, rtol=1e-9)
    assert fitted(rows[:-1], read, "latency_ms") is None, "a line through other points than were fitted"


def test_scaling_shows_both_layouts_attention_alone_and_every_doubling(root: Path) -> None:
    app = page("scaling", "quick", "reference-h200/full")
    full = json.loads((root / "reference-h200" / "full" / "benchmark_summary.json").read_text())

    def line(heading: str) -> dict[str, str]:
        rows = [row for row in table(app, heading) if row["run"] == "reference-h200/full" and row["attention"] == "LSH"]
        return next(row for row in rows if row.get("cost", "forward + backward") == "forward + backward")

    fit = full["fits"]["lsh"]["train_latency"]
    shown = line("drawn again")
    assert shown["longest decade, at most"] == f"{full['alpha_upper']:.3g}" and shown["drawn again"] == "processes"
    assert shown["bootstrap [95 %]"] == f"[{fit['bootstrap_low']:.2f}, {fit['bootstrap_high']:.2f}]"
    assert shown["a + b·n^α [95 %]"].startswith(f"{fit['fixed_part']['exponent']:.2f} [")
    last = fit["doublings"][-1]
    assert line("to 131,072")["to 131,072"] == f"{last['ratio']:.2f} [{last['low']:.2f}, {last['high']:.2f}]"
    assert not app.info
    app.segmented_control(key="every_length_with").set_value("fixed tokens").run()
    assert not app.exception and app.info[0].value.startswith("quick: not measured at fixed tokens")
    fixed = full["fixed_tokens"]["fits"]["lsh"]["train_latency"]
    assert line("drawn again")["exponent [95 %]"].startswith(f"{fixed['exponent']:.2f} [")
    row = next(row for row in full["fixed_tokens"]["rows"] if row["seq_len"] == 1024 and row["attention"] == "lsh")
    assert table(app, "dense ÷ LSH")[0]["LSH, ms"] == f"{row['train_latency_ms'] / 128:.4g}"
    app.segmented_control(key="time").set_value("attention, forward + backward").run()
    line_of_1024 = table(app, "dense ÷ LSH")[0]
    assert line_of_1024["LSH, ms"] == f"{row['attention_train_latency_ms'] / 128:.4g}"
    assert "LSH, tokens/s" not in line_of_1024
    drawn = json.loads(app.get("plotly_chart")[0].proto.spec)
    assert drawn["layout"]["yaxis"]["title"]["text"] == "attention alone, forward + backward (ms)"
    names = [trace["name"] for trace in drawn["data"] if trace.get("name")]
    assert len(names) == 2 and all("α = " in name for name in names)


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
