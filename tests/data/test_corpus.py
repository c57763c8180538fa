import functools
import gzip
import itertools
import json
import os
import shutil
import subprocess
import sys
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import load_dataset

from llmkit.data import readers
from llmkit.data.corpus import Corpus, open_corpus
from llmkit.errors import UserError


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory, monkeypatch):
    """Keep what `datasets` stores, lock files included, out of the home folder."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def write_jsonl(path: Path, rows: list[dict]) -> str:
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return str(path)


def write_parquet(path: Path, texts: list[str | None]) -> str:
    pq.write_table(pa.table({"text": pa.array(texts, pa.string()), "n": range(len(texts))}), path, row_group_size=500)
    return str(path)


def write_text(path: Path, text: str | bytes) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return str(path)


def num_text_bytes(corpus: Corpus) -> int:
    return sum(len(document.encode()) for document in corpus.documents())


# ----------------------------------------------------------------------------- text files


def test_globs_are_expanded_sorted_and_each_file_is_read_once(tmp_path):
    for name in ["b.txt", "a.txt", "deep/er/c.txt", "other.md"]:
        write_text(tmp_path / name, f"I am {name}")
    corpus = open_corpus([str(tmp_path / "b.txt"), str(tmp_path / "**/*.txt"), str(tmp_path / "*.txt")])
    assert list(corpus.documents()) == ["I am a.txt", "I am b.txt", "I am deep/er/c.txt"]
    assert "3 files" in corpus.description
    assert str(tmp_path) not in corpus.description


def test_text_is_kept_to_the_byte_but_for_the_byte_order_mark(tmp_path):
    text = "  tabs\t and\r\nline ends\r and é東 \n\n"
    corpus = open_corpus([write_text(tmp_path / "a.txt", "\ufeff" + text)])
    assert list(corpus.documents()) == [text]
    assert open_corpus([write_text(tmp_path / "b.txt", text)]).num_bytes() == len(text.encode())


def test_a_name_that_looks_like_a_glob_is_a_name(tmp_path):
    path = write_text(tmp_path / "[draft] a*.txt", "text")
    table = write_jsonl(tmp_path / "b[1]*.jsonl", [{"text": "row"}])
    assert list(open_corpus([path, table]).documents()) == ["text", "row"]


@pytest.mark.parametrize("skip", [0, 1, 2, 3, 5, 99])
def test_skip_drops_documents_from_the_start(tmp_path, skip):
    write_text(tmp_path / "a.txt", "one")
    write_text(tmp_path / "b.txt", "two")
    write_jsonl(tmp_path / "c.jsonl", [{"text": "three"}, {"text": ""}, {"text": None}, {"text": "four"}])
    write_text(tmp_path / "d.txt", "five")
    corpus = open_corpus([str(tmp_path / "*")])
    assert list(corpus.documents(skip)) == ["one", "two", "three", "four", "five"][skip:]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "the file is empty"),
        (b"\xef\xbb\xbf", "the file is empty"),
        (b"PNG\0\0", "a zero byte at offset 3"),
        ("caf\u00e9 noir".encode("latin-1"), "byte offset 3"),
        ("text".encode("utf-16"), "a zero byte at offset 3"),
    ],
)
def test_a_file_that_is_not_text_is_named_when_the_corpus_is_opened(tmp_path, content, message):
    write_text(tmp_path / "a.txt", "fine")
    bad = write_text(tmp_path / "b.txt", content)
    with pytest.raises(UserError, match=message) as raised:
        open_corpus([str(tmp_path / "*.txt")])
    assert bad in str(raised.value)


def test_bad_utf8_far_into_a_file_is_told_with_its_offset(tmp_path):
    path = write_text(tmp_path / "a.txt", b"x" * 10_000 + b"\xff")
    corpus = open_corpus([path])
    with pytest.raises(UserError, match="a.txt: not UTF-8 text .byte offset 10000"):
        next(corpus.documents())


def test_an_unfinished_last_character_is_told_when_the_file_is_read(tmp_path):
    corpus = open_corpus([write_text(tmp_path / "a.txt", "caf\u00e9".encode("latin-1"))])
    with pytest.raises(UserError, match="a.txt: not UTF-8 text .byte offset 3"):
        next(corpus.documents())


def test_a_character_over_the_edge_of_the_first_block_is_no_mistake(tmp_path):
    assert list(open_corpus([write_text(tmp_path / "a.txt", "x" * 4095 + "é")]).documents())[0].endswith("é")


@pytest.mark.parametrize("pattern", ["missing.txt", "*.txt", "**/*.jsonl"])
def test_no_such_file_names_the_pattern(tmp_path, pattern):
    with pytest.raises(UserError, match="text_files: ") as raised:
        open_corpus([str(tmp_path / pattern)])
    assert str(tmp_path / pattern) in str(raised.value)


def test_a_folder_is_every_text_below_it(tmp_path):
    """What is not text, or hidden, is left out, and the user is told of it."""
    for name in ["b.txt", "deep/er/a.md", "c.py", ".git/config", ".hidden"]:
        write_text(tmp_path / "books" / name, f"I am {name}")
    write_text(tmp_path / "books/cover.jpg", b"JFIF\0")
    write_text(tmp_path / "books/empty.txt", "")
    write_jsonl(tmp_path / "books/d.jsonl", [{"text": "a row"}])
    corpus = open_corpus([str(tmp_path / "books")])
    assert list(corpus.documents()) == ["I am b.txt", "I am c.py", "a row", "I am deep/er/a.md"]
    assert corpus.description == "books (4 files)"
    assert corpus.remarks == ["2 files are not text and were left out: cover.jpg, empty.txt"]
    (tmp_path / "nothing").mkdir()
    write_text(tmp_path / "images/cover.jpg", b"JFIF\0")
    for folder in ("nothing", "images"):
        with pytest.raises(UserError, match=f"text_files: there is no .*{folder}"):
            open_corpus([str(tmp_path / folder)])


def test_a_home_folder_is_found_and_not_named(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "alice"))
    for name in ["a.txt", "b.txt", "books/c.txt"]:
        write_text(tmp_path / "alice" / name, name)
    assert list(open_corpus(["~/books"]).documents()) == ["books/c.txt"]
    for patterns in (["~/*.txt"], [str(tmp_path / "alice/*.txt")], ["~/a.txt", "~/b.txt"]):
        corpus = open_corpus(patterns)
        assert len(corpus.files) == 2 and "alice" not in corpus.description + corpus.name
    assert open_corpus(["~"]).description == "3 files"


def test_many_files_are_counted_and_not_listed(tmp_path):
    files = [write_text(tmp_path / "books" / f"{n}.txt", str(n)) for n in range(600)]
    assert open_corpus(files).description == "600 files"
    assert open_corpus([str(tmp_path / "books/*.txt")]).description == "books (600 files)"
    assert open_corpus(files[:1]).description == "0.txt"


def test_a_file_named_twice_is_read_once_and_said(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_text(tmp_path / "a.txt", "text")
    corpus = open_corpus(["a.txt", "./a.txt"])
    assert list(corpus.documents()) == ["text"]
    assert corpus.remarks == ["1 files were named more than once and are read once"]


@pytest.mark.parametrize(
    "path", ["", " ", "a\0b", "x" * 300, "/proc/self/nothing", "/proc/version/x", "x" * 300 + "*"]
)
def test_paths_that_cannot_be(path):
    with pytest.raises(UserError, match="text_files: "):
        open_corpus([path])


def test_compressed_text_is_text(tmp_path):
    path = write_text(tmp_path / "a.txt.gz", gzip.compress(b"some text " * 1000))
    corpus = open_corpus([path])
    assert list(corpus.documents()) == ["some text " * 1000]
    assert corpus.num_bytes() == 10_000
    with pytest.raises(UserError, match="b.txt.gz: cannot be read"):
        list(open_corpus([write_text(tmp_path / "b.txt.gz", b"not compressed")]).documents())


@pytest.mark.parametrize("blanks", [True, False])
def test_a_large_file_comes_in_pieces(tmp_path, blanks):
    text = ("🌍 éclair wörld\n漢字 " if blanks else "漢字é") * 60_000
    corpus = open_corpus([write_text(tmp_path / "a.txt", "\ufeff" + text), write_text(tmp_path / "b.txt", "short")])
    for _ in range(2):  # a document can be gone through again
        document, short = corpus.in_pieces()
        assert "".join(document) == text and "".join(document) == text and list(short) == ["short"]
    assert (len(list(document)) > 4) == blanks
    assert all(piece[-1].strip() and next_piece[0] in " \n" for piece, next_piece in itertools.pairwise(document))


MEMORY = """
import resource, sys
from llmkit.data.corpus import open_corpus
from llmkit.data.holdout import by_document, split_pieces
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
corpus = open_corpus(sys.argv[1:])
corpus.fingerprint()
assert not by_document(corpus, 0.01)
length = sum(len(piece.text) for piece in split_pieces(corpus, 0, 0.01, False, True))
print(length, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""


def test_a_large_file_takes_little_memory(tmp_path):
    """Sixty megabytes with one emoji took six times their size."""
    text = "one two three four five\n" * 2_500_000 + "🌍"
    command = [sys.executable, "-c", MEMORY, write_text(tmp_path / "a.txt", text)]
    length, megabytes = map(float, subprocess.run(command, capture_output=True, text=True, check=True).stdout.split())
    assert length == len(text) and megabytes < 30


def test_files_and_a_dataset_at_once_are_refused(tmp_path):
    with pytest.raises(UserError, match="text_files and dataset_name"):
        open_corpus([write_text(tmp_path / "a.txt", "a")], dataset_name="b")


# ----------------------------------------------------------------------------- JSONL and Parquet


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.json"])
def test_json_lines_are_documents(tmp_path, name):
    texts = [f"document {i} é" for i in range(2500)]
    corpus = open_corpus(
        [write_jsonl(tmp_path / name, [{"body": text, "n": 1} for text in texts])], text_column="body"
    )
    assert list(corpus.documents()) == texts
    assert list(corpus.documents(skip=2400)) == texts[2400:]
    assert corpus.num_bytes() == pytest.approx(num_text_bytes(corpus), rel=0.01)


def test_a_long_jsonl_file_is_measured_by_its_start(tmp_path):
    rows = [{"text": "some words " * 30, "url": "https://example.org/a/page"} for _ in range(10_000)]
    for name in ["a.jsonl", "a.jsonl.gz"]:
        corpus = open_corpus([write_jsonl(tmp_path / name, rows)])
        assert corpus.num_bytes() == pytest.approx(num_text_bytes(corpus), rel=0.1)


def test_a_json_array_is_read(tmp_path):
    corpus = open_corpus([write_text(tmp_path / "a.json", '[{"text": "one"},\n {"text": "two"}]')])
    assert list(corpus.documents()) == ["one", "two"]
    assert corpus.num_bytes() >= 6


@pytest.mark.parametrize("text", ["[]", " [ ]\n", '\ufeff[{"text": "one"}]', '[{"text":"one"},{"text":"two"}]'])
def test_an_array_is_read_row_by_row(tmp_path, monkeypatch, text):
    """At any length of the blocks in which the file is read, also where all of it is in one line."""
    rows = json.loads(text.removeprefix("\ufeff"))
    if len(rows) == 2:
        rows = [{"text": f"{n} [{{,}}] é" * n, "n": [n, {}]} for n in range(1, 30)]
        text = json.dumps(rows, ensure_ascii=False)
    file = write_text(tmp_path / "a.json", text)
    for block in (1, 7, 1 << 18):
        monkeypatch.setattr("llmkit.data.readers._BLOCK", block)
        assert list(readers.read_table(file, "text")) == [row["text"] for row in rows]


@pytest.mark.parametrize(
    "text", ['[{"text": "a"}', '[{"text": "a"},]', '[{"text": "a"} {"text": "b"}]', '[{"text": "a"}, oops]']
)
def test_an_array_that_is_none_is_one_line(tmp_path, text):
    with pytest.raises(UserError, match="a.json: cannot be read: row 2 is not JSON") as raised:
        list(open_corpus([write_text(tmp_path / "a.json", text)]).documents())
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("begin, end", [("", ""), ("[", "]")])
def test_a_row_that_is_too_long_is_refused_before_it_is_read(tmp_path, monkeypatch, begin, end):
    monkeypatch.setattr(readers, "LONGEST", 50)
    monkeypatch.setattr(readers, "_BLOCK", 10)
    row = json.dumps({"text": "word " * 20})
    for file in ("a.json", "a.json.gz"):
        content = f'{begin}{{"text": "a"}}{"," if begin else chr(10)}{row}{end}'.encode()
        path = write_text(tmp_path / file, gzip.compress(content) if file.endswith("gz") else content)
        with pytest.raises(UserError, match="row 2 has more than 50 bytes"):
            list(readers.read_table(path, "text"))


def test_text_without_white_space_is_refused_before_all_of_it_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "LONGEST", 1 << 19)
    assert list(open_corpus([write_text(tmp_path / "a.txt", "x" * (1 << 19))]).documents())
    with pytest.raises(UserError, match="b.txt: more than 524,288 characters without white space"):
        list(open_corpus([write_text(tmp_path / "b.txt", "x" * (1 << 19) + "y")]).documents())


