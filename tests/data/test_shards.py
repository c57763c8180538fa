"""Shards hold exactly the corpus, whatever happens while they are made."""

import errno
import functools
import json
import math
import operator
import random
import re
import shutil
import subprocess
import sys
import textwrap
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tiktoken
import tokenizers
import xxhash
from tokenizers import models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from llmkit.data import holdout, shards
from llmkit.data.corpus import Corpus
from llmkit.data.encoding import GPT2_PATTERN, SEPARATOR, fastest_encoder
from llmkit.data.manifest import load_manifest
from llmkit.data.shard_writer import ShardWriter
from llmkit.data.shards import prepare_shards
from llmkit.data.tokenizer import (
    byte_level_bpe,
    document_encoder,
    split_document,
    train_bpe_tokenizer,
    train_character_tokenizer,
)
from llmkit.data.windows import TokenWindows
from llmkit.errors import UserError


class ListCorpus(Corpus):
    def __init__(self, documents, name="list"):
        self.list, self.name, self.description = list(documents), name, name

    def in_pieces(self, skip=0):
        return ([*split_document(document, holdout.BATCH_CHARACTERS)] for document in self.list[skip:])

    def num_bytes(self):
        return sum(len(document.encode()) for document in self.list)

    def fingerprint(self):
        return self.description


WORDS = [
    "the",
    "cat's",
    "sat\ton",
    "été",
    "漢字",
    "😀",
    "1234",
    "<|endoftext|>",
    "don't",
    "\n\n",
    "def f(x):\n    return",
]
WORDS += ["", "x+1", "\u2003", "\x85\x1c", "mat."]


def make_documents(count, seed=0, words=60):
    rng = random.Random(seed)
    blanks = (" ", " ", " ", "  ", "\n", "\n\n    ", "\t", "\u00a0")
    return [
        "".join(rng.choice(WORDS) + rng.choice(blanks) for _ in range(rng.randrange(1, words))) + str(i)
        for i in range(count)
    ]


DOCUMENTS = make_documents(300)


@pytest.fixture(scope="module")
def bpe():
    return train_bpe_tokenizer(DOCUMENTS, 400)


def prepare(tmp_path, documents, tokenizer, **kwargs):
    kwargs = {"validation_fraction": 0.2, "shard_tokens": 2000, "num_workers": 2} | kwargs
    return prepare_shards(ListCorpus(documents), tokenizer, tmp_path / "shards", **kwargs)


def read(manifest, split):
    files = [manifest.directory / shard.name for shard in manifest.splits[split].shards]
    return np.concatenate([np.fromfile(file, dtype=np.dtype(manifest.dtype).newbyteorder("<")) for file in files])


def texts_of(manifest, split, tokenizer):
    """The documents in a split's shards, decoded."""
    ids = read(manifest, split)
    ends = np.flatnonzero(ids == tokenizer.eos_token_id)
    assert ends[-1] == len(ids) - 1
    return [tokenizer.decode(part[:-1].tolist()) for part in np.split(ids, ends + 1)[:-1]]


def contents(directory):
    """Every visible file of a folder, byte for byte."""
    return {path.name: path.read_bytes() for path in directory.iterdir() if not path.name.startswith(".")}


# ----------------------------------------------------------------------------- what is in them


