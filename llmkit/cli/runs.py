"""Commands about runs that are done or under way: `report` and `runs`."""

import argparse
from pathlib import Path

from llmkit.console import shown
from llmkit.errors import UserError
from llmkit.paths import existing_path


def add_commands(nouns) -> None:
    """Add what is here to the command's parser."""
    report = nouns.add_parser(
        "report", help="Write a page about a run, or one that compares several runs.", allow_abbrev=False
    )
    report.add_argument(
        "runs", nargs="+", metavar="RUN", help="The folder of a run, such as runs/pretrain_quickstart."
    )
    report.add_argument(
        "--output", help="The page, or a .png for the loss curve (default: report.html in the first run's folder)."
    )
    report.set_defaults(command=_report)
    runs = nouns.add_parser(
        "runs",
        help="List all runs in a folder.",
        description="List the runs in a folder with their state and last figures, and write index.html there, a page "
        "that links to their reports.",
        allow_abbrev=False,
    )
    runs.add_argument(
        "folder",
        nargs="?",
        default="runs",
        metavar="FOLDER",
        help="The folder that holds the runs (default: %(default)s).",
    )
    runs.set_defaults(command=_runs)


def _report(args: argparse.Namespace) -> None:
    runs = [existing_path(run) for run in args.runs]

    if args.output and args.output.endswith(".png"):
        if len(runs) > 1:
            raise UserError(f"output={args.output}: a picture shows one run; give a page (.html) for {len(runs)}")
        from llmkit.runs.loss_curve import draw_loss
        from llmkit.runs.run import load_run

        if not draw_loss(load_run(runs[0]), Path(args.output).expanduser()):
            raise UserError(f"{runs[0]}: fewer than two losses are logged, which is no curve yet")
        print(f"wrote {args.output}")
        return

    from llmkit.runs.report import write_report

    print(f"wrote {write_report(runs, args.output)}")


def _runs(args: argparse.Namespace) -> None:
    from llmkit.runs.report.index import as_text, list_runs, write_index

    rows = list_runs(args.folder)
    print(shown(as_text(rows)))
    print(f"\nwrote {write_index(args.folder, rows)}")
