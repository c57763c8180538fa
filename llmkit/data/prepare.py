"""The tokenizer and the token shards of a pretraining run, made on the first run and found on the next."""

import dataclasses
import hashlib
import itertools
import json
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from filelock import FileLock
from transformers import PreTrainedTokenizerBase

from llmkit.console import say
from llmkit.data.arguments import DataArguments
from llmkit.data.corpus import Corpus, open_corpus
from llmkit.data.fetching import PATIENCE, patiently, read
from llmkit.data.files import is_remote
from llmkit.data.manifest import JOURNAL, MANIFEST, SPLITS, Manifest, check_tokenizer, load_manifest
from llmkit.data.mixture import MixedWindows
from llmkit.data.places import RemotePlace
from llmkit.data.preparation import check_settings
from llmkit.data.shards import prepare_shards
from llmkit.data.tokenizer import load_tokenizer, train_bpe_tokenizer, train_character_tokenizer
from llmkit.data.windows import TokenWindows
from llmkit.errors import UserError
from llmkit.files import write_json, write_whole

# A vocabulary of 50k is settled by a few hundred megabytes; more text costs time and changes little.
TOKENIZER_TRAINING_CHARACTERS = 300_000_000

SOURCE, TOKENIZER = "source.json", "tokenizer"


def prepare_pretraining_data(args: DataArguments, **how: Any) -> tuple[PreTrainedTokenizerBase, Manifest]:
    """Train or load the tokenizer, and tokenize the corpus, where that is not done yet.

    Safe to call from several ranks or runs at once: a lock in the folder lets one work, and the others wait for it.

    Args:
        how: what else `prepare_shards` takes.

    Raises:
        UserError: what `open_corpus`, `load_tokenizer` and `prepare_shards` refuse; or `data_dir` was made otherwise.
    """
    if args.data is not None:
        raise UserError("data names several sources: llmkit.data.prepare.prepare_windows prepares them all")
    if args.shards_url:
        return _of_url(args, args.shards_url)
    if args.data_dir and is_prepared_elsewhere(args):
        directory = Path(args.data_dir)
        _check_source(directory, args)
        tokenizer = load_tokenizer(str(directory / TOKENIZER) if _is_trained(args) else args.tokenizer)
        return tokenizer, load_manifest(directory, tokenizer)
    with opened_source(args) as (corpus, tokenizer, directory):
        split = {"validation_fraction": args.validation_fraction, "validation_split": args.validation_split}
        manifest = prepare_shards(corpus, tokenizer, directory, **split, **how)
    return tokenizer, manifest


def is_prepared_elsewhere(args: DataArguments) -> bool:
    """Whether the shards of text on another machine are in `data_dir`: then it is not asked for again."""
    return bool(args.data_dir) and _is_elsewhere(args) and (Path(str(args.data_dir)) / MANIFEST).exists()


def prepare_windows(
    args: DataArguments, block_size: int, max_steps: int = -1
) -> tuple[PreTrainedTokenizerBase, TokenWindows | MixedWindows, TokenWindows | MixedWindows]:
    """`prepare_pretraining_data` for each source; the tokenizer, the windows to train on, and those for validation.

    Args:
        max_steps: of the run, where they are stated.

    Raises:
        UserError: what `prepare_pretraining_data`, `TokenWindows` and `MixedWindows` refuse; a run on text that is
            tokenized meanwhile, without `max_steps`.
    """
    if args.prepare == "ahead":
        from llmkit.data.prepare_ahead import prepare_ahead  # which builds on this module

        if max_steps < 1:
            raise UserError("prepare: ahead needs max_steps: nobody knows yet how long an epoch is")
        return prepare_ahead(args, block_size)
    sources, how = args.sources(), (block_size, args.shard_group, args.shard_cache_gb)
    if not sources:
        tokenizer, manifest = prepare_pretraining_data(args)
        train, validation = (TokenWindows(manifest, split, *how) for split in SPLITS)
        return tokenizer, train, validation
    prepared = {source.name: prepare_pretraining_data(source.args) for source in sources}
    manifests = {name: manifest for name, (_, manifest) in prepared.items()}
    tokenizer, _ = prepared[sources[0].name]
    weights = {source.name: source.weights for source in sources}
    train, validation = (
        MixedWindows({name: TokenWindows(made, split, *how) for name, made in manifests.items()}, weights)
        for split in SPLITS
    )
    return tokenizer, train, validation


