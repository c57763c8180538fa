"""Training data from token shards: the shards of a split are one stream, which is cut into windows of one length."""

import bisect
import copy
import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import xxhash
from torch.utils.data import Dataset, default_collate
from transformers import PreTrainedTokenizerBase

from llmkit.data.arguments import REMOTE_GROUP, DataArguments
from llmkit.data.encoding import token_dtype
from llmkit.data.manifest import SPLITS, Manifest, Shard, Split, load_manifest
from llmkit.data.order import BatchSizes, WindowBatchSampler, WindowOrder
from llmkit.data.shard_cache import CachedFiles, ShardCache
from llmkit.data.shard_files import DamagedShard, OpenFiles, ShardFile
from llmkit.data.tokenizer import decode, tokenizer_fingerprint
from llmkit.errors import UserError

IGNORED = -100  # the label that losses leave out


class TokenWindows(Dataset):
    """The windows of one split: window i covers tokens [i*T, i*T + T], where T is the block size.

    Its first T tokens are the inputs, its last T the targets. Neighbours share one token, so in an epoch each token
    but the first is a target once. The training split has whole windows only, and leaves out up to T - 1 tokens at
    its end. The validation split keeps its last window, filled up with `<|endoftext|>` and ignored labels, so that
    every token counts.

    The files are opened when they are first read: that costs the same at any size, and copies for DataLoader workers
    are small. `from_tokens` makes windows over arrays in memory.

    Args:
        shards: a folder or a URL of shards, or its manifest.
        split: "train" or "validation".
        block_size: T.
        shard_group: the number of consecutive shards whose windows are shuffled together. By default all of them, and
            `REMOTE_GROUP` of a URL.
        cache_gb: the bound of the cache for shards of URLs, in 10^9 bytes.

    Raises:
        UserError: no finished shards there, or a split that is too short for one window.
    """

    def __init__(
        self,
        shards: Manifest | str | Path,
        split: str,
        block_size: int,
        shard_group: int | None = None,
        cache_gb: float = DataArguments.shard_cache_gb,
    ):
        manifest = shards if isinstance(shards, Manifest) else load_manifest(shards)
        self.manifest, self.split = manifest, split
        self.shard_group = shard_group or (REMOTE_GROUP if manifest.url else None)
        tokens = manifest.splits[split]
        self.block_size = block_size
        self.num_tokens = tokens.tokens
        self.num_bytes = tokens.bytes
        self.pad_id = manifest.eos_token_id
        self.dtype = np.dtype(manifest.dtype).newbyteorder("<")
        self.vocab_size = manifest.vocab_size
        # starts[i] is the position of shard i's first token in the stream; the last entry is the stream's length.
        self.starts = [0, *itertools.accumulate(shard.tokens for shard in tokens.shards)]
        self.num_windows = (self.num_tokens - 1) // block_size
        if split == "validation":
            self.num_windows = -(-(self.num_tokens - 1) // block_size)
        if self.num_windows < 1:
            raise UserError(
                f"{manifest.place or manifest.corpus}: the {split} split has {self.num_tokens:,} tokens, one "
                f"window of block_size {block_size:,} takes {block_size + 1:,}: give more text or a smaller block_size"
            )
        self.shards: Sequence[np.ndarray | ShardFile] = []
        self.cache = ShardCache(manifest, int(cache_gb * 1e9)) if manifest.url else None
        if manifest.directory is not None:
            # Of the cache as many files are open as a group has, with the one in which its last window ends.
            files = CachedFiles(self.cache, (self.shard_group or 0) + 1) if self.cache else OpenFiles()
            self.shards = [
                ShardFile(manifest.directory / shard.name, self.dtype, shard.tokens, files) for shard in tokens.shards
            ]

    @classmethod
    def from_tokens(
        cls,
        train_ids: Sequence[int] | np.ndarray,
        validation_ids: Sequence[int] | np.ndarray,
        tokenizer: PreTrainedTokenizerBase,
        block_size: int,
    ) -> tuple["TokenWindows", "TokenWindows"]:
        """Windows over token ids in memory, to train on without files: those of training and of validation.

        The ids are decoded once to count the bytes of their text, which bits per byte are reckoned from.

        Args:
            train_ids, validation_ids: one series of ids each, as arrays, lists or tensors on the CPU. Between two
                documents stands `tokenizer.eos_token_id`.
            tokenizer: the one that they come from; it has an end-of-text token.

        Raises:
            UserError: ids of another shape or type, or that the tokenizer does not have; too few for a window.
        """
        if tokenizer.eos_token_id is None:
            raise UserError("the tokenizer has no end-of-text token: set its eos_token")
        arrays = {
            split: _check_ids(split, ids, tokenizer)
            for split, ids in zip(SPLITS, (train_ids, validation_ids), strict=True)
        }
        manifest = Manifest(
            directory=None,
            dtype=token_dtype(tokenizer).name,
            vocab_size=len(tokenizer),
            eos_token_id=tokenizer.eos_token_id,
            corpus="tokens in memory",
            settings={"corpus": "tokens in memory", "tokenizer": tokenizer_fingerprint(tokenizer)},
            splits={split: _in_memory(split, ids, tokenizer) for split, ids in arrays.items()},
        )
        train, validation = (cls(manifest, split, block_size) for split in SPLITS)
        train.shards, validation.shards = [arrays["train"]], [arrays["validation"]]
        return train, validation

    @property
    def tokens_per_byte(self) -> float:
        """Turns a mean loss per token into bits per byte: loss * tokens_per_byte / ln 2."""
        return self.num_tokens / self.num_bytes

    def beginnings(self, tokenizer: PreTrainedTokenizerBase, count: int = 2) -> list[str]:
        """At most 12 tokens of the first documents of the split: prompts to watch a model learn with."""
        length = max(1, min(12, self.block_size // 2))
        prompts: dict[str, None] = {}
        ids = self._read(0, 1 << 16)
        for document in np.split(ids, np.flatnonzero(ids == self.pad_id) + 1):
            text = decode(tokenizer, document[document != self.pad_id][:length]).rstrip("\ufffd")  # half a character
            if text.strip() and len(prompts) < count:
                prompts[text] = None
        return list(prompts)

    def padded_to_multiple_of(self, multiple: int) -> "TokenWindows":
        """The same windows, and as many after them, with every label ignored, as make `len` a multiple.

        With a multiple of (batch size x ranks) each rank evaluates equally many batches and no window twice. A batch
        may then have no target at all: sum losses and targets, do not average batches.
        """
        padded = copy.copy(self)
        padded.num_windows = -(-self.num_windows // multiple) * multiple
        return padded

    def verify(self) -> None:
        """Read every shard and compare its checksum.

        Raises:
            UserError: a shard is damaged.
        """
        self.manifest.verify()

    def group_bounds(self) -> list[int]:
        """The first window of each group of shards, and the number of windows. A window is of the group it begins in.

        Its last tokens may be those of the next group's first shard.
        """
        firsts = self.starts[: -1 : self.shard_group or len(self.starts)]
        return [*(min(-(-first // self.block_size), self.num_windows) for first in firsts), self.num_windows]

    def order(self, seed: int) -> WindowOrder:
        """The order in which a run draws the windows."""
        return WindowOrder(self.group_bounds(), seed)

    def sampler(self, batches: BatchSizes, seed: int) -> WindowBatchSampler:
        """The batches of a run."""
        return WindowBatchSampler(self.order(seed), batches)

    def locate(self, index: int) -> tuple["TokenWindows", int]:
        """Where a window comes from: these windows, and its number in them."""
        return self, index

    def __len__(self) -> int:
        return self.num_windows

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """`input_ids` and `shift_labels`, both (T,) and int64."""
        return {name: batch[0] for name, batch in self.__getitems__([index]).items()}

    def __getitems__(self, indices: Sequence[int]) -> dict[str, torch.Tensor]:
        """A whole batch at once, which is what a DataLoader asks for: `input_ids`, `shift_labels`, both (B, T)."""
        size = self.block_size
        rows = np.full((len(indices), size + 1), self.pad_id, dtype=self.dtype)
        short: list[tuple[int, int]] = []
        for row, index in enumerate(indices):
            if not 0 <= index < self.num_windows:
                raise IndexError(f"window {index} of {self.num_windows}")
            window = self._read(index * size, index * size + size + 1)
            rows[row, : len(window)] = window
            if len(window) <= size:
                short.append((row, max(0, len(window) - 1)))
        if (largest := rows.max(initial=0)) >= self.vocab_size:
            raise DamagedShard(
                f"{self.manifest.place}: token id {largest} in windows {list(indices)[:8]}, and the vocabulary "
                f"has {self.vocab_size:,}: the shards are damaged, delete the folder and prepare them again"
            )
        shift_labels = rows[:, 1:].astype(np.int64)
        for row, num_targets in short:
            shift_labels[row, num_targets:] = IGNORED
        input_ids = torch.from_numpy(rows[:, :-1].astype(np.int64))
        return {"input_ids": input_ids, "shift_labels": torch.from_numpy(shift_labels)}

    def _read(self, start: int, stop: int) -> np.ndarray:
        """Tokens [start, stop) of the stream, or as many of them as there are."""
        stop = min(stop, self.num_tokens)
        parts = []
        while start < stop:
            shard = bisect.bisect_right(self.starts, start) - 1
            offset = self.starts[shard]
            parts.append(self.shards[shard][start - offset : stop - offset])
            start += len(parts[-1])
        if len(parts) == 1:
            return parts[0]
        return np.concatenate(parts) if parts else np.empty(0, dtype=self.dtype)


def _check_ids(split: str, ids: Sequence[int] | np.ndarray, tokenizer: PreTrainedTokenizerBase) -> np.ndarray:
    array = np.asarray(ids)
    if array.ndim != 1 or not np.issubdtype(array.dtype, np.integer):
        raise UserError(
            f"{split}_ids: an array of {array.dtype} with {array.ndim} dimensions: give one series of integers, such "
            "as np.concatenate(list_of_documents)"
        )
    if array.size and not 0 <= array.min() <= array.max() < len(tokenizer):
        raise UserError(
            f"{split}_ids: ids from {array.min()} to {array.max()}, and the tokenizer has {len(tokenizer):,}: give "
            "the tokenizer that they were made with"
        )
    return np.ascontiguousarray(array, dtype=token_dtype(tokenizer))


def _in_memory(split: str, ids: np.ndarray, tokenizer: PreTrainedTokenizerBase) -> Split:
    ends = np.flatnonzero(ids == tokenizer.eos_token_id)
    documents = [document[document != tokenizer.eos_token_id] for document in np.split(ids, ends + 1)]
    num_bytes = sum(len(decode(tokenizer, document).encode()) for document in documents)
    checksum = xxhash.xxh3_64_hexdigest(ids.data)
    count = sum(document.size > 0 for document in documents)
    return Split.of([Shard(split, tokens=len(ids), documents=count, bytes=num_bytes, xxh3_64=checksum)])


def collate_windows(windows: dict[str, torch.Tensor] | list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """A DataLoader's `collate_fn`: `TokenWindows` gives batches ready made, other datasets give lists of windows."""
    return windows if isinstance(windows, dict) else default_collate(windows)
