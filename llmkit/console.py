"""What is printed for people: plain lines, in which texts of models and data cannot steer the terminal."""

import logging
import os
import re
import sys
from typing import TextIO

from tqdm.auto import tqdm

# Control characters but line end and tab (escape sequences begin with one), what reverses the direction of a line,
# line ends that only some programs know, and halves of characters, which cannot be printed at all.
UNSAFE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def say(line: str) -> None:
    """Print above the progress bar, at once also where output goes to a file; on a terminal as `shown`."""
    tqdm.write(shown(line), file=sys.stdout)
    sys.stdout.flush()


def shown(text: str, stream: TextIO | None = None) -> str:
    """A text of a model, of data or of an error as it may be written to a stream, standard output if not given.

    A terminal gets `<U+001B>` in place of an escape character and the like; a file or a pipe gets the text as it is.
    Each character is looked at alone, so the pieces of a text may come one by one.
    """
    if not (stream or sys.stdout).isatty():
        return text
    return UNSAFE.sub(lambda match: f"<U+{ord(match[0]):04X}>", text)


def has_color(stream: TextIO | None = None) -> bool:
    """Whether colours are wanted: on a terminal, unless NO_COLOR (no-color.org) or TERM=dumb says otherwise."""
    unwanted = os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb"
    return (stream or sys.stdout).isatty() and not unwanted


class ShownLogRecord(logging.LogRecord):
    """A message of any library's logger as `shown`, for they quote configurations and data in their warnings."""

    def getMessage(self) -> str:
        return shown(super().getMessage(), sys.stderr)