def test_parquet_rows_are_documents_and_empty_ones_are_dropped(tmp_path):
    texts = [f"a longer document with the number {i}, é" * 5 for i in range(3000)]
    with_gaps = [None if i % 3 == 0 else "" if i % 3 == 1 else text for i, text in enumerate(texts)]
    corpus = open_corpus([write_parquet(tmp_path / "a.parquet", with_gaps)])
    assert list(corpus.documents()) == texts[2::3]
    assert list(corpus.documents(skip=990)) == texts[2::3][990:]
    assert corpus.num_bytes() == pytest.approx(num_text_bytes(corpus), rel=0.1)


def test_a_missing_column_is_named_with_those_there_are(tmp_path):
    for path in [
        write_jsonl(tmp_path / "a.jsonl", [{"body": "x", "n": 1}]),
        write_parquet(tmp_path / "a.parquet", ["x"]),
    ]:
        with pytest.raises(UserError, match=r"no column 'words': set text_column to one of: (body|text), n$"):
            open_corpus([path], text_column="words")


def test_a_column_of_numbers_is_not_text(tmp_path):
    with pytest.raises(UserError, match="a.parquet: column 'n' holds int64, not text"):
        open_corpus([write_parquet(tmp_path / "a.parquet", ["x"])], text_column="n")


