"""Windows cover every token, and every rank draws its own."""

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from llmkit.data.manifest import Manifest, Shard, Split
from llmkit.data.shard_files import DamagedShard
from llmkit.data.tokenizer import train_bpe_tokenizer
from llmkit.data.windows import IGNORED, TokenWindows, collate_windows
from llmkit.errors import UserError

EOS = 7


def make_manifest(directory: Path, train: list[int], validation: list[int], dtype: str = "uint16") -> Manifest:
    """Shards of the given lengths. A token says where in its split it stands."""
    splits = {}
    for split, lengths in (("train", train), ("validation", validation)):
        stream = np.arange(sum(lengths)) + 1000
        shards, start = [], 0
        for index, length in enumerate(lengths):
            name = f"{split}_{index:05d}.bin"
            stream[start : start + length].astype(np.dtype(dtype).newbyteorder("<")).tofile(directory / name)
            shards.append(Shard(name, tokens=length, documents=1, bytes=4 * length))
            start += length
        splits[split] = Split(len(stream), len(lengths), 4 * len(stream), 0, shards)
    return Manifest(directory, dtype, 60_000, EOS, "numbers", {}, splits)


def targets(windows, split_windows):
    """(position, token, target) of every target that counts."""
    found = []
    for index in split_windows:
        window = windows[index]
        for offset, (token, target) in enumerate(zip(window["input_ids"], window["shift_labels"], strict=True)):
            if target != IGNORED:
                found.append((index * windows.block_size + offset, int(token), int(target)))
    return found


