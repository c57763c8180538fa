"""Commands that turn text into tokens: `tokenizer train`, `tokenizer show`, `shards prepare`."""

import argparse
import dataclasses
import itertools
import os
import time
import typing
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from llmkit.cli.arguments import read_stdin
from llmkit.console import has_color, say
from llmkit.data.arguments import DataArguments
from llmkit.errors import UserError
from llmkit.paths import local_path

CORPUS = ("text_files", "dataset_name", "dataset_config", "dataset_split", "text_column", "streaming")


def add_commands(nouns) -> None:
    """Add what is here to the command's parser."""
    noun = nouns.add_parser("tokenizer", help="Train a tokenizer, or show a text's tokens.")
    verbs = noun.add_subparsers(metavar="{train,show}", required=True)
    train = verbs.add_parser("train", help="Train a tokenizer on text.", allow_abbrev=False)
    train.add_argument("--output", type=os.path.expanduser, required=True, help="The folder for the tokenizer.")
    train.add_argument(
        "--kind",
        choices=("bpe", "character"),
        default="bpe",
        help="A byte-level BPE (the default), or a token for each character.",
    )
    train.add_argument(
        "--vocab_size", type=int, help=f"The number of tokens of a BPE (default: {DataArguments.vocab_size})."
    )
    train.add_argument(
        "--max_documents",
        type=int,
        help="Learn from this many documents only. A gigabyte of text is plenty. (default: all)",
    )
    _add_corpus_flags(train)
    train.set_defaults(command=_train_tokenizer)

    show = verbs.add_parser("show", help="Show a text's tokens.", allow_abbrev=False)
    show.add_argument("text", metavar="FILE_OR_TEXT", help="A text file, - for standard input, or the text itself.")
    show.add_argument(
        "--tokenizer", help="The folder of a checkpoint, a tokenizer or token shards, or a name on the Hub."
    )
    show.add_argument("--compare", metavar="TOKENIZER", help="A second tokenizer, to compare with the first.")
    show.add_argument("--ids", action="store_true", help="Print a line for each token, with its id.")
    show.add_argument("--color", action="store_true", help="Print colours even if the output is not a terminal.")
    show.add_argument(
        "--html", metavar="FILE", type=os.path.expanduser, help="Write a page for a browser in place of the text."
    )
    show.set_defaults(command=_show_tokens)

    verbs = nouns.add_parser("shards", help="Turn text into token shards.").add_subparsers(
        metavar="{prepare}", required=True
    )
    prepare = verbs.add_parser("prepare", help="Tokenize text into shards for training.", allow_abbrev=False)
    prepare.add_argument(
        "--output", required=True, help="The folder for tokenizer and shards, here or as a URL (s3://bucket/corpus)."
    )
    _add_corpus_flags(prepare)
    add_fields(prepare, ("tokenizer", "vocab_size", "validation_fraction", "validation_split"))
    prepare.add_argument(
        "--num_workers",
        type=int,
        help="The number of threads that tokenize (default: all cores; with --executor, one for each task).",
    )
    prepare.add_argument("--shard_tokens", type=int, help="The number of tokens of a shard (default: 100,000,000).")
    tasks = prepare.add_argument_group(
        "several tasks or machines", "These need datatrove: pip install 'llmkit[scale]'. See docs/data.md."
    )
    tasks.add_argument(
        "--executor", choices=("local", "slurm", "ray"), help="Divide the work into tasks, and say where they run."
    )
    tasks.add_argument("--tasks", type=int, help="The number of tasks, which decides how the shards are cut.")
    tasks.add_argument(
        "--workers",
        type=int,
        help="The number of tasks that run at a time (default: all cores; no limit on slurm and ray).",
    )
    tasks.add_argument(
        "--slurm",
        nargs="+",
        metavar="OPTION=VALUE",
        help="Options for sbatch, such as partition=cpu time=4:00:00 mem-per-cpu=4G. The first two are needed.",
    )
    prepare.set_defaults(command=_prepare_shards)


def _add_corpus_flags(parser: argparse.ArgumentParser) -> None:
    corpus = parser.add_argument_group(
        "text", "Without files and without a dataset, the sources of Python's standard library are taken."
    )
    add_fields(corpus, CORPUS)


