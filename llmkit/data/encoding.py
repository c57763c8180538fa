"""From documents to token ids, as fast as the machine can, and always exactly the ids of the tokenizer.

`tokenizers` builds strings and offsets for each token that nobody reads here. Where the vocabulary is a byte-level BPE
with GPT-2's pre-tokenizer, and a check of its merges says that the ids are the same, tiktoken finds them about five
times faster; where tokens are characters, a table lookup does. Every other tokenizer goes through `tokenizers`.

All three work in Rust or numpy without holding the interpreter, so threads of one process share the cores.
"""

import itertools
import json
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TypeVar

import numpy as np
import tiktoken
from transformers import PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode

from llmkit.data.tokenizer import document_encoder

# GPT-2's pre-tokenizer, with possessive quantifiers: the same matches, found without backtracking.
GPT2_PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""
# Joins texts for tiktoken. Unicode reserves this code point for use inside programs; no text has it.
SEPARATOR = "\U0010ffff"

Encode = Callable[[list[str]], list[np.ndarray]]
Item = TypeVar("Item")
Result = TypeVar("Result")


def token_dtype(tokenizer: PreTrainedTokenizerBase) -> np.dtype:
    """The smallest type that holds every id; little-endian, as files have to be the same on any machine."""
    return np.dtype("<u2" if len(tokenizer) <= 1 << 16 else "<u4")


def fastest_encoder(tokenizer: PreTrainedTokenizerBase) -> tuple[Encode, bool]:
    """The fastest way to the ids of `document_encoder(tokenizer)`.

    Returns:
        A function from texts to one array each, of `token_dtype`: the text's ids and `<|endoftext|>`. And whether
        `split_document` may cut texts before.
    """
    encoder = document_encoder(tokenizer)
    state = json.loads(encoder.to_str())
    dtype, end = token_dtype(tokenizer), tokenizer.eos_token_id

    def encode(texts: list[str]) -> list[np.ndarray]:
        encodings = encoder.encode_batch_fast(texts, add_special_tokens=False)
        return [np.array([*encoding.ids, end], dtype=dtype) for encoding in encodings]

    def encode_bpe(texts: list[str]) -> list[np.ndarray]:
        # One call for all texts: with a call for each one, short documents take 1.3x as long.
        joined = SEPARATOR.join(texts) + SEPARATOR
        try:
            ids = engine.bpe.encode_to_numpy(joined, allowed_special={SEPARATOR}, disallowed_special=())
        except ValueError:  # its regex engine gives up on a run of about a million blanks
            return encode(texts)
        ends = np.flatnonzero(ids == end) + 1
        return _cut(ids.astype(dtype), ends) if len(ends) == len(texts) else encode(texts)  # a text has a separator

    def encode_characters(table: np.ndarray, texts: list[str]) -> list[np.ndarray]:
        ids = table[np.frombuffer("".join(texts).encode("utf-32-le"), dtype="<u4")]
        lengths = np.array([len(text) for text in texts])
        return _cut(np.insert(ids, np.cumsum(lengths), end), np.cumsum(lengths + 1))

    if (ranks := _tiktoken_ranks(state)) is not None:
        engine = _ThreadEngine(ranks, {SEPARATOR: end})
        return encode_bpe, True
    if (table := _character_table(state, dtype)) is not None:
        return partial(encode_characters, table), True
    return encode, False


def _cut(ids: np.ndarray, ends: np.ndarray) -> list[np.ndarray]:
    return [ids[start:end] for start, end in itertools.pairwise([0, *ends.tolist()])]


class _ThreadEngine(threading.local):
    """tiktoken's engine, one for each thread.

    All but the first thread to use an engine take its regex's slow path to scratch memory: with an engine each, two
    threads are 1.4x as fast.
    """

    def __init__(self, ranks: dict[bytes, int], special_tokens: dict[str, int]):
        self.bpe = tiktoken.Encoding(
            "llmkit", pat_str=GPT2_PATTERN, mergeable_ranks=ranks, special_tokens=special_tokens
        )


def map_in_order(function: Callable[[Item], Result], items: Iterable[Item], num_workers: int) -> Iterator[Result]:
    """`map(function, items)` on `num_workers` threads, at most two items ahead for each, results in the items' order.

    The items come from the caller's thread, which also consumes the results: what it writes does not depend on the
    number of threads.
    """
    with ThreadPoolExecutor(num_workers) as pool:
        pending = deque()
        for item in items:
            pending.append(pool.submit(function, item))
            if len(pending) > 2 * num_workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()


def _is_plain_bpe(state: dict) -> bool:
    """Whether a serialised tokenizer is a BPE that takes texts as they are, without any special case."""
    options = (
        "dropout",
        "continuing_subword_prefix",
        "end_of_word_suffix",
        "fuse_unk",
        "byte_fallback",
        "ignore_merges",
    )
    return (
        state["normalizer"] is None
        and all(token["special"] for token in state["added_tokens"])
        and state["model"]["type"] == "BPE"
        and not any(state["model"][option] for option in options)
    )


def _tiktoken_ranks(state: dict) -> dict[bytes, int] | None:
    """The ranks with which tiktoken gives a tokenizer's ids; None if that is not certain.

    tiktoken joins any two neighbours whose bytes together are a token, lowest id first; a BPE joins only the pairs
    among its merges, in their order. The two are the same if ids grow along the merges, and if each token, from its
    own bytes with the earlier merges alone, comes down to exactly the pair that its merge names: whatever two
    neighbours tiktoken joins to that token, they grew from those bytes with those merges, so they are that pair.
    """
    pre_tokenizer = state["pre_tokenizer"]
    gpt2_words = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
    if not _is_plain_bpe(state) or pre_tokenizer is None or not gpt2_words.items() <= pre_tokenizer.items():
        return None
    vocab, merges = state["model"]["vocab"], state["model"]["merges"]
    to_byte = {character: byte for byte, character in bytes_to_unicode().items()}
    if not to_byte.keys() <= vocab.keys():
        return None
    ranks: dict[str, int] = {}
    last = -1
    for left, right in merges:
        rank = vocab[left + right]
        if rank <= last or _merge_below(rank, left + right, ranks) != [left, right]:
            return None
        ranks[left + right] = last = rank
    ranks |= {character: vocab[character] for character in to_byte}
    return {bytes(to_byte[character] for character in token): rank for token, rank in ranks.items()}


def _merge_below(rank: int, token: str, ranks: dict[str, int]) -> list[str]:
    """What tiktoken's algorithm makes of a token's characters with the ranks below its own."""
    parts = list(token)
    while len(parts) > 2:
        best, at = rank, -1
        for i in range(len(parts) - 1):
            if (candidate := ranks.get(parts[i] + parts[i + 1], rank)) < best:
                best, at = candidate, i
        if at < 0:
            break
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return parts


def _character_table(state: dict, dtype: np.dtype) -> np.ndarray | None:
    """The id of each code point, for a vocabulary of characters; None for any other."""
    if not _is_plain_bpe(state) or state["model"]["merges"] or state["model"]["unk_token"] is None:
        return None
    pre_tokenizer = state["pre_tokenizer"]
    if pre_tokenizer is not None and (pre_tokenizer["type"] != "Split" or pre_tokenizer["behavior"] == "Removed"):
        return None
    vocab = state["model"]["vocab"]
    table = np.full(sys.maxunicode + 1, vocab[state["model"]["unk_token"]], dtype=dtype)
    for token, index in vocab.items():
        if len(token) == 1:
            table[ord(token)] = index
    return table
