"""Commands around a fine-tune: `audit` before it, `merge` after it."""

import argparse

from llmkit.console import has_color, say


def add_commands(nouns) -> None:
    """Add what is here to the command's parser."""
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


def _audit(args: argparse.Namespace) -> None:
    from llmkit.finetuning.adapters import AdapterArguments, load_chat_tokenizer
    from llmkit.finetuning.arguments import SFTArguments
    from llmkit.finetuning.audit import Audit, audit, show_tokens
    from llmkit.finetuning.conversations import ConversationArguments, encode_all, load_conversations
    from llmkit.recipe_parser import RecipeParser

    parser = RecipeParser((ConversationArguments, AdapterArguments, SFTArguments), default_config=args.recipe)
    data_args, adapter_args, training_args = parser.parse(args.fields)
    tokenizer = load_chat_tokenizer(adapter_args)
    train, validation = load_conversations(data_args)
    for conversations, check in ((train, Audit.check), (validation, Audit.check_held_out)):
        rows = encode_all(conversations, tokenizer)
        findings = audit(conversations, rows, tokenizer, training_args.max_length)
        say(findings.table() + "\n")
        print(show_tokens(rows[0], tokenizer, color=has_color()), end="\n\n")
        check(findings)


def _merge(args: argparse.Namespace) -> None:
    import warnings

    import torch
    from transformers.utils.logging import disable_progress_bar

    from llmkit.finetuning.merge import merge_adapter

    disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning)  # peft still calls transformers by older names
    print(merge_adapter(args.adapter, args.output, getattr(torch, args.dtype), args.base).table())
    print(f"saved {args.output}")
