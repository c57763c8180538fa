"""The `llmkit` command: the steps before and after training.

    llmkit tokenizer train --output my_tokenizer --text_files 'books/*.txt'
    llmkit shards prepare --output my_shards --tokenizer my_tokenizer --text_files 'books/*.txt'
    llmkit tokenizer show 'def main():' --tokenizer runs/pretrain
    llmkit eval runs/pretrain runs/pretrain/checkpoint-500 --hellaswag hellaswag_val.jsonl
    llmkit doctor
    llmkit lr-find --config recipes/pretrain_quickstart.yaml
    llmkit audit recipes/sft_qlora.yaml --max_length 512
    llmkit merge runs/sft_qlora merged
    llmkit generate runs/pretrain "def read_file(path):"
    llmkit chat runs/sft_qlora
    llmkit compare runs/sft_qlora runs/dpo_qlora --prompts questions.txt
    llmkit verify runs/pretrain
    llmkit push runs/pretrain me/model
    llmkit blame runs/pretrain --step 120
    llmkit report runs/pretrain_a runs/pretrain_b --output compared.html
    llmkit runs

The flags have the names of the recipes' fields. One module a subject; each imports the libraries it needs inside its
commands, so that `llmkit --help` need not wait for torch.
"""

import argparse
import sys
from collections.abc import Sequence
from typing import NoReturn

from llmkit.cli import blame, data, evaluate, finetuning, inference, planning, runs, share, training, tuning
from llmkit.errors import UserError, exit_on_user_error

SUBJECTS = (training, data, blame, evaluate, finetuning, inference, planning, runs, share, tuning)


class Parser(argparse.ArgumentParser):
    """Tells a mistake as everything here does, in one line and not below a page of usage."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see {self.prog} --help)")


def parser() -> argparse.ArgumentParser:
    """The whole command's parser; what it returns has the function to call as `command`."""
    parser = Parser(prog="llmkit", description="The steps before and after training.")
    nouns = parser.add_subparsers(metavar="COMMAND", required=True)
    for subject in SUBJECTS:
        subject.add_commands(nouns)
    return parser


@exit_on_user_error
def main(argv: Sequence[str] | None = None) -> None:
    """Run one command; a user's mistake ends it with one line and status 2."""
    argv = sys.argv[1:] if argv is None else list(argv)
    for text in argv:
        try:
            text.encode()
        except UnicodeEncodeError as error:  # Python reads bytes that are not UTF-8 as surrogates
            raise UserError(f"the argument {ascii(text)} is not UTF-8: write it in UTF-8") from error
    args = parser().parse_args(argv)
    args.command(args)
