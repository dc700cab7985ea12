"""Documents are found, checked and divided: by document, seeded, without copies, without the corpus in memory."""

import json
import random
import tracemalloc
from pathlib import Path

import pytest

from lshv2.data.corpus import PIECE, find_files
from lshv2.data.packing import write_stream
from lshv2.data.scan import scan
from lshv2.data.split import split_corpus
from lshv2.data.tokenizer import train_tokenizer
from lshv2.errors import UserError


def write(folder, files):
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(folder)


def text_of(corpus, row):
    return "".join(corpus.pieces(row)).encode()


def texts_of(corpus):
    return {corpus.name(row): text_of(corpus, row) for row in range(len(corpus))}


def split(source, **changes):
    settings = {"eval_fraction": 0.2, "max_bytes": None, "seed": 0} | changes
    return split_corpus(scan(find_files(source)), **settings)


@pytest.fixture
def folder(tmp_path):
    """Sixty documents in three kinds of file, with odd whitespace in each."""
    lines = [json.dumps({"text": f"jsonl {i}\r\n\t emoji \U0001f600 nbsp\u00a0\n" * (i + 1)}) for i in range(20)]
    lines[7] = json.dumps("a plain string line")
    files = {f"sub/{i}.txt": f"text {i}\r\n \u2028 tail " * (3 * i + 1) for i in range(20)}
    files |= {f"notes/{i}.md": f"# note {i}\n\n" * (2 * i + 1) for i in range(20)}
    return write(tmp_path / "corpus", files | {"rows.jsonl": "\n\n".join(lines) + "\n"})


def test_documents_are_read_byte_by_byte(folder):
    texts = texts_of(scan(find_files(folder)))
    assert len(texts) == 60
    assert texts["sub/3.txt"] == ("text 3\r\n \u2028 tail " * 10).encode()
    assert texts["rows.jsonl:5"] == ("jsonl 2\r\n\t emoji \U0001f600 nbsp\u00a0\n" * 3).encode()
    assert texts["rows.jsonl:15"] == b"a plain string line"


