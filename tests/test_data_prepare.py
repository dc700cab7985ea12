"""Phase 02_data as a whole: what it leaves in `data/`, and that it leaves nothing half-written."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from lshv2.data import (
    ensure,
    language_dataset,
    load_token_bytes,
    load_tokenizer,
    prepare,
    prepared,
    synthetic_dataset,
)
from lshv2.data.folder import replacing
from lshv2.data.tokenizer import decode
from lshv2.errors import UserError
from lshv2.runs import load_run, open_run


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    monkeypatch.setenv("LSHV2_RUNNER", "1")


@pytest.fixture
def source(tmp_path):
    folder = tmp_path / "source"
    folder.mkdir()
    for i in range(30):
        (folder / f"{i}.txt").write_text(f"document number {i}\r\n\tcafé {i * i}\n" * (i + 5))
    return folder


@pytest.fixture
def run(tmp_path, source):
    return open_run(tmp_path / "run", preset="test", overrides={"data.max_bytes": None}, data=str(source))


def snapshot(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_data_json_says_what_lies_there(run):
    statistics = prepare(run)
    assert statistics == json.loads((run.data / "data.json").read_text())
    listed = {entry["path"]: entry["bytes"] for entry in statistics["files"]}
    found = {path: len(content) for path, content in snapshot(run.data).items()}
    assert found.pop("data.json") and listed == found
    assert {"tokenizer.json", "train.bin", "eval.bin", "train_docs.npy", "eval_docs.npy", "token_bytes.npy",
            "synthetic/recall_train.jsonl", "synthetic/needle_eval.jsonl"} < listed.keys()
    train, held_out = statistics["splits"]["train"], statistics["splits"]["eval"]
    assert train["documents"] + held_out["documents"] == statistics["source"]["documents"] == 30
    assert train["bytes"] + held_out["bytes"] == statistics["source"]["bytes"]
    lengths = load_token_bytes(run)
    for split, sizes in statistics["splits"].items():
        tokens = np.fromfile(run.data / f"{split}.bin", "<u2")
        assert len(tokens) == sizes["tokens"] and lengths[tokens].sum() == sizes["bytes"]
        assert len(language_dataset(run, split)) == sizes["windows"] <= sizes["windows_asked"]
    assert statistics["tokenizer"]["vocab_size"] == len(lengths) == load_tokenizer(run).get_vocab_size()
    assert 0 < statistics["order2_bits_per_byte"] < 8
    assert len(synthetic_dataset(run, "recall", "eval")) == statistics["synthetic"]["recall"]["eval"] == 8
    assert not list(run.path.glob(".data*"))


def test_no_text_is_on_both_sides(run):
    prepare(run)
    texts = [set(decode(load_tokenizer(run), np.fromfile(run.data / f"{split}.bin", "<u2")).split("<|endoftext|>"))
             for split in ("train", "eval")]
    assert len(texts[0]) + len(texts[1]) == 30 + 2 and texts[0] & texts[1] == {""}


def test_the_same_settings_give_the_same_bytes(run, tmp_path, source):
    prepare(run)
    first = snapshot(run.data)
    prepare(run)
    again = snapshot(run.data)
    other = open_run(tmp_path / "other", preset="test", overrides={"data.max_bytes": None}, data=str(source), seed=1)
    prepare(other)
    for name in first.keys() - {"data.json"}:
        assert first[name] == again[name], name
        assert name.endswith("token_bytes.npy") or first[name] != snapshot(other.data)[name], name


def test_ensure_prepares_only_what_changed(run, source):
    assert not prepared(run)
    first = ensure(run)
    made = (run.data / "data.json").stat().st_mtime_ns
    assert prepared(run) and ensure(run) == first and (run.data / "data.json").stat().st_mtime_ns == made
    assert prepared(load_run(run.path))
    reopened = lambda **changes: open_run(  # noqa: E731
        run.path, preset="test", overrides={"data.max_bytes": None} | changes, data=str(source)
    )
    assert prepared(reopened(**{"train.learning_rate": 1e-5}))
    assert not prepared(reopened(**{"data.eval_fraction": 0.3}))
    assert not prepared(reopened(**{"model.vocab_size": 300}))
    assert not prepared(reopened(**{"recall.num_train_sequences": 33}))
    (source / "31.txt").write_text("one more")
    assert not prepared(run)
    assert ensure(run)["source"]["documents"] == 31
    shutil.rmtree(source)
    assert prepared(run), "lost sources make the data no worse"
    os.truncate(run.data / "train.bin", 10)
    assert not prepared(run)


BAD = {
    "missing": (lambda s: shutil.rmtree(s), r"source does not exist"),
    "empty folder": (lambda s: [p.unlink() for p in s.iterdir()], r"source holds no \.txt"),
    "empty files": (lambda s: [p.write_text("") for p in s.iterdir()], r"source is empty \(30 file"),
    "not UTF-8": (lambda s: (s / "7.txt").write_bytes(b"ok\nfine\nna\xefve\n"), r"7\.txt: line 3: byte 10 \(0xef\)"),
    "cut UTF-8": (lambda s: (s / "7.txt").write_bytes(b"ok\ncaf\xc3"), r"7\.txt: line 2: byte 6 \(0xc3\)"),
    "UTF-8 broken far in": (
        lambda s: (s / "7.txt").write_bytes("é\n".encode() * 700_000 + b"\xff"), r"7\.txt: line 700001: byte 2100000 "),
    "UTF-16": (lambda s: (s / "7.txt").write_text("text", encoding="utf-16"), r"7\.txt: line 1: byte 0 \(0xff\)"),
    "broken JSON": (
        lambda s: (s / "a.jsonl").write_text('{"text": "a"}\n\n{"text": "b"\n'), r"a\.jsonl: line 3: broken JSON"),
    "no text": (lambda s: (s / "a.jsonl").write_text('{"text": "a"}\n{"txt": "b"}\n'), r"a\.jsonl: line 2: no text"),
    "text is a number": (lambda s: (s / "a.jsonl").write_text('{"text": 3}'), r"a\.jsonl: line 1: no text"),
    "JSON not UTF-8": (lambda s: (s / "a.jsonl").write_bytes(b'"ok"\n"\xe9"\n'), r"a\.jsonl: line 2: byte 1 \(0xe9\)"),
    "half a surrogate": (lambda s: (s / "a.jsonl").write_text('"\\ud83d"\n'), r"a\.jsonl: line 1: .*surrogate"),
    "deep JSON": (lambda s: (s / "a.jsonl").write_text("[" * 200_000), r"a\.jsonl: line 1: broken JSON"),
}


@pytest.mark.parametrize("had_data", [False, True], ids=["first time", "over former data"])
@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_changes_nothing(run, source, case, had_data):
    if had_data:
        prepare(run)
    before = snapshot(run.path)
    spoil, message = BAD[case]
    spoil(source)
    with pytest.raises(UserError, match=message) as caught:
        prepare(run)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400
    after = snapshot(run.path)
    after.pop("progress.json", None), before.pop("progress.json", None)
    assert after == before and run.data.exists() == had_data


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"model.vocab_size": 256}, "model.vocab_size=256 is too small"),
        ({"model.max_seq_len": 4096, "train.seq_length": 4096}, "eval.bin holds .* tokens.*seq_length=4096"),
        ({"data.synthetic_seq_length": 63}, "data.synthetic_seq_length=63 must be even"),
        ({"data.max_bytes": 1}, "cannot be divided"),
    ],
)
def test_impossible_settings_are_one_line_and_leave_nothing(tmp_path, source, overrides, message):
    run = open_run(tmp_path / "run", preset="test", overrides=overrides, data=str(source))
    with pytest.raises(UserError, match=message):
        prepare(run)
    assert not run.data.exists() and not list(run.path.glob(".data*"))


@pytest.mark.parametrize("name", ["page.pdf", "noextension"])
def test_a_file_of_another_kind_is_refused(tmp_path, name):
    (tmp_path / name).write_text("text")
    run = open_run(tmp_path / "run", preset="test", data=str(tmp_path / name))
    with pytest.raises(UserError, match=rf"{name} has the extension .*readable: \.txt, \.md, \.py, \.jsonl"):
        prepare(run)


def test_a_kill_leaves_the_former_data_and_nothing_of_its_own_for_long(run, tmp_path):
    prepare(run)
    before = snapshot(run.data)
    code = "import sys; from lshv2.runs import load_run; from lshv2.data import prepare; prepare(load_run(sys.argv[1]))"
    big = open_run(run.path, preset="quick")
    child = subprocess.Popen([sys.executable, "-c", code, str(big.path)])
    try:
        deadline = time.monotonic() + 60
        while not any(path.stat().st_size > 100_000 for path in run.path.glob(".data.*.tmp/train.bin")):
            assert child.poll() is None and time.monotonic() < deadline
            time.sleep(0.02)
        child.send_signal(signal.SIGKILL)
        assert child.wait() == -signal.SIGKILL
    finally:
        child.kill()
    assert snapshot(run.data) == before, "the kill reached the former data"
    assert list(run.path.glob(".data.*.tmp"))
    prepare(run)
    assert not list(run.path.glob(".data.*")) and prepared(run)


def test_a_former_folder_comes_back_where_its_replacement_never_came(tmp_path):
    """A kill between the two renames: data/ is hidden, its replacement not there yet."""
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    (tmp_path / f".data.{gone.pid}.old").mkdir()
    (tmp_path / f".data.{gone.pid}.old" / "kept").write_text("former")
    with pytest.raises(ZeroDivisionError), replacing(tmp_path / "data"):
        raise ZeroDivisionError
    assert snapshot(tmp_path) == {"data/kept": b"former"}
