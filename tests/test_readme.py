"""The README's results are those of the reference runs, whole, partial or none."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from project_files import ROOT, page

from lshv2 import readme, readme_parts
from lshv2.errors import UserError
from lshv2.operator_results import Target
from lshv2.runs import append_jsonl, write_json


def test_the_results_are_up_to_date() -> None:
    want = readme.with_results(page("README.md"), readme.digest(ROOT / "runs"))
    assert page("README.md") == want, "run: python -m lshv2.readme"
    assert page("runs/RESULTS.md") == readme.page_of(ROOT / "runs"), "run: python -m lshv2.readme"


def test_every_link_of_the_results_leads_somewhere() -> None:
    links = re.findall(r"\]\((?!http)([^)#]+)", page("runs/RESULTS.md"))
    assert len(links) > 10 and [link for link in links if not (ROOT / "runs" / link).exists()] == []


def test_the_readme_shows_the_reference_with_most_rows(tmp_path: Path) -> None:
    assert readme.digest(tmp_path) == readme.NONE_YET
    row = {"task": "mqar", "model": "lsh", "seed": 0, "setting": "", "seq_len": 1024, "status": "ok",
           "trained_len": 512, "metric": "accuracy", "value": 0.5, "chance": 0.25, "device": "a GPU"}
    alone = {**row, "task": "listops", "seq_len": 2001}
    for name, rows in (("few", [row]), ("more", [row, {**row, "task": "copy"}, alone])):
        (tmp_path / "reference-x" / name).mkdir(parents=True)
        for one in rows:
            append_jsonl(tmp_path / "reference-x" / name / "arena.jsonl", one)
    said = readme.digest(tmp_path)
    assert "(runs/reference-x/more)" in said and "few" not in said and said.endswith(readme.MORE)
    assert "| target |" not in said and "| ListOps, trained at 512 | 2,001 | – | 50.0 %, 1 seed | – |" in said, said


def test_results_say_what_was_not_measured(tmp_path: Path) -> None:
    row = {"attention": "lsh", "seq_len": 1024, "status": "ok", "latency_ms": 12.34, "train_latency_ms": 1234.5,
           "rss_mb": 400.2, "batch_size": 1}
    dead = {"attention": "dense", "seq_len": 2048, "status": "out of memory", "latency_ms": 7.0}
    fit = {"exponent": 1.014, "low": 0.9, "high": 1.131, "n": 5, "r2": 1.0, "min_seq_len": 1024, "max_seq_len": 16384}
    content = {"device": "cpu (tested)", "dtype": "float32", "state": "done", "rows": [row, dead],
               "fits": {"lsh": {"train_latency": fit, "memory": None}}}
    assert readme.results(tmp_path) == readme.NONE_YET
    write_json(tmp_path / "mine" / "benchmark_summary.json", content)
    assert readme.results(tmp_path) == readme.NONE_YET, "a run that is no reference"
    write_json(tmp_path / "reference-x" / "full" / "benchmark_summary.json", content)
    write_json(tmp_path / "reference-x" / "full" / "pipeline_results.json",
               {"verdict": "All is well.", "environment": {"commit": "0123456789", "torch": "2.13.0"}})
    said = readme.results(tmp_path)
    assert "**[reference-x/full](runs/reference-x/full)**: cpu (tested), float32, torch 2.13.0, commit 0123456" in said
    assert "| 1,024 | 12.3 | not measured | 1,234 | not measured | 400 | not measured |" in said
    assert "| 2,048 | not measured | 7.0 | not measured | out of memory | not measured | out of memory |" in said
    assert "α (forward + backward) = 1.01, 95 % interval 0.90 to 1.13, 5 lengths, 1,024 to 16,384 tokens; β" in said
    assert "β (memory above the fixed part) not measured." in said and said.endswith("All is well.")
    decade = {**fit, "high": 1.2, "bootstrap_low": 1.0, "bootstrap_high": 1.25, "min_seq_len": 2048}
    more = {**fit, "resampled": "processes", "ranges": {"longest_decade": decade}}
    fixed = {"tokens": 131_072, "rows": [{**row, "batch_size": 128}], "fits": {"lsh": {"train_latency": fit}}}
    write_json(tmp_path / "reference-x" / "full" / "benchmark_summary.json",
               {**content, "fits": {"lsh": {"train_latency": more, "memory": None}}, "fixed_tokens": fixed})
    said = readme.results(tmp_path)
    assert ("; α over the longest decade, 2,048 to 16,384 tokens, at most 1.25 (the larger upper end of its interval "
            "and a bootstrap over processes); α (forward + backward at 131,072 tokens a batch) = 1.01, 95 %") in said
    write_json(tmp_path / "reference-x" / "full" / "benchmark_summary.json", {**content, "state": "running"})
    assert "commit 0123456; the benchmark was not finished\n" in readme.results(tmp_path)
    write_json(tmp_path / "reference-x" / "alone" / "benchmark_summary.json",
               {**content, "environment": {"torch": "2.11", "commit": "abcdef0123"}, "weights": "untrained",
                "tokens": "random", "gradient_checkpoint": True,
                "fits": {**content["fits"], "dense": {"train_latency": {**fit, "exponent": 1.8}}},
                "fixed_tokens": {**fixed, "fits": {"dense": {"memory": {**fit, "low": None}}}}})
    said = readme.results(tmp_path)
    assert ("(runs/reference-x/alone)**: cpu (tested), float32, untrained weights, random tokens, "
            "gradient_checkpoint=true, torch 2.11, commit abcdef0\n") in said
    assert "not measured; dense: α 1.80 (0.90 to 1.13), β at fixed tokens 1.01." in said, "the twin's beside LSH's"
    with pytest.raises(UserError, match="once each"):
        readme.with_results("no marks", said)


def test_training_steps_are_shown_with_what_did_not_fit(tmp_path: Path) -> None:
    row = {"attention": "lsh", "seq_len": 4096, "batch_size": 32, "ponder": True, "gradient_checkpoint": True,
           "compile": False, "status": "ok", "step_ms": 1234.4, "step_ms_p20": 1200.0, "step_ms_p80": 1300.0,
           "tokens_per_sec": 106_000.0, "over_dense": 7.789, "mfu": None, "peak_mb": 2048.0,
           "commit": "abcdef01"}
    full = {**row, "seq_len": 131_072, "batch_size": 1, "status": "out of memory", "gradient_checkpoint": "block",
            "commit": "0123456789"}
    apart = {**row, "ponder": False, "compile": True, "mfu": 0.356, "over_dense_commit": "98765432"}
    content = {"device": "cuda (a GPU)", "environment": {"commit": "0123456789", "torch": "2.11"},
               "rows": [row, full, apart]}
    write_json(tmp_path / "reference-x" / "training" / "training.json", content)
    said = readme.results(tmp_path)
    assert "cuda (a GPU), torch 2.11, commit 0123456, abcdef0\n" in said
    assert said.splitlines()[-4:] == [
        "| --- | ---: | --- | ---: | ---: | ---: | ---: | ---: | --- |",
        "| lsh, Ponder, not compiled | 4,096 x 32 | all but attention "
        "| 1,234 (1,200 to 1,300) | 106,000 | 7.79 × |  | 2.0 | abcdef0 |",
        "| lsh, Ponder, not compiled | 131,072 x 1 | blocks | out of memory |  |  |  |  | 0123456 |",
        "| lsh | 4,096 x 32 | all but attention "
        "| 1,234 (1,200 to 1,300) | 106,000 | 7.79 × (dense: 9876543) | 0.36 | 2.0 | abcdef0 |",
    ]


def test_trained_runs_are_a_line_each(tmp_path: Path) -> None:
    run = tmp_path / "reference-x" / "full"
    settings = {"model": {"attention": "dense"}, "train": {"seq_length": 131_072}}
    write_json(run / "config.json", {"schema": 1, "run": "full", "settings": settings})
    assert readme.results(tmp_path) == readme.NONE_YET
    steps = list(range(0, 80, 10))
    train = {name: [1.0, 2.0, 3.0] for name in ("loss_train", "learning_rate", "ponder_steps", "grad_norm", "tokens")}
    write_json(run / "training_metrics.json", {
        "schema": 1, "state": "running", "device": "a GPU", "environment": {"commit": "0123456789"}, "step": [2, 4, 79],
        **train, "tokens_per_sec": [10.0, 22_668.4, 30_000.0], "eval_step": steps, "loss_eval": [1.0] * 8,
        "accuracy": [0.5] * 8, "bits_per_byte": [4.0 - n / 40 for n in steps],
    })
    assert readme.results(tmp_path).splitlines()[-1] == (
        "| [reference-x/full](runs/reference-x/full) | dense | 131,072 | 79 | 22,668 | "
        "4.000 (0), 3.750 (10), 3.250 (30), 2.750 (50), 2.250 (70) | a GPU, 0123456 |"
    )


def test_targets_stand_with_how_they_were_measured_and_those_that_were_not_in_a_line(tmp_path: Path) -> None:
    """Of every reference, also of one that missed what another met; how much it left out too."""
    def row(length: int) -> dict[str, Any]:
        return {"mode": "eager", "seq_len": length, "batch_size": 1, "n_buckets": 8,
                "contenders": {"lsh": {"status": "ok", "both_ms": 1.5}, "peer": {"status": "ok", "both_ms": 30.0}}}

    def target(name: str, value: float | None) -> dict[str, Any]:
        return {"name": name, "target": "≥ 2 ×", "stretch": "≥ 4 ×", "value": value, "unit": "×", "met": True,
                "stretch_met": False, "detail": "why"}

    common = {"schema": 2, "state": "done", "device": "cuda (a GPU)", "dtype": "bfloat16", "environment": {}}
    for name, lengths in (("few", (1024,)), ("more", (1024, 2048))):
        write_json(tmp_path / "reference-x" / name / "attention.json", {
            **common, "rows": [row(length) for length in lengths], "targets": [target(f"speed of {name}", 3.0)],
            "left_out": [{"mode": "graph", "seq_len": 4096, "batch_size": 1}] if name == "few" else []})
    said = readme.results(tmp_path)
    assert said.count("| 1,024 | 1.5 | 30 |") == 2 and said.count("1 rows left out") == 1
    assert all(f"| speed of {name} | ≥ 2 × | ≥ 4 × | 3 × (why) | met |" in said for name in ("few", "more"))
    measured, missing = ([Target(name, "≥ 2 ×", "≥ 4 ×", value, "×", None, None, "why")] for name, value in
                         (("a", 3.0), ("b", math.nan)))
    assert readme_parts.target_table([*measured, *missing])[-1] == "Not measured here: b (why)."
    bare = [replace(target, detail="") for target in missing]
    assert readme_parts.target_table([*measured, *bare])[-1] == "Not measured here: b."
    assert readme_parts.target_table(missing) == ["None of its 1 targets was measured here."]


def test_several_gpus_stand_below_the_one(tmp_path: Path) -> None:
    row = {"mode": "sequence", "attention": "lsh", "ponder": False, "compile": True, "gradient_checkpoint": "block",
           "seq_len": 131_072, "batch_size": 1, "processes": 2, "step_ms": 626.9, "tokens_per_sec": 209_088.4,
           "speed_up": 1.723, "peak_mb": 18_432.0}
    content = {"device": "cuda (a GPU)", "environment": {"commit": "0123456789", "torch": "2.11"}, "processes": 2,
               "rows": [{**row, "mode": "alone", "processes": 1, "speed_up": None}, row]}
    folder = tmp_path / "reference-x" / "training"
    write_json(folder / "training.json", {"rows": []})
    write_json(folder / "parallel-2.json", content)
    said = readme.results(tmp_path)
    assert said.splitlines()[-2:] == [
        "| the whole step | 1 | lsh | 131,072 x 1 | blocks | 627 | 209,088 |  | 18.0 |",
        "| a part of each sequence | 2 | lsh | 131,072 x 1 | blocks | 627 | 209,088 | 1.72 × | 18.0 |",
    ]
    assert ("[parallel-2.json](runs/reference-x/training/parallel-2.json), the same step on 2 GPUs, medians: "
            "cuda (a GPU), torch 2.11, commit 0123456\n") in said
    equal = [{"loss_first": 1e-7, "loss_later": 2e-5}, {"loss_first": 3e-7, "loss_later": 1e-5}]
    write_json(folder / "parallel-2.json", {**content, "equality": equal})
    assert "losses in float32 are one process's within 3e-07 of them in the first step, 2e-05 in the next\n" in (
        readme.results(tmp_path))


def test_ablations_are_shown_with_their_spread(tmp_path: Path) -> None:
    def twin(low: float) -> dict[str, float]:
        values = {"": low + 0.1, "_low": low, "_high": low + 0.3}
        columns = ("bits_per_byte", "late_bits_per_byte")
        return {"seeds": 3, **{column + end: value for column in columns for end, value in values.items()}}

    content = {"environment": {"commit": "0123456789", "torch": "2.13.0", "gpus": [], "cpu": "a CPU"},
               "summary": {"worse": twin(2.0), "better": twin(1.5)}}
    write_json(tmp_path / "reference-x" / "quality" / "ablation.json", content)
    said = readme.results(tmp_path)
    assert "(runs/reference-x/quality)**" in said and "a CPU, torch 2.13.0, commit 0123456." in said
    assert said.splitlines()[-2:] == [
        "| `better` | 3 | 1.600 (1.500 to 1.800) | 1.600 (1.500 to 1.800) |",
        "| `worse` | 3 | 2.100 (2.000 to 2.300) | 2.100 (2.000 to 2.300) |",
    ]
