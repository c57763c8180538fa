import gzip
import json
import os
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

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


def test_a_folder_is_not_a_file(tmp_path):
    with pytest.raises(UserError, match="is a folder"):
        open_corpus([str(tmp_path)])


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