@pytest.mark.parametrize("dtype", ["uint16", "uint32"])
@pytest.mark.parametrize("lengths", [[41], [17, 1, 3, 20], [5, 5, 30], [40], [42]])
@pytest.mark.parametrize("block_size", [1, 4, 7, 8])
def test_each_token_but_the_first_is_a_target_once(tmp_path, lengths, block_size, dtype):
    manifest = make_manifest(tmp_path, lengths, lengths, dtype)
    total = sum(lengths)
    for split, last in (("train", (total - 1) // block_size * block_size), ("validation", total - 1)):
        windows = TokenWindows(manifest, split, block_size)
        expected = [(i, 1000 + i, 1001 + i) for i in range(last)]
        assert targets(windows, range(len(windows))) == expected
        for index in range(len(windows)):
            window = windows[index]
            assert window.keys() == {"input_ids", "shift_labels"}
            for tensor in window.values():
                assert tensor.shape == (block_size,) and tensor.dtype == torch.int64


def test_the_last_validation_window_is_filled_up_and_masked(tmp_path):
    windows = TokenWindows(make_manifest(tmp_path, [20], [11]), "validation", 8)
    assert len(windows) == 2
    assert windows[1]["input_ids"].tolist() == [1008, 1009, 1010] + [EOS] * 5
    assert windows[1]["shift_labels"].tolist() == [1009, 1010] + [IGNORED] * 6


@pytest.mark.parametrize("total", [9, 33, 34, 40])
def test_padding_adds_only_masked_windows(tmp_path, total):
    windows = TokenWindows(make_manifest(tmp_path, [20], [total]), "validation", 8)
    for multiple in (1, 4, 6):
        padded = windows.padded_to_multiple_of(multiple)
        assert len(padded) % multiple == 0 and len(windows) <= len(padded) < len(windows) + multiple
        assert targets(padded, range(len(padded))) == targets(windows, range(len(windows)))
        for index in range(len(windows), len(padded)):
            assert padded[index]["input_ids"].shape == (8,)
            assert padded[index]["shift_labels"].tolist() == [IGNORED] * 8


def test_windows_outside_are_an_index_error(tmp_path):
    windows = TokenWindows(make_manifest(tmp_path, [20], [11]), "train", 8)
    assert len(list(windows)) == len(windows) == 2  # iteration ends at the IndexError
    for index in (2, -1):
        with pytest.raises(IndexError):
            windows[index]


def test_measures_of_the_text(tmp_path):
    windows = TokenWindows(make_manifest(tmp_path, [20, 4], [11]), "train", 8)
    assert (windows.num_tokens, windows.num_bytes, windows.tokens_per_byte, windows.block_size) == (24, 96, 0.25, 8)


@pytest.mark.parametrize(("split", "lengths", "block_size"), [("train", [8], 8), ("validation", [1], 8)])
def test_a_split_shorter_than_a_block_is_an_error(tmp_path, split, lengths, block_size):
    manifest = make_manifest(tmp_path, lengths, lengths)
    with pytest.raises(UserError, match=rf"{split} split has {lengths[0]} tokens.*block_size 8 takes 9"):
        TokenWindows(manifest, split, block_size)


def test_opening_reads_no_token(tmp_path):
    manifest = make_manifest(tmp_path, [20], [11])
    (tmp_path / "train_00000.bin").unlink()
    windows = TokenWindows(manifest, "train", 8)
    with pytest.raises(DamagedShard, match="train_00000.bin cannot be read: No such file"):
        windows[0]
    loader = DataLoader(windows, batch_size=1, num_workers=1, collate_fn=collate_windows)
    with pytest.raises(DamagedShard, match="^[^ ]*train_00000.bin cannot be read: No such file"):  # and no traceback
        next(iter(loader))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_dataloader_gives_the_windows_in_batches(tmp_path, num_workers):
    windows = TokenWindows(make_manifest(tmp_path, [60, 41], [11]), "train", 5)
    windows[0]  # opens a file, which a copy for a worker must not carry
    assert len(pickle.dumps(windows)) < 2000
    sampler = windows.sampler([3] * 8, seed=1)
    loader = DataLoader(windows, batch_sampler=sampler, collate_fn=collate_windows, num_workers=num_workers)
    for indices, batch in zip(sampler, loader, strict=True):
        one_by_one = collate_windows([windows[index] for index in indices])
        assert batch.keys() == one_by_one.keys()
        for name, tensor in batch.items():
            assert tensor.shape == (3, 5) and tensor.is_contiguous()
            torch.testing.assert_close(tensor, one_by_one[name], rtol=0, atol=0)


def test_an_id_beyond_the_vocabulary_is_said_and_not_looked_up(tmp_path):
    manifest = make_manifest(tmp_path, [60], [60])
    windows = TokenWindows(manifest, "train", 8)
    ids = np.fromfile(tmp_path / "train_00000.bin", "<u2")
    ids[20] = manifest.vocab_size
    ids.tofile(tmp_path / "train_00000.bin")
    windows[0]
    with pytest.raises(UserError, match="token id 60000 in windows .2., and the vocabulary has 60,000: .* damaged"):
        windows[2]


def test_prompts_are_the_beginnings_of_held_out_documents(tmp_path):
    tokenizer = train_bpe_tokenizer(["one two three four five six seven eight nine ten " * 50], 290)
    documents = ["", "one two three four five six seven eight nine ten " * 9, "\n\n", "two", "two", "six seven", "🌍"]
    ids = [id for text in documents for id in [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]]
    validation = TokenWindows.from_tokens(ids, ids, tokenizer, 64)[1]
    assert validation.beginnings(tokenizer, 2) == [
        (documents[1] * 2)[: len(validation.beginnings(tokenizer)[0])],
        "two",
    ]
    assert validation.beginnings(tokenizer, 9)[1:] == ["two", "six seven", "🌍"]
    for block_size in (1, 4, 64):
        prompts = TokenWindows.from_tokens(ids, ids, tokenizer, block_size)[1].beginnings(tokenizer)
        assert all(1 <= len(tokenizer(prompt)["input_ids"]) <= max(1, block_size // 2) for prompt in prompts)
        assert len(prompts[0]) >= min(2, block_size) / 2


# ----------------------------------------------------------------------------- tokens in memory


@pytest.mark.parametrize("kind", [list, np.array, torch.tensor])
def test_windows_of_tokens_in_memory_are_those_of_shards(data, kind):
    manifest, tokenizer = data
    ids = {
        split: np.concatenate([np.fromfile(manifest.directory / s.name, "<u2") for s in manifest.splits[split].shards])
        for split in ("train", "validation")
    }
    in_memory = TokenWindows.from_tokens(*(kind(part.tolist()) for part in ids.values()), tokenizer, 16)
    for split, windows in zip(ids, in_memory, strict=True):
        expected = TokenWindows(manifest, split, 16)
        assert len(windows) == len(expected) and windows.num_bytes == expected.num_bytes
        assert windows.manifest.splits[split].documents == manifest.splits[split].documents
        again = pickle.loads(pickle.dumps(windows))  # as a DataLoader's worker gets it
        for index in range(len(expected)):
            for name, tensor in expected[index].items():
                assert torch.equal(windows[index][name], tensor) and torch.equal(again[index][name], tensor)
    other = TokenWindows.from_tokens(ids["train"][::-1], ids["validation"], tokenizer, 16)[0]
    assert other.manifest.fingerprint != in_memory[0].manifest.fingerprint


@pytest.mark.parametrize(
    ("train", "message"),
    [
        ([1, 2, 300], "train_ids: ids from 1 to 300, and the tokenizer has 300"),
        ([-1, 2, 3], "train_ids: ids from -1"),
        ([1.0, 2.0], "train_ids: an array of float64"),
        ([[1, 2], [3, 4]], "with 2 dimensions: give one series"),
        ([], "train_ids: an array of float64"),
        ([1, 2, 3], "the train split has 3 tokens, one window of block_size 16 takes 17"),
    ],
)
def test_tokens_that_make_no_windows(data, train, message):
    with pytest.raises(UserError, match=message):
        TokenWindows.from_tokens(train, [1, 2, 3], data[1], 16)
