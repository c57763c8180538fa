"""Commands that take what was trained elsewhere: `push`, `verify`."""

import argparse
import json
import shutil
import sys

from llmkit.console import shown
from llmkit.errors import UserError
from llmkit.paths import checkpoint_path, existing_path, new_path

CONSUMERS = ("transformers", "peft", "onnxruntime", "ctranslate2", "llama.cpp", "vllm")


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
        "repository", help="The name of the repository, such as me/model. It is created if it does not exist."
    )
    push.add_argument("--public", action="store_true", help="Make a repository public when it is created.")
    push.add_argument("--revision", help="Push to this branch, which is made if it does not exist (default: main).")
    push.add_argument("--license", help="The license for the model card, as the Hub names it, such as apache-2.0.")
    push.add_argument("--base", help="The base model's name on the Hub, if the adapter was trained on a local folder.")
    push.add_argument("--keep_card", action="store_true", help="Leave the model card that is on the Hub as it is.")
    push.set_defaults(command=_push)

    verify = nouns.add_parser(
        "verify",
        help="Check that a checkpoint opens elsewhere and says the same there.",
        description="Compare a checkpoint with what its training recorded. Then open it without llmkit in each "
        "program that is installed (transformers, ONNX Runtime, CTranslate2, llama.cpp, vLLM), and compare logits, "
        "greedy text, end token, tokens and chat template with ours. The exit status is 1 if anything differs.",
        allow_abbrev=False,
    )
    verify.add_argument(
        "checkpoint", help="The folder of a run, of one of its checkpoints or of an adapter, or a name on the Hub."
    )
    verify.add_argument(
        "--only",
        nargs="+",
        choices=CONSUMERS,
        default=[],
        help="Open it in these programs only, each of which then has to be installed.",
    )
    verify.add_argument(
        "--python",
        metavar="PATH",
        default=sys.executable,
        help="Run the programs with this Python, for those that cannot be installed beside llmkit.",
    )
    verify.add_argument("--llama_cpp", metavar="FOLDER", help="A checkout of llama.cpp, whose converter is used.")
    verify.add_argument(
        "--keep",
        metavar="FOLDER",
        help="Keep what is made of the checkpoint (ONNX, CTranslate2, GGUF) in this folder.",
    )
    verify.add_argument("--data_dir", help="The folder of the run's token shards, if it has moved since the training.")
    verify.add_argument("--skip_loss", action="store_true", help="Do not measure the validation loss again.")
    verify.add_argument("--base", help="Load an adapter's base model from here, if it has moved since the training.")
    verify.add_argument("--json", action="store_true", help="Print JSON in place of a table.")
    verify.set_defaults(command=_verify)


def _push(args: argparse.Namespace) -> None:
    checkpoint = checkpoint_path(str(existing_path(args.checkpoint)))

    from transformers.utils.logging import disable_progress_bar

    from llmkit.sharing.hub import Repository, patiently, push

    disable_progress_bar()
    repository = Repository(args.repository, not args.public, args.revision, license=args.license, base=args.base)
    message = "Upload with llmkit"
    url = patiently(lambda: push(checkpoint, repository, message, keep_card=args.keep_card))
    print(f"pushed {checkpoint} to {url}")


def _verify(args: argparse.Namespace) -> None:
    args.checkpoint = checkpoint_path(args.checkpoint)
    if (python := shutil.which(args.python)) is None:
        raise UserError(f"--python {args.python}: there is no such program: give the path of a Python interpreter")
    if args.llama_cpp and not (existing_path(args.llama_cpp) / "convert_hf_to_gguf.py").is_file():
        raise UserError(f"--llama_cpp {args.llama_cpp}: no convert_hf_to_gguf.py there: give a checkout of llama.cpp")
    keep = new_path(args.keep) if args.keep else None

    import warnings
    from pathlib import Path

    from transformers.utils.logging import disable_progress_bar

    from llmkit.sharing.verify import Settings, verify

    disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning)  # peft still calls transformers by older names
    settings = Settings(
        only=args.only,
        python=str(Path(python).absolute()),
        llama_cpp=str(existing_path(args.llama_cpp).absolute()) if args.llama_cpp else None,
        keep=keep.absolute() if keep else None,
        base=args.base,
        data_dir=args.data_dir,
        loss=not args.skip_loss,
    )
    report = verify(args.checkpoint, settings, lambda line: print(f"{line} ...", file=sys.stderr))
    print(json.dumps(report.as_dict(), indent=1) if args.json else shown(report.table()))
    if not report.agrees:
        sys.exit(1)