def prepare_at(
    args: DataArguments, url: str, make: Callable[[Corpus, PreTrainedTokenizerBase, RemotePlace], Manifest | None]
) -> Manifest | None:
    """Prepare shards behind a URL: `make` does it, with the tokenizer that is there or is put there first.

    Raises:
        UserError: the URL cannot be written to, or holds something else; what `opened_source` and `make` refuse.
    """
    place = RemotePlace(url)
    names = place.names()
    with tempfile.TemporaryDirectory(prefix="llmkit-shards-") as folder:
        if SOURCE in names:
            for name in names:
                if name == SOURCE or name.startswith(f"{TOKENIZER}/"):
                    path = Path(folder, name)
                    path.parent.mkdir(exist_ok=True)
                    path.write_bytes(place.read(name))
        elif others := [name for name in names if not name.startswith(f"{TOKENIZER}/")]:
            raise UserError(f"{url} holds other files, such as {others[0]}: give an empty folder, or a new one")
        with opened_source(dataclasses.replace(args, data_dir=folder)) as (corpus, tokenizer, directory):
            if SOURCE not in names:  # last, for with it the tokenizer is whole
                for path in (*sorted(directory.glob(f"{TOKENIZER}/*")), directory / SOURCE):
                    place.upload(path, path.relative_to(directory).as_posix())
            return make(corpus, tokenizer, place)


def _of_url(args: DataArguments, url: str) -> tuple[PreTrainedTokenizerBase, Manifest]:
    """The tokenizer and the manifest of shards at a URL, which are taken as they are: what is said has to fit them."""
    manifest = load_manifest(url)
    assert manifest.directory is not None
    found = manifest.settings | {"vocab_size": manifest.vocab_size}
    said = {name: getattr(args, name) for name in ("validation_fraction", "validation_split", "vocab_size")}
    check_settings(url, found, {name: value for name, value in said.items() if value != getattr(DataArguments, name)})
    folder = manifest.directory / TOKENIZER
    if _is_trained(args):  # the one that was made for the shards
        folder.mkdir(parents=True, exist_ok=True)
        for file in ("tokenizer.json", "tokenizer_config.json"):
            source = f"{url.rstrip('/')}/{TOKENIZER}/{file}"
            with FileLock(folder / ".lock"):
                if not (folder / file).exists():
                    data = patiently(partial(read, source), source, time.monotonic() + PATIENCE)
                    write_whole(folder / file, data)
    tokenizer = load_tokenizer(str(folder) if _is_trained(args) else args.tokenizer)
    check_tokenizer(manifest, tokenizer)
    return tokenizer, manifest


@contextmanager
def opened_source(args: DataArguments) -> Iterator[tuple[Corpus, PreTrainedTokenizerBase, Path]]:
    """The corpus, the tokenizer (trained now if that has not been done), and the folder for shards, which is checked.

    A folder that is new stays only if what is done with it succeeds, or leaves shards to go on from.

    Raises:
        UserError: what `open_corpus` and `load_tokenizer` refuse; or the folder holds something else.
    """
    corpus = open_corpus(
        args.text_files,
        args.dataset_name,
        args.dataset_config,
        args.dataset_split,
        args.text_column,
        args.streaming,
    )
    tokenizer = None if _is_trained(args) else load_tokenizer(args.tokenizer)
    directory = Path(args.data_dir or default_data_dir(args, corpus))
    _check_folder(directory)
    with _new_or_removed(directory):
        tokenizer = _write_source_once(args, corpus, directory) or tokenizer
        assert tokenizer is not None, "trained just now, or loaded"
        yield corpus, tokenizer, directory


def _is_elsewhere(args: DataArguments) -> bool:
    """Whether the text is on the Hub or on another machine."""
    on_hub = args.dataset_name is not None and not Path(args.dataset_name).is_dir()
    return on_hub or any(map(is_remote, args.text_files or ()))


