"""The operator's benchmark: the command end to end, what follows from hand-made rows, and what it never claims."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from lshv2.attention import visible_set
from lshv2.benchmark import attention_contenders as who
from lshv2.benchmark import attention_inputs as shapes
from lshv2.benchmark import attention_timing as timing
from lshv2.benchmark.attention import plan
from lshv2.benchmark.attention_rows import Bench, Case, predict
from lshv2.benchmark.attention_targets import crossover, targets
from lshv2.errors import UserError
from lshv2.operator_plots import operator_png
from lshv2.operator_results import find_operator_results, read_operator, verdict
from lshv2.readme import results
from lshv2.runs import repo_root, write_json

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a real run of the command, at its smallest."""
    folder = tmp_path_factory.mktemp("runs") / "reference-x" / "operator"
    command = [sys.executable, "-m", "lshv2.benchmark.attention", "--lengths", "300", "160", "--quick",
               "--out", str(folder / "attention.json")]
    said = subprocess.run(command, cwd=repo_root(), check=True, capture_output=True, text=True, timeout=120).stdout
    assert "not measured speed-up at 16,384" in said
    return folder


def test_the_command_measures_everybody_in_turn_and_says_why_not(measured: Path) -> None:
    content = json.loads((measured / "attention.json").read_text())
    assert (content["schema"], content["state"], content["left_out"]) == (2, "done", [])
    assert [(row["mode"], row["seq_len"]) for row in content["rows"]] == [
        ("eager", 300), ("given ids", 300), ("eager", 160)]
    row = content["rows"][0]["contenders"]
    for name in ("lsh", "lsh_clustered", "sdpa"):
        entry = row[name]
        assert entry["n_samples"] == len(entry["both_samples_ms"]) == 2
        for forward, backward, both in zip(*(entry[f"{part}_samples_ms"] for part in ("forward", "backward", "both")),
                                           strict=True):
            assert forward + backward == pytest.approx(both) and min(forward, backward) > 0
    for half in ("forward", "backward"):
        assert {"bucket_attn", "global", "other"} <= row["lsh"]["breakdown"][half].keys()
    assert "hashing" in row["lsh"]["breakdown"]["forward"]
    assert row["sdpa_cudnn"] == {"status": "not measured", "reason": "only timed on cuda"}
    assert "--quick" in row["flex_window"]["reason"]
    assert any(words in row["peer"]["reason"] for words in ("not installed", "multiples of 128 tokens only"))
    assert len(content["rows"][1]["contenders"]) == 14, "seven kinds of ids, of R tables and of one"
    assert (measured / "attention.png").read_bytes().startswith(b"\x89PNG")


def test_a_published_peer_takes_part_where_it_is_installed() -> None:
    pytest.importorskip("reformer_pytorch", reason="optional: pip install reformer-pytorch")
    results = Bench([256], "float32", samples=1, limit_ms=1e4, seed=0, quick=True).eager(Case("eager", 256, 2))
    assert results["peer"]["status"] == "ok" and results["peer"]["both_ms"] > 0 and results["lsh"]["status"] == "ok"


def test_a_budget_leaves_rows_out_by_name(tmp_path: Path) -> None:
    out = tmp_path / "attention.json"
    command = [sys.executable, "-m", "lshv2.benchmark.attention", "--quick", "--budget-s", "0", "--out", str(out)]
    subprocess.run(command, cwd=repo_root(), check=True, capture_output=True, timeout=60)
    content = json.loads(out.read_text())
    assert content["rows"] == [] and [case["seq_len"] for case in content["left_out"]] == [512, 512, 256]
    assert {target["met"] for target in content["targets"]} == {None}


def test_a_dense_opponent_beyond_the_limit_has_no_figure() -> None:
    bench = Bench([160, 128], "float32", samples=1, limit_ms=0.0, seed=0, quick=True)
    bench.probe()
    assert bench.costs["sdpa"][0][0] == 160**2, "a launch-bound probe scaled up would skip what can be measured"
    entry = bench.row(Case("eager", 160))["contenders"]["sdpa"]
    assert entry["status"] == "not measured" and entry["reason"].startswith("predicted ") and "both_ms" not in entry
    assert predict([(4096.0**2, 3.0), (8192.0**2, 11.0)], 16_384.0**2) == 44.0
    assert predict([(4096.0**2, 3.0)], 2048.0**2) == 0.75


