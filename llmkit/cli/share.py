"""A command that shares what was trained: `push`."""

import argparse

from llmkit.paths import existing_path


def add_commands(nouns) -> None:
    """Add what is here to the command's parser."""
    push = nouns.add_parser(
        "push",
        help="Share a checkpoint on the Hub.",
        description="Upload a checkpoint, its tokenizer and a model card to the Hub. A new repository is private.",
        allow_abbrev=False,
    )
    push.add_argument("checkpoint", help="The folder of a run, of one of its checkpoints, or of any saved model.")
    push.add_argument(
        "repository", help="The name of the repository, such as me/model. It is made if it does not exist."
    )
    push.add_argument("--public", action="store_true", help="Let everybody see a repository that is made.")
    push.add_argument("--revision", help="Push to this branch, which is made if it does not exist (default: main).")
    push.add_argument("--license", help="The license for the model card, as the Hub names it, such as apache-2.0.")
    push.add_argument("--base", help="The base model's name on the Hub, if the adapter was trained on a local folder.")
    push.add_argument("--keep_card", action="store_true", help="Leave the model card that is on the Hub as it is.")
    push.set_defaults(command=_push)


def _push(args: argparse.Namespace) -> None:
    checkpoint = str(existing_path(args.checkpoint))

    from transformers.utils.logging import disable_progress_bar

    from llmkit.sharing.hub import Repository, patiently, push

    disable_progress_bar()
    repository = Repository(args.repository, not args.public, args.revision, license=args.license, base=args.base)
    message = "Upload with llmkit"
    url = patiently(lambda: push(checkpoint, repository, message, keep_card=args.keep_card))
    print(f"pushed {checkpoint} to {url}")
