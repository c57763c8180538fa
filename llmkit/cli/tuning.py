"""`lr-find`: which learning rate a recipe wants, before it is run."""

import argparse
import tempfile
from pathlib import Path

from llmkit.errors import UserError

FEWEST_STEPS = 20


def add_commands(nouns) -> None:
    """Add what is here to the command's parser."""
    find = nouns.add_parser(
        "lr-find",
        help="find a recipe's learning rate",
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
    parser.add_argument("--config", required=True, help="the recipe, pretrain_*.yaml or sft_*.yaml")
    parser.add_argument("--min_lr", type=float, default=1e-5, help="learning rate of the first step (default: 1e-5)")
    parser.add_argument("--max_lr", type=float, default=1.0, help="learning rate of the last step (default: 1)")
    parser.add_argument("--num_steps", type=int, default=100, help="steps from one to the other (default: 100)")
    parser.add_argument("--output", help="folder for lr_find.csv and lr_find.png (default: lr_find/RECIPE)")
    return parser.parse_known_args(argv)


def _lr_find(args: argparse.Namespace) -> None:
    options, fields = _parse(args.arguments)
    name = Path(options.config).stem
    output = Path(options.output or Path("lr_find") / name)
    kind = name.split("_")[0]
    if kind not in ("pretrain", "sft"):
        raise UserError(
            f"config={options.config}: a recipe's name says which script it is for: begin it with pretrain_ or sft_"
        )
    if not 0 < options.min_lr < options.max_lr:
        raise UserError(
            f"min_lr={options.min_lr:g} and max_lr={options.max_lr:g}: give two above 0, min_lr the lower one"
        )
    if options.num_steps < FEWEST_STEPS:
        raise UserError(f"num_steps={options.num_steps}: a curve takes {FEWEST_STEPS} or more, such as 100")
    if output.exists() and not output.is_dir():
        raise UserError(f"output={output} is a file: give a folder")

    import warnings

    import datasets
    from transformers.utils.logging import disable_progress_bar

    from llmkit.training.lr_finder import TESTS, draw, half_width, suggest, write_csv
    from llmkit.training.optimizers import MUON

    disable_progress_bar()
    datasets.disable_progress_bars()
    warnings.filterwarnings("ignore", category=FutureWarning)  # as in recipes/sft_qlora.py

    with tempfile.TemporaryDirectory() as folder:
        trainer = TESTS[kind](options.config, fields, options.num_steps, folder)
        steps = trainer.test(options.min_lr, options.max_lr)
    width, is_first = half_width(options.num_steps), trainer.is_world_process_zero()
    if is_first:
        output.mkdir(parents=True, exist_ok=True)
        write_csv(steps, width, output / "lr_find.csv")
    suggestion = suggest(steps, width)  # on every rank, which so ends with the same error
    if is_first:
        draw(steps, width, suggestion, name, output / "lr_find.png")
        print(f"saved lr_find.csv and lr_find.png in {output}; for {options.config}:")
        print(f"learning_rate: {suggestion:.1e}")
        if trainer.args.optim == MUON:
            muon = suggestion * trainer.args.muon_learning_rate / trainer.args.learning_rate
            print(f"muon_learning_rate: {muon:.1e}")
    trainer.accelerator.wait_for_everyone()
    trainer.accelerator.end_training()
