"""`train`, `sft` and `prefer`: run a recipe, in this process or in several."""

import argparse
import os
import runpy
import sys

from llmkit.errors import UserError
from llmkit.recipe_kinds import DPO, PRETRAIN, SFT, RecipeKind, check_recipe, recipe_path


def add_commands(nouns) -> None:
    """Add what is here to the command's parser."""
    for kind, summary in (
        (PRETRAIN, "Pretrain a model as a recipe says."),
        (SFT, "Fine-tune a model as a recipe says."),
        (DPO, "Tune a model on preference pairs as a recipe says."),
    ):
        command = nouns.add_parser(
            kind.command,
            help=summary,
            add_help=False,
            prefix_chars="\0",  # so that nothing is a flag here: a recipe's fields are its own parser's to know
        )
        command.add_argument("arguments", nargs=argparse.REMAINDER)
        command.set_defaults(command=lambda args, kind=kind: run_recipe(kind, args.arguments))


def run_recipe(kind: RecipeKind, argv: list[str]) -> None:
    """Run a recipe in this process, or hand it to `accelerate launch` where a launcher's option is given.

    Args:
        argv: the recipe's file or name, the launcher's options `--config_file` and `--num_processes`, and fields of
            the recipe.
    """
    if not {"-h", "--help"} & set(argv) and (not argv or argv[0].startswith("-")):
        quickstart = f"{kind.script.removesuffix('.py')}_quickstart"
        raise UserError(
            f"no recipe: give its file or name first, as in `llmkit {kind.command} {quickstart}` "
            f"(see llmkit {kind.command} --help)"
        )
    from llmkit.cli import Parser

    launcher = Parser(prog=f"llmkit {kind.command}", add_help=False, allow_abbrev=False)
    launcher.add_argument("--config_file")
    launcher.add_argument("--num_processes")
    launch, fields = launcher.parse_known_args(argv)
    if not {"-h", "--help"} & set(argv):
        fields = ["--config", str(recipe_path(argv[0])), *fields[1:]]
    check_recipe(kind, fields, default_config="")
    script = str(kind.script_path)
    options = [word for name, value in vars(launch).items() if value for word in (f"--{name}", value)]
    if options:
        os.execv(sys.executable, [sys.executable, "-m", "accelerate.commands.launch", *options, script, *fields])
    sys.argv = [script, *fields]
    runpy.run_path(script, run_name="__main__")