def test_shards_hold_every_document_once_with_exact_counts(tmp_path, bpe):
    manifest = prepare(tmp_path, DOCUMENTS, bpe)
    encoder = document_encoder(bpe)
    held_out = set(texts_of(manifest, "validation", bpe))
    assert 30 <= len(held_out) <= 90  # a fifth of 300
    for split in ("train", "validation"):
        expected = [document for document in DOCUMENTS if (document in held_out) == (split == "validation")]
        assert texts_of(manifest, split, bpe) == expected
        ids = [[*encoder.encode(document, add_special_tokens=False).ids, bpe.eos_token_id] for document in expected]
        assert read(manifest, split).tolist() == sum(ids, [])
        summary = manifest.splits[split]
        assert summary.tokens == sum(map(len, ids))
        assert summary.documents == len(expected)
        assert summary.bytes == sum(len(document.encode()) for document in expected)
        assert summary.unknown_tokens == 0
        for name in ("tokens", "documents", "bytes"):
            assert getattr(summary, name) == sum(getattr(shard, name) for shard in summary.shards)
        assert all(shard.tokens >= 2000 for shard in summary.shards[:-1])
    assert len(manifest.splits["train"].shards) > 3
    assert load_manifest(tmp_path / "shards", bpe) == manifest
    names = {shard.name for split in manifest.splits.values() for shard in split.shards}
    assert contents(tmp_path / "shards").keys() == names | {"manifest.json"}


def test_the_checksums_are_those_of_the_files(tmp_path, bpe):
    manifest = prepare(tmp_path, DOCUMENTS, bpe)
    for split in manifest.splits.values():
        for shard in split.shards:
            data = (manifest.directory / shard.name).read_bytes()
            assert xxhash.xxh3_64_hexdigest(data) == shard.xxh3_64


def test_the_fingerprint_says_which_tokens_these_are(tmp_path, bpe):
    first = prepare(tmp_path / "a", DOCUMENTS, bpe)
    assert len(first.fingerprint) == 16
    assert prepare(tmp_path / "b", DOCUMENTS, bpe).fingerprint == first.fingerprint
    assert load_manifest(shutil.copytree(first.directory, tmp_path / "c")).fingerprint == first.fingerprint
    others = [
        prepare(tmp_path / "d", [*DOCUMENTS[:-1], "x"], bpe),
        prepare(tmp_path / "e", DOCUMENTS[::-1], bpe),
        prepare(tmp_path / "f", DOCUMENTS, bpe, validation_fraction=0.5),
    ]
    assert len({manifest.fingerprint for manifest in [first, *others]}) == 4


@pytest.mark.parametrize(
    ("count", "expected"), [(3, r"\b\d{2,3}B, about \d+ tokens"), (300, r"\d+\.\dkB, about \d+,\d+ ")]
)
def test_sizes_are_told_in_fitting_units(tmp_path, bpe, capsys, count, expected):
    prepare(tmp_path, DOCUMENTS[:count], bpe)
    assert re.search(expected, capsys.readouterr().out)


def test_special_tokens_in_text_are_text(tmp_path, bpe):
    documents = [f"{i} <|endoftext|> {i}" for i in range(40)]
    manifest = prepare(tmp_path, documents, bpe)
    found = [text for split in ("train", "validation") for text in texts_of(manifest, split, bpe)]
    assert sorted(found) == sorted(documents)


def test_copies_of_a_document_stay_on_one_side(tmp_path, bpe):
    documents = make_documents(50) * 3
    manifest = prepare(tmp_path, documents, bpe)
    train, validation = (Counter(texts_of(manifest, split, bpe)) for split in ("train", "validation"))
    assert not train.keys() & validation.keys()
    assert set((train | validation).values()) == {3}


def test_tail_holds_out_the_end_of_every_document(tmp_path, bpe):
    documents = ["漢字é" * 500, "abc" * 700]
    manifest = prepare(tmp_path, documents, bpe, validation_split="tail", validation_fraction=0.1)
    train, validation = (texts_of(manifest, split, bpe) for split in ("train", "validation"))
    assert [a + b for a, b in zip(train, validation, strict=True)] == documents
    assert [len(text) for text in validation] == [150, 210]
    assert manifest.splits["validation"].bytes == sum(len(text.encode()) for text in validation)


