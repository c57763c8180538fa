"""`eval`: how good checkpoints are, side by side."""

import argparse
import json
from contextlib import suppress
from pathlib import Path

from llmkit.console import shown
from llmkit.errors import UserError
from llmkit.paths import checkpoint_path, existing_path
from llmkit.runs.metrics import METRICS

# Windows of a model that reads more than this: longer ones cost memory, and few texts are long enough to gain by them.
LONGEST_WINDOW = 2048


def add_commands(nouns) -> None:
    """Add what is here to the command's parser."""
    evaluate = nouns.add_parser(
        "eval",
        help="Compare checkpoints by loss and HellaSwag.",
        description="Loss, perplexity and bits per byte of the validation data of a checkpoint's run, of other token "
        "shards or of any text, and HellaSwag. Loss and perplexity are per token: between models of different "
        "tokenizers compare bits per byte. `accelerate launch -m llmkit eval` shares the work out over ranks.",
        allow_abbrev=False,
    )
    evaluate.add_argument(
        "checkpoints",
        nargs="+",
        metavar="CHECKPOINT",
        help="The folder of a run, of one of its checkpoints or of an adapter, or a model's name on the Hub.",
    )
    evaluate.add_argument(
        "--data_dir", help="The folder of token shards. Without other data, those of the checkpoint's run are taken."
    )
    evaluate.add_argument("--text_files", nargs="+", help="Paths or globs of text, .jsonl or .parquet files.")
    evaluate.add_argument("--text_column", default="text", help="The column that holds the text (default: text).")
    evaluate.add_argument(
        "--hellaswag", metavar="FILE", help="The JSONL file of HellaSwag; `hub` reads it from the Hub."
    )
    evaluate.add_argument(
        "--hellaswag_questions", type=int, help="Ask only this many questions, from the first on (default: all)."
    )
    evaluate.add_argument("--base", help="Load an adapter's base model from here, if it has moved since the training.")
    evaluate.add_argument(
        "--block_size", type=int, help="The tokens of a window. The default is the run's, or the model's context."
    )
    evaluate.add_argument(
        "--batch_size", type=int, default=8, help="Compute this many windows or questions at a time (default: 8)."
    )
    evaluate.add_argument(
        "--precision",
        choices=("bf16", "float32"),
        help="The precision of products. As in training, the default is bf16 on machines that have it in hardware.",
    )
    evaluate.add_argument("--json", action="store_true", help="Print JSON in place of a table.")
    evaluate.add_argument(
        "--output", metavar="FILE", help="Write the answers to HellaSwag into this file, one JSON object per question."
    )
    evaluate.set_defaults(command=_evaluate)


def _evaluate(args: argparse.Namespace) -> None:
    _check(args)
    args.checkpoints = [checkpoint_path(name) for name in args.checkpoints]

    import torch
    from accelerate import Accelerator
    from accelerate.utils import parse_flag_from_env
    from transformers.utils.logging import disable_progress_bar

    from llmkit.data.corpus import open_corpus
    from llmkit.data.tokenizer import load_tokenizer
    from llmkit.evaluation.hellaswag import load_hellaswag
    from llmkit.machine import bf16_is_fast, set_up_cpu

    # What can be refused is refused before the first checkpoint is computed, of all of them.
    for name in args.checkpoints:
        load_tokenizer(name)
    rows = load_hellaswag(None if args.hellaswag == "hub" else args.hellaswag) if args.hellaswag else None
    rows = rows and rows[: args.hellaswag_questions]
    data = [None] * len(args.checkpoints)
    if args.text_files:
        data = [open_corpus(args.text_files, text_column=args.text_column)] * len(args.checkpoints)
    elif args.data_dir or not args.hellaswag:
        data = [_shards(name, args.data_dir) for name in args.checkpoints]

    disable_progress_bar()  # of transformers' file reading
    # Said here, or two ranks on a CPU would not find each other: the launcher's own flag comes too late.
    cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()
    accelerator = Accelerator(cpu=cpu)
    device_type = accelerator.device.type
    precision = args.precision or ("bf16" if bf16_is_fast(device_type) else "float32")
    if device_type == "cpu":
        set_up_cpu()
    results, answers = [], []
    for name, source in zip(args.checkpoints, data, strict=True):
        with torch.autocast(device_type, torch.bfloat16, enabled=precision == "bf16"):
            result, some = _evaluate_one(name, source, rows, args, accelerator)
        results.append({**result, "precision": precision, "device": device_type})
        answers += some
    if accelerator.is_main_process:
        if args.output:
            Path(args.output).write_text("".join(_json(answer) + "\n" for answer in answers))
        print(_json(results, indent=1) if args.json else shown(_table(results)))
    accelerator.end_training()


def _check(args: argparse.Namespace) -> None:
    if args.data_dir and args.text_files:
        raise UserError("data_dir and text_files are both set: set one of them")
    if args.batch_size < 1 or (args.block_size is not None and args.block_size < 1):
        raise UserError("batch_size and block_size have to be 1 or more")
    if args.hellaswag_questions is not None and not args.hellaswag:
        raise UserError("hellaswag_questions is for HellaSwag: give --hellaswag as well")
    if args.hellaswag_questions is not None and args.hellaswag_questions < 1:
        raise UserError(f"hellaswag_questions={args.hellaswag_questions}: must be at least 1")
    if args.output and not args.hellaswag:
        raise UserError("output is for HellaSwag's answers: give --hellaswag as well, or --json for the figures")
    if args.output and Path(args.output).exists():
        raise UserError(f"output={args.output} is there already: choose another file or delete it")
    if args.output and not Path(args.output).absolute().parent.is_dir():
        raise UserError(f"output={args.output}: its folder does not exist: make it, or choose another file")
    if args.data_dir:
        existing_path(args.data_dir)
    if args.text_files:
        from llmkit.data.files import check_there

        check_there(args.text_files)
    if args.hellaswag and args.hellaswag != "hub":
        existing_path(args.hellaswag)


