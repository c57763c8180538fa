"""Token shards: text is tokenized once, into flat binary files that training memory-maps.

A folder of shards holds `train_00000.bin`, ..., `validation_00000.bin`, ..., plain arrays of little-endian `uint16`
(`uint32` for vocabularies over 65,536), and `manifest.json`, which is written last: a folder without it is not a
dataset. Every document is followed by `<|endoftext|>`. (build-nanogpt puts it before. In a flat stream the two differ
by one token at each end; after, the last document is closed like all others, and "finished" is what the token says.)

The work is pipelined over threads of one process: one reads the corpus and writes the shards in the corpus's order,
the others tokenize in Rust without holding the interpreter. So the result does not depend on the number of threads.

A shard is called `<name>.partial` until it is full. Then the open files of *both* splits are flushed, and a journal
records which shards are finished, how long the open ones are, and how many documents that took. A run that was killed
goes on from there, and ends with the same bytes as one that was not.
"""

import errno
import itertools
import json
import os
import shutil
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import filelock
import numpy as np
import xxhash
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode

from llmkit.corpus import Corpus
from llmkit.errors import UserError
from llmkit.tokenizer import document_encoder, split_document, tokenizer_fingerprint, unknown_token_id

try:
    import tiktoken
except ImportError:  # an optional speed-up: the ids are the same without it
    tiktoken = None

FORMAT_VERSION = 1
SPLITS = ("train", "validation")
MANIFEST, JOURNAL, LOCK = "manifest.json", "journal.json", ".lock"
# Characters handed to a thread at a time: enough to hide the hand-over, little enough to keep every core busy.
BATCH_CHARACTERS = 1 << 18
SAMPLE_CHARACTERS = 1 << 20  # read beforehand to estimate how many tokens there will be

Encode = Callable[[list[str]], list[np.ndarray]]


# ----------------------------------------------------------------------------- manifest


@dataclass
class Shard:
    """One file of tokens: what it holds, and its checksum."""

    name: str
    tokens: int = 0
    documents: int = 0
    bytes: int = 0
    unknown_tokens: int = 0
    xxh3_64: str = ""


@dataclass(frozen=True)
class Split:
    """The shards of one split in order, and their sums.

    `bytes` are those of the UTF-8 text, so that bits_per_byte = loss * tokens / (ln 2 * bytes).
    """

    tokens: int
    documents: int
    bytes: int
    unknown_tokens: int
    shards: list[Shard]


@dataclass(frozen=True)
class Manifest:
    """What a folder of finished shards holds and what it was made from."""

    directory: Path
    dtype: str
    vocab_size: int
    eos_token_id: int
    corpus: str
    settings: dict[str, int | float | str]
    splits: dict[str, Split]


def load_manifest(shard_dir: str | Path, tokenizer: PreTrainedTokenizerBase | None = None) -> Manifest:
    """Read the manifest of a folder of shards; the files' sizes are checked, their contents are not read.

    Args:
        tokenizer: if given, it has to be the one that the shards were made with.

    Raises:
        UserError: no finished shards there, a missing or truncated shard, another tokenizer.
    """
    directory = Path(shard_dir)
    path = directory / MANIFEST
    if not path.exists():
        unfinished = "its preparation did not finish: run it again" if (directory / JOURNAL).exists() else "no shards"
        raise UserError(f"{directory}: {unfinished} ({MANIFEST} is missing)")
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
        splits = {
            name: Split(**{**split, "shards": [Shard(**shard) for shard in split["shards"]]})
            for name, split in fields.pop("splits").items()
        }
        manifest = Manifest(directory=directory, splits=splits, **fields)
        version = manifest.settings["format_version"]
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{path}: not a manifest of token shards ({error}): choose another folder") from error
    if version != FORMAT_VERSION:
        raise UserError(
            f"{path}: format version {version}, this llmkit reads {FORMAT_VERSION}: prepare the shards again"
        )
    for shard in itertools.chain.from_iterable(split.shards for split in splits.values()):
        _check_size(directory / shard.name, shard.tokens * np.dtype(manifest.dtype).itemsize)
    if tokenizer is not None:
        made_with, given = manifest.settings["tokenizer"], tokenizer_fingerprint(tokenizer)
        if made_with != given:
            raise UserError(
                f"{directory}: its shards were made with another tokenizer (fingerprint {made_with}, not {given}): "
                "use that tokenizer, or prepare shards with this one in another folder"
            )
    return manifest


def _check_size(path: Path, expected: int) -> None:
    size = path.stat().st_size if path.exists() else None
    if size != expected:
        found = "is missing" if size is None else f"has {size:,} bytes instead of {expected:,}"
        raise UserError(f"{path} {found}: delete the folder and prepare the shards again")