def test_a_table_without_text_is_no_corpus(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": ""}, {"text": None}])
    with pytest.raises(UserError, match="no documents"):
        open_corpus([path])
    write_text(tmp_path / "b.txt", "but here is one")
    assert list(open_corpus([str(tmp_path / "*")]).documents()) == ["but here is one"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"text": "a"}\n{"text": 1}', "row 2: 'text' holds 1, not text"),
        ('{"text": ["a"]}', "row 1: 'text' holds .*a.*, not text"),
        ('{"text": {"a": 1}}', "not text: fix the row, or set text_column to one of: text"),
        ('{"text": true}', "holds true, not text"),
        ("null", "row 1 is not an object"),  # a segmentation fault in Arrow
        ('{"text": "a"}\n"b"', "row 2 is not an object"),
        ("[1, 2]", "row 1 is not an object"),
        ('{"text": "\\ud800"}', "cannot be read: .*surrogates not allowed"),
        ("[" * 100_000, "cannot be read"),
        ('{"text": "a"}\n' + "[" * 100_000, "row 2 is not JSON"),
    ],
)
def test_what_is_no_text_in_json_is_named_with_its_row(tmp_path, content, message):
    with pytest.raises(UserError, match=message) as raised:
        list(open_corpus([write_text(tmp_path / "a.jsonl", content)]).documents())
    assert "a.jsonl" in str(raised.value) and "\n" not in str(raised.value)


