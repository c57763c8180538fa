"""Preparing token shards: a corpus is tokenized once, into the files that training memory-maps.

The work is pipelined over threads of one process: one reads the corpus and writes the shards in the corpus's order,
the others tokenize. So the result does not depend on the number of threads.

When a shard is full, the open files of *both* splits are flushed, and a journal records which shards are finished, how
long the open ones are, and how many documents that took. A run that was killed goes on from there, and ends with the
same bytes as one that was not.
"""

import errno
import itertools
import json
import os
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path

import filelock
import numpy as np
from huggingface_hub.errors import StrictDataclassError
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from llmkit.console import say
from llmkit.data.corpus import Corpus
from llmkit.data.encoding import fastest_encoder, map_in_order, token_dtype
from llmkit.data.holdout import TOLERANCE, Piece, by_document, in_batches, split_pieces
from llmkit.data.manifest import (
    FORMAT_VERSION,
    JOURNAL,
    MANIFEST,
    SPLITS,
    Manifest,
    Shard,
    Split,
    load_manifest,
)
from llmkit.data.shard_writer import ShardWriter, partial_files
from llmkit.data.tokenizer import tokenizer_fingerprint, unknown_token_id
from llmkit.errors import UserError
from llmkit.files import write_json

LOCK = ".lock"
SAMPLE_CHARACTERS = 1 << 20  # read beforehand to estimate how many tokens there will be


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
            never fall on both sides; the end of each where they are too few for it. "tail" holds out the end of each
            document in any case.
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
        with _working_alone(directory), _full_disk_is_user_error(directory):
            if not (directory / MANIFEST).exists():  # whoever had the lock before may have made it
                _Preparation(corpus, tokenizer, directory, settings).run(num_workers or os.cpu_count() or 1)
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
            for path in [*partial_files(directory), directory / LOCK]:
                path.unlink(missing_ok=True)
            with suppress(OSError):  # it is not empty
                directory.rmdir()
        raise
    finally:
        lock.release()


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
    """One process's work on a folder whose lock it holds. The first `documents` of the corpus are in the files."""

    def __init__(self, corpus: Corpus, tokenizer: PreTrainedTokenizerBase, directory: Path, settings: dict):
        self.corpus, self.tokenizer, self.directory, self.settings = corpus, tokenizer, directory, settings
        self.num_bytes, self.dtype = corpus.num_bytes(), token_dtype(tokenizer)
        self.unknown_id = unknown_token_id(tokenizer)
        self.encode, self.can_cut = fastest_encoder(tokenizer)
        self.documents = 0
        shards = {split: [Shard(f"{split}_00000.bin")] for split in SPLITS}
        if (directory / JOURNAL).exists():
            try:
                journal = json.loads((directory / JOURNAL).read_text(encoding="utf-8"))
                found, self.documents = dict(journal["settings"]), int(journal["documents"])
                shards = {split: [Shard(**shard) for shard in journal["shards"][split]] for split in SPLITS}
            except (OSError, ValueError, TypeError, KeyError, RecursionError, StrictDataclassError) as error:
                raise UserError(
                    f"{directory / JOURNAL} is damaged ({error}): delete the folder and prepare the shards again"
                ) from error
            _check_settings(directory, found, settings)
        self.writers = {split: ShardWriter(directory, split, self.dtype, shards[split]) for split in SPLITS}

    def run(self, num_workers: int) -> None:
        try:
            self._check_disk()
            self._write_shards(num_workers)
            self._finish()
        finally:
            for writer in self.writers.values():
                writer.close()
        if unknown := self._sum("unknown_tokens"):
            print(
                f"shards: {unknown:,} characters are not in the vocabulary, they became the unknown token", flush=True
            )

    def _sum(self, count: str) -> int:
        return sum(getattr(shard, count) for writer in self.writers.values() for shard in writer.shards)

    def _check_disk(self) -> None:
        """Say what disk space is needed, going by the first documents, and refuse to start if it is not there."""
        free = shutil.disk_usage(self.directory).free
        sample, characters = [], 0
        for text in itertools.chain.from_iterable(self.corpus.in_pieces()):
            sample.append(text)
            characters += len(text)
            if characters >= SAMPLE_CHARACTERS:
                break
        for remark in self.corpus.remarks:
            print(f"shards: {remark}", flush=True)
        text, place = self.corpus.description, f"{self.directory} ({_size(free)} free)"
        if self.num_bytes is None or not sample:
            say(f"shards: {text}, size unknown, to {place}")
            return
        tokens_per_byte = sum(map(len, self.encode(sample))) / sum(len(text.encode()) for text in sample)
        tokens = self.num_bytes * tokens_per_byte
        need = max(0, self.num_bytes - self._sum("bytes")) * tokens_per_byte * self.dtype.itemsize
        size = _size(self.num_bytes)
        say(f"shards: {text}, {size}, about {tokens:,.0f} tokens: {_size(need)} to write to {place}")
        if need > free:
            raise UserError(
                f"{self.directory}: the shards need about {_size(need)} and the disk has {_size(free)} free: "
                "free some space or choose a folder on another disk"
            )

    def _write_shards(self, num_workers: int) -> None:
        fraction = self.settings["validation_fraction"]
        whole = self.settings["validation_split"] == "document" and by_document(self.corpus, fraction)
        if not whole and self.settings["validation_split"] == "document":
            print(
                f"shards: too few documents to hold out {fraction:.3g} of them: the end of each is held out",
                flush=True,
            )
        batches = in_batches(split_pieces(self.corpus, self.documents, fraction, whole, self.can_cut))
        tokens_before, start = self._sum("tokens"), time.perf_counter()
        with self._progress_bar() as bar:
            for batch, encoded in map_in_order(self._encode, batches, num_workers):
                for piece, ids in zip(batch, encoded, strict=True):
                    self._append(piece, ids)
                rate = (self._sum("tokens") - tokens_before) / (time.perf_counter() - start)
                bar.set_postfix_str(f"{tqdm.format_sizeof(rate)} tokens/s", refresh=False)
                bar.update(self._sum("bytes") - bar.n)

    def _progress_bar(self) -> tqdm:
        return tqdm(
            desc="tokenizing",
            total=self.num_bytes,
            initial=self._sum("bytes"),
            unit="B",
            unit_scale=True,
            mininterval=0.5 if sys.stderr.isatty() else 30,  # a log file gets few lines
        )

    def _encode(self, batch: list[Piece]) -> tuple[list[Piece], list[np.ndarray]]:
        return batch, self.encode([piece.text for piece in batch])

    def _append(self, piece: Piece, ids: np.ndarray) -> None:
        writer = self.writers[piece.split]
        writer.append(ids if piece.ends_text else ids[:-1])
        shard = writer.open_shard
        shard.bytes += len(piece.text.encode())
        shard.documents += piece.ends_text
        if self.unknown_id is not None:
            shard.unknown_tokens += int(np.count_nonzero(ids == self.unknown_id))
        if piece.ends_document:
            self.documents += 1
            full = self.settings["shard_tokens"]
            if any(writer.open_shard.tokens >= full for writer in self.writers.values()):
                self._commit(full)

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
        write_json(self.directory / JOURNAL, journal)
        for partial, finished in closed:
            partial.replace(finished)

    def _finish(self) -> None:
        """Close the last shards, write the manifest, and remove what only a restart needs."""
        fraction = self.settings["validation_fraction"]
        num_bytes = {split: sum(shard.bytes for shard in writer.shards) for split, writer in self.writers.items()}
        for split, size in num_bytes.items():
            if not size:
                raise UserError(
                    f"{self.corpus.description}: no text for the {split} split: its {self.documents:,} documents "
                    f"leave it none at validation_fraction={fraction}: give more text, or --validation_split tail"
                )
        if (share := num_bytes["validation"] / sum(num_bytes.values())) > TOLERANCE * fraction:
            print(
                f"shards: {share:.1%} of the text is held out, more than three times validation_fraction={fraction}, "
                "for there is so little: give more text",
                flush=True,
            )
        self._commit(full=1)
        Manifest(
            self.directory,
            dtype=self.dtype.name,
            vocab_size=len(self.tokenizer),
            eos_token_id=self.tokenizer.eos_token_id,
            corpus=self.corpus.description,
            settings=self.settings,
            splits={split: Split.of(writer.finished_shards) for split, writer in self.writers.items()},
        ).save()
        for path in [*partial_files(self.directory), self.directory / JOURNAL]:
            path.unlink()


def _size(num_bytes: float) -> str:
    return tqdm.format_sizeof(num_bytes, "B")