@pytest.mark.parametrize("fraction", [1e-9, 0.01, 0.5, 0.99, 1 - 1e-9])
@pytest.mark.parametrize("copies", [False, True])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_of_a_few_documents_the_end_of_each_is_held_out(tmp_path, bpe, capsys, count, copies, fraction):
    """One book, or two: no whole one can be held out and come near the fraction."""
    documents = ["one long text " * 50] * count if copies else make_documents(count)
    manifest = prepare(tmp_path, documents, bpe, validation_fraction=fraction)
    train, validation = (texts_of(manifest, split, bpe) for split in ("train", "validation"))
    if len(train) == len(documents):
        assert [a + b for a, b in zip(train, validation, strict=True)] == documents
        expected = [min(max(1, int(len(text) * (1 - fraction))), len(text) - 1) for text in documents]
        assert [len(text) for text in train] == expected
        assert "the end of each is held out" in capsys.readouterr().out
    else:  # whole documents did come near it
        assert fraction >= 0.5 and not copies and sorted(train + validation) == sorted(documents)


def test_documents_that_are_few_for_their_size_are_noticed_at_once(tmp_path, bpe, monkeypatch):
    """Forty documents of a megabyte at 1%: more than half of such corpora were refused after all was tokenized."""
    monkeypatch.setattr(holdout, "LOOKED_AT", 1 << 14)
    for seed in range(4):
        documents = make_documents(40, seed, words=400)
        manifest = prepare(tmp_path / str(seed), documents, bpe, validation_fraction=0.01)
        assert manifest.splits["train"].documents == manifest.splits["validation"].documents == 40
    # Of as many that are small, and of an unknown number of them, whole ones are held out.
    many = prepare(tmp_path / "many", make_documents(2000, words=100), bpe, validation_fraction=0.01)
    assert 8 <= many.splits["validation"].documents < 40

    class Endless(ListCorpus):
        def num_bytes(self):
            return None

    assert holdout.by_document(Endless(documents), 0.01)


def test_a_share_far_from_what_was_asked_for_is_said(tmp_path, bpe, capsys):
    prepare(tmp_path / "short", ["ab", "cd"] * 10, bpe, validation_split="tail", validation_fraction=0.01)
    assert "50.0% of the text is held out, more than three times validation_fraction=0.01" in capsys.readouterr().out
    prepare(tmp_path / "many", DOCUMENTS, bpe)
    assert "more than" not in capsys.readouterr().out
    with pytest.raises(UserError, match="no text for the validation split: its 80 documents"):
        prepare(tmp_path / "shorter", [*"abcdefgh"] * 10, bpe, validation_split="tail")
    assert not (tmp_path / "shorter/shards").exists()


@pytest.mark.parametrize(("vocab_size", "dtype"), [(65_536, "uint16"), (65_537, "uint32")])
def test_dtype_follows_the_vocabulary(tmp_path, vocab_size, dtype):
    # One token per code point, the last id in use.
    characters = [chr(code) for code in range(0x20, 0x20 + 2 * vocab_size) if not 0xD800 <= code < 0xE000]
    tokenizer = train_character_tokenizer(["".join(characters[: vocab_size - 2])])
    assert len(tokenizer) == vocab_size
    documents = [characters[vocab_size - 3] * 3 + chr(0x30 + i) for i in range(40)]
    manifest = prepare(tmp_path, documents, tokenizer)
    assert manifest.dtype == dtype and manifest.vocab_size == vocab_size
    assert read(manifest, "train").max() == vocab_size - 2 == tokenizer.eos_token_id
    assert set(texts_of(manifest, "train", tokenizer)) < set(documents)
    first = manifest.splits["train"].shards[0]
    assert (manifest.directory / first.name).stat().st_size == first.tokens * (2 if dtype == "uint16" else 4)


def test_unknown_characters_are_counted_and_reported_once(tmp_path, capsys):
    tokenizer = train_character_tokenizer(["abc "])
    documents = [f"abc {'x' * i}" for i in range(40)]
    manifest = prepare(tmp_path, documents, tokenizer)
    known = sum(split.tokens - split.documents - split.unknown_tokens for split in manifest.splits.values())
    assert known == 4 * 40
    total = sum(range(40))
    assert sum(split.unknown_tokens for split in manifest.splits.values()) == total
    assert manifest.splits["validation"].unknown_tokens > 0
    assert capsys.readouterr().out.count(f"{total:,} characters are not in the vocabulary") == 1