def test_text_that_looks_like_something_else_is_text(tmp_path):
    """Arrow makes times of these."""
    texts = ["2024-01-01", "2024-01-02"]
    assert list(open_corpus([write_jsonl(tmp_path / "a.jsonl", [{"text": t} for t in texts])]).documents()) == texts


def test_rows_of_json_may_lack_the_column_but_not_all(tmp_path):
    rows = [{"other": 1}] * 10 + [{"text": "a"}]
    assert list(open_corpus([write_jsonl(tmp_path / "a.jsonl", rows)]).documents()) == ["a"]
    with pytest.raises(UserError, match="no column 'text': set text_column to one of: other"):
        open_corpus([write_jsonl(tmp_path / "b.jsonl", [{"other": 1}] * 2000)])


def test_a_parquet_file_without_rows_does_not_stop_the_corpus(tmp_path):
    for name, texts in {"a": [], "b": ["one"], "c": []}.items():
        write_parquet(tmp_path / f"{name}.parquet", texts)
    assert list(open_corpus([str(tmp_path / "*.parquet")]).documents()) == ["one"]
    with pytest.raises(UserError, match="no documents"):
        open_corpus([str(tmp_path / "a.parquet")])


@pytest.mark.parametrize("kind", [pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string())])
def test_every_way_that_parquet_stores_text_is_text(tmp_path, kind):
    texts = (
        pa.array(["one", "two"]).dictionary_encode()
        if pa.types.is_dictionary(kind)
        else pa.array(["one", "two"], kind)
    )
    pq.write_table(pa.table({"text": texts}), tmp_path / "a.parquet")
    assert list(open_corpus([str(tmp_path / "a.parquet")]).documents()) == ["one", "two"]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", b'{"text": "a"}\n{"text": oops}\n'),
        ("a.jsonl", b'{"text": "\xff\xfe"}\n'),
        ("a.jsonl.gz", b"not compressed"),
        ("a.parquet", b"not Parquet at all"),
    ],
)
def test_a_damaged_table_is_named_in_one_line_and_nothing_else_is_said(tmp_path, capfd, name, content):
    path = write_text(tmp_path / name, content)
    with pytest.raises(UserError, match="cannot be read") as raised:
        open_corpus([path])
    assert path in str(raised.value)
    assert "\n" not in str(raised.value)
    assert capfd.readouterr() == ("", "")


