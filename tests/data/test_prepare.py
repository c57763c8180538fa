"""Tokenizer and shards of a run: made once, found again, and never taken for what they are not."""

from pathlib import Path

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


def test_a_refused_preparation_leaves_nothing(texts):
    (Path("texts") / "9.txt").write_bytes(b"fine at first\n" * 500 + b"\xff\xfe broken")
    with pytest.raises(UserError, match="9.txt"):
        prepare_pretraining_data(DataArguments(text_files=[texts], vocab_size=300, data_dir="mine"))
    assert not Path("mine").exists()