def test_the_plan_begins_with_what_tells_most() -> None:
    cases = plan([131_072, 65_536, 1_024, 262_144], "cuda")
    assert cases == [
        Case("eager", 131_072), Case("given ids", 131_072), Case("eager", 65_536), Case("eager", 65_536, 2),
        Case("eager", 1_024), Case("eager", 1_024, 128), Case("eager", 262_144),
        Case("graph", 1_024), Case("graph", 1_024, 128),
    ]


def test_data_are_what_they_are_called() -> None:
    inputs = shapes.make_inputs(2048, 1, "clustered", CPU, torch.float32, seed=0)
    assert inputs.q.norm(dim=-1).allclose(torch.tensor(8.0)) and inputs.n_buckets == 16
    near = torch.nn.functional.normalize(inputs.k[0, 0].detach(), dim=-1)
    cosines = near @ near.T
    assert (cosines > 0.6).float().mean() == pytest.approx(0.044, abs=0.01)  # Zipf over 256 clusters: Σ p²
    asked = torch.nn.functional.normalize(inputs.q[0, 2].detach(), dim=-1) @ near.T
    assert (asked.amax(dim=-1) > 0.6).float().mean() > 0.95, "queries lie far from their group's keys"
    alone = shapes.make_inputs(2048, 1, "uniform", CPU, torch.float32, seed=0)
    assert inputs.bytes == sum(x.numel() * 4 for x in (alone.q, alone.k, alone.v, alone.grad)) * 2

    ids = shapes.given_ids(4096, 1, 32, CPU, seed=0)
    assert all(x.dtype == torch.int32 and x.min() >= 0 and x.max() < 32 for pair in ids.values() for x in pair)
    q, k = ids["queries in two buckets, 95 % of the keys elsewhere"]
    assert q.max() == 1 and 0.94 < (k > 1).float().mean() < 0.96
    q, k = ids["a bucket with 90 % of all"]
    assert 0.89 < (k == 0).float().mean() < 0.92 and 0.89 < (q == 0).float().mean() < 0.92
    q, k = ids["all queries in a bucket of few keys"]
    assert not q.any() and ((k == 0).sum(-1) == 64).all()
    q, k = ids["the same ids in every round"]
    assert (q == q[:, :, :1]).all() and (k == k[:, :, :1]).all() and q.max() > 1


def test_the_window_opponent_sees_window_and_sinks() -> None:
    """The block mask covers exactly what the mask function lets through, and no block is full that is not."""
    length = 700
    mask = who.window_mask(length, CPU)
    place = torch.arange(768)
    seen = who.visible(place[:, None], place[None])
    blocks = seen.view(6, 128, 6, 128)
    full = blocks.all(3).all(1)
    for counts, indices, want in ((mask.full_kv_num_blocks, mask.full_kv_indices, full),
                                  (mask.kv_num_blocks, mask.kv_indices, blocks.any(3).any(1) & ~full)):
        got = torch.zeros(6, 6, dtype=torch.bool)
        for row, count in enumerate(counts[0, 0].tolist()):
            got[row, indices[0, 0, row, :count].long()] = True
        assert (got == want).all()
    none = torch.zeros(1, 1, 1, length, dtype=torch.int32), torch.ones(1, 1, 1, length, dtype=torch.int32)
    ours = visible_set(*none, bucket_size=1, window=shapes.WINDOW, n_global=shapes.N_GLOBAL)
    assert (ours[0, 0] == seen[:length, :length]).all()


def test_a_contender_that_fails_has_its_reason_and_the_others_go_on() -> None:
    def broken() -> timing.Sample:
        raise RuntimeError("CUDA error: out of luck\nmore")

    taken = timing.in_turn({"bad": broken, "good": lambda: {"both": 2.0}}, timing.Limits(most=3))
    assert taken["bad"] == "RuntimeError: CUDA error: out of luck" and taken["good"] == [{"both": 2.0}] * 3
    slow = timing.in_turn({"slow": lambda: {"both": 1000.0}}, timing.Limits(most=20, least=5, seconds=1.5))
    assert len(slow["slow"]) == 5