@pytest.mark.parametrize("line", ["x" * 50 + "\n", "é" * 50, "\U0001f600", "日本\r\n"])
def test_pieces_of_a_long_document_join_to_it_and_end_at_lines(tmp_path, line):
    text = line * (3 * PIECE // len(line.encode()))
    corpus = scan(find_files(write(tmp_path, {"long.txt": text})))
    pieces = list(corpus.pieces(0))
    assert "".join(pieces) == text and len(pieces) > 2
    assert all(len(piece.encode()) <= PIECE for piece in pieces)
    assert "\n" not in line or all(piece.endswith("\n") for piece in pieces)


def test_hidden_and_foreign_files_are_left_out(tmp_path):
    source = write(tmp_path, {
        "a.txt": "a", ".git/b.txt": "b", "c.bin": b"\xff", "__pycache__/d.py": "d", "lib/site-packages/e.py": "e",
        ".hidden.txt": "f", "G.MD": "g",
    })
    assert find_files(source).names == ("G.MD", "a.txt")


def test_the_standard_library_is_the_embedded_corpus():
    sources = find_files(None)
    assert len(sources.names) > 300 and "json/decoder.py" in sources.names
    assert not any("site-packages" in name for name in sources.names)


def test_foreign_encodings_are_counted_in_the_standard_library_and_refused_elsewhere(tmp_path, monkeypatch):
    source = write(tmp_path, {"a.py": "a = 1\n", "latin.py": b"# caf\xe9\n", "empty.py": ""})
    monkeypatch.setattr("sysconfig.get_path", lambda name: source)
    assert scan(find_files(None)).skipped == {"empty": 1, "not UTF-8": 1}
    with pytest.raises(UserError, match=r"latin\.py: line 1: byte 5 \(0xe9\) is not UTF-8"):
        scan(find_files(source))


def test_no_eval_document_is_trained_on(folder):
    parts = split(folder)
    train, held_out = texts_of(parts.train), texts_of(parts.eval)
    assert train and held_out and not train.keys() & held_out.keys()
    assert not set(train.values()) & set(held_out.values())
    assert len(train) + len(held_out) == 60


def test_copies_are_dropped_whatever_their_name_and_kind(tmp_path):
    copies = {f"{i}.txt": "the same text" for i in range(30)} | {"x.jsonl": json.dumps({"text": "the same text"})}
    parts = split(write(tmp_path, copies | {"other.txt": "another text"}))
    assert parts.duplicates == 30
    assert len(parts.train) == len(parts.eval) == 1


def test_the_split_is_seeded_and_stable(folder, tmp_path):
    one, same, other = split(folder), split(folder), split(folder, seed=1)
    assert list(texts_of(one.train)) == list(texts_of(same.train))
    assert texts_of(one.eval).keys() != texts_of(other.eval).keys()
    write(tmp_path / "corpus", {"new.txt": "one more"})
    sides = texts_of(split(folder).eval).keys() - {"new.txt"}
    assert sides == texts_of(one.eval).keys(), "a new document moved the others"


@pytest.mark.parametrize("fraction", [1e-9, 0.4999])
@pytest.mark.parametrize("n", [2, 3])
def test_both_sides_get_a_document(tmp_path, n, fraction):
    source = write(tmp_path, {f"{i}.txt": f"document {i}" for i in range(n)})
    for seed in range(20):
        parts = split(source, eval_fraction=fraction, seed=seed)
        assert len(parts.train) >= 1 and len(parts.eval) >= 1


@pytest.mark.parametrize(
    ("text", "end"),
    [("".join(f"paragraph {i}\nmore\n\n" for i in range(200)), b"\n\n"),
     ("".join(f"line {i}\n" for i in range(400)), b"\n"), ("é" * 999, b""), ("ab", b""), ("a\n", b"")],
)
@pytest.mark.parametrize("kind", ["txt", "jsonl"])
def test_a_single_document_is_divided_at_a_boundary(tmp_path, text, end, kind):
    source = write(tmp_path, {f"one.{kind}": text if kind == "txt" else json.dumps({"text": text})})
    parts = split(source, eval_fraction=0.1)
    head, tail = text_of(parts.train, 0), text_of(parts.eval, 0)
    assert head + tail == text.encode() and head and tail
    assert head.endswith(end) and head.decode() and tail.decode()
    assert len(text) < 100 or 0.8 < len(head) / len(text.encode()) <= 0.9
    assert "only document" in parts.cut


def test_one_character_cannot_be_divided(tmp_path):
    with pytest.raises(UserError, match="one.txt is the only document"):
        split(write(tmp_path, {"one.txt": "é"}))


def test_the_cap_takes_whole_documents_in_seeded_order(folder):
    every = scan(find_files(folder))
    seen = set()
    for seed in range(8):
        parts = split(folder, max_bytes=4000, seed=seed)
        kept = texts_of(parts.train) | texts_of(parts.eval)
        full = texts_of(every)
        assert all(full[name] == text for name, text in kept.items()) and parts.cut is None
        assert 2000 <= sum(map(len, kept.values())) <= 4000
        assert len(kept) + parts.beyond_cap + parts.duplicates == 60
        seen |= kept.keys()
    assert len(seen) > 40, "the cap always took the same documents"


def test_a_file_larger_than_the_cap_is_cut_at_a_line(tmp_path):
    source = write(tmp_path, {"large.txt": "".join(f"line {i}\n" for i in range(5000))})
    parts = split(source, max_bytes=1000)
    kept = text_of(parts.train, 0) + text_of(parts.eval, 0)
    assert 900 < len(kept) <= 1000 and kept.endswith(b"\n")
    assert "data.max_bytes" in parts.cut and "only document" in parts.cut


def test_the_corpus_is_never_held_in_memory(tmp_path):
    words = [str(n) * 16 for n in range(100, 300)]
    pick = random.Random(0)
    block = [" ".join(pick.choices(words, k=24)) + "\n" for _ in range(100)]
    with open(tmp_path / "a.txt", "w") as text, open(tmp_path / "b.jsonl", "w") as lines:
        for i in range(12_000):
            text.write(block[i % 100])
            lines.write(json.dumps({"text": f"{i} {block[i % 100]}"}) + "\n")
    size = sum(path.stat().st_size for path in tmp_path.iterdir())
    tokenizer = train_tokenizer(block, 2000)
    tracemalloc.start()
    try:
        parts = split(str(tmp_path))
        n_tokens = write_stream(tmp_path / "train.bin", parts.train, tokenizer)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert n_tokens > 500_000 and size > 20_000_000
    assert peak < size / 3, f"{peak / 1e6:.1f} MB of Python memory for a corpus of {size / 1e6:.1f} MB"




def test_what_a_person_can_mend_is_a_user_error_by_name(tmp_path: Path) -> None:
    """The runner knows a kernel's exceptions by name alone: a subclass would be shown as a defect, with exit code 1."""
    bad = tmp_path / "bad.txt"
    bad.write_bytes(b"fine\n\xff\n")
    with pytest.raises(UserError) as caught:
        scan(find_files(str(bad)))
    assert type(caught.value) is UserError and "line 2" in str(caught.value)
    package = Path(scan.__code__.co_filename).parents[1]
    assert not [path for path in package.rglob("*.py") if "(UserError)" in path.read_text(encoding="utf-8")]
