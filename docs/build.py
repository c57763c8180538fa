"""Keep what the pages quote from the code current: the lines that they point at.

    python docs/build.py           # rewrite the pages
    python docs/build.py --check   # exit with status 1 where one is stale

A page points into the code as {{path:Name}} when it is written, where Name is a function, a class or Class.method.
This turns it into a link to the line of its definition, and afterwards corrects the line whenever the code moves.
"""

import ast
import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGES = sorted((ROOT / "docs").glob("*.md"))
POINTER = re.compile(r"\{\{(?P<path>[\w/]+\.py):(?P<name>[\w.]+)\}\}")
LINK = re.compile(r"\[`(?P<name>[\w.]+)` in [\w.]+, line \d+\]\(\.\./(?P<path>[\w/]+\.py)#L\d+\)")


def line_of(path: str, name: str) -> int:
    """The line, counted from 1, of a function, a class or `Class.method` of a file below the repository's root.

    Raises:
        KeyError: the file defines no such name.
    """
    node: ast.AST = ast.parse((ROOT / path).read_text(encoding="utf-8"))
    for part in name.split("."):
        found = {child.name: child for child in ast.iter_child_nodes(node) if hasattr(child, "name")}
        node = found[part]
    return node.lineno


def link(match: re.Match) -> str:
    path, name = match["path"], match["name"]
    line = line_of(path, name)
    return f"[`{name}` in {Path(path).name}, line {line}](../{path}#L{line})"


def current(page: Path) -> str:
    """The page's text with every pointer and link at the line where its name is defined now."""
    return LINK.sub(link, POINTER.sub(link, page.read_text(encoding="utf-8")))


def main() -> None:
    stale = {page: text for page in PAGES if (text := current(page)) != page.read_text(encoding="utf-8")}
    if "--check" in sys.argv:
        sys.exit(f"stale, run `make docs`: {', '.join(page.name for page in stale)}" if stale else 0)
    for page, text in stale.items():
        page.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
