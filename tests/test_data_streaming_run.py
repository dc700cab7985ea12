"""The stream in a run: a training process killed at some batch, and phase 2 for a corpus that is not prepared."""

import hashlib
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from lshv2.__main__ import _data as command_line_data
from lshv2.data import ensure, language_dataset, language_stream, load_tokenizer, prepare, prepared, streamed
from lshv2.data.shards import Shards
from lshv2.data.stream import TokenStream
from lshv2.data.tokenizer import decode, train_tokenizer
from lshv2.errors import UserError
from lshv2.model import LSHModel
from lshv2.presets import make_settings
from lshv2.runner.markers import describe_inputs
from lshv2.runner.phases import PHASE_TABLE, find_artifacts
from lshv2.runs import open_run, read_jsonl, repo_root
from lshv2.train import Trainer, language_task

TEXTS = [f"<{n}> " + " ".join(f"word{n * k % 89}" for k in range(n % 130 + 20)) + "\n" for n in range(400)]
STEPS, EVERY = 60, 7
LOOP = """
import hashlib, sys, time
from pathlib import Path
from lshv2.data.shards import Shards
from lshv2.data.stream import TokenStream
from lshv2.runs import append_jsonl, read_json, write_json

if __name__ == "__main__":
    folder, workers, steps, every = Path(sys.argv[1]), *map(int, sys.argv[2:])
    shards = Shards.find(str(folder / "shards"), seed=0, eval_fraction=0.1)
    stream = TokenStream(
        shards, folder / "tokenizer.json", seq_length=64, n_sequences=1, shuffle_buffer=9, num_workers=workers
    )
    state, _ = read_json(folder / "state.json")
    if state:
        stream.restore(state)
    for ids, labels in stream.batches(2):
        digest = hashlib.sha256(ids.numpy().tobytes()).hexdigest()
        append_jsonl(folder / "batches.jsonl", {"batch": stream.n_batches, "digest": digest})
        if stream.n_batches == steps:
            break
        if stream.n_batches % every == 0:
            write_json(folder / "state.json", stream.state())
        time.sleep(0.01)
"""


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    monkeypatch.setenv("LSHV2_RUNNER", "1")


@pytest.fixture
def source(tmp_path):
    folder = tmp_path / "shards"
    folder.mkdir()
    for shard in range(3):
        lines = (json.dumps({"text": text}) + "\n" for text in TEXTS[shard::3])
        (folder / f"{shard}.jsonl").write_text("".join(lines))
    return folder


@pytest.mark.parametrize("workers", [0, 2])
def test_a_killed_process_goes_on_with_the_batches_of_one_that_was_not(tmp_path, source, workers):
    train_tokenizer(TEXTS, 300).save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "loop.py").write_text(LOOP)
    command = [sys.executable, "loop.py", str(tmp_path), str(workers), str(STEPS), str(EVERY)]
    kill_at = random.Random(workers).randrange(EVERY + 1, STEPS - EVERY)
    process = subprocess.Popen(command, cwd=tmp_path, env=_environment())
    batches = tmp_path / "batches.jsonl"
    deadline = time.monotonic() + 60
    while len(read_jsonl(batches)[0]) < kill_at:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before, _ = read_jsonl(batches)
    subprocess.run(command, cwd=tmp_path, env=_environment(), check=True, timeout=60)
    records, _ = read_jsonl(batches)
    assert before == records[: len(before)] and len(before) < STEPS, f"killed at {kill_at}: {len(before)} batches done"
    went_on_at = records[len(before)]["batch"]
    assert went_on_at == len(before) // EVERY * EVERY + 1
    assert [r["batch"] for r in records[len(before):]] == list(range(went_on_at, STEPS + 1))

    shards = Shards.find(str(source), seed=0, eval_fraction=0.1)
    stream = TokenStream(
        shards, tmp_path / "tokenizer.json", seq_length=64, n_sequences=1, shuffle_buffer=9, num_workers=workers
    )
    whole = [hashlib.sha256(ids.numpy().tobytes()).hexdigest() for ids, _ in itertools.islice(stream.batches(2), STEPS)]
    wrong = [r["batch"] for r in records if r["digest"] != whole[r["batch"] - 1]]
    assert not wrong and len(set(whole)) == STEPS, f"killed after {len(before)}, other batches: {wrong}"


def _environment():
    return {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parent.parent)}


def open_stream(tmp_path, source, **overrides):
    overrides = {"data.stream": True, "data.shuffle_buffer": 4, "data.eval_fraction": 0.1} | overrides
    return open_run(tmp_path / "run", preset="test", overrides=overrides, data=str(source))


def test_phase_2_prepares_the_held_out_text_alone(tmp_path, source, monkeypatch):
    monkeypatch.setattr(streamed, "SAMPLE_PER_ENTRY", 100)
    run = open_stream(tmp_path, source)
    statistics = prepare(run)
    assert statistics == json.loads((run.data / "data.json").read_text())
    files = {path.relative_to(run.data).as_posix() for path in run.data.rglob("*") if path.is_file()}
    assert {entry["path"] for entry in statistics["files"]} == files - {"data.json"}
    assert "shards.json" in files and not any(name.startswith(("train", ".")) for name in files)
    assert find_artifacts(PHASE_TABLE[1], run)[1] == []
    facts = statistics["source"]
    assert (facts["kind"], facts["files"], facts["documents"], facts["bytes"]) == ("stream", 3, None, None)
    assert 32_000 <= statistics["tokenizer"]["sample_bytes"] < 34_000, "a sample, not the corpus"
    assert statistics["splits"].keys() == {"eval"} and 0 < statistics["order2_bits_per_byte"] < 8
    assert len(language_dataset(run, "eval")) == 4


