"""What several commands need to read their arguments."""

import sys

from llmkit.errors import UserError


def read_stdin() -> str:
    """The text on standard input.

    Raises:
        UserError: it is not UTF-8.
    """
    try:
        text = sys.stdin.read()
        text.encode()  # where the locale is C, Python reads other bytes as surrogates
    except UnicodeError as error:
        raise UserError(f"standard input is not a text in UTF-8 ({error}): give a text file") from error
    return text
