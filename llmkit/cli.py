"""The `llmkit` command: the steps before and after training.

    llmkit tokenizer train --output my_tokenizer --text_files 'books/*.txt'
    llmkit shards prepare --output my_shards --tokenizer my_tokenizer --text_files 'books/*.txt'
    llmkit audit recipes/sft_qlora.yaml --max_length 512
    llmkit merge runs/sft_qlora merged

The flags have the names of the recipes' fields.
"""

import argparse
import dataclasses
import itertools
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from llmkit.errors import UserError, exit_on_user_error

# Libraries are imported inside the commands: `llmkit --help` need not wait for torch.

DEFAULT_VOCAB_SIZE = 4096


class _Parser(argparse.ArgumentParser):
    """Tells a mistake as everything here does, in one line and not below a page of usage."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see {self.prog} --help)")


@exit_on_user_error
def main(argv: Sequence[str] | None = None) -> None:
    """Run one command; a user's mistake ends it with one line and status 2."""
    args = _parser().parse_args(argv)
    args.command(args)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="llmkit", description="The steps before and after training.")
    nouns = parser.add_subparsers(metavar="{tokenizer,shards,audit,merge}", required=True)

    verbs = nouns.add_parser("tokenizer", help="make a tokenizer").add_subparsers(metavar="{train}", required=True)
    train = verbs.add_parser("train", help="train a tokenizer on text", allow_abbrev=False)
    train.add_argument("--output", required=True, help="folder for the tokenizer")
    train.add_argument(
        "--kind",
        choices=("bpe", "character"),
        default="bpe",
        help="a byte-level BPE (default), or one token a character",
    )
    train.add_argument("--vocab_size", type=int, help=f"number of tokens of a BPE (default: {DEFAULT_VOCAB_SIZE})")
    train.add_argument(
        "--max_documents", type=int, help="learn from so many only; a gigabyte of text is plenty (default: all)"
    )
    _add_corpus_flags(train)
    train.set_defaults(command=_train_tokenizer)

    verbs = nouns.add_parser("shards", help="turn text into tokens").add_subparsers(metavar="{prepare}", required=True)
    prepare = verbs.add_parser("prepare", help="tokenize text into shards for training", allow_abbrev=False)
    prepare.add_argument("--output", required=True, help="folder for the shards")
    prepare.add_argument(
        "--tokenizer", default="bpe", help="a tokenizer's folder or name on the Hub; or bpe (default) or character"
    )
    prepare.add_argument("--vocab_size", type=int, default=4096, help="size of a bpe tokenizer (default: 4096)")
    _add_corpus_flags(prepare)
    prepare.add_argument(
        "--validation_fraction", type=float, default=0.01, help="part of the text to hold out (default: 0.01)"
    )
    prepare.add_argument(
        "--validation_split",
        choices=("document", "tail"),
        default="document",
        help="hold out whole documents (default), or the end of each one, for one long text",
    )
    prepare.add_argument("--num_workers", type=int, help="threads that tokenize (default: all cores)")
    prepare.add_argument("--shard_tokens", type=int, help="tokens in a shard (default: 100_000_000)")
    prepare.set_defaults(command=_prepare_shards)

    audit = nouns.add_parser("audit", help="show what a fine-tuning recipe would train", allow_abbrev=False)
    audit.add_argument("recipe", help="the recipe, such as recipes/sft_qlora.yaml")
    audit.add_argument("fields", nargs=argparse.REMAINDER, help="any field of the recipe, as --field value")
    audit.set_defaults(command=_audit)

    merge = nouns.add_parser("merge", help="merge an adapter into a plain checkpoint", allow_abbrev=False)
    merge.add_argument("adapter", help="the folder of a fine-tuning run or of one of its checkpoints")
    merge.add_argument("output", help="folder for the merged checkpoint")
    merge.add_argument(
        "--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="of the checkpoint (default: bfloat16)"
    )
    merge.add_argument("--base", help="where the base model is, if it has moved since the training")
    merge.set_defaults(command=_merge)
    return parser


