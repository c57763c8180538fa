"""Commands about runs that are done or under way: `report`."""

import argparse


def add_commands(nouns) -> None:
    """Add what is here to the command's parser."""
    report = nouns.add_parser(
        "report", help="show one run, or several beside each other, as a page", allow_abbrev=False
    )
    report.add_argument("runs", nargs="+", metavar="RUN", help="the folder of a run, such as runs/pretrain_quickstart")
    report.add_argument("--output", help="the page to write (default: report.html in the first run's folder)")
    report.set_defaults(command=_report)


def _report(args: argparse.Namespace) -> None:
    from llmkit.runs.report import write_report

    print(f"wrote {write_report(args.runs, args.output)}")
