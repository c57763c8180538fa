"""Tokenizer and shards of a run: made once, found again, and never taken for what they are not."""

from pathlib import Path

import fsspec
import pytest

from llmkit.data.arguments import DataArguments
from llmkit.data.prepare import prepare_pretraining_data
from llmkit.errors import UserError


@pytest.fixture
def texts(tmp_path, monkeypatch) -> str:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "texts").mkdir()
    for number in range(30):
        (tmp_path / "texts" / f"{number}.txt").write_text(f"{number} and {number + 1} are neighbours. " * 20)
    return "texts/*.txt"


def test_made_once_and_found_again(texts):
    first, manifest = prepare_pretraining_data(DataArguments(text_files=[texts], vocab_size=300))
    written = {path: path.stat().st_mtime_ns for path in manifest.directory.rglob("*.*") if path.suffix != ".lock"}
    assert manifest.directory.parent == Path("data") and len(first) == 300
    again, same = prepare_pretraining_data(DataArguments(text_files=[texts], vocab_size=300))
    assert same == manifest and again.get_vocab() == first.get_vocab()
    assert written == {path: path.stat().st_mtime_ns for path in written}


def test_other_text_or_settings_have_a_folder_of_their_own(texts):
    def folder(**settings) -> Path:
        return prepare_pretraining_data(DataArguments(text_files=[texts], **settings))[1].directory

    folders = {folder(vocab_size=300), folder(vocab_size=310), folder(tokenizer="character")}
    folders.add(folder(vocab_size=300, validation_fraction=0.2))
    (Path("texts") / "0.txt").write_text("something else")
    folders.add(folder(vocab_size=300))
    assert len(folders) == 5


@pytest.mark.parametrize(
    "change, message",
    [
        ({"vocab_size": 310}, "made with vocab_size=300, not 310"),
        ({"tokenizer": "character"}, "made with tokenizer=bpe, not character"),
        ({"validation_fraction": 0.2}, "made with validation_fraction=0.01, not 0.2"),
        ({"text_files": ["texts/1.txt"], "validation_split": "tail"}, "made with validation_split=document, not tail"),
        ({"text_files": ["texts/1*.txt"]}, "another corpus"),
    ],
)
def test_a_folder_made_otherwise_is_refused(texts, change, message):
    settings = {"text_files": [texts], "vocab_size": 300, "data_dir": "mine"}
    prepare_pretraining_data(DataArguments(**settings))
    with pytest.raises(UserError, match=message):
        prepare_pretraining_data(DataArguments(**settings | change))


def test_prepared_shards_of_a_hub_dataset_need_no_hub(texts):
    """Names on the Hub are not asked for where shards stand, and are compared whole."""
    settings = {"dataset_name": "texts-on-the-hub", "dataset_config": "small", "vocab_size": 300, "data_dir": "mine"}
    local = DataArguments(text_files=[texts], vocab_size=300, data_dir="mine")
    _, manifest = prepare_pretraining_data(local)
    source = Path("mine") / "source.json"
    source.write_text(source.read_text().replace('"dataset_name": null', '"dataset_name": "texts-on-the-hub"'))
    source.write_text(source.read_text().replace('"dataset_config": null', '"dataset_config": "small"'))
    assert prepare_pretraining_data(DataArguments(**settings))[1] == manifest
    with pytest.raises(UserError, match="made with dataset_config=small, not large"):
        prepare_pretraining_data(DataArguments(**settings | {"dataset_config": "large"}))


@pytest.mark.parametrize(
    "setting",
    [{"vocab_size": 10**9}, {"vocab_size": 256}, {"data_dir": ""}, {"data_dir": "a\0b"}, {"tokenizer": " "}]
    + [{"data_dir": "/proc/shards"}, {"data_dir": "x" * 300}, {"data_dir": "texts/1.txt/shards"}]
    + [
        {"data_dir": "s3://bucket/shards"},
        {"data_dir": "texts"},
        {"text_files": [""]},
        {"text_files": ["texts/none*"]},
    ],
)
def test_settings_that_cannot_be_are_one_line_and_write_nothing(texts, setting):
    before = sorted(Path().rglob("*"))
    with pytest.raises(UserError) as raised:
        prepare_pretraining_data(DataArguments(**{"text_files": [texts], "vocab_size": 300} | setting))
    assert "\n" not in str(raised.value)
    assert sorted(Path().rglob("*")) == before


def test_a_home_folder_is_expanded(texts, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    args = DataArguments(text_files=["~/texts"], vocab_size=300, data_dir="~/mine")
    assert prepare_pretraining_data(args)[1].directory == tmp_path / "mine"
    again = DataArguments(text_files=["texts"], tokenizer="~/mine/tokenizer", data_dir="~/other")
    assert prepare_pretraining_data(again)[1].vocab_size == 300


def test_the_folder_has_the_name_of_the_text(texts):
    for text, name in {"texts": "texts", "texts/*.txt": "texts", "texts/1.txt": "1"}.items():
        _, manifest = prepare_pretraining_data(DataArguments(text_files=[text], vocab_size=300))
        assert manifest.directory.name.startswith(f"{name}-bpe300-")


@pytest.mark.parametrize("content", ["", "[1]", "null", "[" * 100_000])
def test_a_damaged_record_of_the_source_is_one_line(texts, content):
    args = {"text_files": [texts], "vocab_size": 300, "data_dir": "mine"}
    prepare_pretraining_data(DataArguments(**args))
    (Path("mine") / "source.json").write_text(content)
    with pytest.raises(UserError, match="source.json is damaged"):
        prepare_pretraining_data(DataArguments(**args))


def test_prepared_shards_of_files_elsewhere_need_no_network(texts):
    memory = fsspec.filesystem("memory")
    memory.pipe_file("/stories/a.txt", b"some words of a story\n" * 200)
    args = {"text_files": ["memory://stories/"], "vocab_size": 300, "data_dir": "mine"}
    _, manifest = prepare_pretraining_data(DataArguments(**args))
    memory.rm("/stories", recursive=True)
    assert prepare_pretraining_data(DataArguments(**args))[1] == manifest
    with pytest.raises(UserError, match="made with text_files="):
        prepare_pretraining_data(DataArguments(**args | {"text_files": ["memory://other/"]}))


def test_a_refused_preparation_leaves_nothing(texts):
    (Path("texts") / "9.txt").write_bytes(b"fine at first\n" * 500 + b"\xff\xfe broken")
    with pytest.raises(UserError, match="9.txt"):
        prepare_pretraining_data(DataArguments(text_files=[texts], vocab_size=300, data_dir="mine"))
    assert not Path("mine").exists()


def test_a_preparation_that_another_rank_has_just_begun_is_no_other_file(texts):
    Path("mine").mkdir()
    (Path("mine") / "source.json.tmp").touch()  # not renamed yet, or left behind by a kill
    prepare_pretraining_data(DataArguments(text_files=[texts], tokenizer="character", data_dir="mine"))
    (Path("other") / "photos").mkdir(parents=True)
    with pytest.raises(UserError, match="holds other files, such as photos"):
        prepare_pretraining_data(DataArguments(text_files=[texts], tokenizer="character", data_dir="other"))
