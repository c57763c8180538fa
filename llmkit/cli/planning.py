"""Commands before a run is paid for: `plan`, `doctor`."""

import argparse
import itertools
import json
import os
import sys
import warnings
from pathlib import Path

from llmkit.errors import UserError
from llmkit.gpus import find_gpu
from llmkit.recipe_kinds import kind_of, parse_recipe, recipe_path


def add_commands(nouns) -> None:
    """Add what is here to the command's parser."""
    plan = nouns.add_parser(
        "plan",
        help="Say what a recipe's run will take.",
        add_help=False,
        prefix_chars="\0",  # so that nothing is a flag here: a recipe's fields stand between the command's own
    )
    plan.add_argument("arguments", nargs=argparse.REMAINDER)
    plan.set_defaults(command=_plan)

    doctor = nouns.add_parser(
        "doctor",
        help="Check whether this machine is set up to train.",
        description="Try what training needs on this machine and print one line for each: ok, warning or error, with "
        "what to do about it. The exit status is 1 if there is an error.",
        allow_abbrev=False,
    )
    doctor.add_argument(
        "--output_dir", default="runs", help="The folder for runs, whose disk is checked (default: runs)."
    )
    doctor.add_argument(
        "--recipe",
        nargs=argparse.REMAINDER,
        metavar=("RECIPE", "--FIELD VALUE"),
        help="Check what this recipe needs as well: its file, or the name of one of llmkit's own, at the end; any "
        "field of the recipe can follow.",
    )
    doctor.set_defaults(command=_doctor)


def _parse_plan(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    from llmkit.cli import Parser

    plan = Parser(
        prog="llmkit plan",
        allow_abbrev=False,
        description="Print the tokens, floating-point operations, memory, time, cost and disk of a recipe's run. "
        "Memory is that of the recipe's real step, run without content. Nothing is downloaded but the configuration "
        "of a base model on the Hub.",
        epilog="Any field of the recipe can follow, as --field value.",
    )
    plan.add_argument(
        "recipe", help="The recipe's file, or the name of one of llmkit's own, such as pretrain_gpt2_124m."
    )
    plan.add_argument(
        "--gpu", help="Words of the GPU's name, such as H200 or 'A100 80GB'. The default is this machine."
    )
    plan.add_argument("--gpus", type=int, default=1, help="The number of devices, each with a rank (default: 1).")
    plan.add_argument("--mfu", type=float, default=0.4, help="The share of the peak that is assumed (default: 0.4).")
    plan.add_argument("--dollars_per_hour", type=float, help="The price of one device for an hour.")
    plan.add_argument("--measure", action="store_true", help="Take real steps on this machine to measure the pace.")
    plan.add_argument("--json", action="store_true", help="Print the figures as JSON.")
    return plan.parse_known_args(argv)


def _plan(given: argparse.Namespace) -> None:
    args, fields = _parse_plan(given.arguments)
    if args.gpus < 1:
        raise UserError(f"gpus={args.gpus}: must be at least 1")
    if not 0 < args.mfu <= 1:
        raise UserError(f"mfu={args.mfu}: give a share of the peak above 0 and up to 1, such as 0.4")
    if args.dollars_per_hour is not None and not 0 <= args.dollars_per_hour < 1e6:
        raise UserError(f"dollars_per_hour={args.dollars_per_hour}: must be at least 0")
    if args.measure and (args.gpu or args.gpus > 1):
        raise UserError("--measure is for this machine with one device: leave out --gpu and --gpus")
    if args.gpu is not None:
        find_gpu(args.gpu)

    path = recipe_path(args.recipe)
    kind = kind_of(path, fields)
    recipe = parse_recipe(kind, fields, default_config=path)

    warnings.filterwarnings("ignore", category=FutureWarning)  # peft still calls transformers by older names

    from llmkit.planning.hardware import Hardware
    from llmkit.planning.plan import Assumptions
    from llmkit.planning.recipe_plan import plan_recipe

    assumptions = Assumptions(args.mfu, args.dollars_per_hour, args.measure)
    plan = plan_recipe(kind, recipe, Hardware.of(args.gpu, args.gpus), assumptions)
    print(json.dumps(plan.as_dict(), indent=2) if args.json else plan.table())


def _doctor(args: argparse.Namespace) -> None:
    folder, kind, recipe = args.output_dir, None, ()
    if args.recipe == []:
        raise UserError("--recipe: give a recipe's file or name after it")
    if args.recipe:
        path, fields = recipe_path(args.recipe[0]), args.recipe[1:]
        kind = kind_of(path, fields)
        recipe = parse_recipe(kind, fields, default_config=path)
        folder = recipe[-1].output_dir

    from llmkit.planning.doctor import ERROR, examine

    of_recipe = ()
    if kind:
        warnings.filterwarnings("ignore", category=FutureWarning)  # as in `_plan`

        from llmkit.planning.recipe_checks import examine_recipe

        of_recipe = examine_recipe(kind, recipe)
    failed = False
    for finding in itertools.chain(examine(Path(folder).absolute()), of_recipe):
        failed = failed or finding.state == ERROR
        if os.environ.get("RANK", "0") != "0":  # under `accelerate launch` all ranks work, and the first one speaks
            continue
        print(f"{finding.name:>16}  {finding.state:7}  {finding.text}", flush=True)
        if finding.fix:
            print(f"{'':27}to fix it: {finding.fix}")
    if failed:
        sys.exit(1)
