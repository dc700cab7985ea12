"""The arena's study: what is planned, missing, shared among processes, killed and gone on with."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from project_files import ROOT

from lshv2.arena import study
from lshv2.arena.job import run_job
from lshv2.arena.judge import judge
from lshv2.arena.phase import publish, run_arena
from lshv2.arena.pool import in_order, run_pool
from lshv2.arena.recipes import RECIPES
from lshv2.arena.registry import get_task
from lshv2.arena.study import ARENA, Job, missing, plan, rows_of
from lshv2.arena.sweep import LIGHTER_DENSE, POINTS, TASKS, Point, sweep_jobs
from lshv2.arena.task import REGISTERED
from lshv2.arena.tasks.text import Text
from lshv2.errors import UserError
from lshv2.runner.phases import PHASE_TABLE, hash_outputs
from lshv2.runner.sweep import run_sweep
from lshv2.runs import open_run, read_json, read_jsonl, repo_root, write_json

TINY: dict[str, Any] = {"steps": 4, "sequences": 6}


def small_plan(*tasks: str, changes: dict[str, Any] | None = None, **more: Any) -> list[Job]:
    return plan(tasks, lengths=(64, 200), small=True, changes={**TINY, **(changes or {})}, **more)


def test_committed_rows_are_of_the_recipes_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the same command trains anew what the folder holds, and the table shows what no recipe gives."""
    rows = rows_of(repo_root() / "runs" / "reference-h200" / "arena")
    plain = {(row["task"], row["model"], row["seed"]) for row in rows.values() if row["setting"] == ""}
    planned = plan(sorted({task for task, *_ in plain}), seeds=range(6))  # 3 to 5: after the recipes had been chosen
    jobs = {(job.task, job.model, job.seed): job for job in planned if not job.label}
    assert len(plain) > 60 and [which for which in plain if missing(jobs[which], rows)] == []
    points = {(row["task"], row["seed"], row["setting"]) for row in rows.values()
              if row["setting"] in {point.label for point in POINTS if point.label}}
    swept = {(job.task, job.seed, job.label): job for job in sweep_jobs(TASKS, (0, 1, 2))}
    known = {job.trained_as: job.trained_by for job in (*planned, *swept.values())}
    assert len(points) > 30, "the quality curve's too"
    shortest = {which: replace(job, lengths=job.lengths[:1]) for which, job in swept.items()}
    assert {which for which in points if missing(shortest[which], rows)} == set()
    assert {row["trained_as"]: row["trained_by"] for row in rows.values()}.items() <= known.items()
    twins = {(job.task, job.seed): job.trained_as for job in plan(["mqar"], ("dense",), (0, 1, 2))}
    assert {which[:2]: job.trained_as for which, job in swept.items() if not job.label} == twins
    plain, = plan(["mqar"], ("lsh",))
    ponders = replace(plain, recipe=replace(plain.recipe, settings={**plain.recipe.settings, "use_ponder": True}))
    before = plain.trained_as, ponders.trained_as
    monkeypatch.setitem(study.UNUSED, "ponder_beta", 9.0)
    assert plain.trained_as != before[0] and ponders.trained_as == before[1], "where it is read its own value counts"


def test_a_study_goes_on_where_it_was(tmp_path: Path) -> None:
    job, = small_plan("induction", attentions=("lsh",))
    assert run_job(job, tmp_path) == 2
    rows = read_jsonl(tmp_path / ARENA)[0]
    assert [(row["seq_len"], row["status"], row["steps"]) for row in rows] == [(64, "ok", 4), (200, "ok", 4)]
    assert {row["trained_as"] for row in rows} == {job.trained_as} and not missing(job, rows_of(tmp_path))
    assert run_job(job, tmp_path) == 0, "nothing is computed twice"
    weights = tmp_path / "arena" / "induction-lsh-0.pt"
    before = weights.stat().st_mtime_ns
    longer = replace(job, lengths=(64, 200, 256))
    assert run_job(longer, tmp_path) == 1 and weights.stat().st_mtime_ns == before, "a new length trains nothing"
    assert rows_of(tmp_path)[tuple_of(longer, 256)]["value"] is not None
    changed, = small_plan("induction", attentions=("lsh",), changes={"steps": 5})
    assert changed.trained_as != job.trained_as and len(missing(changed, rows_of(tmp_path))) == 2
    assert run_job(changed, tmp_path) == 2 and weights.stat().st_mtime_ns != before
    last = list(rows_of(tmp_path).values())[-1]
    assert last["steps"] == 5 and last["trained_as"] == changed.trained_as