@pytest.mark.parametrize(("milliseconds", "calls"), [(0.0, 1 + 2 * 6), (30.0, 4 + 3)])
def test_a_short_call_is_made_once_before_it_is_timed(milliseconds: float, calls: int) -> None:
    made = []

    def forward() -> torch.Tensor:
        made.append(time.sleep(milliseconds / 1e3))
        return torch.zeros(1)

    contender = who.Contender("one", forward, (), torch.zeros(1))
    taken = timing.measure([contender], CPU, timing.Limits(most=3))["one"]
    assert len(taken) == 3 and len(made) == calls


def row(length: int, lsh: float, dense: float | None, *, batch: int = 1, mode: str = "eager",
        clustered: float | None = None, ratio: float | None = None) -> dict[str, Any]:
    entries: dict[str, Any] = {"lsh": {"status": "ok", "both_ms": lsh, "extra_memory_ratio": ratio},
                               "sdpa_flash": {"status": "ok", "both_ms": dense and 2 * dense},
                               "sdpa_cudnn": {"status": "ok" if dense else "not measured", "both_ms": dense},
                               "flex_window": {"status": "ok", "both_ms": 0.001}}
    if clustered:
        entries["lsh_clustered"] = {"status": "ok", "both_ms": clustered}
    return {"mode": mode, "seq_len": length, "batch_size": batch, "contenders": entries}


def test_a_crossover_is_the_length_from_which_on_lsh_is_faster() -> None:
    def lengths(**speedups: float) -> list[dict[str, Any]]:
        return [{"seq_len": int(name[1:]), "speedup": value} for name, value in speedups.items()]

    assert crossover([]) is None
    found = crossover(lengths(n1024=0.5, n2048=2.0, n4096=0.25, n8192=4.0, n16384=9.0))
    assert found and found["first_faster"] == 8192, "2,048 was faster, but 4,096 was not"
    assert found["interpolated"] == pytest.approx(math.sqrt(4096 * 8192))
    below = crossover(lengths(n1024=1.5, n2048=2.0))
    assert below and (below["first_faster"], below["interpolated"]) == (1024, None)
    never = crossover(lengths(n1024=0.5, n2048=1.0))
    assert never and (never["first_faster"], never["interpolated"], never["longest"]) == (None, None, 2048)


def judged(rows: list[dict[str, Any]], device: str = "cuda") -> dict[str, dict[str, Any]]:
    return {target["name"]: target for target in targets(rows, device)}


def test_targets_follow_from_the_rows() -> None:
    ids = {"uniform": 2.0, "one bucket": 3.0, "giant": 9.0}
    rows = [
        row(131_072, 8.0, 200.0, clustered=10.0, ratio=0.7), row(65_536, 4.0, 50.0), row(32_768, 2.0, 12.0),
        row(16_384, 1.0, 1.9), row(8_192, 0.5, 0.6), row(4_096, 0.4, 0.3), row(4_096, 5.0, 6.0, batch=32),
        row(2_048, 5.0, 3.0, batch=64), row(4_096, 0.2, 0.3, mode="graph"), row(1_048_576, 70.0, None),
        {"mode": "given ids", "seq_len": 131_072, "batch_size": 1,
         "contenders": {name: {"both_ms": ms} for name, ms in ids.items()}},
    ]
    got = judged(rows)
    fast = got["speed-up at 131,072"]
    assert (fast["value"], fast["met"], fast["stretch_met"]) == (20.0, True, False), "clustered data is the slower"
    assert fast["detail"].startswith("against sdpa_cudnn")
    assert (got["speed-up at 65,536"]["value"], got["speed-up at 16,384"]["met"]) == (12.5, False)
    assert (got["crossover, batch 1"]["value"], got["crossover, batch 1"]["met"]) == (8192, True)
    assert "graph: faster from 4,096" in got["crossover, batch 1"]["detail"]
    fixed = got["crossover, fixed tokens"]
    assert (fixed["value"], fixed["met"], fixed["stretch_met"]) == (4096, True, False)
    alpha = got["α over 32k to 131k, upper 95 % bound"]
    assert alpha["value"] == pytest.approx(1.0) and alpha["stretch_met"]
    worst = got["worst adversarial ids against uniform"]
    assert (worst["value"], worst["met"], worst["detail"]) == (4.5, False, "giant")
    assert got["extra memory at 131,072 over q, k, v, o and gradients"]["stretch_met"]
    million = got["1,048,576 tokens against the time of 131,072"]
    assert (million["value"], million["met"], million["stretch_met"]) == (8.75, True, True)


