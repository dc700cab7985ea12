"""The stream: what each reader reads, in which order, how it goes on, how little it holds, what it says of mistakes."""

import gzip
import itertools
import json
import shutil
import tracemalloc

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lshv2.data.corpus import PIECE, find_files
from lshv2.data.packing import write_stream
from lshv2.data.scan import scan
from lshv2.data.shards import Position, Shards, share
from lshv2.data.stream import Place, TokenStream, WindowStream
from lshv2.data.tokenizer import decode, read_tokenizer, train_tokenizer
from lshv2.errors import UserError

SEQ = 32
TEXTS = [f"<{n}> " + " ".join(f"word{n * k % 89}" for k in range(n % 13 + 2)) for n in range(200)]


def write_shards(folder, texts, n_shards, suffix=".jsonl"):
    """The texts in turn over the shards, with blank lines and empty texts between."""
    folder.mkdir(exist_ok=True)
    for shard in range(n_shards):
        lines = "\n\n".join(json.dumps({"text": text}) for text in [*texts[shard::n_shards], ""])
        path = folder / f"{shard:03}{suffix}"
        path.write_bytes(gzip.compress(lines.encode()) if suffix.endswith(".gz") else lines.encode())
    return str(folder)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(source, the path of a tokenizer)"""
    folder = tmp_path_factory.mktemp("stream")
    train_tokenizer(TEXTS, 300).save(str(folder / "tokenizer.json"))
    return write_shards(folder / "shards", TEXTS, 5), folder / "tokenizer.json"


def find(source, eval_fraction=0.0, seed=0):
    return Shards.find(source, seed=seed, eval_fraction=eval_fraction)


def one_reader(source, tokenizer, place=None, *, buffer=7, seed=0, seq_length=SEQ):
    return WindowStream(
        find(source, seed=seed), tokenizer, seq_length=seq_length, batch_size=2, shuffle_buffer=buffer, rank=0,
        world_size=1, places=[place or Place()],
    )


def token_stream(made, *, workers=0, rank=0, ranks=1, buffer=5, eval_fraction=0.1, seed=0):
    return TokenStream(
        find(made[0], eval_fraction, seed), made[1], seq_length=SEQ, n_sequences=100, shuffle_buffer=buffer,
        num_workers=workers, rank=rank, world_size=ranks,
    )


def take(stream, n, size=3):
    """The next n batches, and the state after each as a file would hold it."""
    batches = ((ids.numpy().copy(), json.dumps(stream.state())) for ids, _ in stream.batches(size))
    return list(itertools.islice(batches, n))


def first_pass(documents):
    return list(itertools.takewhile(lambda document: document.position.epoch == 0, documents))


def text_of(document):
    return "".join(piece for _, piece, _ in document.pieces())


# What is read


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".txt"])
def test_the_tokens_are_those_that_packing_would_write(tmp_path, made, suffix):
    """Documents of several pieces included, their ends, and whole files as well as lines."""
    long = ["é" * PIECE + "\n" + "line\n" * 30_000, "short", "a" * (2 * PIECE)]
    texts = long[:1] if suffix == ".txt" else [*long, *TEXTS]
    (tmp_path / "plain").mkdir()
    if suffix == ".txt":
        (tmp_path / "plain/a.txt").write_text(texts[0])
        source = str(tmp_path / "plain/a.txt")
    else:
        write_shards(tmp_path / "plain", texts, 1)
        source = write_shards(tmp_path / "streamed", texts, 1, suffix)
    n = write_stream(tmp_path / "a.bin", scan(find_files(str(tmp_path / "plain"))), read_tokenizer(made[1]))
    reader = one_reader(source, made[1], seq_length=1000)
    windows = [window for _, window in itertools.islice(reader.windows(0, Position()), n // 1000)]
    assert np.array_equal(np.concatenate(windows), np.fromfile(tmp_path / "a.bin", "<u2")[: n // 1000 * 1000])


def test_batches_have_the_shape_and_the_labels_of_prepared_data(made):
    stream = token_stream(made)
    ids, labels = next(stream.batches(3))
    assert ids.shape == (3, SEQ) and ids.dtype == torch.int64 and torch.equal(ids, labels) and len(stream) == 100


@given(n_shards=st.integers(1, 60), parts=st.integers(1, 40))
def test_every_document_belongs_to_exactly_one_reader(n_shards, parts):
    shares = [share(n_shards, part, parts) for part in range(parts)]
    for shard in range(n_shards):
        readers = [(number, of) for own in shares for s, number, of in own if s == shard]
        assert sorted(readers) == [(number, len(readers)) for number in range(len(readers))], (shard, readers)
    weights = [sum(1 / of for _, _, of in own) for own in shares]
    assert max(weights) - min(weights) < 1 and all(sum(of > 1 for _, _, of in own) <= 1 for own in shares)


@pytest.mark.parametrize(("n_shards", "parts"), [(1, 6), (2, 3), (5, 2), (7, 3), (3, 3)])
def test_the_readers_together_read_every_document_once_a_pass(tmp_path, n_shards, parts):
    shards = find(write_shards(tmp_path / "s", TEXTS, n_shards))
    read = [text_of(d) for part in range(parts) for d in first_pass(shards.documents(part=part, parts=parts))]
    assert sorted(read) == sorted(TEXTS)


def test_every_rank_has_batches_without_end(tmp_path, made):
    """Even where one rank has 19 times the text: it is only in an earlier pass."""
    source = write_shards(tmp_path / "s", TEXTS[:2], 2)
    (tmp_path / "s/001.jsonl").write_text("\n".join(json.dumps(text) for text in TEXTS[:40]))
    states = [json.loads(take(token_stream((source, made[1]), rank=rank, ranks=2, eval_fraction=0.0), 40)[-1][1])
              for rank in (0, 1)]
    assert [state["batches"] for state in states] == [40, 40]
    assert states[0]["places"][0][0][0] > states[1]["places"][0][0][0] > 0  # passes


# Held-out documents


@pytest.mark.parametrize("seed", [0, 1])
def test_held_out_documents_never_reach_training(made, seed):
    shards = find(made[0], eval_fraction=0.2, seed=seed)
    held_out = {text_of(d) for d in first_pass(shards.documents(held_out=True))}
    train = {text_of(d) for part in range(3) for d in first_pass(shards.documents(part=part, parts=3, held_out=False))}
    assert held_out | train == set(TEXTS) and not held_out & train
    assert 20 <= len(held_out) <= 60, f"{len(held_out)} of 200 where 40 are due: 3.5 standard deviations are 20"
    stream = token_stream(made, workers=0, buffer=3, eval_fraction=0.2, seed=seed)
    tokenizer = read_tokenizer(made[1])
    seen = "".join(decode(tokenizer, row) + "\n" for ids, _ in take(stream, 250, 2) for row in ids)
    numbers = [{text.split(">")[0] + ">" for text in texts} for texts in (train, held_out)]
    assert sum(n in seen for n in numbers[0]) > 0.9 * len(train), "the marks of documents are to be seen at all"
    assert not [n for n in numbers[1] if n in seen]


def test_copies_of_a_document_are_on_one_side(tmp_path):
    write_shards(tmp_path / "s", TEXTS, 3)
    write_shards(tmp_path / "s", TEXTS[::-1], 2, ".copy.jsonl")
    shards = find(str(tmp_path / "s"), eval_fraction=0.3)
    sides = [sorted(text_of(d) for d in first_pass(shards.documents(held_out=side))) for side in (True, False)]
    assert not set(sides[0]) & set(sides[1]) and sides[0][::2] == sides[0][1::2] and len(sides[0] + sides[1]) == 400


# Order


def test_shuffling_moves_windows_within_blocks_and_loses_none(made):
    reader = one_reader(*made)
    plain = [window.tobytes() for _, window in itertools.islice(reader.windows(0, Position()), 300)]
    mixed = [window.tobytes() for window, _ in itertools.islice(reader.shuffled(0), 7 * 42)]
    at, orders = 0, []
    for size in (1, 2, 4, *[7] * 41):
        came, left = plain[at : at + size], mixed[at : at + size]
        assert sorted(came) == sorted(left), f"block at {at}"
        orders.append(tuple(came.index(window) for window in left))
        at += size
    assert len(set(orders[3:])) > 35, "41 draws of 5,040 orders"
    again, other = (
        [w.tobytes() for w, _ in itertools.islice(one_reader(*made, seed=s).shuffled(0), 50)] for s in (0, 1)
    )
    assert again == mixed[:50] != other


def test_each_pass_takes_the_shards_in_another_order(made):
    documents = itertools.islice(find(made[0]).documents(), 5 * len(TEXTS))
    orders = [list(dict.fromkeys(d.name.split(": ")[0] for d in group))
              for _, group in itertools.groupby(documents, key=lambda d: d.position.epoch)]
    assert len(orders) == 5 and len({tuple(order) for order in orders}) > 1
    assert all(sorted(order) == sorted(orders[0]) and len(order) == 5 for order in orders)


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


def test_a_glob_names_its_matches_wherever_they_lie(tmp_path):
    write_shards(tmp_path / "a", TEXTS, 2)
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    (tmp_path / "b/notes.doc").write_text("not read")
    assert find(str(tmp_path / "*/0*.jsonl")).names == ("a/000.jsonl", "a/001.jsonl", "b/000.jsonl", "b/001.jsonl")
    assert find(str(tmp_path / "**/*")).names == find(str(tmp_path / "*/*")).names