def _shards(checkpoint: str, data_dir: str | None):
    """The manifest of the shards in a folder, or of those that the checkpoint's run was trained with; and the size of
    that run's windows."""
    from llmkit.data.ahead import manifest_of_run
    from llmkit.data.manifest import load_manifest
    from llmkit.data.tokenizer import load_tokenizer
    from llmkit.runs.run import load_run

    record = {}
    with suppress(UserError):  # a checkpoint from elsewhere has no run
        record = load_run(checkpoint).record["data"]
    directory = data_dir or record.get("directory")
    if directory is None and "sources" in record:
        folders = ", ".join(source["directory"] for source in record["sources"].values())
        raise UserError(f"{checkpoint} was trained on several sources: give --data_dir with one of {folders}")
    if directory is None:
        raise UserError(
            f"{checkpoint}: no record of a pretraining run that says what to evaluate on: give --data_dir, "
            "--text_files or --hellaswag"
        )
    try:
        manifest = load_manifest(directory, load_tokenizer(checkpoint))
        manifest = manifest if data_dir else manifest_of_run(manifest, record)
    except UserError as error:
        hint = "" if data_dir else f" ({checkpoint} was trained with it; give --data_dir if it has moved)"
        raise UserError(f"{error}{hint}") from error
    if not data_dir and manifest.fingerprint != record["fingerprint"]:
        raise UserError(f"{directory} holds other data now than {checkpoint} was trained with: give --data_dir")
    return manifest, record.get("block_size")


def _evaluate_one(name: str, source, rows: list[dict] | None, args: argparse.Namespace, accelerator):
    """The figures of one checkpoint, and its answers to HellaSwag."""
    from llmkit.data.windows import TokenWindows
    from llmkit.evaluation.held_out import TextWindows, evaluate_windows
    from llmkit.evaluation.hellaswag import accuracies, encode_hellaswag, ending_losses, results
    from llmkit.inference.generation import load_for_generation
    from llmkit.model.opening import context_length

    model, tokenizer = load_for_generation(name, base=args.base)
    if model.device.type != accelerator.device.type:
        model.to(accelerator.device)
    context = context_length(model.config)
    if args.block_size and args.block_size > context:
        raise UserError(f"block_size={args.block_size} is more than the context of {name}, {context} tokens")
    size = args.block_size or min(context, LONGEST_WINDOW)
    result, answers = {"checkpoint": name}, []
    if source is not None:
        if args.text_files:
            windows, data = TextWindows(source, tokenizer, size), source.description
        else:
            manifest, trained_with = source
            windows = TokenWindows(manifest, "validation", args.block_size or min(size, trained_with or size))
            data = f"the validation split of {manifest.place} ({manifest.corpus})"
        result |= evaluate_windows(model, windows, args.batch_size, accelerator)
        result |= {"data": data, "tokens": windows.num_tokens, "block_size": windows.block_size}
    if rows is not None:
        questions = encode_hellaswag(rows, tokenizer, context)
        losses = ending_losses(model, questions, args.batch_size, accelerator, progress=True)
        result |= accuracies(questions, losses)
        result["hellaswag/cut"] = sum(question.cut > 0 for question in questions)
        answers = [{"checkpoint": name, **answer} for answer in results(questions, losses)]
    return result, answers


def _json(value, indent: int | None = None) -> str:
    """JSON has no NaN and no infinity, which Python would write all the same: null in their place."""
    return json.dumps(json.loads(json.dumps(value), parse_constant=lambda _: None), indent=indent)


def _table(results: list[dict]) -> str:
    """A row a checkpoint, a column a figure, and below what was measured and how."""
    shown = {"checkpoint": [result["checkpoint"] for result in results]}
    first = results[0]
    if "loss" in first:
        for key, column in (("loss", "loss"), ("perplexity", "perplexity"), ("bits_per_byte", "bits/byte")):
            shown[column] = [METRICS[f"eval_{key}"].write(result[key]) for result in results]
    if "hellaswag/acc" in first:
        for name in ("acc", "acc_norm"):
            key, error = f"hellaswag/{name}", f"hellaswag/{name}_stderr"
            write = METRICS[key].write
            shown[key] = [
                write(result[key]) + (f" ± {write(result[error])}" if error in result else "") for result in results
            ]
    widths = [max(map(len, [name, *column])) for name, column in shown.items()]
    lines = [
        "  ".join(
            [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        )
        for row in [tuple(shown), *zip(*shown.values(), strict=True)]
    ]
    notes = {}  # the same line for several checkpoints once
    for result in results:
        if "loss" in result:
            notes[f"loss: {result['data']}: {result['tokens']:,} tokens, windows of {result['block_size']:,}"] = None
        if "hellaswag/acc" in result:
            cut = f", {result['hellaswag/cut']:,} of them cut on the left to fit" if result["hellaswag/cut"] else ""
            notes[f"hellaswag: {result['hellaswag/questions']:,.0f} questions{cut}"] = None
    how = (
        f"computed {'with bf16 autocast' if first['precision'] == 'bf16' else 'without autocast'} on {first['device']}"
    )
    return "\n".join([*lines, "", *notes, how])