# ----------------------------------------------------------------------------- files elsewhere


@pytest.fixture
def served(tmp_path, monkeypatch):
    """Four files on a web server of this machine and in fsspec's memory: their addresses."""
    folder = tmp_path / "served"
    (folder / "rows").mkdir(parents=True)
    write_text(folder / "books/a.txt", "book a")
    write_text(folder / "books/b.txt.gz", gzip.compress(b"book b"))
    write_jsonl(folder / "rows/c.jsonl", [{"text": "row c"}])
    write_parquet(folder / "rows/d.parquet", ["row d"])
    memory = fsspec.filesystem("memory")
    for path in sorted(folder.rglob("*.*")):
        memory.pipe_file(f"/{path.relative_to(folder)}", path.read_bytes())
    handler = functools.partial(SimpleHTTPRequestHandler, directory=folder)
    monkeypatch.setattr(SimpleHTTPRequestHandler, "log_message", lambda *_: None)
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield {"memory": "memory://", "http": f"http://127.0.0.1:{server.server_port}/"}
    server.shutdown()
    memory.rm("/", recursive=True)


@pytest.mark.parametrize("kind", ["memory", "http"])
def test_files_elsewhere_are_read_as_those_here(served, kind):
    root = served[kind]
    corpus = open_corpus([root + "books/a.txt", root + "rows/c.jsonl"])
    assert list(corpus.documents()) == ["book a", "row c"]
    assert corpus.num_bytes() == len("book a") + len('{"text": "row c"}\n')
    assert corpus.description == "2 files"
    books = open_corpus([root + "books/"])
    assert list(books.documents()) == ["book a", "book b"] and books.description == "books (2 files)"
    assert list(open_corpus([root + "books/*.gz"]).documents()) == ["book b"]
    assert open_corpus([root + "books/*.gz"]).name == "b.txt"
    for missing in ("none.txt", "none/*.txt"):
        with pytest.raises(UserError, match="no file at|cannot be read"):
            open_corpus([root + missing])


