"""The tokenizer and the token shards of a pretraining run, made on the first run and found on the next."""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock
from transformers import PreTrainedTokenizerBase

from llmkit.arguments import DataArguments
from llmkit.corpus import Corpus, open_corpus
from llmkit.errors import UserError
from llmkit.manifest import MANIFEST, Manifest, load_manifest
from llmkit.shards import prepare_shards
from llmkit.tokenizer import load_tokenizer, train_bpe_tokenizer, train_character_tokenizer

# A vocabulary of 50k is settled by a few hundred megabytes; more text costs time and changes little.
TOKENIZER_TRAINING_CHARACTERS = 300_000_000


def prepare_pretraining_data(args: DataArguments) -> tuple[PreTrainedTokenizerBase, Manifest]:
    """Train or load the tokenizer, and tokenize the corpus, where that is not done yet.

    Safe to call from several ranks or runs at once: a lock in the folder lets one work, and the others wait for it.

    Raises:
        UserError: what `open_corpus`, `load_tokenizer` and `prepare_shards` refuse.
    """
    if args.data_dir and args.dataset_name and (Path(args.data_dir) / MANIFEST).exists():
        # Prepared earlier, on a machine with a network perhaps: the dataset itself is not needed any more.
        return _prepared(args)
    corpus = open_corpus(
        args.text_files,
        args.dataset_name,
        args.dataset_config,
        args.dataset_split,
        args.text_column,
        args.streaming,
    )
    directory = Path(args.data_dir or default_data_dir(args, corpus))
    if args.tokenizer in ("bpe", "character"):
        tokenizer = _train_tokenizer_once(args, corpus, directory / "tokenizer")
    else:
        tokenizer = load_tokenizer(args.tokenizer)
    manifest = prepare_shards(
        corpus,
        tokenizer,
        directory,
        validation_fraction=args.validation_fraction,
        validation_split=args.validation_split,
    )
    return tokenizer, manifest


def default_data_dir(args: DataArguments, corpus: Corpus) -> str:
    """A folder name that differs where the tokens would: `data/stdlib-bpe4096-1b9d6bcd`."""
    vocabulary = f"bpe{args.vocab_size}" if args.tokenizer == "bpe" else Path(args.tokenizer).name
    source = "stdlib"
    if args.text_files or args.dataset_name:
        source = Path(args.dataset_name or args.text_files[0]).stem.replace("*", "") or "text"
    decisive = [corpus.fingerprint(), args.tokenizer, vocabulary, args.validation_fraction, args.validation_split]
    digest = hashlib.sha256(json.dumps(decisive).encode()).hexdigest()[:8]
    return f"data/{source}-{vocabulary}-{digest}"


def _prepared(args: DataArguments) -> tuple[PreTrainedTokenizerBase, Manifest]:
    manifest = load_manifest(args.data_dir)
    if args.dataset_name not in manifest.corpus:
        raise UserError(f"{args.data_dir} holds shards of {manifest.corpus}, not of {args.dataset_name}")
    trained = args.tokenizer in ("bpe", "character")
    tokenizer = load_tokenizer(str(Path(args.data_dir) / "tokenizer") if trained else args.tokenizer)
    return tokenizer, load_manifest(args.data_dir, tokenizer)


def _train_tokenizer_once(args: DataArguments, corpus: Corpus, directory: Path) -> PreTrainedTokenizerBase:
    directory.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(directory.with_name(".tokenizer.lock")):
        if not directory.exists():
            text = _first_characters(corpus.documents(), TOKENIZER_TRAINING_CHARACTERS)
            if args.tokenizer == "bpe":
                tokenizer = train_bpe_tokenizer(text, args.vocab_size)
            else:
                tokenizer = train_character_tokenizer(text)
            unfinished = directory.with_name("tokenizer.unfinished")
            tokenizer.save_pretrained(unfinished)
            unfinished.rename(directory)
            print(f"trained a {args.tokenizer} tokenizer of {len(tokenizer):,} tokens on {corpus.description}")
    return load_tokenizer(str(directory))


def _first_characters(documents: Iterator[str], limit: int) -> Iterator[str]:
    seen = 0
    for document in documents:
        if seen >= limit:
            return
        seen += len(document)
        yield document