def test_bits_per_byte_of_a_uniform_guess(tmp_path):
    tokenizer = train_character_tokenizer(["abcdef"])
    split = prepare(tmp_path, ["abcdef" * 10 + c for c in "abcdef"] * 5, tokenizer).splits["train"]
    loss = math.log(8)  # nats per token, 8 tokens equally likely
    assert loss * split.tokens / (math.log(2) * split.bytes) == pytest.approx(3 * 62 / 61)


# ----------------------------------------------------------------------------- encoders


def reference_ids(tokenizer, text):
    """The ids of a whole document."""
    return [*document_encoder(tokenizer).encode(text, add_special_tokens=False).ids, tokenizer.eos_token_id]


def test_tiktoken_gives_the_ids_of_tokenizers(bpe):
    encode, can_cut = fastest_encoder(bpe)
    assert can_cut and encode.__name__ == "encode_bpe"
    # Every code point next to letters, digits, marks and blanks: both engines have to class it the same way.
    code_points = [chr(code) for code in range(sys.maxunicode + 1) if not 0xD800 <= code < 0xE000]
    sampled = code_points[:0x3100] + random.Random(1).sample(code_points, 3000)
    texts = ["".join(f"a{c} {c}1{c}!{c} {c}{c}\n" for c in sampled[i : i + 100]) for i in range(0, len(sampled), 100)]
    texts += make_documents(500, seed=2) + ["", " ", "\n", " \n ", "a ", " a"]
    for text, ids in zip(texts, encode(texts), strict=True):
        assert ids.tolist() == reference_ids(bpe, text), repr(text)


def test_a_text_that_tiktoken_gives_up_on_is_encoded_all_the_same(bpe):
    encode, _ = fastest_encoder(bpe)
    text = "\n" * 1_000_000 + "a"
    with pytest.raises(ValueError, match="Regex error"):
        tiktoken.Encoding(
            "x", pat_str=GPT2_PATTERN, mergeable_ranks={b"\n": 0, b"a": 1}, special_tokens={}
        ).encode_to_numpy(text)
    assert encode([text])[0].tolist() == reference_ids(bpe, text)


@pytest.mark.parametrize("text", [SEPARATOR, f"a {SEPARATOR}\n", f"{SEPARATOR * 2} b"])
def test_a_text_with_the_separator_is_encoded_all_the_same(bpe, text):
    encode, _ = fastest_encoder(bpe)
    texts = ["before ", text, " after"]
    assert [ids.tolist() for ids in encode(texts)] == [reference_ids(bpe, text) for text in texts]


def test_character_table_gives_the_ids_of_tokenizers():
    tokenizer = train_character_tokenizer(DOCUMENTS[:200])
    encode, can_cut = fastest_encoder(tokenizer)
    assert can_cut and encode.func.__name__ == "encode_characters"
    texts = [*DOCUMENTS, "never seen: ÿ𝄞", "", "<|unknown|><|endoftext|>"]
    for text, ids in zip(texts, encode(texts), strict=True):
        assert ids.tolist() == reference_ids(tokenizer, text), repr(text)


