"""Shards that several tasks make: the same bytes wherever and in whatever order the tasks run."""

import json
import pickle
import shutil

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from test_shards import DOCUMENTS, ListCorpus, contents, texts_of

from llmkit.data.corpus import open_corpus
from llmkit.data.manifest import JOURNAL, PARTS, load_manifest
from llmkit.data.parts import Parts
from llmkit.data.places import LocalPlace
from llmkit.data.shard_writer import ShardWriter
from llmkit.data.shards import prepare_shards, shard_settings
from llmkit.data.tokenizer import train_bpe_tokenizer
from llmkit.errors import UserError

SETTINGS = {"validation_fraction": 0.2, "validation_split": "document", "shard_tokens": 500}
TASKS = 3


@pytest.fixture(scope="module")
def bpe():
    return train_bpe_tokenizer(DOCUMENTS, 400)


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """Documents in files of each kind: texts, JSON lines, and Parquet files of several row groups."""
    folder = tmp_path_factory.mktemp("texts")
    for number, document in enumerate(DOCUMENTS[:20]):
        (folder / f"a{number:02d}.txt").write_text(document)
    (folder / "b.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in DOCUMENTS[20:120]))
    for name, rows in {"c": DOCUMENTS[120:220], "d": DOCUMENTS[220:]}.items():
        pq.write_table(pa.table({"text": rows}), folder / f"{name}.parquet", row_group_size=30)
    return folder


@pytest.fixture
def corpus(texts):
    return open_corpus([str(texts)])


def make_parts(corpus, bpe, directory, tasks=TASKS, **settings):
    directory.mkdir(exist_ok=True)
    return Parts(corpus, bpe, LocalPlace(directory), shard_settings(corpus, bpe, **SETTINGS | settings), tasks)


def made(corpus, bpe, directory, order=range(TASKS)):
    parts = make_parts(corpus, bpe, directory)
    for task in order:
        parts.prepare(task)
    return parts.merge()


@pytest.mark.parametrize("tasks", [1, 2, 3, 7, 28])
def test_parts_one_after_the_other_are_the_corpus(corpus, tasks):
    parts = corpus.divided(tasks)
    assert len(parts) == tasks
    found = [list(part.documents()) for part in parts]
    assert all(found) and sum(found, []) == list(corpus.documents())
    assert [text for part in parts for text in part.documents(skip=2)] == [text for part in found for text in part[2:]]


def test_parts_are_of_about_equal_size(tmp_path):
    pq.write_table(pa.table({"text": DOCUMENTS}), tmp_path / "all.parquet", row_group_size=10)
    corpus = open_corpus([str(tmp_path / "all.parquet")])
    sizes = [sum(map(len, part.documents())) for part in corpus.divided(3)]
    assert max(sizes) < 1.5 * min(sizes)


def test_files_are_not_opened_where_there_are_enough_of_them(texts, monkeypatch):
    corpus = open_corpus([str(texts)])
    monkeypatch.setattr("llmkit.data.corpus.row_group_bytes", None)
    assert sum((part.files for part in corpus.divided(2)), []) == corpus.files


def test_more_tasks_than_the_text_has_parts_are_refused(corpus):
    with pytest.raises(UserError, match="29.*28 parts at most|28 parts at most.*29"):
        corpus.divided(29)


@pytest.mark.parametrize("streaming", [False, True])
def test_a_dataset_is_divided_too(texts, tmp_path, monkeypatch, streaming):
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    for name in ("c", "d"):
        (tmp_path / "set").mkdir(exist_ok=True)
        shutil.copy(texts / f"{name}.parquet", tmp_path / "set")
    corpus = open_corpus(dataset_name=str(tmp_path / "set"), streaming=streaming)
    parts = pickle.loads(pickle.dumps(corpus.divided(2)))
    found = [list(part.documents()) for part in parts]
    assert all(found) and sum(found, []) == list(corpus.documents()) == DOCUMENTS[120:]
    if streaming:
        with pytest.raises(UserError, match="2 parts at most"):
            corpus.divided(3)


def test_tasks_in_any_order_make_the_same_bytes_and_the_same_documents_as_one_process(corpus, bpe, tmp_path):
    first = made(corpus, bpe, tmp_path / "first")
    second = made(corpus, bpe, tmp_path / "second", order=[2, 0, 1, 1])
    assert contents(first.directory) == contents(second.directory)
    assert not (first.directory / PARTS).exists()
    alone = prepare_shards(corpus, bpe, tmp_path / "alone", **SETTINGS)
    assert first.splits["train"].shards != alone.splits["train"].shards
    for split in ("train", "validation"):
        assert texts_of(first, split, bpe) == texts_of(alone, split, bpe)
        for count in ("tokens", "documents", "bytes"):
            assert getattr(first.splits[split], count) == getattr(alone.splits[split], count)
    # A run on the same text and settings takes the folder for what it is.
    assert prepare_shards(corpus, bpe, first.directory, **SETTINGS) == load_manifest(first.directory, bpe)


def test_too_few_documents_are_noticed_over_all_parts(bpe, tmp_path):
    """A part of few documents holds out what the whole corpus does; a part of one split has no shard of the other."""
    for number, document in enumerate(DOCUMENTS[:40]):
        (tmp_path / f"{number:02d}.txt").write_text(document)
    corpus = open_corpus([f"{tmp_path}/*.txt"])
    parts = make_parts(corpus, bpe, tmp_path / "shards", tasks=40)
    shards = [parts.prepare(task) for task in range(40)]
    assert {len(part["train"]) + len(part["validation"]) for part in shards} == {1}
    assert sum(len(part["validation"]) for part in shards) == parts.merge().splits["validation"].documents > 1


class Died(Exception):
    pass


def test_a_task_that_died_anywhere_goes_on_and_ends_with_the_same_bytes(corpus, bpe, tmp_path, monkeypatch):
    whole = made(corpus, bpe, tmp_path / "whole")
    close, flush = ShardWriter.close_shard, ShardWriter.flush
    for name, method in (("close_shard", close), ("flush", flush)):
        for place in (1, 3):
            folder = tmp_path / f"{name}{place}"
            calls = []

            def die(writer, method=method, calls=calls, place=place):
                calls.append(writer)
                if len(calls) == place:
                    raise Died
                return method(writer)

            parts = make_parts(corpus, bpe, folder)
            monkeypatch.setattr(ShardWriter, name, die)
            with pytest.raises(Died):
                parts.prepare(1)
            monkeypatch.setattr(ShardWriter, name, method)
            assert contents(made(corpus, bpe, folder).directory) == contents(whole.directory)


def test_a_merge_that_died_goes_on_and_ends_with_the_same_bytes(corpus, bpe, tmp_path, monkeypatch):
    whole = made(corpus, bpe, tmp_path / "whole")
    parts = make_parts(corpus, bpe, tmp_path / "shards")
    for task in range(TASKS):
        parts.prepare(task)
    replace, moved = type(tmp_path).replace, []

    def die(path, target):
        if target.parent == parts.place.directory and len(moved) == 2:
            raise Died
        moved.extend([target] if target.parent == parts.place.directory else [])
        return replace(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(type(tmp_path), "replace", die)
        with pytest.raises(Died):
            parts.merge()
    assert len(moved) == 2
    assert contents(parts.merge().directory) == contents(whole.directory)


def test_a_merge_refuses_what_is_not_whole(corpus, bpe, tmp_path):
    parts = make_parts(corpus, bpe, tmp_path / "shards")
    parts.prepare(0)
    parts.prepare(2)
    with pytest.raises(UserError, match="1 of 3 tasks have not finished .the first is 1"):
        parts.merge()
    parts.prepare(1)
    shard = parts.place.directory / "parts/00002/train_00000.bin"
    shard.write_bytes(shard.read_bytes()[:-2])
    with pytest.raises(UserError, match="train_00000.bin has .* bytes instead of"):
        parts.merge()
    (parts.place.directory / "parts/00000/part.json").write_text("[")
    with pytest.raises(UserError, match="part.json is damaged"):
        parts.merge()
    assert not list(parts.place.directory.glob("*.bin"))


def test_a_preparation_is_not_mixed_with_another(corpus, bpe, tmp_path):
    folder = tmp_path / "shards"
    make_parts(corpus, bpe, folder).prepare(0)
    for other in ({"tasks": 2}, {"shard_tokens": 600}, {"validation_fraction": 0.3}):
        with pytest.raises(UserError, match=f"made with {next(iter(other))}"):
            make_parts(corpus, bpe, folder, **other)
    with pytest.raises(UserError, match="in several tasks did not finish"):
        prepare_shards(corpus, bpe, folder, **SETTINGS)
    with pytest.raises(UserError, match="its preparation did not finish"):
        load_manifest(folder)
    shutil.rmtree(folder / PARTS)
    (folder / JOURNAL).write_text("{}")
    with pytest.raises(UserError, match="by one process did not finish"):
        make_parts(corpus, bpe, folder)


def test_a_corpus_without_text_for_a_split_is_refused_and_can_be_mended(bpe, tmp_path):
    class Divided(ListCorpus):
        def divided(self, count):
            return [Divided(self.list[index::count]) for index in range(count)]

    corpus = Divided([*["the same text"] * 20])
    parts = make_parts(corpus, bpe, tmp_path / "shards", tasks=2)
    parts.plan["whole_documents"] = True  # as a corpus whose first documents promise otherwise
    for task in range(2):
        parts.prepare(task)
    with pytest.raises(UserError, match="no text for the validation split: its 20 documents"):
        parts.merge()