def test_what_the_rows_do_not_tell_is_not_measured() -> None:
    assert {target["met"] for target in judged([]).values()} == {None}
    long = judged([row(131_072, 1.0, 20.0)])
    assert long["crossover, batch 1"]["met"] is None, "faster at the only length says nothing about 8,192"
    slow = judged([row(131_072, 1.0, 0.5)])["crossover, batch 1"]
    assert (slow["met"], slow["value"]) == (False, None) and "not faster up to 131,072" in slow["detail"]
    json.dumps(slow, allow_nan=False)  # "never" is not written as infinity


def test_the_cpus_last_target_says_that_it_is_extrapolated() -> None:
    rows = [row(32_768, 10.0, 50.0), row(65_536, 20.0, None)]
    got = judged(rows, "cpu")["speed-up at 65,536"]
    assert (got["value"], got["met"], got["stretch_met"]) == (10.0, True, False) and "extrapolated" in got["detail"]
    got = judged([*rows[:1], row(65_536, 20.0, 100.0)], "cpu")["speed-up at 65,536"]
    assert (got["value"], got["met"]) == (5.0, False), "measured comes before extrapolated"


def test_the_reader_gives_what_the_command_wrote(measured: Path) -> None:
    result, problems = read_operator(measured)
    assert result is not None and not problems
    content = json.loads((measured / "attention.json").read_text())
    shown = result.of("eager", batch_one=True)
    assert [row.seq_len for row in shown] == [160, 300]
    assert shown[1].contenders["lsh"].get("both_ms") == content["rows"][0]["contenders"]["lsh"]["both_ms"]
    assert math.isnan(shown[1].contenders["sdpa_flash"].get("both_ms"))
    assert {s.seq_len for s in result.speedups} == {160, 300}
    assert [verdict(target) for target in result.targets] == ["not measured"] * 6, "R tables and an inverted file"
    assert find_operator_results(measured.parent.parent) == [measured]
    said = results(measured.parent.parent)
    assert "(runs/reference-x/operator)**, one attention layer" in said and "| 300 | " in said
    assert "None of its 6 targets was measured here." in said
    assert "![" in said and "(runs/reference-x/operator/attention.png)" in said


@pytest.mark.parametrize("content", [b"{", b"[]", b'{"schema": 2}', b'{"schema": 2, "rows": [7, {"mode": "magic"}]}'])
def test_a_broken_file_is_a_problem_with_its_name(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "attention.json").write_bytes(content)
    result, problems = read_operator(tmp_path)
    assert str(problems[0]).startswith("attention.json ") and (result is None or not result.rows)
    with pytest.raises(UserError, match="no plot"):
        operator_png(tmp_path)


def test_files_of_the_first_schema_are_read(tmp_path: Path) -> None:
    write_json(tmp_path / "attention.json", {
        "schema": 1, "environment": {"gpus": [], "cpu": "a CPU", "torch": "2.13.0"},
        "rows": [{"seq_len": 4096, "dtype": "torch.float32", "lsh_ms": 4.0, "dense_ms": 6.0, "speedup": 1.5}],
    })
    result, problems = read_operator(tmp_path)
    assert result is not None and not problems
    assert (result.device, result.dtype, result.targets) == ("cpu (a CPU)", "float32", ())
    assert result.rows[0].contenders["sdpa"].get("both_ms") == 6.0 and result.speedups[0].factor == 1.5
    assert operator_png(tmp_path).startswith(b"\x89PNG")