def test_other_sequences_are_asked_of_the_same_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job, = small_plan("induction", attentions=("lsh",))
    other, numbers = replace(job, asked=1), list[int]()

    def spied(*arguments: Any) -> dict[str, Any]:
        numbers.append(arguments[-1])
        return judge(*arguments)

    monkeypatch.setattr("lshv2.arena.judge.judge", spied)
    assert run_job(job, tmp_path, lambda _: None) == run_job(other, tmp_path, lambda _: None) == 2
    rows = rows_of(tmp_path).values()
    assert [row["setting"] for row in rows] == ["", "", "sequences 1", "sequences 1"] and numbers == [0, 0, 1, 1]
    assert len({row["train_seconds"] for row in rows}) == 1, "trained once"
    assert missing(job, rows_of(tmp_path)) == missing(other, rows_of(tmp_path)) == []
    fewer, more = (replace(job, recipe=replace(job.recipe, sequences=n)) for n in (5, 7))
    assert missing(fewer, rows_of(tmp_path)) == [] and len(missing(more, rows_of(tmp_path))) == 2


def test_a_seed_comes_before_the_next_and_its_longest_jobs_first() -> None:
    jobs = [job for steps in (4, 5) for job in small_plan("induction", attentions=("lsh", "dense"), seeds=(0, 1),
                                                          changes={"steps": steps})]
    assert [(job.seed, job.recipe.steps) for job in in_order(jobs)] == [(0, 5)] * 2 + [(0, 4)] * 2 + [(1, 5)] * 2 + [
        (1, 4)] * 2


def test_a_task_of_another_version_is_trained_and_judged_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job, = small_plan("induction", attentions=("lsh",))
    assert run_job(job, tmp_path) == 2
    before = (tmp_path / "arena" / "induction-lsh-0.pt").read_bytes()
    monkeypatch.setattr(type(get_task("induction")), "version", 2)
    assert len(missing(job, rows_of(tmp_path))) == 2
    assert run_job(job, tmp_path) == 2 and len(rows_of(tmp_path)) == 4
    assert (tmp_path / "arena" / "induction-lsh-0.pt").read_bytes() != before


def tuple_of(job: Job, length: int) -> tuple[Any, ...]:
    return job.task, job.model, job.seed, "", length, job.trained_as


def test_weights_that_were_judged_are_those_that_lie_there(tmp_path: Path) -> None:
    job, = small_plan("induction", attentions=("lsh",))
    run_job(job, tmp_path)
    first = rows_of(tmp_path)[tuple_of(job, 64)]["value"]
    (tmp_path / ARENA).unlink()
    run_job(job, tmp_path)
    assert rows_of(tmp_path)[tuple_of(job, 64)]["value"] == first
    state = torch.load(tmp_path / "arena" / "induction-lsh-0.pt", weights_only=True)
    state["model"]["head.weight"].zero_()
    state["model"]["head.weight"][7] = 1.0
    torch.save(state, tmp_path / "arena" / "induction-lsh-0.pt")
    (tmp_path / ARENA).unlink()
    run_job(job, tmp_path)
    assert rows_of(tmp_path)[tuple_of(job, 64)]["value"] in (0.0, *(n / 6 for n in range(1, 4)))


def test_duplication_is_asked_with_other_probes(tmp_path: Path) -> None:
    lsh, dense = small_plan("duplication", attentions=("lsh", "dense"))
    assert [name for name, _ in lsh.settings] == ["", "rounds=1", "rounds=2", "rounds=8", "attention=dense"]
    assert [name for name, _ in dense.settings] == [""]
    run_job(replace(lsh, lengths=(64,)), tmp_path)
    rounds = {row["setting"]: row["rounds"] for row in rows_of(tmp_path).values()}
    assert rounds == {"": 4, "rounds=1": 1, "rounds=2": 2, "rounds=8": 8, "attention=dense": 4}


def test_what_lsh_alone_reads_trains_no_twin_anew() -> None:
    """Nor the quality curve's points, which have shapes of their own; laptop recipes have nothing of it."""
    own = plan(["mqar"], seeds=(0,))
    without = plan(["mqar"], seeds=(0,), changes={"lsh": {}})
    assert {job.model: job.trained_as == bare.trained_as for job, bare in zip(own, without, strict=True)} == {
        "lsh": False, "dense": True, "dense_scaled": True, "window": True}
    assert own[0].config.n_buckets == 16_384 and without[0].config.n_buckets == own[1].config.n_buckets == 4096
    point = next(job for job in sweep_jobs(("mqar",), (0,)) if job.label == "R 4, W 64, cells x 1")
    assert point.config.n_buckets == 4096 and not point.recipe.lsh
    assert small_plan("mqar", attentions=("lsh",))[0].config.n_buckets == 64