def _add_corpus_flags(parser: argparse.ArgumentParser) -> None:
    corpus = parser.add_argument_group(
        "text", "Without files and without a dataset: the Python standard library's own sources."
    )
    corpus.add_argument("--text_files", nargs="+", help="paths or globs: text, .jsonl, .parquet")
    corpus.add_argument("--dataset_name", help="a dataset's name on the Hub, or a local folder")
    corpus.add_argument("--dataset_config", help="its configuration, such as sample-10BT")
    corpus.add_argument("--dataset_split", default="train", help="its split (default: train)")
    corpus.add_argument("--text_column", default="text", help="the column that holds the text (default: text)")
    corpus.add_argument("--streaming", action="store_true", help="read a dataset while it downloads")


def _open_corpus(args: argparse.Namespace):
    from llmkit.corpus import open_corpus

    return open_corpus(
        text_files=args.text_files,
        dataset_name=args.dataset_name,
        dataset_config=args.dataset_config,
        dataset_split=args.dataset_split,
        text_column=args.text_column,
        streaming=args.streaming,
    )


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

    from llmkit.tokenizer import document_encoder, split_document, train_bpe_tokenizer, train_character_tokenizer

    start = time.perf_counter()
    documents = itertools.islice(corpus.documents(), args.max_documents)
    documents = tqdm(documents, desc="reading", unit=" documents", leave=False, disable=None)  # None: in a terminal
    if args.kind == "bpe":
        tokenizer = train_bpe_tokenizer(documents, DEFAULT_VOCAB_SIZE if args.vocab_size is None else args.vocab_size)
    else:
        tokenizer = train_character_tokenizer(documents)
    seconds = time.perf_counter() - start
    tokenizer.save_pretrained(output)

    pieces = (piece for document in corpus.documents() for piece in split_document(document))
    sample = list(itertools.islice(pieces, 100))
    num_tokens = sum(len(encoding.ids) for encoding in document_encoder(tokenizer).encode_batch_fast(sample))
    bytes_per_token = sum(len(piece.encode()) for piece in sample) / num_tokens
    print(f"trained on {corpus.description} in {seconds:.1f} s")
    print(f"{len(tokenizer):,} tokens, {bytes_per_token:.2f} bytes of text a token; saved in {output}")


def _prepare_shards(args: argparse.Namespace) -> None:
    from llmkit.arguments import DataArguments
    from llmkit.pretraining_data import prepare_pretraining_data

    how = {name: getattr(args, name) for name in ("shard_tokens", "num_workers") if getattr(args, name) is not None}
    fields = {
        field.name: getattr(args, field.name) for field in dataclasses.fields(DataArguments) if field.name in args
    }
    _, manifest = prepare_pretraining_data(DataArguments(**fields, data_dir=args.output), **how)
    train, validation = manifest.splits["train"], manifest.splits["validation"]
    print(f"{train.tokens:,} tokens to train on and {validation.tokens:,} for validation in {args.output}")


def _audit(args: argparse.Namespace) -> None:
    from llmkit.adapters import AdapterArguments, load_chat_tokenizer
    from llmkit.audit import audit, show_tokens
    from llmkit.conversations import ConversationArguments, encode_all, load_conversations
    from llmkit.recipe_parser import RecipeParser
    from llmkit.sft import SFTArguments

    parser = RecipeParser((ConversationArguments, AdapterArguments, SFTArguments), default_config=args.recipe)
    data_args, adapter_args, training_args = parser.parse(args.fields)
    tokenizer = load_chat_tokenizer(adapter_args)
    for conversations in load_conversations(data_args):
        rows = encode_all(conversations, tokenizer)
        findings = audit(conversations, rows, tokenizer, training_args.max_length)
        print(findings.table(), show_tokens(rows[0], tokenizer, color=sys.stdout.isatty()), sep="\n\n", end="\n\n")
        findings.check()


def _merge(args: argparse.Namespace) -> None:
    import torch

    from llmkit.merge import merge_adapter

    print(merge_adapter(args.adapter, args.output, getattr(torch, args.dtype), args.base).table())
    print(f"saved {args.output}")


if __name__ == "__main__":
    main()
