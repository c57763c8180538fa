"""Preparing token shards: a corpus is tokenized once, into the files that training reads."""

import errno
import itertools
import math
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path

import filelock
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from llmkit.console import say
from llmkit.data.corpus import Corpus
from llmkit.data.encoding import fastest_encoder, token_dtype
from llmkit.data.holdout import TOLERANCE, by_document
from llmkit.data.manifest import (
    FORMAT_VERSION,
    JOURNAL,
    MANIFEST,
    PARTS,
    Manifest,
    Shard,
    Split,
    load_manifest,
)
from llmkit.data.preparation import Preparation, check_settings
from llmkit.data.shard_writer import partial_files
from llmkit.data.tokenizer import tokenizer_fingerprint
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
    close_together: bool = False,
    show_progress: bool = True,
) -> Manifest:
    """Tokenize a corpus into shards, unless that has been done. Ranks and runs may call it at the same time.

    Args:
        validation_fraction: the part of the text that is held out.
        validation_split: "document" holds out whole documents, chosen by a hash of their text, so that exact copies
            never fall on both sides; the end of each where they are too few for it. "tail" holds out the end of each
            document in any case.
        shard_tokens: a shard is closed after the document that fills it.
        num_workers: threads that tokenize; all cores by default.
        close_together: a shard of one split is closed with that of the other, so that the first ones are whole early.

    Raises:
        UserError: what is in the folder was made from something else, the disk is too small, a split is empty.
    """
    if num_workers is not None and num_workers < 1:
        raise UserError(f"num_workers is {num_workers}: give 1 or more threads")
    settings = shard_settings(corpus, tokenizer, validation_fraction, validation_split, shard_tokens, close_together)
    directory = Path(shard_dir)
    if not (directory / MANIFEST).exists():
        with working_alone(directory), full_disk_is_user_error(directory):
            if (directory / PARTS).exists():
                raise UserError(
                    f"{directory}: its preparation in several tasks did not finish: give its `llmkit shards prepare "
                    "--executor ...` again, or delete the folder"
                )
            if not (directory / MANIFEST).exists():  # whoever had the lock before may have made it
                _prepare(corpus, tokenizer, directory, settings, num_workers or os.cpu_count() or 1, show_progress)
    manifest = load_manifest(directory)
    check_settings(directory, manifest.settings, settings)
    return manifest


def shard_settings(
    corpus: Corpus,
    tokenizer: PreTrainedTokenizerBase,
    validation_fraction: float,
    validation_split: str,
    shard_tokens: int = 100_000_000,
    close_together: bool = False,
) -> dict:
    """What decides the tokens in a folder of shards, and their files.

    Raises:
        UserError: a setting that cannot be.
    """
    if not 0 < validation_fraction < 1:
        raise UserError(f"validation_fraction is {validation_fraction}: it lies between 0 and 1, such as 0.01")
    if validation_split not in ("document", "tail"):
        raise UserError(f"validation_split is {validation_split!r}: give document or tail")
    if shard_tokens < 1:
        raise UserError(f"shard_tokens is {shard_tokens}: give 1 or more tokens")
    return {
        "format_version": FORMAT_VERSION,
        "corpus": corpus.fingerprint(),
        "tokenizer": tokenizer_fingerprint(tokenizer),
        "validation_fraction": validation_fraction,
        "validation_split": validation_split,
        "shard_tokens": shard_tokens,
    } | ({"close_together": 1} if close_together else {})


