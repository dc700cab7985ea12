"""The package: made from a run that was really trained, checked, damaged in every way."""

from __future__ import annotations

import hashlib
import json
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load, save

from lshv2.errors import UserError
from lshv2.package import WEIGHTS, check_package, main, make_package
from lshv2.runs import Run, open_run, read_json, write_json
from lshv2.train import train_run
from lshv2.unpack import MANIFEST

Members = dict[str, bytes]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    run = open_run(tmp_path_factory.mktemp("runs") / "packed", preset="test", seed=1)
    train_run(run)
    run.log("03_train").write_text("trained\n")
    return run


@pytest.fixture(scope="module")
def package(run: Run) -> Path:
    return make_package(run)


def rewritten(package: Path, target: Path, change: Callable[[Members], None], *, honest: bool = False) -> Path:
    """A copy with changed members; honest: its MANIFEST.json lists the changed ones with their sha256."""
    with zipfile.ZipFile(package) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    change(members)
    if honest:
        manifest = json.loads(members[MANIFEST])
        manifest["members"] = {n: {"bytes": len(b), "sha256": hashlib.sha256(b).hexdigest()}
                               for n, b in members.items() if n != MANIFEST}
        members[MANIFEST] = json.dumps(manifest).encode()
    with zipfile.ZipFile(target, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return target


def test_a_package_reproduces_the_loss_that_training_reported(run: Run, package: Path) -> None:
    result = check_package(package)
    metrics = read_json(run.file("training_metrics.json"))[0]
    assert result["expected"] == metrics["loss_eval"][-1] and result["difference"] <= result["tolerance"] == 1e-3
    assert result["bits_per_byte"] == pytest.approx(metrics["bits_per_byte"][-1], abs=1e-3)
    assert result["changed_sources"] == []


def test_what_is_in_it(package: Path) -> None:
    with zipfile.ZipFile(package) as archive:
        names, weights = set(archive.namelist()), load(archive.read(WEIGHTS))
        manifest = json.loads(archive.read(MANIFEST))
    assert {"config.json", "training_metrics.json", "metrics.jsonl", "component_profiles.json", "logs/03_train.log",
            "data/tokenizer.json", "eval_windows.npy", "lshv2/model.py", "pyproject.toml"} <= names
    assert not any(name.startswith("checkpoints/") or "train.bin" in name for name in names)
    assert weights and all(name.startswith("model.") for name in weights)
    assert manifest["members"].keys() == names - {MANIFEST}
    assert manifest["expected"]["how"].startswith("reported by training")


def test_the_same_run_gives_the_same_bytes(run: Run, package: Path) -> None:
    before = package.read_bytes()
    assert make_package(run).read_bytes() == before


def test_a_step_that_was_not_evaluated_is_evaluated_while_packing(run: Run, tmp_path: Path) -> None:
    shutil.copytree(run.path, tmp_path / "copy")
    copy = Run(tmp_path / "copy", run.settings)
    metrics = read_json(run.file("training_metrics.json"))[0]
    write_json(copy.file("training_metrics.json"), {**metrics, "eval_step": metrics["eval_step"][:-1],
                                                    "loss_eval": metrics["loss_eval"][:-1]})
    make_package(copy)
    result = check_package(copy.file("lsh_v2_complete_package.zip"))
    assert result["expected"] == pytest.approx(metrics["loss_eval"][-1], abs=1e-3)


def test_a_tampered_member_is_named(package: Path, tmp_path: Path) -> None:
    def flip(members: Members) -> None:
        content = bytearray(members[WEIGHTS])
        content[-1] ^= 1
        members[WEIGHTS] = bytes(content)

    with pytest.raises(UserError, match=rf"member {WEIGHTS} is damaged"):
        check_package(rewritten(package, tmp_path / "p.zip", flip))


def test_a_flipped_bit_in_the_file_is_named(package: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(package) as archive:
        info = archive.getinfo("lshv2/model.py")
    content = bytearray(package.read_bytes())
    content[info.header_offset + 30 + len(info.filename) + 200] ^= 4
    (tmp_path / "p.zip").write_bytes(bytes(content))
    with pytest.raises(UserError, match="member lshv2/model.py is damaged"):
        check_package(tmp_path / "p.zip")


@pytest.mark.parametrize("kept", [0, 100, 0.5, 0.999])
def test_a_truncated_file_is_refused(package: Path, tmp_path: Path, kept: float) -> None:
    content = package.read_bytes()
    (tmp_path / "p.zip").write_bytes(content[: int(kept * len(content)) if kept < 1 else int(kept)])
    with pytest.raises(UserError, match="not a whole zip"):
        check_package(tmp_path / "p.zip")


@pytest.mark.parametrize("name", ["../outside", "/tmp/lshv2-outside", "a/../../outside", "..\\outside", "C:outside"])
def test_no_member_is_written_outside(package: Path, tmp_path: Path, name: str) -> None:
    bad = rewritten(package, tmp_path / "p.zip", lambda members: members.update({name: b"x"}), honest=True)
    with pytest.raises(UserError, match="outside of its folder"):
        check_package(bad)
    assert not Path("/tmp/lshv2-outside").exists()


def _with(**members: bytes) -> Callable[[Members], None]:
    return lambda found: found.update({name.replace("__", "."): content for name, content in members.items()})


def _without(name: str) -> Callable[[Members], None]:
    return lambda found: found.pop(name) and None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_without("config.json"), "member config.json is missing"),
        (_with(extra__txt=b"x"), "member extra.txt is missing, unlisted"),
        (_without(MANIFEST), "MANIFEST.json is missing or damaged"),
        (_with(MANIFEST__json=b"{"), "MANIFEST.json is missing or damaged"),
        (_with(config__json=b"{}"), "member config.json is damaged"),
    ],
)
def test_missing_unlisted_and_damaged_members_are_named(
    package: Path, tmp_path: Path, change: Callable[[Members], None], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        check_package(rewritten(package, tmp_path / "p.zip", change))


def test_weights_of_another_run_do_not_pass_for_these(package: Path, tmp_path: Path) -> None:
    def retrain(members: Members) -> None:
        generator = torch.Generator().manual_seed(0)
        weights = load(members[WEIGHTS])
        weights["model.head.weight"] += 0.2 * torch.randn(weights["model.head.weight"].shape, generator=generator)
        members[WEIGHTS] = save(weights, metadata={"state": '{"step": 8}'})

    with pytest.raises(UserError, match="not of one run"):
        check_package(rewritten(package, tmp_path / "p.zip", retrain, honest=True))


def test_a_run_without_weights_is_packed_and_only_its_sums_are_checked(tmp_path: Path) -> None:
    run = open_run(tmp_path / "bare", preset="test")
    result: dict[str, Any] = check_package(make_package(run))
    assert result["members"] > 10 and "loss_eval" not in result


def test_the_command_line(run: Run, package: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["make", str(run.path)]) == 0 and main(["check", str(package)]) == 0
    assert '"loss_eval"' in capsys.readouterr().out
    for wrong in (["check", str(tmp_path / "none.zip")], ["make", str(tmp_path)], ["pack"], []):
        assert main(wrong) == 2
        message = capsys.readouterr().err
        assert message.startswith("lshv2.package: ") and message.count("\n") == 1, message