def test_other_tokenizers_go_through_tokenizers(tmp_path):
    backend = tokenizers.Tokenizer(models.WordLevel({"the": 0, "?": 1, "<eos>": 2}, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", unk_token="?")
    encode, can_cut = fastest_encoder(tokenizer)
    assert not can_cut and encode.__name__ == "encode"
    assert [ids.tolist() for ids in encode(["the cat the", ""])] == [[0, 1, 0, 2], [2]]
    manifest = prepare(tmp_path, [f"the {i}" for i in range(40)], tokenizer)
    assert sum(split.unknown_tokens for split in manifest.splits.values()) == 40


def test_a_document_that_is_too_long_for_one_piece_is_refused_before_it_is_joined(tmp_path, monkeypatch, bpe):
    monkeypatch.setattr(holdout, "LONGEST", 3000)
    documents = make_documents(40, words=10) + ["a word " * 1000]
    prepare(tmp_path / "in pieces", documents, bpe)
    backend = tokenizers.Tokenizer(models.WordLevel({"<|endoftext|>": 0, "a": 1}, unk_token="<|endoftext|>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    whole = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>", unk_token="<|endoftext|>")
    with pytest.raises(UserError, match="a document has 7,000 characters, and .* of 3,000 at most"):
        prepare(tmp_path / "whole", documents, whole)


def test_a_bpe_whose_merges_tiktoken_would_not_follow_is_not_given_to_it(bpe):
    state = json.loads(bpe.backend_tokenizer.to_str())["model"]
    alphabet = {c: i for c, i in state["vocab"].items() if len(c) == 1}
    assert len(alphabet) == 256

    def engine(merges):
        vocab = alphabet | {a + b: 256 + i for i, (a, b) in enumerate(merges)}
        tokenizer = byte_level_bpe(vocab, merges)
        return tokenizer, fastest_encoder(tokenizer)[0].__name__

    assert engine([("b", "c"), ("a", "bc")])[1] == "encode_bpe"
    # "abc" is a token made of "a" and "bc"; tiktoken would also make it of "ab" and "c", which these merges cannot.
    tokenizer, name = engine([("a", "b"), ("b", "c"), ("a", "bc")])
    assert name == "encode"
    assert len(reference_ids(tokenizer, "abc")) == 2 + 1


@pytest.mark.parametrize("characters", [False, True])
def test_long_documents_are_cut_without_changing_ids(tmp_path, bpe, monkeypatch, characters):
    tokenizer = train_character_tokenizer(DOCUMENTS) if characters else bpe
    document = "".join(DOCUMENTS)
    monkeypatch.setattr(holdout, "BATCH_CHARACTERS", 50)
    assert len(list(split_document(document, 50))) > 100
    manifest = prepare(tmp_path, [document], tokenizer, validation_split="tail", validation_fraction=0.5)
    half = document[: int(len(document) * 0.5)]
    assert read(manifest, "train").tolist() == reference_ids(tokenizer, half)


# ----------------------------------------------------------------------------- the same bytes, come what may


def test_number_of_workers_does_not_matter(tmp_path, bpe, monkeypatch):
    monkeypatch.setattr(holdout, "BATCH_CHARACTERS", 1000)
    one = prepare(tmp_path / "one", DOCUMENTS, bpe, num_workers=1)
    five = prepare(tmp_path / "five", DOCUMENTS, bpe, num_workers=5)
    assert contents(one.directory) == contents(five.directory)


PREPARE = """
    import os, signal, sys, time
    from pathlib import Path
    sys.path[:0] = {tests!r}
    from test_shards import DOCUMENTS, ListCorpus
    from llmkit.data.shards import prepare_shards
    from llmkit.data.tokenizer import load_tokenizer

    directory, mode = Path(sys.argv[1]), sys.argv[2]

    class Watched(ListCorpus):
        def in_pieces(self, skip=0):
            for index, document in enumerate(super().in_pieces(skip)):
                if mode == "kill" and (directory / "train_00001.bin").exists():
                    os.kill(os.getpid(), signal.SIGKILL)
                if mode == "slow" and index % 100 == 0:
                    time.sleep(0.1)
                yield document

    Path(f"{{directory}}.{{os.getpid()}}.ready").touch()
    while mode == "slow" and len(list(directory.parent.glob("*.ready"))) < 2:
        time.sleep(0.01)
    manifest = prepare_shards(Watched(DOCUMENTS), load_tokenizer(sys.argv[3]), directory,
                              validation_fraction=0.2, shard_tokens=2000, num_workers=2)
    print("tokens", manifest.splits["train"].tokens)
"""


def start(tmp_path, mode, bpe):
    bpe.save_pretrained(tmp_path / "tokenizer")
    code = "import llmkit.data.holdout\nllmkit.data.holdout.BATCH_CHARACTERS = 1000\n" + textwrap.dedent(PREPARE)
    code = code.format(tests=[str(folder) for folder in Path(__file__).parents[:2]])
    command = [sys.executable, "-c", code, str(tmp_path / "shards"), mode, str(tmp_path / "tokenizer")]
    return subprocess.Popen(
        command, cwd=Path(__file__).parents[2], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def test_killed_and_restarted_ends_with_the_same_bytes(tmp_path, bpe, monkeypatch):
    whole = prepare(tmp_path / "whole", DOCUMENTS, bpe)
    process = start(tmp_path, "kill", bpe)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == -9, errors
    folder = tmp_path / "shards"
    assert (folder / "train_00001.bin").exists() and not (folder / "manifest.json").exists()
    with pytest.raises(UserError, match="did not finish"):
        load_manifest(folder)
    # What the killed run wrote after its last commit is not in the journal, and must not stay.
    for partial in folder.glob("*.partial"):
        with partial.open("ab") as file:
            file.write(b"torn")
    finished = (folder / "train_00000.bin").stat()
    skipped, documents = [], ListCorpus.in_pieces
    monkeypatch.setattr(ListCorpus, "in_pieces", lambda self, skip=0: skipped.append(skip) or documents(self, skip))
    again = prepare(tmp_path, DOCUMENTS, bpe)
    assert max(skipped) > 50  # it went on, and did not start again
    assert (folder / "train_00000.bin").stat().st_ino == finished.st_ino
    assert contents(again.directory) == contents(whole.directory)


@pytest.mark.parametrize(("split", "fraction"), [("document", 0.2), ("document", 1e-9), ("tail", 0.2)])
def test_stopped_at_any_write_it_ends_with_the_same_bytes(tmp_path, bpe, monkeypatch, split, fraction):
    """Stops a preparation at each of its file operations in turn, and starts it again."""
    documents = DOCUMENTS[:80]
    kwargs = {"shard_tokens": 700, "validation_split": split, "validation_fraction": fraction}
    whole = prepare(tmp_path / "whole", documents, bpe, **kwargs)
    expected = contents(whole.directory)

    class Stopped(BaseException):
        """As a kill: nothing catches it."""

    for operation in ("replace", "open", "truncate"):
        for count in range(1000):
            folder = tmp_path / f"{operation}{count}"
            remaining = [count]

            def stopping(original, remaining=remaining):
                def call(*args, **kwargs):
                    if remaining[0] == 0:
                        raise Stopped
                    remaining[0] -= 1
                    return original(*args, **kwargs)

                return call

            with monkeypatch.context() as patch:
                owner = shards.os if operation == "truncate" else shards.Path
                patch.setattr(owner, operation, stopping(getattr(owner, operation)))
                try:
                    prepare(folder, documents, bpe, **kwargs)
                    stopped = False
                except Stopped:
                    stopped = True
            again = prepare(folder, documents, bpe, **kwargs)
            assert contents(again.directory) == expected, (operation, count)
            if not stopped:
                break
        assert count > 5 or operation == "truncate"


def test_two_processes_make_one_dataset(tmp_path, bpe):
    whole = prepare(tmp_path / "whole", DOCUMENTS, bpe)
    processes = [start(tmp_path, "slow", bpe) for _ in range(2)]
    results = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], results
    outputs = [output for output, _ in results]
    assert all(f"tokens {whole.splits['train'].tokens}" in output for output in outputs)
    # Only one of them did the work, and said what it needs.
    assert sum("free" in output for output in outputs) == 1
    assert contents(tmp_path / "shards") == contents(whole.directory)


def test_finished_shards_are_returned_untouched(tmp_path, bpe, monkeypatch):
    first = prepare(tmp_path, DOCUMENTS, bpe)
    monkeypatch.setattr(ListCorpus, "in_pieces", lambda *_: pytest.fail("read the corpus again"))
    assert prepare(tmp_path, DOCUMENTS, bpe) == first


# ----------------------------------------------------------------------------- what can go wrong


def test_another_tokenizer_corpus_or_setting_is_an_error(tmp_path, bpe):
    manifest = prepare(tmp_path, DOCUMENTS, bpe)
    before = contents(manifest.directory)
    other = train_character_tokenizer(DOCUMENTS)
    with pytest.raises(UserError, match="another tokenizer"):
        load_manifest(manifest.directory, other)
    with pytest.raises(UserError, match="another tokenizer.*another folder or delete"):
        prepare(tmp_path, DOCUMENTS, other)
    with pytest.raises(UserError, match="another corpus"):
        prepare_shards(ListCorpus(DOCUMENTS, "other"), bpe, manifest.directory, validation_fraction=0.2)
    with pytest.raises(UserError, match="shard_tokens 2000 instead of 3000"):
        prepare(tmp_path, DOCUMENTS, bpe, shard_tokens=3000)
    assert contents(manifest.directory) == before


def stop_after(count):
    """A corpus that fails after some documents, as a dropped connection would."""

    class Failing(ListCorpus):
        def in_pieces(self, skip=0):
            for index, document in enumerate(super().in_pieces(skip), skip):
                if index == count:
                    raise ConnectionError("dropped")
                yield document

    return Failing(DOCUMENTS)


def test_unfinished_shards_of_other_settings_are_an_error(tmp_path, bpe, monkeypatch):
    monkeypatch.setattr(shards, "SAMPLE_CHARACTERS", 100)
    monkeypatch.setattr(holdout, "BATCH_CHARACTERS", 100)
    folder = tmp_path / "shards"
    options = {"validation_fraction": 0.2, "shard_tokens": 2000, "num_workers": 1}
    with pytest.raises(ConnectionError):
        prepare_shards(stop_after(250), bpe, folder, **options)
    assert (folder / "train_00000.bin").exists()
    with pytest.raises(UserError, match="validation_fraction 0.2 instead of 0.1"):
        prepare(tmp_path, DOCUMENTS, bpe, validation_fraction=0.1)
    # With nothing finished there is nothing to lose: it starts clean, and left no folder.
    with pytest.raises(ConnectionError):
        prepare_shards(stop_after(10), bpe, tmp_path / "early", **options)
    assert not (tmp_path / "early").exists()
    whole = prepare(tmp_path / "whole", DOCUMENTS, bpe)
    assert contents(prepare(tmp_path, DOCUMENTS, bpe).directory) == contents(whole.directory)


def test_too_small_a_disk_is_refused_before_anything_is_written(tmp_path, bpe, monkeypatch, capsys):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(UserError, match="need about .* free"):
        prepare(tmp_path, DOCUMENTS, bpe)
    assert list(tmp_path.iterdir()) == []
    assert "to write" in capsys.readouterr().out


@pytest.mark.parametrize("writes", [5, 250])
def test_a_disk_that_fills_up_leaves_nothing_that_looks_whole(tmp_path, bpe, monkeypatch, writes):
    append = ShardWriter.append
    calls = []

    def fail(writer, ids):
        calls.append(1)
        if len(calls) > writes:
            raise OSError(errno.ENOSPC, "No space left on device")
        append(writer, ids)

    with monkeypatch.context() as patch:
        patch.setattr(ShardWriter, "append", fail)
        with pytest.raises(UserError, match="disk is full"):
            prepare(tmp_path, DOCUMENTS, bpe)
    folder = tmp_path / "shards"
    assert folder.exists() == (writes == 250)
    with pytest.raises(UserError, match="manifest.json is missing"):
        load_manifest(folder)
    whole = prepare(tmp_path / "whole", DOCUMENTS, bpe)
    assert contents(prepare(tmp_path, DOCUMENTS, bpe).directory) == contents(whole.directory)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="/dev/full is Linux's")
def test_a_really_full_device_is_a_user_error(tmp_path, bpe, monkeypatch):
    monkeypatch.setattr(ShardWriter, "_partial", lambda *_: Path("/dev/full"))
    with pytest.raises(UserError, match="disk is full"):
        prepare(tmp_path, DOCUMENTS, bpe)
    assert list(tmp_path.iterdir()) == []


def test_a_missing_or_truncated_shard_is_an_error(tmp_path, bpe):
    manifest = prepare(tmp_path, DOCUMENTS, bpe)
    path = manifest.directory / "train_00001.bin"
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(UserError, match="train_00001.bin has .* bytes instead of"):
        load_manifest(manifest.directory)
    path.unlink()
    with pytest.raises(UserError, match="train_00001.bin is missing"):
        load_manifest(manifest.directory)


def test_a_folder_of_something_else_is_an_error(tmp_path):
    with pytest.raises(UserError, match="no shards"):
        load_manifest(tmp_path)
    for text in (b"{", b"[]", b"{}", b'{"splits": {}}', b"\xff\xfe", b"[" * 100_000):
        (tmp_path / "manifest.json").write_bytes(text)
        with pytest.raises(UserError, match="not a manifest"):
            load_manifest(tmp_path)


def leaves(value, path=()):
    """The paths of everything in a JSON value, the inner nodes included."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield from leaves(item, (*path, key))


@pytest.mark.parametrize("odd", [None, -1, 10**30, 1.5, "x", "../x", [], {}, True])
def test_a_damaged_manifest_is_one_line(tmp_path, bpe, odd):
    """Any value in it, replaced by another: it is refused, or changes nothing that is read."""
    manifest = prepare(tmp_path, DOCUMENTS[:60], bpe, shard_tokens=3000)
    fields = json.loads((manifest.directory / "manifest.json").read_text())
    refused = 0
    for path in list(leaves(fields))[1:]:
        damaged = json.loads(json.dumps(fields))
        place = functools.reduce(operator.getitem, path[:-1], damaged)
        place[path[-1]] = odd
        (manifest.directory / "manifest.json").write_text(json.dumps(damaged))
        try:
            found = load_manifest(manifest.directory, bpe)
        except UserError as error:
            assert "\n" not in str(error) and str(manifest.directory) in str(error)
            refused += 1
        else:
            for split in ("train", "validation"):
                assert len(TokenWindows(found, split, 8)) == len(TokenWindows(manifest, split, 8))
    assert refused > 20


@pytest.mark.parametrize("name", ["", ".", "..", "../train_00000.bin", "/train_00000.bin", "a\0b"])
def test_a_shard_is_a_file_of_the_folder(tmp_path, bpe, name):
    path = prepare(tmp_path, DOCUMENTS[:60], bpe).directory / "manifest.json"
    fields = json.loads(path.read_text())
    fields["splits"]["train"]["shards"][0]["name"] = name
    path.write_text(json.dumps(fields))
    with pytest.raises(UserError, match=r"not a manifest of token shards \(splits\)"):
        load_manifest(path.parent)


@pytest.mark.parametrize("content", [b"", b"\xff\xfe", b"[" * 100_000, b'{"settings": 1}', b'{"settings": {}}'])
def test_a_damaged_journal_is_one_line(tmp_path, bpe, content):
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards/journal.json").write_bytes(content)
    with pytest.raises(UserError, match="journal.json is damaged"):
        prepare(tmp_path, DOCUMENTS, bpe)


@pytest.mark.parametrize(
    "option",
    [{"validation_fraction": 0}, {"validation_fraction": 1.5}, {"validation_split": "half"}, {"num_workers": 0}],
)
def test_bad_options_name_themselves(tmp_path, bpe, option):
    with pytest.raises(UserError, match=next(iter(option))):
        prepare(tmp_path, DOCUMENTS, bpe, **option)
    assert list(tmp_path.iterdir()) == []