def test_tracking_is_asked_with_everything_to_see_too(tmp_path: Path) -> None:
    job, = small_plan("variable_tracking", attentions=("lsh",), variants=False)
    run_job(job, tmp_path)
    rows = {(row["setting"], row["seq_len"]): row for row in rows_of(tmp_path).values()}
    assert {which: row["keys_a_query"] is None for which, row in rows.items()} == {
        (name, n): bool(name) for n in (64, 200) for name in ("", "attention=dense")}
    assert {which: row.get("centroids") for which, row in rows.items() if which[1] == 64} == {
        ("", 64): "unit", ("attention=dense", 64): None}, "only who looks for cells has centroids"
    assert {row["model"] for row in rows.values()} == {"lsh"} and len({row["trained_as"] for row in rows.values()}) == 1


def test_the_sweep_changes_what_its_points_say(tmp_path: Path) -> None:
    jobs = sweep_jobs(("duplication",), (0, 1), small=True, changes=TINY)
    assert len(jobs) == 2 * len(POINTS) and len({job.trained_as for job in jobs}) == len(jobs)
    config = {job.label: job.config for job in jobs[: len(POINTS)]}
    assert config["R 8, W 8, cells x 1"].n_rounds == config["R 8, W 8, cells x 1"].bucket_size == 8
    assert config["R 4, W 16, cells x 4"].n_buckets == 4 * config["R 4, W 16, cells x 1"].n_buckets
    usual, = plan(["duplication"], ("dense",), small=True, changes=TINY)
    assert config[""] == usual.config, "the dense twin is the arena's own"
    half = {job.label: job.recipe for job in sweep_jobs(("duplication",), (0,)) if job.model == "dense"}
    assert {label: how.steps for label, how in half.items()} == {LIGHTER_DENSE: 5000}, "trained as the points are"
    text = sweep_jobs(("bytes",), (0,))
    assert {(job.recipe.steps, job.lengths) for job in text} == {(1000, (16_384,))} and len(text) == len(POINTS)
    assert [job.label for job in text if job.model == "dense"] == [LIGHTER_DENSE]
    seen = {config[f"R {r}, W {w}, cells x 1"].n_rounds * w for r, w in ((1, 16), (2, 16), (4, 16), (8, 16), (4, 8))}
    twins = {c.window - 16 for c in config.values() if c.attention == "window"}
    assert seen <= twins | {0}, "each number of found keys has a window that sees as many recent ones"


def test_the_sweep_executes_a_notebook_a_point_and_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("nbformat", reason="notebooks are executed")
    some = {"preset": "test", "overrides": {"arena.lengths": [64], "arena.steps": 2}, "seed": 0, "data": None}
    points = (Point("lsh", 2, 64), Point("lsh", 1, 64), Point("window"))
    assert run_sweep(tmp_path / "sweep", "make sweep", points, **some) == 0
    rows = rows_of(tmp_path / "sweep").values()
    assert [(row["setting"], row["task"], row["rounds"]) for row in rows] == [
        ("R 2, W 16, cells x 1", "duplication", 2), ("R 1, W 16, cells x 1", "duplication", 1),
        ("window 16", "duplication", 4)]
    assert len(list((tmp_path / "sweep" / "notebooks" / "sweep").glob("*.ipynb"))) == 3
    assert (tmp_path / "sweep" / "arena_curve.png").exists()
    assert run_sweep(tmp_path / "sweep", "make sweep", points, **some) == 0
    assert len(read_jsonl(tmp_path / "sweep" / ARENA)[0]) == 3, "nothing is computed twice"
    assert capsys.readouterr().out.count(": there") == 3


KILLED = """
import os, signal, sys
from pathlib import Path
from lshv2.arena import job, learn
from lshv2.arena.study import plan

def on_step(step, loss):
    if step == int(sys.argv[2]):
        os.kill(os.getpid(), signal.SIGKILL)

learn.SAVE_EVERY, learn.CHECK_EVERY = 0.0, 3
changes = {"steps": 10, "sequences": 2, "tokens": 256, "lengths": (64, 128)}
one, = plan(["mqar"], ("lsh",), (0,), (128,), True, changes=changes)
job.run_job(one, Path(sys.argv[1]), on_step=on_step)
"""


