"""The embedded corpus, which needs no download: the Python standard library's own sources."""

import sysconfig
from pathlib import Path

# Folders that are no good to learn Python from. What is left is about 10 MB of code written by people.
_LEFT_OUT = {
    "site-packages",  # not the standard library
    "dist-packages",
    "__pycache__",
    "test",  # as long as all the rest together, and its files are full of odd literals and encodings
    "tests",
    "idle_test",
    "encodings",  # generated: 120 tables of 256 lines each
    "pydoc_data",  # generated: the language reference as one dictionary of strings
}


def stdlib_sources() -> list[Path]:
    """The standard library's `.py` files on this machine, without its tests and generated tables, in a fixed order.

    Also left out are empty files and the build settings, which differ from one machine to the next.
    """
    # Of the interpreter that a virtual environment was made from: the environment holds no standard library.
    root = Path(sysconfig.get_path("stdlib"))
    return sorted(
        path
        for path in root.rglob("*.py")
        if _LEFT_OUT.isdisjoint(path.relative_to(root).parts)
        and not path.relative_to(root).parts[0].startswith(("_sysconfigdata", "_sysconfig_vars", "config-"))
        and path.stat().st_size > 0
    )