def test_parquet_from_a_file_system_elsewhere(served):
    assert list(open_corpus(["memory://rows/*"]).documents()) == ["row c", "row d"]


def test_the_fingerprint_of_a_remote_file_follows_its_version(served):
    before = open_corpus(["memory://books/a.txt"]).fingerprint()
    assert open_corpus(["memory://books/a.txt"]).fingerprint() == before
    fsspec.filesystem("memory").pipe_file("/books/a.txt", b"book A")
    assert open_corpus(["memory://books/a.txt"]).fingerprint() != before


def test_a_key_in_an_address_is_not_shown(served):
    corpus = open_corpus([served["http"] + "books/a.txt?key=secret"])
    assert list(corpus.documents()) == ["book a"] and "secret" not in corpus.description + corpus.name


@pytest.mark.parametrize("url", ["nosuch://a/b.txt", "http://127.0.0.1:9/a.txt", "s3://bucket/a.txt"])
def test_a_file_system_that_is_not_there(url):
    with pytest.raises(UserError) as raised:
        open_corpus([url])
    assert url in str(raised.value) and "\n" not in str(raised.value)


# ----------------------------------------------------------------------------- datasets


@pytest.fixture
def dataset_folder(tmp_path) -> str:
    folder = tmp_path / "stories"
    folder.mkdir()
    write_parquet(folder / "train-00000.parquet", [f"story {i}" for i in range(1500)])
    write_parquet(folder / "test-00000.parquet", ["the test"])
    return str(folder)


@pytest.mark.parametrize("streaming", [False, True])
def test_a_dataset_is_read_from_its_name(dataset_folder, streaming):
    corpus = open_corpus(dataset_name=dataset_folder, streaming=streaming)
    assert list(corpus.documents()) == [f"story {i}" for i in range(1500)]
    assert list(corpus.documents(skip=1499)) == ["story 1499"]
    assert corpus.description == "dataset stories, split train"
    assert list(open_corpus(dataset_name=dataset_folder, dataset_split="test").documents()) == ["the test"]


@pytest.mark.parametrize("split", ["train[:50%]", "train[:1]+test", "train[1:]", "train[-1:]"])
def test_a_part_of_a_split(dataset_folder, split):
    corpus = open_corpus(dataset_name=dataset_folder, dataset_split=split)
    expected = load_dataset(dataset_folder, split=split)["text"]
    assert list(corpus.documents()) == [text for text in expected if text]
    assert corpus.fingerprint() != open_corpus(dataset_name=dataset_folder).fingerprint()
    assert corpus.num_bytes() is None
    with pytest.raises(UserError, match="streaming reads one whole split"):
        open_corpus(dataset_name=dataset_folder, dataset_split=split, streaming=True)


@pytest.mark.parametrize(
    "split", ["train[", "train[:x]", "nope[:10%]", "train[:200%]", "train[:9:2]", "+", "train[1600:]"]
)
def test_a_part_that_is_none(dataset_folder, split):
    with pytest.raises(UserError):
        list(open_corpus(dataset_name=dataset_folder, dataset_split=split).documents())


def test_how_a_dataset_is_read_does_not_change_its_fingerprint(dataset_folder):
    downloaded = open_corpus(dataset_name=dataset_folder)
    streamed = open_corpus(dataset_name=dataset_folder, streaming=True)
    assert downloaded.fingerprint() == streamed.fingerprint()
    assert downloaded.num_bytes() == streamed.num_bytes() >= 1500 * len("story 1")
    other = open_corpus(dataset_name=dataset_folder, dataset_split="test")
    assert other.fingerprint() != downloaded.fingerprint()


