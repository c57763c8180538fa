"""`lr-find`: which learning rate a recipe wants, before it is run."""

import argparse
import os
import shutil
from pathlib import Path

from llmkit.errors import UserError
from llmkit.recipe_kinds import PRETRAIN, SFT, check_recipe, recipe_path

FEWEST_STEPS = 20
KINDS = {"pretrain": PRETRAIN, "sft": SFT}


def add_commands(nouns) -> None:
    """Add what is here to the command's parser."""
    find = nouns.add_parser(
        "lr-find",
        help="Find a learning rate for a recipe.",
        add_help=False,
        prefix_chars="\0",  # so that nothing is a flag here: a recipe's fields are nobody's to know but its parser's
    )
    find.add_argument("arguments", nargs=argparse.REMAINDER)
    find.set_defaults(command=_lr_find)


def _parse(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    from llmkit.cli import Parser

    parser = Parser(
        prog="llmkit lr-find",
        allow_abbrev=False,
        description="Raise the learning rate from step to step on a copy of the run, until its loss diverges, and "
        "suggest one. The run itself is left alone.",
        epilog="Any field of the recipe can follow, as --field value. On several ranks: accelerate launch "
        "--config_file accelerate_configs/multi_gpu.yaml -m llmkit lr-find ...",
    )
    parser.add_argument(
        "--config",
        required=True,
        help="The recipe's file, pretrain_*.yaml or sft_*.yaml, or the name of one of llmkit's own.",
    )
    parser.add_argument(
        "--min_lr", type=float, default=1e-5, help="The learning rate of the first step (default: 1e-5)."
    )
    parser.add_argument("--max_lr", type=float, default=1.0, help="The learning rate of the last step (default: 1).")
    parser.add_argument("--num_steps", type=int, default=100, help="The number of steps (default: 100).")
    parser.add_argument("--output", help="The folder for lr_find.csv and lr_find.png (default: lr_find/RECIPE).")
    return parser.parse_known_args(argv)


def _lr_find(args: argparse.Namespace) -> None:
    options, fields = _parse(args.arguments)
    config = recipe_path(options.config)
    name = config.stem
    output = Path(options.output or Path("lr_find") / name)
    kind = name.split("_")[0]
    if kind not in KINDS:
        raise UserError(
            f"config={config}: a recipe's name says which script it is for: begin it with pretrain_ or sft_"
        )
    if not 0 < options.min_lr < options.max_lr:
        raise UserError(
            f"min_lr={options.min_lr:g} and max_lr={options.max_lr:g}: give two above 0, min_lr the lower one"
        )
    if options.num_steps < FEWEST_STEPS:
        raise UserError(f"num_steps={options.num_steps}: a curve takes {FEWEST_STEPS} or more, such as 100")
    if output.exists() and not output.is_dir():
        raise UserError(f"output={output} is a file: give a folder")
    check_recipe(KINDS[kind], fields, config)

    from llmkit.runs.run import load_run
    from llmkit.training.lr_finder import Step, draw, half_width, run_recipe, suggest, write_csv

    folder = output / "run"  # one for all ranks, and gone at the end
    is_first = os.environ.get("RANK", "0") == "0"
    if is_first:
        shutil.rmtree(folder, ignore_errors=True)
    test = {"max_steps": options.num_steps, "output_dir": folder}
    test |= {"range_test_min_lr": options.min_lr, "range_test_max_lr": options.max_lr}
    run_recipe(config, KINDS[kind], fields, test)
    if not is_first:
        return
    run = load_run(folder)
    shutil.rmtree(folder)
    steps = [Step(record["step"], record["learning_rate"], record["loss"]) for record in run.training]
    width = half_width(options.num_steps)
    write_csv(steps, width, output / "lr_find.csv")
    suggestion = suggest(steps, width)
    draw(steps, width, suggestion, name, output / "lr_find.png")
    print(f"saved lr_find.csv and lr_find.png in {output}; for {config}:")
    given = run.record["decisive"]
    for field, value in given.items():
        if field.endswith("learning_rate") and value is not None:  # muon_learning_rate keeps its ratio
            print(f"{field}: {suggestion * value / given['learning_rate']:.1e}")