def _write_json(path: Path, fields: dict) -> None:
    """Write a file in one step: it is there whole or not at all, after a power cut too."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        json.dump(fields, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


# ----------------------------------------------------------------------------- preparation


def prepare_shards(
    corpus: Corpus,
    tokenizer: PreTrainedTokenizerBase,
    shard_dir: str | Path,
    *,
    validation_fraction: float = 0.01,
    validation_split: str = "document",
    shard_tokens: int = 100_000_000,
    num_workers: int | None = None,
) -> Manifest:
    """Tokenize a corpus into shards, unless that has been done. Ranks and runs may call it at the same time.

    Args:
        validation_fraction: the part of the text that is held out.
        validation_split: "document" holds out whole documents, chosen by a hash of their text, so that exact copies
            never fall on both sides. "tail" holds out the end of every document, for one or a few long texts.
        shard_tokens: a shard is closed after the document that fills it.
        num_workers: threads that tokenize; all cores by default.

    Raises:
        UserError: what is in the folder was made from something else, the disk is too small, a split is empty.
    """
    if not 0 < validation_fraction < 1:
        raise UserError(f"validation_fraction is {validation_fraction}: it lies between 0 and 1, such as 0.01")
    if validation_split not in ("document", "tail"):
        raise UserError(f"validation_split is {validation_split!r}: give document or tail")
    if shard_tokens < 1 or (num_workers is not None and num_workers < 1):
        raise UserError(f"shard_tokens ({shard_tokens}) and num_workers ({num_workers}) have to be positive")
    settings = {
        "format_version": FORMAT_VERSION,
        "corpus": corpus.fingerprint(),
        "tokenizer": tokenizer_fingerprint(tokenizer),
        "validation_fraction": validation_fraction,
        "validation_split": validation_split,
        "shard_tokens": shard_tokens,
    }
    directory = Path(shard_dir)
    if not (directory / MANIFEST).exists():
        with _working_alone(directory):
            if not (directory / MANIFEST).exists():
                with _full_disk_is_user_error(directory):
                    preparation = _Preparation(corpus, tokenizer, directory, settings)
                    preparation.run(num_workers or os.cpu_count() or 1)
    manifest = load_manifest(directory)
    _check_settings(directory, manifest.settings, settings)
    return manifest


def _check_settings(directory: Path, found: dict, wanted: dict) -> None:
    different = [
        f"another {name}" if name in ("corpus", "tokenizer") else f"{name} {found.get(name)} instead of {value}"
        for name, value in wanted.items()
        if found.get(name) != value
    ]
    if different:
        raise UserError(
            f"{directory}: its shards were made with {', '.join(different)}: choose another folder or delete this one"
        )


@contextmanager
def _working_alone(directory: Path) -> Iterator[None]:
    """Hold the folder's lock; after a failure leave no trace, unless there are finished shards to go on from."""
    directory.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(directory / LOCK)
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        print(f"shards: another process is preparing {directory}, waiting for it", flush=True)
        lock.acquire()
    directory.mkdir(exist_ok=True)  # whoever held the lock has failed and removed it
    try:
        yield
    except Exception:
        if not (directory / JOURNAL).exists():
            for path in [*_partial_files(directory), directory / LOCK]:
                path.unlink(missing_ok=True)
            with suppress(OSError):  # it is not empty
                directory.rmdir()
        raise
    finally:
        lock.release()


def _partial_files(directory: Path) -> list[Path]:
    return [path for split in SPLITS for path in directory.glob(f"{split}_*.partial")] + list(directory.glob("*.tmp"))