def test_row_counts_in_the_card_give_the_size(tmp_path):
    write_text(tmp_path / "train.csv", "text,n\n" + "some words,1\n" * 50)
    splits = "  splits:\n  - name: train\n    num_bytes: 9999\n    num_examples: 50\n"
    features = "  features:\n  - name: text\n    dtype: string\n  - name: n\n    dtype: int64\n"
    corpus = open_corpus(dataset_name=str(tmp_path), streaming=True)
    assert corpus.num_bytes() is None
    write_text(tmp_path / "README.md", f"---\ndataset_info:\n{features}{splits}---\n")
    corpus = open_corpus(dataset_name=str(tmp_path), streaming=True)
    assert corpus.num_bytes() == 50 * len("some words")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"dataset_split": "nope"}, "Bad split: nope. Available splits: .*train"),
        ({"dataset_config": "nope"}, "nope.*default"),
        ({"text_column": "nope"}, "no column 'nope': set text_column to one of: text, n"),
        ({"text_column": "n"}, "column 'n' holds int64"),
    ],
)
def test_what_a_dataset_does_not_have_is_named_with_what_it_has(dataset_folder, wrong, message):
    with pytest.raises(UserError, match=message) as raised:
        open_corpus(dataset_name=dataset_folder, **wrong)
    assert "\n" not in str(raised.value)


def test_a_dataset_that_is_not_there(tmp_path):
    with pytest.raises(UserError, match="nothing/here"):
        open_corpus(dataset_name=str(tmp_path / "nothing/here"))


# ----------------------------------------------------------------------------- fingerprints


def test_fingerprint_follows_the_content_and_not_the_place_or_the_date(tmp_path):
    write_text(tmp_path / "one/a.txt", "text a")
    write_text(tmp_path / "one/sub/b.txt", "text b")
    shutil.copytree(tmp_path / "one", tmp_path / "two/moved")
    os.utime(tmp_path / "two/moved/a.txt", (1, 1))
    first = open_corpus([str(tmp_path / "one/**/*.txt")])
    moved = open_corpus([str(tmp_path / "two/moved/**/*.txt")], text_column="of no importance to text")
    assert first.fingerprint() == moved.fingerprint()

    seen = {first.fingerprint()}
    write_text(tmp_path / "one/a.txt", "TEXT a")  # of the same length
    seen.add(open_corpus([str(tmp_path / "one/**/*.txt")]).fingerprint())
    (tmp_path / "one/a.txt").rename(tmp_path / "one/c.txt")
    seen.add(open_corpus([str(tmp_path / "one/**/*.txt")]).fingerprint())
    seen.add(open_corpus([str(tmp_path / "one/c.txt")]).fingerprint())
    assert len(seen) == 4


def test_fingerprint_sees_every_byte_of_a_corpus_of_ordinary_size(tmp_path):
    content = bytearray(b"word " * 400_000)
    before = open_corpus([write_text(tmp_path / "a.txt", bytes(content))]).fingerprint()
    content[1_234_567] ^= 1
    assert open_corpus([write_text(tmp_path / "a.txt", bytes(content))]).fingerprint() != before


def test_fingerprint_depends_on_the_column_of_a_table(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"question": "why", "answer": "because"}])
    question, answer = (open_corpus([path], text_column=column) for column in ("question", "answer"))
    assert question.fingerprint() != answer.fingerprint()


# ----------------------------------------------------------------------------- the embedded corpus


def test_embedded_corpus():
    corpus = open_corpus()
    documents = list(corpus.documents())
    assert all(documents)
    assert corpus.num_bytes() == sum(len(document.encode()) for document in documents)
    assert corpus.fingerprint() == open_corpus().fingerprint()
    assert "standard library" in corpus.description
    assert list(corpus.documents(skip=len(documents) - 1)) == documents[-1:]


def test_a_python_without_its_sources_says_what_to_do(monkeypatch):
    monkeypatch.setattr("llmkit.data.corpus.stdlib_sources", lambda: [])
    with pytest.raises(UserError, match="set text_files or dataset_name"):
        open_corpus()
