"""`llmkit blame`: what a step of a pretraining run was trained on."""

import argparse
from pathlib import Path

from llmkit.errors import UserError
from llmkit.runs.run import load_run


def add_commands(nouns) -> None:
    """Add what is here to the command's parser."""
    blame = nouns.add_parser("blame", help="Show the documents of a step's batch.", allow_abbrev=False)
    blame.add_argument("run", metavar="RUN", help="The folder of a pretraining run.")
    blame.add_argument("--step", type=int, required=True, help="The step, counted from 1 as in the log.")
    blame.add_argument("--tokens", type=int, default=16, help="Show this many tokens of each document (default: 16).")
    blame.set_defaults(command=_blame)


def _blame(args: argparse.Namespace) -> None:
    record = load_run(args.run).record
    if "block_size" not in record["data"]:
        raise UserError(f"{args.run} was not trained on token shards: blame is for pretraining runs")
    if not 1 <= args.step <= record["steps"]:
        raise UserError(f"step={args.step}: the run has steps 1 to {record['steps']:,}")

    from llmkit.data.lookup import documents_of
    from llmkit.data.mixture import windows_of_record
    from llmkit.data.prepare import TOKENIZER
    from llmkit.data.tokenizer import load_tokenizer
    from llmkit.training.batch_ramp import Batches

    settings = record["defaults"] | record["arguments"]
    block_size, ranks = record["data"]["block_size"], record["machine"]["ranks"]
    windows = windows_of_record(record["data"], "train", block_size)
    batches = Batches(
        full_steps=settings["max_steps"],
        full=settings["total_batch_tokens"] // block_size,
        micro_batches=settings["gradient_accumulation_steps"] * ranks,
        start=(settings["batch_ramp_start"] or settings["total_batch_tokens"]) // block_size,
        ramp=(settings["batch_ramp_tokens"] or 0) // block_size,
    )
    seed = settings["seed"] if settings["data_seed"] is None else settings["data_seed"]
    sampler = windows.sampler(batches, seed)
    own = Path(record["data"]["directory"] or "") / TOKENIZER  # of shards that brought their own
    tokenizer = load_tokenizer(str(own if own.is_dir() else _saved(Path(args.run))))
    for number, place in enumerate(batches.places(args.step)):
        micro_batch, rank = divmod(number, ranks)
        for window in sampler.windows(*place):
            for document in documents_of(*windows.locate(window), tokenizer, args.tokens):
                print(f"rank {rank}, micro-batch {micro_batch + 1}, window {window:,}: {document}")


def _saved(run: Path) -> Path:
    """Where the run has its tokenizer: in its folder once it has ended, else in a checkpoint."""
    places = [run, *sorted(run.glob("checkpoint-*"))]
    found = [place for place in places if (place / "tokenizer.json").exists()]
    if not found:
        raise UserError(f"{run} holds no tokenizer and no checkpoint yet, so its tokens cannot be read as text")
    return found[0]