def _check_folder(directory: Path) -> None:
    """Refuse a folder that holds something else than a preparation, or that cannot be made."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        names = {path.name.removesuffix(".tmp") for path in directory.iterdir() if not path.name.startswith(".")}
    except OSError as error:
        raise UserError(f"{directory}: no folder for shards can be made there: {error.strerror}") from error
    if names and not names & {SOURCE, TOKENIZER, MANIFEST, JOURNAL} and not list(directory.glob("*_00000.bin*")):
        raise UserError(f"{directory} holds other files, such as {min(names)}: give an empty folder, or a new one")


def _is_trained(args: DataArguments) -> bool:
    return args.tokenizer in ("bpe", "character")


@contextmanager
def _new_or_removed(directory: Path) -> Iterator[None]:
    """Remove a folder that was made for a preparation which was refused before its first tokens."""
    is_new = not any(directory.iterdir())
    try:
        yield
    except UserError:
        if is_new and not any(directory.rglob("*.bin*")):
            shutil.rmtree(directory, ignore_errors=True)
        raise


def default_data_dir(args: DataArguments, corpus: Corpus) -> str:
    """A folder name that differs where the tokens would: `data/stdlib-bpe4096-1b9d6bcd`."""
    vocabulary = f"bpe{args.vocab_size}" if args.tokenizer == "bpe" else Path(args.tokenizer).name
    decisive = [corpus.fingerprint(), args.tokenizer, vocabulary, args.validation_fraction, args.validation_split]
    if args.prepare == "ahead":  # the shards of the two splits are closed together
        decisive.append(args.prepare)
    digest = hashlib.sha256(json.dumps(decisive).encode()).hexdigest()[:8]
    return f"data/{corpus.name}-{vocabulary}-{digest}"


def _source(args: DataArguments) -> dict:
    """What a folder is made from, but for the text itself, which the shards' manifest knows by its hash."""
    names = ("dataset_name", "dataset_config", "dataset_split", "text_column", "tokenizer")
    names += ("validation_fraction", "validation_split")
    source = {name: getattr(args, name) for name in names}
    if args.tokenizer == "bpe":
        source["vocab_size"] = args.vocab_size
    if args.text_files and _is_elsewhere(args):
        source["text_files"] = args.text_files
    return source


def _check_source(directory: Path, args: DataArguments) -> None:
    try:
        was = dict(json.loads((directory / SOURCE).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise UserError(f"{directory / SOURCE} is damaged ({error}): delete the folder, or take another") from error
    for name, value in _source(args).items():
        if was.get(name) != value:
            raise UserError(
                f"{directory} was made with {name}={was.get(name)}, not {value}: take another data_dir, or delete it"
            )


def _write_source_once(args: DataArguments, corpus: Corpus, directory: Path) -> PreTrainedTokenizerBase | None:
    """Note what the folder is made from, or check it where that is done; train the tokenizer if one is to be."""
    directory.mkdir(parents=True, exist_ok=True)
    with FileLock(directory / ".source.lock"):
        if (directory / SOURCE).exists():
            _check_source(directory, args)
        else:
            if _is_trained(args):
                _train_tokenizer(args, corpus, directory / TOKENIZER)
            write_json(directory / SOURCE, _source(args))
    return load_tokenizer(str(directory / TOKENIZER)) if _is_trained(args) else None


def _train_tokenizer(args: DataArguments, corpus: Corpus, directory: Path) -> None:
    text = _first_characters(itertools.chain.from_iterable(corpus.in_pieces()), TOKENIZER_TRAINING_CHARACTERS)
    if args.tokenizer == "bpe":
        tokenizer = train_bpe_tokenizer(text, args.vocab_size)
    else:
        tokenizer = train_character_tokenizer(text)
    tokenizer.save_pretrained(directory)
    say(f"trained a {args.tokenizer} tokenizer of {len(tokenizer):,} tokens on {corpus.description}")


def _first_characters(pieces: Iterable[str], limit: int) -> Iterator[str]:
    seen = 0
    for text in pieces:
        if seen >= limit:
            return
        seen += len(text)
        yield text
