"""The stream: how it goes on where it stopped, how little it holds, what it says of mistakes."""

import gzip
import json
import tracemalloc

import numpy as np
import pytest
from streams import SEQ, TEXTS, find, make, take, token_stream, write_shards

from lshv2.data.stream import Place, WindowStream
from lshv2.errors import UserError


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(source, the path of a tokenizer)"""
    return make(tmp_path_factory.mktemp("stream"))


# Going on


@pytest.mark.parametrize(("workers", "rank", "ranks"), [(0, 0, 1), (2, 1, 2)])
def test_the_batch_after_a_state_is_the_one_that_would_have_come(made, workers, rank, ranks):
    """At every batch without workers: inside blocks and between them, over ends of shards and of passes."""
    options = dict(workers=workers, rank=rank, ranks=ranks)
    whole = take(token_stream(made, **options), 90)
    assert json.loads(whole[-1][1])["places"][0][0][0] >= 1, "the second pass is reached"
    for stop in range(0, 80) if not workers else (1, 20, 52):
        stream = token_stream(made, **options)
        stream.restore(json.loads(whole[stop][1]))
        for step, (ids, state) in enumerate(take(stream, 4), stop + 1):
            assert np.array_equal(ids, whole[step][0]), f"stopped after {stop}, batch {step}"
            assert json.loads(state) == json.loads(whole[step][1])
    assert len(whole[-1][1]) < 600 + 80 * workers


def test_a_compressed_shard_gives_the_same_batches_and_goes_on(tmp_path, made):
    source = write_shards(tmp_path / "s", TEXTS, 5, ".jsonl.gz")
    plain = take(token_stream(made), 40)
    packed = take(token_stream((source, made[1])), 40)
    assert all(np.array_equal(a, b) for (a, _), (b, _) in zip(plain, packed, strict=True))
    stream = token_stream((source, made[1]))
    stream.restore(json.loads(packed[25][1]))
    assert np.array_equal(take(stream, 1)[0][0], packed[26][0])


def test_going_on_reads_two_buffers_not_the_corpus(made, monkeypatch):
    late = json.loads(take(token_stream(made), 200)[-1][1])
    read = []
    windows = WindowStream.windows
    monkeypatch.setattr(WindowStream, "windows", lambda *a: (read.append(1) or w for w in windows(*a)))
    stream = token_stream(made)
    stream.restore(late)
    take(stream, 1, size=1)
    assert len(read) <= 2 * 5


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (dict(workers=2), r"train\.num_workers\) was 1 and is 2"), (dict(ranks=2), "number of ranks was 1 and is 2"),
        (dict(buffer=6), r"data\.shuffle_buffer was 5 and is 6"), (dict(seed=1), "seed was 0 and is 1"),
        (dict(eval_fraction=0.2), r"data\.eval_fraction was 0\.1 and is 0\.2"),
    ],
)
def test_a_state_of_another_stream_is_refused(made, change, said):
    state = token_stream(made).state()
    with pytest.raises(UserError, match=said):
        token_stream(made, **change).restore(state)


def test_a_state_of_other_shards_or_of_no_stream_is_refused(tmp_path, made):
    with pytest.raises(UserError, match="the list of shards was"):
        token_stream((write_shards(tmp_path / "s", TEXTS, 4), made[1])).restore(token_stream(made).state())
    with pytest.raises(UserError, match="not trained on a stream"):
        token_stream(made).restore(None)


# Size


def peak(source, tokenizer):
    """(bytes that Python and numpy held at most in one pass of one of 64 readers, the position after one batch)"""
    shards = find(source)
    stream = WindowStream(shards, tokenizer, seq_length=SEQ, batch_size=4, shuffle_buffer=8, rank=0, world_size=64,
                          places=[Place()])
    tracemalloc.start()
    batches = (json.loads(place)[0] for _, place in stream)
    first = next(batches)
    next(began for began in batches if began[0] == 1)
    held = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return held, first


def test_memory_does_not_grow_with_the_corpus(tmp_path, made):
    text = "some words of a document\n" * 40
    held = []
    for megabytes in (2, 32):
        path = tmp_path / f"{megabytes}.jsonl"
        with open(path, "w") as file:
            file.writelines(f'{{"text": {json.dumps(f"{n} {text}")}}}\n' for n in range(megabytes * 1000))
        bytes_held, first = peak(str(path), made[1])
        assert first[4] < 200_000, "the first batch needs the beginning of a shard alone"
        held.append(bytes_held)
    assert held[1] < held[0] + 200_000 < 8_000_000, held


# Mistakes


def broken(name, content):
    return lambda folder: (folder / name).write_bytes(content)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (broken("000.jsonl", b'{"text": "a"}\n\n{"text": "b"\n'), r"000\.jsonl: line 3: broken JSON"),
        (broken("000.jsonl", b'{"text": "a"}\n{"txt": "b"}\n'), r'000\.jsonl: line 2: no text here.*"text"'),
        (broken("000.jsonl", b'{"text": "a"}\n"\xe9"\n'), r"000\.jsonl: line 2: byte 1 \(0xe9\) is not UTF-8"),
        (broken("z.txt", b"x" * 70_000 + b"\xff"), r"z\.txt: byte 70000 \(0xff\) is not UTF-8"),
        (broken("z.jsonl.gz", gzip.compress(b'"text"\n' * 100)[:-9]), r"shard .*z\.jsonl\.gz cannot be read"),
        (broken("z.jsonl.gz", b'"text"\n'), r"shard .*z\.jsonl\.gz cannot be read"),
    ],
)
def test_a_broken_shard_is_one_line_with_file_and_line(tmp_path, made, spoil, said):
    spoil_in = tmp_path / "s"
    spoil_in.mkdir()
    spoil(spoil_in)
    with pytest.raises(UserError, match=said) as caught:
        take(token_stream((str(spoil_in), made[1]), eval_fraction=0.0), 1000)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("loss", ["gone", "shorter"])
def test_a_shard_that_changes_while_training_is_one_line(tmp_path, made, workers, loss):
    source = write_shards(tmp_path / "s", TEXTS, 4)
    batches = token_stream((source, made[1]), workers=workers).batches(2)
    next(batches)
    for path in (tmp_path / "s").iterdir():
        path.unlink() if loss == "gone" else path.write_text('"x"\n')
    with pytest.raises(UserError, match=r"No such file" if loss == "gone" else r"has 4 bytes, not \d+") as caught:
        for _ in range(1000):
            next(batches)
    assert "\n" not in str(caught.value) and ".jsonl" in str(caught.value)


def test_nothing_to_read_is_one_line(tmp_path, made):
    with pytest.raises(UserError, match=r"holds no .*\.jsonl\.gz file"):
        find(str(tmp_path))
    with pytest.raises(UserError, match=r"matches no .*\.jsonl\.gz file"):
        find(str(tmp_path / "*.jsonl"))
    (tmp_path / "a.txt").write_text("one document")
    with pytest.raises(UserError, match=r"reader 2 of 3 \(ranks x train.num_workers\) finds no train document in 1 sh"):
        take(token_stream((str(tmp_path), made[1]), rank=1, ranks=3, eval_fraction=0.0), 1)
