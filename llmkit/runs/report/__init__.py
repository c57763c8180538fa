"""One page that shows a run, or several beside each other: `report.html`, which needs nothing but a browser.

`page.html` is the frame. What is shown is computed here and put into it as JSON, with `page.css`, `numbers.js`
(formats, ticks), `chart.js` (draws a chart), `curves.js` (all of them, and their switches) and `page.js` (the rest);
nothing is loaded from anywhere.
"""

import html
import json
import time
from collections.abc import Sequence
from pathlib import Path

from llmkit.errors import UserError
from llmkit.files import is_held, write_whole
from llmkit.runs.report.curves import charts, curves, logged
from llmkit.runs.report.summary import figures, headline, moment, samples, state
from llmkit.runs.report.tables import comparison, differences, run_tables
from llmkit.runs.run import Run, load_run

REPORT = "report.html"
HERE = Path(__file__).parent
SCRIPTS = ("numbers.js", "chart.js", "curves.js", "page.js")


def write_report(folders: Sequence[str | Path], output: str | Path | None = None) -> Path:
    """Write the report of one or more runs.

    Args:
        folders: of the runs; one given twice is shown once.
        output: the page's file, by default `report.html` in the first run's folder.

    Returns:
        Where it was written.

    Raises:
        UserError: a folder without a run.
    """
    runs = list({run.folder.resolve(): run for run in map(load_run, folders)}.values())
    output = Path(output) if output is not None else runs[0].folder / REPORT
    text = page(runs, time.time())
    write_page(output, text)
    return output


def write_page(path: Path, text: str) -> None:
    """Write a page in one step: a browser that reloads it never meets a half of it.

    Raises:
        UserError: it cannot be written there.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, text.encode(errors="backslashreplace"))  # a folder's name need not be UTF-8
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from error


def static_page(title: str, body: str) -> str:
    """A page without a script, in the report's style.

    Args:
        title: plain text.
        body: HTML.
    """
    style = (HERE / "page.css").read_text(encoding="utf-8")
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">\n"
        f"<title>{html.escape(title)}</title>\n<style>{style}</style>\n</head>\n<body>\n<main>{body}</main>\n"
        "</body>\n</html>\n"
    )


def page(runs: list[Run], now: float) -> str:
    """The whole page.

    Args:
        now: when it is made, in seconds since the epoch: and a run that was silent for long has stopped.
    """
    data = content(runs, now)
    # In a script element HTML ends at the first "</script", and a comment may begin with "<!--": no "<" is left.
    text = json.dumps(data, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
    parts = {
        "title": html.escape(data["title"]),
        "style": (HERE / "page.css").read_text(encoding="utf-8"),
        "script": "\n".join((HERE / name).read_text(encoding="utf-8") for name in SCRIPTS),
        "data": text,
    }
    frame = (HERE / "page.html").read_text(encoding="utf-8").split("%%")  # text, name, text, name, ..., text
    return "".join(parts[part] if index % 2 else part for index, part in enumerate(frame))


def content(runs: list[Run], now: float) -> dict:
    """What the page shows, as JSON can say it."""
    shown: list[dict] = []
    for name, run in zip(run_names(runs), runs, strict=True):
        key_figures = [[key, figure["text"], figure["note"]] for key, figure in figures(run).items()]
        about = {
            "name": name,
            "headline": headline(run),
            "state": state(run, now, is_held(run.folder)),
            "figures": key_figures,
        }
        shown.append(about | curves(run) | {"samples": samples(run), "tables": run_tables(run)})
    names = [run["name"] for run in shown]
    return {
        "title": names[0] if len(runs) == 1 else f"{len(runs)} runs: {', '.join(names)}",
        "made": moment(now),
        "live": any(run["state"]["kind"] == "running" for run in shown),
        "tokens": tokens_name(runs),
        "runs": shown,
        "charts": charts({key for run in runs for key in logged(run)}),
        "comparison": [differences(runs), comparison(runs)] if len(runs) > 1 else [],
    }


def tokens_name(runs: list[Run]) -> str:
    """What is counted, in words that are true of all runs."""
    names = {run.counted for run in runs}
    return names.pop() if len(names) == 1 else "trained tokens"


def run_names(runs: list[Run]) -> list[str]:
    """The folders' names, with as much of what is above them as tells them apart."""
    paths = [run.folder.resolve() for run in runs]
    for depth in range(1, max(len(path.parts) for path in paths)):
        names = ["/".join(path.parts[-depth:]) for path in paths]
        if len(set(names)) == len(names):
            return names
    raise AssertionError("resolved folders differ")