def test_a_killed_training_goes_on_from_its_checkpoint_and_ends_as_one_that_was_not(tmp_path: Path) -> None:
    """To the bit: weights, cells, losses. Killed twice, once right after a checkpoint that was then torn."""
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}

    def run(folder: str, killed_at: int = 0) -> str:
        command = [sys.executable, "-c", KILLED, str(tmp_path / folder), str(killed_at)]
        (tmp_path / folder).mkdir(exist_ok=True)
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
        assert done.returncode == (-signal.SIGKILL if killed_at else 0), done.stderr
        return done.stdout

    run("whole")
    half, weights = (tmp_path / "parts" / "arena" / f"mqar-lsh-0{end}" for end in (".half.pt", ".pt"))
    assert run("parts", 3) == "" and half.exists()
    assert run("parts", 9) == "mqar lsh seed 0: goes on after step 3 of 10\n"
    assert len(torch.load(half)["losses"]) == 9 and not weights.exists()
    whole_half = half.read_bytes()
    half.write_bytes(whole_half[:-100])
    assert "mqar-lsh-0.half.pt is unreadable" in run("parts", 6)
    half.write_bytes(whole_half)
    assert run("parts").startswith("mqar lsh seed 0: goes on after step 9 of 10\n") and not half.exists()
    first, second = (torch.load(tmp_path / folder / "arena" / weights.name) for folder in ("whole", "parts"))
    assert first["figures"]["loss_train"] == second["figures"]["loss_train"]
    assert first["model"].keys() == second["model"].keys()
    assert all(torch.equal(x, second["model"][name]) for name, x in first["model"].items())
    values = [rows_of(tmp_path / folder).values() for folder in ("whole", "parts")]
    assert [row["value"] for row in values[0]] == [row["value"] for row in values[1]]


PLUGIN = """
from lshv2.arena.task import register
from lshv2.arena.tasks.text import Text

@register
class Pg19(Text):
    name, source = "pg19", {source!r}
"""


def test_a_text_of_ones_own_takes_one_file(tmp_path: Path) -> None:
    """As CONTRIBUTING says, by the command line, in processes of their own; killed once on the way."""
    books = tmp_path / "books"
    books.mkdir()
    for i in range(12):
        (books / f"{i}.txt").write_text(f"Book {i}. " + " ".join(str(i * n % 977) for n in range(900)))
    plugin = tmp_path / "my_tasks.py"
    plugin.write_text(PLUGIN.format(source=str(books)))
    command = [sys.executable, "-m", "lshv2.arena", str(tmp_path / "out"), "--plugins", str(plugin), "--tasks", "pg19",
               "--attentions", "lsh", "dense", "--seeds", "0", "--lengths", "128", "131072", "--steps", "4",
               "--sequences", "2", "--small"]
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    first = subprocess.Popen(command, env=environment, start_new_session=True, stdout=subprocess.DEVNULL)
    rows = tmp_path / "out" / ARENA
    deadline = time.monotonic() + 120
    while not rows.exists() and first.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()
    kept = read_jsonl(rows)[0]
    assert kept, "nothing was there when it was killed"
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    after = read_jsonl(rows)[0]
    assert after[: len(kept)] == kept and len({(r["model"], r["seq_len"]) for r in after}) == 4
    assert len([r for r in after if r["status"] == "ok"]) == 2, "what was judged is not judged again"
    assert {r["task"] for r in after} == {"pg19"} and all(r["metric"] == "bits_per_byte" for r in after)
    short, long = ([r for r in after if r["seq_len"] == n] for n in (128, 131_072))
    assert all(1 < r["value"] < 10 for r in short), "hardly trained bytes take between a few bits and eight"
    assert all(r["status"] == "not run" and "fewer than one window of 131,072" in r["reason"] for r in long)


DYING = """
import os
from lshv2.arena.task import register
from lshv2.arena.tasks.induction import Induction

@register
class Dying(Induction):
    name, like = "dying", "induction"
    def draw(self, generator, n, length):
        os._exit(3)

@register
class InProcesses(Induction):
    name, like, in_processes = "in_processes", "induction", True
"""


