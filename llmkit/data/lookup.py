"""Which documents a window of training data has: for whoever asks what a step was trained on."""

import bisect
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedTokenizerBase

from llmkit.data.shard_files import ShardFile
from llmkit.data.token_view import printable
from llmkit.data.tokenizer import decode
from llmkit.data.windows import TokenWindows

WORDS = 16  # tokens that are shown of a document


@dataclass(frozen=True)
class Document:
    """A document that a window has a part of."""

    shard: str
    offset: int  # of the document's first token in the shard
    text: str  # how it begins

    def __str__(self) -> str:
        return f"{self.shard}, token {self.offset:,}: {self.text!r}"


def documents_of(
    windows: TokenWindows, index: int, tokenizer: PreTrainedTokenizerBase, tokens: int = WORDS
) -> Iterator[Document]:
    """The documents of which window `index` has a target, in order. Documents do not cross shards.

    Args:
        tokens: how many are decoded of each.
    """
    first, last = index * windows.block_size, min((index + 1) * windows.block_size, windows.num_tokens - 1)
    while first <= last:
        shard = bisect.bisect_right(windows.starts, first) - 1
        begin, end = windows.starts[shard], windows.starts[shard + 1]
        ids = windows.shards[shard]
        start = _after_last(ids, first - begin, windows.pad_id)
        length = _until_next(ids, start, windows.pad_id)
        text = decode(tokenizer, ids[start : start + min(length, tokens)].astype(np.int64))
        yield Document(windows.manifest.splits[windows.split].shards[shard].name, start, printable(text.encode()))
        first = begin + start + length
        assert first <= end


def _after_last(ids: np.ndarray | ShardFile, end: int, end_id: int, chunk: int = 1 << 16) -> int:
    """The place after the last `end_id` before the place `end`, 0 where there is none; read from the end on."""
    for stop in range(end, 0, -chunk):
        begin = max(0, stop - chunk)
        if len(found := np.flatnonzero(ids[begin:stop] == end_id)):
            return begin + int(found[-1]) + 1
    return 0


def _until_next(ids: np.ndarray | ShardFile, start: int, end_id: int, chunk: int = 1 << 16) -> int:
    """Tokens from the place `start` up to and with the first `end_id`."""
    for begin in range(start, len(ids), chunk):
        if len(found := np.flatnonzero(ids[begin : begin + chunk] == end_id)):
            return begin - start + int(found[0]) + 1
    return len(ids) - start
