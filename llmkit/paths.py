"""Whether a name that a user gave is a local path or a name on the Hub."""

import difflib
import os
import re
from pathlib import Path

from llmkit.errors import UserError

# A value that is a private path as a whole: absolute, a file's address, from a home, upwards, or of a Windows share.
WHOLE_PATH = re.compile(r"(?:file:|~|\.{1,2}[/\\]|[A-Za-z]:[/\\]|/[\w.~-]|\\\\)[^\n]*")
HOME = re.compile(r"(?:file:)?/*(?:[A-Za-z]:)?[/\\]*(?:home|users)[/\\][^/\\]+|~[^/\\]*", re.IGNORECASE)
MOST_NAMES = 5  # that a message lists


def local_path(name: str) -> Path | None:
    """The file or folder with this name, or None for a name that only the Hub can know.

    A name that begins with `.`, `/` or `~`, whose first part exists here, or that has more parts than a name on the
    Hub, is a local path: the Hub is never asked for it.

    Raises:
        UserError: it is a local path, and nothing is there.
    """
    if not name.strip():
        raise UserError("an empty name was given: give a path, or a name on the Hub")
    path = Path(os.path.expanduser(name))
    if os.path.exists(path):  # False where the system refuses the path, as one that is too long
        return path
    is_local = name.startswith((".", "~", os.sep)) or len(path.parts) > 2
    if is_local or (len(path.parts) == 2 and os.path.exists(path.parts[0])):
        raise UserError(f"{name!r}: there is no such file or folder{_near(path)}")
    return None


def expand_homes(arguments: object, *names: str) -> None:
    """Replace a `~` at the beginning of these attributes, which are paths or None, by the user's home.

    Raises:
        UserError: one is empty, or holds what no path can.
    """
    for name in names:
        if isinstance(value := getattr(arguments, name), str):
            if not value.strip() or "\0" in value:
                raise UserError(f"{name} is {value!r}: give a value, or leave it out")
            setattr(arguments, name, os.path.expanduser(value))


def check_names(arguments: object, *names: str) -> None:
    """As `expand_homes`, of attributes that may be names on the Hub: a local path has to be there.

    Raises:
        UserError: as `expand_homes` and `local_path`.
    """
    expand_homes(arguments, *names)
    for name in names:
        if (value := getattr(arguments, name)) is not None:
            try:
                local_path(value)
            except UserError as error:
                raise UserError(f"{name}={error}") from None


def last_name(path: str) -> str:
    """The last part of a path of any system; `~` for a home, whose last part is somebody's name."""
    path = path.rstrip("/\\")
    return "~" if HOME.fullmatch(path) else re.split(r"[/\\]", path)[-1]


def existing_path(name: str) -> Path:
    """The file or folder with this name, for what is never read from the Hub.

    Raises:
        UserError: nothing is there.
    """
    if (path := local_path(name)) is None:
        raise UserError(f"{name!r}: there is no such file or folder{_near(Path(name))}")
    return path


def new_path(name: str) -> Path:
    """The path of a folder or file to be made.

    Raises:
        UserError: something is there already.
    """
    path = Path(os.path.expanduser(name))
    if os.path.lexists(path):
        raise UserError(f"{name} is there already: choose another place or delete it")
    return path


def _near(path: Path) -> str:
    """The end of a message: names like the first part of `path` that is missing, or what stands beside the last."""
    missing = path
    while not os.path.isdir(missing.parent):
        missing = missing.parent
    try:
        names = sorted(name for name in os.listdir(missing.parent) if not name.startswith("."))
    except OSError:
        return ""
    if close := difflib.get_close_matches(missing.name, names, n=MOST_NAMES):
        return f". Did you mean {' or '.join(str(missing.parent / name) for name in close)}?"
    if missing != path or path.parent == Path() or not names:
        return ""
    return f". {path.parent} holds {', '.join(names[:MOST_NAMES])}{', ...' if len(names) > MOST_NAMES else ''}"


def checkpoint_path(name: str) -> str:
    """A checkpoint's folder, with `~` expanded, or its name on the Hub as it was given.

    Raises:
        UserError: a local path at which there is no checkpoint.
    """
    folder = local_path(name)
    if folder is None:
        return name
    if not folder.is_dir():
        raise UserError(f"{name!r} is a file: give the folder of a checkpoint")
    if not any((folder / config).is_file() for config in ("config.json", "adapter_config.json")):
        within = [path for path in folder.glob("checkpoint-*") if path.is_dir()]
        last = max(within, key=lambda path: path.stat().st_mtime, default=None)
        hint = f"give one that its training saved, such as {last}" if last else "give a folder that training saved"
        raise UserError(f"{name}: no checkpoint in this folder (no config.json, no adapter_config.json): {hint}")
    return str(folder)