def test_a_process_that_dies_takes_one_job_with_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """And a task of one's own may draw in processes, which know its file too. Beside another it is tried once more."""
    plugin = tmp_path / "my_tasks.py"
    plugin.write_text(DYING)
    jobs = plan(["dying", "in_processes"], ("window",), (0,), (64,), True, (str(plugin),), {"steps": 2, "sequences": 2})
    jobs[0] = replace(jobs[0], recipe=replace(jobs[0].recipe, steps=3))  # the longer one is the first
    try:
        assert run_pool(jobs, tmp_path / "out", [""]) == 1
        alone, = rows_of(tmp_path / "out").values()
        assert (alone["task"], alone["shared"]) == ("in_processes", False)
        assert 0 < alone["forward_ms_p20"] <= alone["forward_ms"] <= alone["forward_ms_p80"]
        assert capsys.readouterr().out.count("FAILED dying window seed 0: BrokenProcessPool") == 1
        assert run_pool(jobs, tmp_path / "beside", ["", ""]) == 1
        beside, = rows_of(tmp_path / "beside").values()
        assert beside["shared"] and "forward_ms" not in beside, "beside other jobs a time tells nothing"
        assert capsys.readouterr().out.count("FAILED dying") == 2
    finally:
        for name in ("dying", "in_processes"):
            REGISTERED.pop(name, None)


def test_a_task_may_have_another_model_that_ponders() -> None:
    jobs = plan(["variable_tracking"], seeds=(0,))
    assert [(job.model, job.label, job.config.use_ponder, job.config.n_ponder_steps) for job in jobs] == [
        ("lsh", "", False, 1), ("dense", "", False, 1), ("window", "", False, 1), ("lsh", "pondering", True, 4)]


def test_dense_attention_is_scaled_where_longer_sequences_are_judged_than_trained() -> None:
    here = {job.task: job.config for job in plan(RECIPES, ("dense_scaled",))}
    assert set(here) == {"mqar", "mqar_dense_pairs", "induction", "selective_copying", "selective_copying_dense",
                         "listops_long", "bytes"}
    assert {(config.attention, config.softmax_scale) for config in here.values()} == {("dense", "log_length")}
    dense, = plan(["mqar"], ("dense",))
    scaled, = plan(["mqar"], ("dense_scaled",))
    assert dense.trained_as != scaled.trained_as
    with pytest.raises(UserError, match="no model to train of mqar with dense_scaled"):
        plan(["mqar"], ("dense_scaled",), lengths=(1024,))


def test_every_task_can_be_swept() -> None:
    jobs = sweep_jobs(tuple(RECIPES), (0,))
    assert len(jobs) == len(RECIPES) * len(POINTS) and not any(job.config.use_ponder for job in jobs)


def test_too_little_memory_beside_others_is_no_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*_: Any, **__: Any) -> dict[str, Any]:
        raise torch.OutOfMemoryError("none left")

    monkeypatch.setattr("lshv2.arena.judge.judge", none)
    job, = plan(["induction"], ("window",), (0,), (64,), True, changes={"steps": 1, "sequences": 2})
    assert run_job(job, tmp_path, lambda _: None, shared=True) == 1 and missing(job, rows_of(tmp_path)) == [("", 64)]
    assert run_job(job, tmp_path, lambda _: None) == 1 and missing(job, rows_of(tmp_path)) == []
    (row,) = rows_of(tmp_path).values()
    assert (row["status"], row["value"], row["shared"]) == ("out of memory", None, False)


def test_a_text_learns_as_bytes_do_and_another_source_is_another_model(monkeypatch: pytest.MonkeyPatch) -> None:
    class Books(Text):
        name, source = "books", "/books"

    monkeypatch.setitem(REGISTERED, "books", Books)
    books, bytes_ = (plan([name], ("lsh",))[0] for name in ("books", "bytes"))
    assert books.recipe == bytes_.recipe and books.lengths == bytes_.lengths
    before = books.trained_as
    monkeypatch.setattr(Books, "source", "/other")
    assert books.trained_as != before


def test_the_phase_leaves_rows_picture_and_averages(tmp_path: Path) -> None:
    run = open_run(tmp_path / "run", preset="test")
    benchmark = next(phase for phase in PHASE_TABLE if phase.name == "04_benchmark")
    write_json(run.file("benchmark_summary.json"), {"rows": [1]})
    before = hash_outputs(benchmark, run)
    averages = run_arena(run)
    assert {(row["task"], row["model"], row["seq_len"]) for row in averages} == {
        ("induction", model, n) for model in ("lsh", "dense") for n in (64, 128)}
    assert run.file("arena.png").exists() and run.file(ARENA).exists()
    assert read_json(run.file("benchmark_summary.json"))[0] == {"rows": [1], "arena": averages}
    assert hash_outputs(benchmark, run) == before, "the benchmark's marker would call its own file changed"
    write_json(run.file("benchmark_summary.json"), {"rows": [2], "arena": averages})
    assert hash_outputs(benchmark, run) != before
    publish(run.path)
    with pytest.raises(UserError, match="arena task 'other' is unknown"):
        run_arena(open_run(tmp_path / "run", preset="test", overrides={"arena.tasks": ["other"]}))
