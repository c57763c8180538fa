"""All runs in a folder: a list for the terminal, and `index.html`, which links to their reports."""

import html
import time
from pathlib import Path
from urllib.parse import quote

from llmkit.errors import UserError
from llmkit.files import is_held
from llmkit.runs.metrics import COMPARED, METRICS
from llmkit.runs.report import REPORT, static_page, write_page
from llmkit.runs.report.curves import tokens
from llmkit.runs.report.summary import last_value, moment, quantity, state
from llmkit.runs.run import LOG, load_run

INDEX = "index.html"
FIGURES = [METRICS["loss"], *COMPARED]


def list_runs(folder: str | Path) -> list[dict[str, str]]:
    """The runs in a folder and the folders in it, the one that logged last first: a row a run.

    Each row has `run`, `state`, `logged`, `tokens` and the last figures by their names, and `report`, the path of its
    page from the folder, where there is one.

    Raises:
        UserError: no such folder, or no run in it.
    """
    folder, now = Path(folder), time.time()
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder: give the one that your runs are in")
    found = []
    for path in sorted(folder.rglob(LOG)):
        name = path.parent.relative_to(folder).as_posix()
        row = {"run": path.parent.resolve().name if name == "." else name}
        try:
            run = load_run(path.parent)
        except UserError:
            found.append((0.0, row | {"state": f"unreadable: no record of a run is in its {LOG}"}))
            continue
        row |= {"state": state(run, now, is_held(run.folder))["text"], "logged": moment(run.log[-1]["time"])}
        row["tokens"] = quantity(tokens(run)[-1])
        for metric in FIGURES:
            if (value := last_value(run, metric.key)) is not None:
                row[metric.name] = metric.write(value)
        if (path.parent / REPORT).exists():
            row["report"] = (path.parent / REPORT).relative_to(folder).as_posix()
        found.append((run.log[-1]["time"], row))
    if not found:
        raise UserError(f"no run is in {folder}: none of its folders has a {LOG}")
    return [row for _, row in sorted(found, key=lambda pair: -pair[0])]


def _columns(rows: list[dict[str, str]]) -> list[str]:
    order = ["run", "state", "logged", "tokens", *(metric.name for metric in FIGURES)]
    return [name for name in order if any(name in row for row in rows)]


def as_text(rows: list[dict[str, str]]) -> str:
    """The rows as a table for the terminal."""
    names = _columns(rows)
    table = [names, *([row.get(name, "") for name in names] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = ["  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)) for line in table]
    return "\n".join(line.rstrip() for line in lines)


def write_index(folder: str | Path, rows: list[dict[str, str]]) -> Path:
    """Write the rows as a page into the folder.

    Raises:
        UserError: it cannot be written there.
    """
    names = _columns(rows)
    head = "".join(f"<th scope='col'>{html.escape(name)}</th>" for name in names)
    body = "".join(f"<tr>{''.join(_cell(row, name) for name in names)}</tr>" for row in rows)
    content = (
        f"<h1>{len(rows)} runs</h1>\n"
        f"<div class='card across list'><div class='scroll' tabindex='0'><table><thead><tr>{head}</tr></thead>"
        f"<tbody>{body}</tbody></table></div></div>\n"
        f"<footer>Made by llmkit, {moment(time.time())}.</footer>"
    )
    path = Path(folder) / INDEX
    write_page(path, static_page("Runs", content))
    return path


def _cell(row: dict[str, str], name: str) -> str:
    text = html.escape(row.get(name, ""))
    if name != "run":
        return f"<td>{text}</td>"
    text = text.replace("_", "_<wbr>").replace("/", "/<wbr>")
    link = f'<a href="{html.escape(quote(row["report"]))}">{text}</a>' if "report" in row else text
    return f"<th scope='row'>{link}</th>"
