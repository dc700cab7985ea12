"""The dashboard's pages of measurements: operator, arena and scaling."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from dashboard_pages import BROKEN, drawn, page, table, warnings
from example_arena import arena_rows, shape_rows, write_arena

from lshv2.scaling import fit_power

pytestmark = pytest.mark.usefixtures("dashboard_on_path")


def test_the_operator_is_shown_with_its_targets_and_reasons(shown_runs: Path) -> None:
    path = shown_runs / "reference-cpu" / "attention" / "attention.json"
    content = json.loads(path.read_text())
    lsh, dense = (content["rows"][0]["contenders"][name]["both_ms"] for name in ("lsh", "sdpa"))
    for target in content["targets"]:  # a busy machine may have measured a crossover
        target |= {"value": None, "met": None, "stretch_met": None}
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


def test_the_first_operator_file_and_a_broken_one_still_draw(shown_runs: Path) -> None:
    path = shown_runs / "reference-cpu" / "attention" / "attention.json"
    path.write_text(json.dumps({"schema": 1, "environment": {"gpus": [], "cpu": "a CPU"}, "rows": [
        {"seq_len": 4096, "dtype": "torch.float32", "lsh_ms": 4.0, "dense_ms": 6.0, "speedup": 1.5}]}))
    app = page("operator")
    assert "written before there were targets" in app.info[0].value and len(app.get("plotly_chart")) == 2
    path.write_bytes(BROKEN["torn"])
    assert "reference-cpu/attention: attention.json " in warnings(page("operator"))


def test_the_arena_shows_twins_chance_shortcuts_and_targets(shown_runs: Path) -> None:
    app = page("arena", "quick")
    by_length, by_gap, by_keys = drawn(app)
    lines = {trace["name"]: trace["x"] for trace in by_length["data"] if trace.get("name")}
    assert lines["LSH"] == [1024, 4096, 16_384, 131_072] and lines["dense"] == [1024, 4096, 16_384], "out of memory"
    assert {"window only", "chance 0.024 %", "best shortcut 0.098 %: guess a value shown"} <= set(lines)
    assert by_length["layout"]["annotations"][0]["text"] == "trained at 2k"
    models = [trace["name"] for trace in by_gap["data"]]
    assert models == ["LSH", "dense, scaled by log n", "window only"], "dense has nothing at 131,072"
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


def test_a_quality_curve_says_which_shape_it_advises(shown_runs: Path) -> None:
    assert "Which shape of attention" not in {one.value for one in page("arena", "quick").subheader}
    (shown_runs / "quick" / "arena.jsonl").unlink()
    write_arena(shown_runs / "quick", [*shape_rows("duplication", 2), *shape_rows("bytes", 3, "bits_per_byte")])
    app = page("arena", "quick")
    said = {row["shape"]: row["advised"] for row in table(app, "advised")}
    assert [shape for shape, advised in said.items() if advised] == ["LSH, R 2, W 64, cells x 1",
                                                                   "LSH, R 4, W 64, cells x 1"]
    assert len(said) == 8 and "window 128" in said


def test_text_says_what_a_longer_context_is_worth(shown_runs: Path) -> None:
    (shown_runs / "quick" / "arena.jsonl").unlink()
    text = {"task": "bytes", "metric": "bits_per_byte", "setting": "", "status": "ok", "by": {"part": {"end": 1.0}}}
    seeds = (("lsh", 0, 0.01), ("lsh", 1, 0.03), ("dense", 0, -0.2))
    write_arena(shown_runs / "quick", [
        {**text, "model": model, "seed": seed, "seq_len": length, "value": 1.2 - seed * 0.1 - saved * (length > 4096)}
        for model, seed, saved in seeds for length in (4096, 16_384)])
    app = page("arena", "quick")
    saved = {row["model"]: row["16,384"] for row in table(app, "16,384")}
    assert saved == {"LSH": "+0.020 (+0.010 to +0.030)", "dense": "-0.200"}
    assert next(row["seeds"] for row in table(app, "best shortcut")) == "1 to 2"


@pytest.mark.parametrize("task, charts", {"passkey": 4, "variable_tracking": 2, "bytes": 3, "my_own_task": 1}.items())
def test_every_task_of_the_arena_draws_what_it_has(shown_runs: Path, task: str, charts: int) -> None:
    app = page("arena", "quick")
    app.selectbox(key="task").set_value(task).run()
    assert not app.exception and len(app.get("plotly_chart")) == charts
    app.selectbox(key=f"arena length {task}").set_value(1024).run()
    assert not app.exception and len(app.get("plotly_chart")) == charts
    if task == "passkey":
        assert [(len(chart["data"][0]["y"]), chart["data"][0]["x"]) for chart in drawn(app)[1:]] == [
            (10, ["1k", "4k", "16k", "128k"])] * 3, "a map a model, with an empty column where there was no memory"
    if task == "variable_tracking":
        assert drawn(app)[1]["data"][0]["mode"] == "lines+markers", "hops have an order"
        assert drawn(app)[1]["layout"]["showlegend"], "of a single line too"
    if task == "bytes":
        line, = (trace for trace in drawn(app)[0]["data"] if trace.get("name") == "best shortcut 2.310: order-2 model")
        top = drawn(app)[0]["layout"]["yaxis"]["range"][1]
        assert top < min(line["y"]), "neither chance nor a shortcut presses the curves flat"
        beaten = [{**row, "shortcuts": {"a rule": 0.5}} for row in arena_rows() if row["task"] == "bytes"]
        (shown_runs / "quick" / "arena.jsonl").unlink()
        write_arena(shown_runs / "quick", beaten)
        low, top = drawn(page("arena", "quick"))[0]["layout"]["yaxis"]["range"]
        assert 0 < low < 0.5 < 1 < top < 2.31, "a rule that beats the models is seen"


def test_a_run_without_an_arena_says_how_to_make_one(shown_runs: Path) -> None:
    app = page("arena", "big-batch", "quick-small-buckets", "reference-h200/full")
    said = [box.value.replace("\\", "") for box in app.info]
    assert said[0] == "**big-batch has no arena yet.** Measure it with `make arena RUN=big-batch`."
    assert "`make arena RUN=quick-small-buckets`" in said[1] and "`make arena RUN=name`" in said[2]
    assert app.selectbox(key="arena").options == ["quick"], "another run's is offered"
    (shown_runs / "quick" / "arena.jsonl").unlink()
    app = page("arena", "big-batch")
    assert len(app.info) == 1 and not app.get("plotly_chart") and not app.selectbox


def test_a_growing_or_broken_arena_still_draws(shown_runs: Path) -> None:
    path = shown_runs / "quick" / "arena.jsonl"
    app = page("arena", "quick")
    write_arena(shown_runs / "quick", [{**arena_rows()[0], "task": "<b>new</b>", "by": {"<i>": {"<u>": 0.5, "": 1}},
                                           "device": "another one"}])
    app.run()
    assert "<b>new</b>" in app.selectbox(key="task").options
    app.selectbox(key="task").set_value("<b>new</b>").run()
    assert not app.exception and "<i>" not in str(drawn(app)[1]["layout"])
    assert drawn(app)[1]["data"][0]["mode"] == "markers", "labels without an order are not joined"
    assert any("another one" in text.value and "test data" not in text.value for text in app.markdown), "its own device"
    path.write_bytes(b'{"task": 1}\n' + path.read_bytes() + b'{"task": "mq')
    app = page("arena", "quick")
    assert "quick: arena.jsonl 1 of " in warnings(app) and len(app.get("plotly_chart")) == 3
    path.write_bytes(b"{}\n")
    assert "have no task, model or seq_len" in warnings(page("arena", "quick"))


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


def test_scaling_shows_both_layouts_attention_alone_and_every_doubling(shown_runs: Path) -> None:
    app = page("scaling", "quick", "reference-h200/full")
    full = json.loads((shown_runs / "reference-h200" / "full" / "benchmark_summary.json").read_text())

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