def add_fields(parser, names: Sequence[str]) -> None:
    """Add a flag for each of these fields of `DataArguments`, with the field's type, default and help.

    (transformers' HfArgumentParser would do it for all fields of a class, after seconds of imports.)
    """
    types = typing.get_type_hints(DataArguments)
    for field in (field for field in dataclasses.fields(DataArguments) if field.name in names):
        how: dict = {"default": field.default, "help": field.metadata["help"]}
        kinds = [kind for kind in typing.get_args(types[field.name]) or [types[field.name]] if kind is not type(None)]
        if typing.get_origin(types[field.name]) is Literal:
            how["choices"] = kinds
        elif kinds == [bool]:
            how["action"] = "store_true"
        elif kinds == [list[str]]:
            how["nargs"] = "+"
        else:
            how["type"] = kinds[0]
        if field.default not in (None, False):
            how["help"] += " (default: %(default)s)"
        parser.add_argument(f"--{field.name}", **how)


def _open_corpus(args: argparse.Namespace):
    from llmkit.data.corpus import open_corpus

    return open_corpus(**{name: getattr(args, name) for name in CORPUS})


def _train_tokenizer(args: argparse.Namespace) -> None:
    output = Path(args.output)
    if output.is_file() or (output / "tokenizer.json").exists():
        raise UserError(f"output: {output} is a file or holds a tokenizer already: choose another folder or delete it")
    if args.kind == "character" and args.vocab_size is not None:
        raise UserError("vocab_size is for --kind bpe: the size of a character vocabulary follows from the text")
    if args.max_documents is not None and args.max_documents < 1:
        raise UserError(f"max_documents is {args.max_documents}: give 1 or more, or leave it out")
    corpus = _open_corpus(args)

    from tqdm import tqdm

    from llmkit.data.tokenizer import document_encoder, train_bpe_tokenizer, train_character_tokenizer

    start = time.perf_counter()
    documents = itertools.islice(corpus.in_pieces(), args.max_documents)
    documents = tqdm(documents, desc="reading", unit=" documents", leave=False, disable=None)  # None: in a terminal
    text = itertools.chain.from_iterable(documents)
    if args.kind == "bpe":
        tokenizer = train_bpe_tokenizer(text, DataArguments.vocab_size if args.vocab_size is None else args.vocab_size)
    else:
        tokenizer = train_character_tokenizer(text)
    seconds = time.perf_counter() - start
    tokenizer.save_pretrained(output)

    sample = list(itertools.islice(itertools.chain.from_iterable(corpus.in_pieces()), 100))
    num_tokens = sum(len(encoding.ids) for encoding in document_encoder(tokenizer).encode_batch_fast(sample))
    bytes_per_token = sum(len(piece.encode()) for piece in sample) / num_tokens
    say(f"trained on {corpus.description} in {seconds:.1f} s")
    print(f"{len(tokenizer):,} tokens, {bytes_per_token:.2f} bytes of text a token; saved in {output}")


def _show_tokens(args: argparse.Namespace) -> None:
    if args.tokenizer is None:
        raise UserError(
            "no tokenizer: give --tokenizer with the folder of a checkpoint (runs/pretrain_quickstart), a tokenizer "
            "or token shards (data/...), or a name on the Hub (openai-community/gpt2)"
        )
    if args.html and not Path(args.html).absolute().parent.is_dir():
        raise UserError(f"html={args.html}: its folder does not exist: make it, or choose another file")
    names = [_tokenizer_path(name) for name in (args.tokenizer, args.compare) if name is not None]
    text = _read_text(args.text)

    from llmkit.data.prepare import TOKENIZER
    from llmkit.data.token_view import as_page, facts_table, in_terminal, segment, with_ids
    from llmkit.data.tokenizer import load_tokenizer

    segmentations = []
    for name in names:
        folder = Path(name) / TOKENIZER  # of token shards that brought their own tokenizer
        tokenizer = load_tokenizer(str(folder) if folder.is_dir() else name)
        segmentations.append(segment(text, tokenizer, name))
    if args.html:
        Path(args.html).write_text(as_page(segmentations), encoding="utf-8")
        print(f"saved {args.html}")
        return
    color = args.color or has_color()
    for segmentation in segmentations:
        if args.compare:
            say(f"--- {segmentation.name}")
        text = with_ids(segmentation) if args.ids else in_terminal(segmentation, color)
        print(text.removesuffix("\n"), end="\n\n")
    say(facts_table(segmentations))