def test_training_sees_no_held_out_document(tmp_path, source):
    run = open_stream(tmp_path, source, **{"train.num_workers": 2, "train.num_eval_sequences": 200})
    ensure(run)
    tokenizer = load_tokenizer(run)
    held_out = decode(tokenizer, np.fromfile(run.data / "eval.bin", "<u2")).split("<|endoftext|>")
    stream = language_stream(run)
    read = "".join(decode(tokenizer, row) for ids, _ in itertools.islice(stream.batches(2), 250) for row in ids.numpy())
    assert min(place.began.epoch for place in stream.places) >= 1, "every reader has read all its documents"
    marks = [text.split()[0] for text in held_out if text]
    assert 20 < len(marks) < 80 and not [mark for mark in marks if mark in read]
    assert sum(text.split()[0] in read for text in TEXTS) == len(TEXTS) - len(marks)
    assert len(stream) == run.settings.train.num_train_sequences


def test_a_training_goes_on_in_the_stream_where_its_checkpoint_stood(tmp_path, source):
    """Broken off two steps after the checkpoint of step 4; eight steps in one go end with the same weights."""
    ends = []
    for name in ("whole", "broken off"):
        run = open_stream(tmp_path / name, source)
        ensure(run)
        trainer = Trainer(run, language_task(run), LSHModel(run.settings.model))
        if name == "broken off":
            step = trainer._train_step

            def breaking(*batch, trainer=trainer, step=step):
                if trainer.step == 6:
                    raise ConnectionError
                return step(*batch)

            trainer._train_step = breaking
            with pytest.raises(ConnectionError):
                trainer.fit()
            trainer = Trainer(run, language_task(run), LSHModel(run.settings.model))
        trainer.fit()
        assert trainer.step == 8
        ends.append(list(trainer.model.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


def test_every_process_reads_the_shards_that_phase_2_saw(tmp_path, source):
    run = open_stream(tmp_path, source)
    first = ensure(run)
    assert prepared(run) and ensure(run) == first
    (source / "new.jsonl").write_text('"one more"\n')
    assert not prepared(run)
    assert language_stream(run).shards.names == ("0.jsonl", "1.jsonl", "2.jsonl")
    ensure(run)
    assert language_stream(run).shards.names == ("0.jsonl", "1.jsonl", "2.jsonl", "new.jsonl")
    (run.data / "shards.json").unlink()
    with pytest.raises(UserError, match=r"shards\.json is missing: run phase 02_data"):
        language_stream(run)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("2.jsonl", b'\n{"text": "a"\n', r"2\.jsonl: line 2: broken JSON"),
        ("z.jsonl", b'{"txt": "a"}\n', r"z\.jsonl: line 1: no text"),
        ("z.jsonl.gz", b"not compressed", r"z\.jsonl\.gz cannot be read"),
        ("z.txt", b"na\xefve", r"z\.txt: byte 2 \(0xef\) is not UTF-8"),
    ],
)
def test_every_shard_is_looked_into_before_training(tmp_path, source, name, content, said):
    (source / name).write_bytes(content)
    with pytest.raises(UserError, match=said):
        prepare(open_stream(tmp_path, source))
    assert not list(tmp_path.glob("run/.data*")) and not (tmp_path / "run/data").exists()


def test_a_corpus_without_a_second_side_is_refused(tmp_path):
    (tmp_path / "one.txt").write_text("the only document\n" * 100)
    with pytest.raises(UserError, match=r"leaves no (eval|train) document by data\.eval_fraction=0\.1"):
        prepare(open_stream(tmp_path, tmp_path / "one.txt"))
    with pytest.raises(UserError, match="data.*stream=true needs a source of shards"):
        make_settings("test", {"data.stream": True})


def test_of_large_documents_phase_2_takes_the_beginnings(tmp_path, monkeypatch):
    monkeypatch.setattr(streamed, "SAMPLE_PER_ENTRY", 100)
    (tmp_path / "books").mkdir()
    for n in range(8):
        (tmp_path / f"books/{n}.txt").write_text(f"line {n} of a book\n" * 20_000)
    statistics = prepare(open_stream(tmp_path, tmp_path / "books", **{"data.eval_fraction": 0.4}))
    read = statistics["tokenizer"]["sample_bytes"], statistics["splits"]["eval"]["bytes"]
    assert all(0 < size <= 1 << 16 for size in read), f"{read} of 360,000 a book: one piece is enough"


def test_a_shard_that_changes_under_a_glob_makes_phase_2_run_again(tmp_path, source):
    run = open_stream(tmp_path, source / "*.jsonl")
    pattern = str(source / "*.jsonl")
    assert command_line_data(pattern) == pattern
    with pytest.raises(UserError, match=r"DATA=.*\*\.gz does not exist"):
        command_line_data(str(source / "*.gz"))
    before = describe_inputs(PHASE_TABLE[1], run, repo_root() / "notebooks/02_data.ipynb")
    (source / "1.jsonl").write_text('"another text"\n')
    after = describe_inputs(PHASE_TABLE[1], run, repo_root() / "notebooks/02_data.ipynb")
    assert before.pop("results") != after.pop("results") and before == after
