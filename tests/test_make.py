"""The Makefile as a person meets it: help, values that reach Python unharmed, mistakes that stop before anything."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from lshv2 import estimate
from lshv2.__main__ import COMMANDS, VARIABLES, _own_settings, main
from lshv2.arena.phase import jobs_of
from lshv2.arena.study import plan, training_flops
from lshv2.arena.sweep import POINTS
from lshv2.errors import UserError
from lshv2.presets import make_settings
from lshv2.runs import PHASES, open_run, repo_root

MAKEFILE = (repo_root() / "Makefile").read_text()


def make(*arguments: str, runs: Path) -> subprocess.CompletedProcess[str]:
    changed = {**os.environ, "LSHV2_RUNS": str(runs), "VIRTUAL_ENV": sys.prefix}
    for name in ("MAKEFLAGS", "MAKELEVEL", *VARIABLES):
        changed.pop(name, None)
    return subprocess.run(["make", *arguments], cwd=repo_root(), env=changed, capture_output=True, text=True)


def test_help_lists_every_target_and_variable(tmp_path: Path) -> None:
    said = make(runs=tmp_path).stdout
    assert said == make("help", runs=tmp_path).stdout, "plain make is not help"
    phony = re.search(r"^\.PHONY: (.*)$", MAKEFILE, re.M)
    assert phony
    rules = {name for line in re.findall(r"^([a-z][a-z -]*):(?!=)", MAKEFILE, re.M) for name in line.split()}
    assert rules == set(phony[1].split())
    for target in rules:
        assert re.search(rf"^  {target} +\S", said, re.M), f"{target} has no help"
    for name in (*VARIABLES, "TORCH_INDEX"):
        assert re.search(rf"^  {name}=", said, re.M), f"{name} has no help"
    assert rules >= {*COMMANDS, "clean-run"}


MISTAKES = {
    "bad value": (["quick", "SET=model.n_layers=five"], "model.n_layers='five'"),
    "no setting": (["quick", "SET=learning_rate"], "section.key=value"),
    "contradiction": (["quick", "PRESET=full"], "contradicts `make quick`"),
    "empty run name": (["quick", "RUN= "], "RUN=' ' is not a run name"),
    "bad run name": (["quick", "RUN=../elsewhere"], "is not a run name"),
    "bad seed": (["quick", "SEED=one"], "SEED='one'"),
    "bad flag": (["quick", "FORCE=yes"], "FORCE='yes'"),
    "several processes": (["quick", "NPROC=3"], "n_kv_heads=2 is not a multiple of 3"),
    "missing data": (["quick", "DATA=/no such folder"], "DATA=/no such folder does not exist"),
    "missing data among the settings": (["quick", "SET=data.source=/nowhere"], "data.source=/nowhere does not exist"),
    "unknown command": (["fast"], "unknown command fast; allowed: quick, full"),
    "unknown argument": (["quick", "--force"], "unknown argument '--force'; allowed: RUN="),
    "nothing to package": (["package", "RUN=nosuch"], "is not a run folder: config.json is missing"),
    "packaging other settings": (["package", "RUN=x", "SEED=1"], "leave SEED out"),
    "unknown arena task": (["quick", "SET=arena.tasks=nope"], "arena task 'nope' is unknown; there are: "),
    "missing plugin": (["quick", "SET=arena.plugins=nope.py"], f"{Path('nope.py').absolute()} is not a Python file"),
    "a length no task has": (["quick", "SET=arena.tasks=duplication arena.lengths=[65]"], "sequences of 65 tokens"),
    "unknown task to sweep": (["sweep", "SET=arena.tasks=nope"], "arena task 'nope' is unknown; there are: "),
    "nothing to delete": (["clean-run", "RUN=nosuch"], "not a run folder"),
    "no name to delete": (["clean-run"], "needs the name of a run"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_stops_before_anything(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments, expected = MISTAKES[case]
    monkeypatch.setenv("LSHV2_RUNS", str(tmp_path))
    assert main(arguments) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.count("\n") == 1 and expected in said.err, said
    assert not list(tmp_path.iterdir()), "something was created"


THROUGH_MAKE = {
    "unknown setting": (["quick", "SET=train.learning_rat=1"], "did you mean train.learning_rate?"),
    "unknown preset": (["test-only", "PRESET=huge"], "PRESET='huge' is unknown; allowed: "),
    "unknown variable": (["quick", "SEDE=3"], "unknown variable SEDE; allowed: RUN PRESET"),
    "shell in the run name": (["quick", "RUN=a;touch pwned"], "RUN='a;touch pwned' is not a run name"),
    "command substitution": (["quick", "RUN=$(touch pwned)`touch pwned`"], "`touch pwned`' is not a run name"),
    "make function": (["quick", "RUN=$(shell touch pwned)"], "RUN='$(shell touch pwned)' is not a run name"),
    "a reference": (["clean-run", "RUN=reference-x"], "committed reference"),
}


@pytest.mark.parametrize("case", THROUGH_MAKE)
def test_a_mistake_through_make_is_one_line_and_code_2(case: str, tmp_path: Path) -> None:
    arguments, expected = THROUGH_MAKE[case]
    done = make(*arguments, runs=tmp_path)
    lines = [line for line in done.stderr.splitlines() if not line.startswith("make: ")]
    assert done.returncode == 2, done.stdout + done.stderr
    assert len(lines) == 1 and expected in lines[0], done.stderr
    assert not list(tmp_path.iterdir()), "something was created"
    assert not (repo_root() / "pwned").exists(), "a value was executed"


def test_every_value_reaches_python_as_it_was_typed(tmp_path: Path) -> None:
    values = {"RUN": "a b", "SET": "x.y=[1,2] z.w='$HOME'", "DATA": "it's #1 $$ \"q\" \\n ; & | `x` $(x)", "SEED": "3"}
    recipe = make("-n", "quick", *(f"{k}={v}" for k, v in values.items()), runs=tmp_path).stdout
    command = recipe[recipe.index("-m lshv2 quick") :]
    assert shlex.split(command)[3:] == [f"{name}={values[name]}" for name in ("RUN", "SET", "SEED", "DATA")]


def test_clean_run_deletes_a_run_folder_alone(tmp_path: Path) -> None:
    for name in ("mine", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
    (tmp_path / "notes").mkdir()
    assert make("clean-run", "RUN=mine", runs=tmp_path).returncode == 0
    assert make("clean-run", "RUN=notes", runs=tmp_path).returncode == 2, "a folder without config.json is no run"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["notes", "other"]


def test_a_run_keeps_its_preset(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "config.json").write_text('{"settings": {"preset": "full"}}')
    done = make("no-training", "RUN=mine", runs=tmp_path)
    assert done.returncode == 2 and "was made with PRESET=full" in done.stderr


def test_package_takes_the_runs_own_settings(tmp_path: Path) -> None:
    changed = {"train.learning_rate": 1e-5, "benchmark.sequence_lengths": [64, 128], "train.model_size": "40K"}
    run = open_run(tmp_path / "mine", preset="test", overrides=changed, seed=5)
    values = {**dict.fromkeys(VARIABLES, ""), "RUN": "mine"}
    own = _own_settings(run.path, values)
    assert make_settings(**own) == run.settings


def test_full_without_a_gpu_says_what_it_takes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    done = make("full", runs=tmp_path)
    assert done.returncode == 2, done.stderr
    assert re.search(r"at least [\d.]+ (days|years)", done.stdout), done.stdout
    assert re.search(r"about \d+ GiB of memory", done.stdout)
    assert "make full YES=1" in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("command", ["arena", "sweep"])
def test_an_arena_of_full_size_without_a_gpu_says_what_it_takes(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    done = make(command, "PRESET=full", runs=tmp_path)
    models = len(jobs_of(make_settings("full"))) if command == "arena" else 3 * len(POINTS) * 3
    assert done.returncode == 2 and f"training the arena's {models} models anew" in done.stderr, done.stderr
    assert re.search(r"at least [\d.]+ (h|days)", done.stderr) and f"make {command} PRESET=full YES=1" in done.stderr
    assert not list(tmp_path.iterdir())


def test_an_arena_is_counted_by_what_its_models_learn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    jobs = plan(["induction"], ("lsh", "dense"), (0,))
    weights = 2 * (4 * 128 * 128 + 3 * 128 * 256) + 17 * 128  # two layers and the head
    assert training_flops(jobs) == pytest.approx(2 * 6 * weights * 8192 * 2000, rel=0.02)
    estimate.check_arena_time(1e12, 1, command="make arena")  # minutes anywhere
    with pytest.raises(UserError, match=r"at least .* years.*make arena YES=1"):
        estimate.check_arena_time(1e22, 7, command="make arena")


def test_the_estimate_counts_what_the_documented_configuration_does() -> None:
    settings = make_settings("full")
    tokens = 1_000 * 131_072 * 5
    # 24 layers of 8.65 M weights, output heads of 24.6 M for the last ponder step and three quarters of the time for
    # three more, 772 visible keys of 768 dimensions in two products; forward and twice that for the backward, and the
    # layers' products again for the checkpoint.
    by_hand = tokens * (3 * (2 * (24 * 8.65e6 + 3.25 * 24.6e6) + 4 * 772 * 768 * 24) + 2 * 24 * 8.65e6)
    assert estimate.training_flops(settings) == pytest.approx(by_hand, rel=0.02)
    longer = make_settings("full", {"train.num_epochs": 10})
    assert estimate.training_flops(longer) == pytest.approx(2 * estimate.training_flops(settings))


def test_commands_leave_out_what_their_names_say() -> None:
    assert COMMANDS["quick"] == COMMANDS["full"] == PHASES
    assert set(PHASES) - set(COMMANDS["no-training"]) == {"03_train"}
    assert set(PHASES) - set(COMMANDS["no-benchmark"]) == {"04_benchmark", "04_arena"}