def _tokenizer_path(name: str) -> str:
    """A tokenizer's folder or its name on the Hub. Called before transformers is imported: see `local_path`."""
    return str(local_path(name) or name)


def _read_text(source: str) -> str:
    """A file's text, standard input's, or the text itself."""
    path = os.path.expanduser(source)
    try:
        if source == "-":
            text = read_stdin()
        elif os.path.isdir(path):
            raise UserError(f"{source} is a folder: give one text file, - for standard input, or the text itself")
        else:
            text = Path(path).read_text(encoding="utf-8") if os.path.isfile(path) else source
    except UnicodeDecodeError as error:
        raise UserError(f"{source}: not a text in UTF-8 ({error}): give a text file") from error
    if not text:
        raise UserError(f"{source!r}: there is no text: give a text file, - for standard input, or the text itself")
    return text


def _prepare_shards(args: argparse.Namespace) -> None:
    in_tasks = _task_options(args)
    if args.tokenizer not in ("bpe", "character"):
        args.tokenizer = _tokenizer_path(args.tokenizer)
    how = {name: getattr(args, name) for name in ("shard_tokens", "num_workers") if getattr(args, name) is not None}
    fields = {
        field.name: getattr(args, field.name) for field in dataclasses.fields(DataArguments) if field.name in args
    }
    data_args = DataArguments(**fields)

    from llmkit.data.files import check_there, is_remote

    check_there(data_args.text_files or ())

    from llmkit.data.prepare import prepare_pretraining_data

    if is_remote(args.output) or in_tasks:
        manifest = _prepare_parts(data_args, args.output, in_tasks, how)
        if manifest is None:  # Slurm has the jobs
            return
    else:
        _, manifest = prepare_pretraining_data(dataclasses.replace(data_args, data_dir=args.output), **how)
    train, validation = manifest.splits["train"], manifest.splits["validation"]
    print(f"{train.tokens:,} tokens to train on and {validation.tokens:,} for validation in {args.output}")


def _task_options(args: argparse.Namespace) -> dict:
    """What was said about tasks; nothing where one process does all."""
    given = {name: value for name in ("tasks", "workers", "slurm") if (value := getattr(args, name)) is not None}
    if args.executor is None:
        if given:
            raise UserError(f"{next(iter(given))} is for work in several tasks: give --executor local, slurm or ray")
        return {}
    if args.tasks is None:
        raise UserError("tasks is missing: say into how many parts the text is divided, such as --tasks 16")
    if args.slurm and args.executor != "slurm":
        raise UserError(f"slurm is for --executor slurm, not for {args.executor}: leave it out")
    return {"executor": args.executor} | given


def _prepare_parts(data_args: DataArguments, output: str, in_tasks: dict, how: dict):
    """In several tasks, or in one whose shards go to a URL."""
    needed = {"ray": ("datatrove", "ray")}.get(in_tasks.get("executor", ""), ("datatrove",)) if in_tasks else ()
    if missing := [name for name in needed if find_spec(name) is None]:
        extra = {"datatrove": "'llmkit[scale]'", "ray": "'datatrove[ray]'"}[missing[0]]
        raise UserError(
            f"executor={in_tasks['executor']} needs {missing[0]}, which is not installed: pip install {extra}"
        )

    from llmkit.data.files import is_remote
    from llmkit.data.places import LocalPlace, Place
    from llmkit.data.prepare import opened_source, prepare_at

    how |= {"validation_fraction": data_args.validation_fraction, "validation_split": data_args.validation_split}

    def make(corpus, tokenizer, place: Place):
        if in_tasks:
            from llmkit.data.executors import prepare_in_tasks

            return prepare_in_tasks(corpus, tokenizer, place, **in_tasks, **how)
        from llmkit.data.parts import prepare_alone

        return prepare_alone(corpus, tokenizer, place, **how)

    if is_remote(output):
        return prepare_at(data_args, output, make)
    with opened_source(dataclasses.replace(data_args, data_dir=output)) as (corpus, tokenizer, directory):
        return make(corpus, tokenizer, LocalPlace(directory))