@contextmanager
def working_alone(directory: Path) -> Iterator[None]:
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
def full_disk_is_user_error(directory: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise UserError(
            f"{directory}: the disk is full: free some space and run it again, it goes on after the last full shard"
        ) from error


def _prepare(
    corpus: Corpus,
    tokenizer: PreTrainedTokenizerBase,
    directory: Path,
    settings: dict,
    num_workers: int,
    show_progress: bool,
) -> None:
    """The whole work of one process on a folder whose lock it holds."""
    num_bytes = corpus.num_bytes()
    with closing(Preparation(corpus, tokenizer, directory, settings)) as preparation:
        check_disk(corpus, num_bytes, tokenizer, directory, preparation.sum("bytes"))
        whole = hold_out_whole(corpus, settings)
        with _progress_bar(num_bytes, preparation.sum("bytes"), show_progress) as bar:
            preparation.write(whole, num_workers, bar)
        written = {split: writer.shards for split, writer in preparation.writers.items()}
        check_splits(corpus, written, settings["validation_fraction"])
        shards = preparation.finish()
    write_json(directory / MANIFEST, make_manifest(corpus, tokenizer, settings, shards, directory).fields())
    for path in [*partial_files(directory), directory / JOURNAL]:
        path.unlink()


def check_disk(
    corpus: Corpus, num_bytes: int | None, tokenizer: PreTrainedTokenizerBase, place: Path | str, done: int
) -> None:
    """Say what disk space is needed, going by the first documents.

    Args:
        num_bytes: of the corpus; None if that is not known.
        place: the folder for the shards, or a URL, of which nobody knows how much is free.
        done: bytes of text that have been tokenized already.

    Raises:
        UserError: there is too little of it.
    """
    free = shutil.disk_usage(place).free if isinstance(place, Path) else math.inf
    sample, characters = [], 0
    for text in itertools.chain.from_iterable(corpus.in_pieces()):
        sample.append(text)
        characters += len(text)
        if characters >= SAMPLE_CHARACTERS:
            break
    for remark in corpus.remarks:
        print(f"shards: {remark}", flush=True)
    text, where = corpus.description, str(place) if math.isinf(free) else f"{place} ({_size(free)} free)"
    if num_bytes is None or not sample:
        say(f"shards: {text}, size unknown, to {where}")
        return
    encode, _ = fastest_encoder(tokenizer)
    tokens_per_byte = sum(map(len, encode(sample))) / sum(len(text.encode()) for text in sample)
    tokens = num_bytes * tokens_per_byte
    need = max(0, num_bytes - done) * tokens_per_byte * token_dtype(tokenizer).itemsize
    say(f"shards: {text}, {_size(num_bytes)}, about {tokens:,.0f} tokens: {_size(need)} to write to {where}")
    if need > free:
        raise UserError(
            f"{place}: the shards need about {_size(need)} and the disk has {_size(free)} free: "
            "free some space or choose a folder on another disk"
        )


def hold_out_whole(corpus: Corpus, settings: dict) -> bool:
    """Whether whole documents are held out, and not the end of each."""
    fraction, by_hash = settings["validation_fraction"], settings["validation_split"] == "document"
    whole = by_hash and by_document(corpus, fraction)
    if by_hash and not whole:
        print(f"shards: too few documents to hold out {fraction:.3g} of them: the end of each is held out", flush=True)
    return whole


def check_splits(corpus: Corpus, shards: dict[str, list[Shard]], fraction: float) -> None:
    """Refuse a split without text; say if far more is held out than was asked for, or if characters are unknown.

    Raises:
        UserError: there is no text for one of the splits.
    """
    splits = {split: Split.of(written) for split, written in shards.items()}
    for name, split in splits.items():
        if not split.bytes:
            documents = sum(split.documents for split in splits.values())
            raise UserError(
                f"{corpus.description}: no text for the {name} split: its {documents:,} documents leave it none at "
                f"validation_fraction={fraction}: give more text, or --validation_split tail"
            )
    share = splits["validation"].bytes / sum(split.bytes for split in splits.values())
    if share > TOLERANCE * fraction:
        print(
            f"shards: {share:.1%} of the text is held out, more than three times validation_fraction={fraction}, "
            "for there is so little: give more text",
            flush=True,
        )
    if unknown := sum(split.unknown_tokens for split in splits.values()):
        print(f"shards: {unknown:,} characters are not in the vocabulary, they became the unknown token", flush=True)


def make_manifest(
    corpus: Corpus,
    tokenizer: PreTrainedTokenizerBase,
    settings: dict,
    shards: dict[str, list[Shard]],
    directory: Path | None,
) -> Manifest:
    """The manifest of finished shards, which makes their folder a dataset when it is written there."""
    return Manifest(
        directory,
        dtype=token_dtype(tokenizer).name,
        vocab_size=len(tokenizer),
        eos_token_id=tokenizer.eos_token_id,
        corpus=corpus.description,
        settings=settings,
        splits={split: Split.of(finished) for split, finished in shards.items()},
    )


def _progress_bar(num_bytes: int | None, done: int, is_shown: bool) -> tqdm:
    return tqdm(
        disable=not is_shown,
        desc="tokenizing",
        total=num_bytes,
        initial=done,
        unit="B",
        unit_scale=True,
        mininterval=0.5 if sys.stderr.isatty() else 30,  # a log file gets few lines
    )


def _size(num_bytes: float) -> str:
    return tqdm.format_sizeof(num_bytes, "B")
