"""Commands around a fine-tune: `audit` before it, `merge` after it."""

import argparse
from pathlib import Path

from llmkit.console import has_color, say
from llmkit.errors import UserError
from llmkit.paths import checkpoint_path, new_path
from llmkit.recipe_kinds import DPO, SFT, parse_recipe, recipe_path


def add_commands(nouns) -> None:
    """Add what is here to the command's parser."""
    audit = nouns.add_parser(
        "audit",
        help="Show what a fine-tuning recipe would train.",
        description="Print how many tokens of a fine-tuning recipe's conversations are trained, and the first "
        "conversation with its trained tokens marked. Nothing is trained.",
        allow_abbrev=False,
    )
    audit.add_argument("recipe", help="The recipe's file, or the name of one of llmkit's own, such as sft_qlora.")
    audit.add_argument(
        "fields", nargs=argparse.REMAINDER, help="Any field of the recipe, as --field value, at the end."
    )
    audit.set_defaults(command=_audit)

    merge = nouns.add_parser(
        "merge",
        help="Merge an adapter into a plain checkpoint.",
        description="Merge an adapter into its base and save a plain checkpoint, which opens without peft. Its "
        "logits are compared with those of the adapter on its base, and the differences are printed.",
        allow_abbrev=False,
    )
    merge.add_argument(
        "adapter",
        help="The folder of a fine-tuning run or of one of its checkpoints, or an adapter's name on the Hub.",
    )
    merge.add_argument("output", help="The folder to make for the merged checkpoint.")
    merge.add_argument(
        "--dtype",
        choices=("bfloat16", "float32"),
        default="bfloat16",
        help="The type of the saved weights (default: bfloat16).",
    )
    merge.add_argument("--base", help="Load the base model from here, if it has moved since the training.")
    merge.set_defaults(command=_merge)


def _audit(args: argparse.Namespace) -> None:
    if Path(args.recipe).name.startswith(f"{DPO.name}_"):
        _audit_pairs(args)
        return
    data_args, adapter_args, training_args = parse_recipe(SFT, args.fields, default_config=recipe_path(args.recipe))

    from llmkit.finetuning.adapters import load_chat_tokenizer
    from llmkit.finetuning.audit import Audit, audit, show_tokens
    from llmkit.finetuning.conversations import encode_all, load_conversations

    tokenizer = load_chat_tokenizer(adapter_args)
    train, validation = load_conversations(data_args)
    for conversations, check in ((train, Audit.check), (validation, Audit.check_held_out)):
        rows = encode_all(conversations, tokenizer)
        findings = audit(conversations, rows, tokenizer, training_args.max_length)
        say(findings.table() + "\n")
        print(show_tokens(rows[0], tokenizer, color=has_color()), end="\n\n")
        check(findings)


def _audit_pairs(args: argparse.Namespace) -> None:
    data_args, model_args, training_args = parse_recipe(DPO, args.fields, default_config=recipe_path(args.recipe))

    from llmkit.finetuning.preference_audit import audit_pairs, show_pair
    from llmkit.finetuning.preferences import encode_pairs, load_pairs

    model_args.resolve()
    tokenizer = model_args.load_tokenizer()
    for pairs in load_pairs(data_args):
        rows = encode_pairs(pairs, tokenizer)
        findings = audit_pairs(pairs, rows, tokenizer, training_args.max_length)
        say(findings.table() + "\n")
        print(show_pair(rows[0], tokenizer, color=has_color()), end="\n\n")
        findings.check()


def _merge(args: argparse.Namespace) -> None:
    import warnings

    adapter = checkpoint_path(args.adapter)
    if (Path(adapter) / "config.json").is_file() and not (Path(adapter) / "adapter_config.json").is_file():
        raise UserError(f"{adapter} is a plain checkpoint: it has no adapter to merge")
    new_path(args.output)

    import torch
    from transformers.utils.logging import disable_progress_bar

    from llmkit.finetuning.merge import merge_adapter

    disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning)  # peft still calls transformers by older names
    print(merge_adapter(adapter, args.output, getattr(torch, args.dtype), args.base).table())
    print(f"saved {args.output}")