@contextmanager
def _full_disk_is_user_error(directory: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise UserError(
            f"{directory}: the disk is full: free some space and run it again, it goes on after the last full shard"
        ) from error


class _Preparation:
    """One process's work on a folder whose lock it holds.

    `documents` of the corpus are in the writers' files.
    """

    def __init__(self, corpus: Corpus, tokenizer: PreTrainedTokenizerBase, directory: Path, settings: dict):
        self.corpus, self.tokenizer, self.directory, self.settings = corpus, tokenizer, directory, settings
        self.dtype = np.dtype("<u2" if len(tokenizer) <= 1 << 16 else "<u4")
        self.encode, self.can_cut = fastest_encoder(tokenizer)
        self.documents = 0
        shards = {split: [Shard(f"{split}_00000.bin")] for split in SPLITS}
        if (directory / JOURNAL).exists():
            journal = json.loads((directory / JOURNAL).read_text(encoding="utf-8"))
            _check_settings(directory, journal["settings"], settings)
            self.documents = journal["documents"]
            shards = {split: [Shard(**shard) for shard in journal["shards"][split]] for split in SPLITS}
        self._check_disk(sum(shard.bytes for split in SPLITS for shard in shards[split]))
        self.writers = {split: _Writer(directory, split, self.dtype, shards[split]) for split in SPLITS}

    def run(self, num_workers: int) -> None:
        try:
            self._write_shards(num_workers)
        finally:
            for writer in self.writers.values():
                writer.close()
        if unknown := sum(shard.unknown_tokens for writer in self.writers.values() for shard in writer.shards):
            print(
                f"shards: {unknown:,} characters are not in the vocabulary, they became the unknown token", flush=True
            )

    def _write_shards(self, num_workers: int) -> None:
        unknown_id = unknown_token_id(self.tokenizer)
        separator = np.array([self.tokenizer.eos_token_id], dtype=self.dtype)
        shard_tokens = self.settings["shard_tokens"]
        pieces = self._pieces(self.corpus.documents(skip=self.documents))
        with self._progress_bar() as bar:
            start, tokens = time.perf_counter(), 0
            for piece, ids in _encode_in_order(pieces, self.encode, self.dtype, num_workers):
                writer = self.writers[piece.split]
                writer.append(ids)
                writer.open_shard.bytes += piece.num_bytes
                if unknown_id is not None:
                    writer.open_shard.unknown_tokens += int(np.count_nonzero(ids == unknown_id))
                if piece.ends_text:
                    writer.append(separator)
                    writer.open_shard.documents += 1
                tokens += len(ids)
                bar.set_postfix_str(f"{tokens / (time.perf_counter() - start) / 1e6:.2f}M tokens/s", refresh=False)
                bar.update(piece.num_bytes)
                if piece.ends_document:
                    self.documents += 1
                    if any(writer.open_shard.tokens >= shard_tokens for writer in self.writers.values()):
                        self._commit(shard_tokens)
        self._check_not_empty()
        self._commit(1)
        self._finish()

    def _commit(self, full: int) -> None:
        """Close the shards of at least `full` tokens, and record how far both splits are.

        The journal comes before the new names: after it, a restart can give them; before it, the files are only
        longer than the last journal says, and a restart cuts them.
        """
        closed = [writer.close_shard() for writer in self.writers.values() if writer.open_shard.tokens >= full]
        for writer in self.writers.values():
            writer.flush()
        shards = {split: [asdict(shard) for shard in writer.shards] for split, writer in self.writers.items()}
        journal = {"settings": self.settings, "documents": self.documents, "shards": shards}
        _write_json(self.directory / JOURNAL, journal)
        for partial, finished in closed:
            partial.replace(finished)

    def _finish(self) -> None:
        """Write the manifest, which makes the folder a dataset, and remove what only a restart needs."""
        splits = {}
        for split, writer in self.writers.items():
            shards = [asdict(shard) for shard in writer.shards[:-1]]  # the last one is open and empty
            sums = {
                name: sum(shard[name] for shard in shards)
                for name in ("tokens", "documents", "bytes", "unknown_tokens")
            }
            splits[split] = {**sums, "shards": shards}
        fields = {
            "dtype": self.dtype.name,
            "vocab_size": len(self.tokenizer),
            "eos_token_id": self.tokenizer.eos_token_id,
            "corpus": self.corpus.description,
            "settings": self.settings,
            "splits": splits,
        }
        _write_json(self.directory / MANIFEST, fields)
        for path in [*_partial_files(self.directory), self.directory / JOURNAL]:
            path.unlink()

    def _pieces(self, documents: Iterable[str]) -> Iterator["_Piece"]:
        for document in documents:
            parts = self._parts(document)
            for split, text in parts:
                pieces = list(split_document(text, BATCH_CHARACTERS)) if self.can_cut else [text]
                for index, piece in enumerate(pieces):
                    ends_text = index == len(pieces) - 1
                    ends_document = ends_text and split == parts[-1][0]
                    yield _Piece(split, piece, len(piece.encode()), ends_text, ends_document)

    def _parts(self, document: str) -> list[tuple[str, str]]:
        """Which text of a document goes to which split."""
        fraction = self.settings["validation_fraction"]
        if self.settings["validation_split"] == "document":
            held_out = xxhash.xxh3_64_intdigest(document.encode()) < fraction * 2**64
            return [("validation" if held_out else "train", document)]
        cut = int(len(document) * (1 - fraction))
        parts = [("train", document[:cut]), ("validation", document[cut:])]
        return [(split, text) for split, text in parts if text]

    def _check_not_empty(self) -> None:
        for split, writer in self.writers.items():
            if not any(shard.tokens for shard in writer.shards):
                raise UserError(
                    f"{self.corpus.description}: no text for the {split} split: of {self.documents:,} documents, "
                    f"validation_fraction {self.settings['validation_fraction']} leaves it none; hold out the end of "
                    "every document instead (--validation_split tail), or another fraction"
                )

    def _check_disk(self, bytes_done: int) -> None:
        """Say what disk space is needed, going by the first documents, and refuse to start if it is not there."""
        free = shutil.disk_usage(self.directory).free
        sample, characters = [], 0
        for document in self.corpus.documents():
            sample.append(document[:SAMPLE_CHARACTERS])
            characters += len(document)
            if characters >= SAMPLE_CHARACTERS:
                break
        self.num_bytes = self.corpus.num_bytes()
        self.bytes_done = bytes_done
        if self.num_bytes is None or not sample:
            print(
                f"shards: {self.corpus.description}, size unknown, to {self.directory} ({_gb(free)} free)", flush=True
            )
            return
        tokens_per_byte = sum(len(ids) + 1 for ids in self.encode(sample)) / sum(len(text.encode()) for text in sample)
        need = max(0, self.num_bytes - bytes_done) * tokens_per_byte * self.dtype.itemsize
        print(
            f"shards: {self.corpus.description}, {_gb(self.num_bytes)} of text, to {self.directory}: about "
            f"{self.num_bytes * tokens_per_byte / 1e6:,.1f}M tokens, {_gb(need)} to write, {_gb(free)} free",
            flush=True,
        )
        if need > free:
            raise UserError(
                f"{self.directory}: the shards need about {_gb(need)} and the disk has {_gb(free)} free: "
                "free some space or choose a folder on another disk"
            )

    def _progress_bar(self) -> tqdm:
        terminal = sys.stderr.isatty()
        return tqdm(
            desc="tokenizing",
            total=self.num_bytes,
            initial=self.bytes_done,
            unit="B",
            unit_scale=True,
            mininterval=0.5 if terminal else 30,  # a log file gets few lines
        )


def _gb(num_bytes: float) -> str:
    return f"{num_bytes / 1e9:.1f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:.1f} MB"


class _Writer:
    """The shards of one split. The last one is open, and called `<name>.partial`."""

    def __init__(self, directory: Path, split: str, dtype: np.dtype, shards: list[Shard]):
        """Go on from the shards of a journal (or from one empty shard), and give the finished ones their names."""
        self.directory, self.split, self.dtype, self.shards = directory, split, dtype, shards
        for shard in shards[:-1]:
            partial = self._partial(shard)
            if partial.exists():  # killed between the journal and the new name
                partial.replace(directory / shard.name)
            _check_size(directory / shard.name, shard.tokens * dtype.itemsize)
        self._open()

    @property
    def open_shard(self) -> Shard:
        return self.shards[-1]

    def _partial(self, shard: Shard) -> Path:
        return self.directory / f"{shard.name}.partial"

    def _open(self) -> None:
        path, size = self._partial(self.open_shard), self.open_shard.tokens * self.dtype.itemsize
        self.checksum = xxhash.xxh3_64()
        if size:
            os.truncate(path, size)
            with path.open("rb") as file:
                while chunk := file.read(1 << 24):
                    self.checksum.update(chunk)
            if self.checksum.hexdigest() != self.open_shard.xxh3_64:
                raise UserError(f"{path} is damaged: delete the folder and prepare the shards again")
        self.file = path.open("ab" if size else "wb", buffering=1 << 20)

    def append(self, ids: np.ndarray) -> None:
        self.file.write(ids.data)
        self.checksum.update(ids.data)
        self.open_shard.tokens += len(ids)

    def flush(self) -> None:
        self.file.flush()
        os.fsync(self.file.fileno())
        self.open_shard.xxh3_64 = self.checksum.hexdigest()

    def close_shard(self) -> tuple[Path, Path]:
        """Open the next shard. Returns the full one's present name and the name that it has earned."""
        self.flush()
        self.file.close()
        full = self.open_shard
        self.shards.append(Shard(f"{self.split}_{len(self.shards):05d}.bin"))
        self._open()
        return self._partial(full), self.directory / full.name

    def close(self) -> None:
        with suppress(OSError):  # on a full disk the last buffer does not go out, and nobody will need it
            self.file.close()


# ----------------------------------------------------------------------------- encoding


class _Piece(NamedTuple):
    """A stretch of a document. The pieces of a long one share the cores."""

    split: str
    text: str
    num_bytes: int
    ends_text: bool  # `<|endoftext|>` follows
    ends_document: bool  # nothing of the document follows in either split


def _encode_in_order(
    pieces: Iterable[_Piece], encode: Encode, dtype: np.dtype, num_workers: int
) -> Iterator[tuple[_Piece, np.ndarray]]:
    """Encode on `num_workers` threads, at most two batches ahead for each, and give the results in the given order."""

    def work(batch: list[_Piece]) -> list[tuple[_Piece, np.ndarray]]:
        ids = encode([piece.text for piece in batch])
        return [(piece, array.astype(dtype, copy=False)) for piece, array in zip(batch, ids, strict=True)]

    with ThreadPoolExecutor(num_workers) as pool:
        pending = deque()
        for batch in _batches(pieces):
            pending.append(pool.submit(work, batch))
            if len(pending) > 2 * num_workers:
                yield from pending.popleft().result()
        while pending:
            yield from pending.popleft().result()


def _batches(pieces: Iterable[_Piece]) -> Iterator[list[_Piece]]:
    batch, characters = [], 0
    for piece in pieces:
        batch.append(piece)
        characters += len(piece.text)
        if characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


# GPT-2's pre-tokenizer, with possessive quantifiers: the same matches, found without backtracking.
GPT2_PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""


class _ThreadEngine(threading.local):
    """tiktoken's engine, one for each thread.

    All but the first thread to use an engine take its regex's slow path to scratch memory: with an engine each, two
    threads are 1.4x as fast.
    """

    def __init__(self, name: str, **kwargs):
        self.encoding = tiktoken.Encoding(name, **kwargs)


def fastest_encoder(tokenizer: PreTrainedTokenizerBase) -> tuple[Encode, bool]:
    """The fastest way to the ids of `document_encoder(tokenizer)`, exactly those.

    `tokenizers` builds strings and offsets for each token that nobody reads here. Where the vocabulary is a byte-level
    BPE with GPT-2's pre-tokenizer, tiktoken gives the same ids about five times faster; where tokens are characters, a
    table lookup does. Every other tokenizer goes through `tokenizers`.

    Returns:
        A function from texts to arrays of ids, and whether `split_document` may cut texts before.
    """
    encoder = document_encoder(tokenizer)
    state = json.loads(encoder.to_str())

    def encode(texts: list[str]) -> list[np.ndarray]:
        encodings = encoder.encode_batch_fast(texts, add_special_tokens=False)
        return [np.array(encoding.ids, dtype=np.uint32) for encoding in encodings]

    def encode_bpe(texts: list[str]) -> list[np.ndarray]:
        try:
            return [bpe.encoding.encode_to_numpy(text, disallowed_special=()) for text in texts]
        except ValueError:  # its regex engine gives up on a run of about a million blanks
            return encode(texts)

    def encode_characters(texts: list[str]) -> list[np.ndarray]:
        return [table[np.frombuffer(text.encode("utf-32-le"), dtype="<u4")] for text in texts]

    if (ranks := _tiktoken_ranks(state)) is not None:
        if tiktoken is None:
            print(
                "shards: `pip install tiktoken` makes tokenizing about five times faster, with the same ids",
                flush=True,
            )
            return encode, True
        # Without any special token tiktoken looks for the empty string, and finds it after every character.
        special = {tokenizer.eos_token: tokenizer.eos_token_id}
        bpe = _ThreadEngine("gpt2", pat_str=GPT2_PATTERN, mergeable_ranks=ranks, special_tokens=special)
        return encode_bpe, True
    if (table := _character_table(state)) is not None:
        return encode_characters, True
    return encode, False


def _plain_bpe(state: dict) -> bool:
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
    if not _plain_bpe(state) or pre_tokenizer is None or not gpt2_words.items() <= pre_tokenizer.items():
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


def _character_table(state: dict) -> np.ndarray | None:
    """The id of each code point, for a vocabulary of characters; None for any other."""
    if not _plain_bpe(state) or state["model"]["merges"] or state["model"]["unk_token"] is None:
        return None
    pre_tokenizer = state["pre_tokenizer"]
    if pre_tokenizer is not None and (pre_tokenizer["type"] != "Split" or pre_tokenizer["behavior"] == "Removed"):
        return None
    vocab = state["model"]["vocab"]
    table = np.full(sys.maxunicode + 1, vocab[state["model"]["unk_token"]], dtype=np.uint32)
    for token, index in vocab.items():
        if len(token) == 1:
            table[ord(token)] = index
    return table
