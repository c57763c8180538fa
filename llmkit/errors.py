"""What a user can fix is said in one line, without a traceback."""

import atexit
import errno
import functools
import gc
import logging
import os
import sys
from collections.abc import Callable
from typing import NoReturn

from llmkit.console import ShownLogRecord, shown

# What the system says of a path at which nothing can be read or written.
WRONG_PATH = (errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.EACCES, errno.EPERM, errno.ENOENT)
WRONG_PATH += (errno.ENAMETOOLONG, errno.EROFS, errno.ELOOP)

# New objects after which Python searches for garbage. With its own default, 700 in Python 3.11, it searches again and
# again while torch and transformers make half a million objects.
GARBAGE_THRESHOLD = 10_000


class UserError(ValueError):
    """Something the user gave and can fix.

    The message is one line: what was given, what is allowed, what to do. Line breaks, as in a quoted message of
    another library, become spaces.

    Attributes:
        of_one_rank: every rank that raises it says its own line; else the first local rank speaks for all.
    """

    of_one_rank = False

    def __init__(self, message: str):
        # torch makes an error of a DataLoader's worker anew, from the worker's traceback, which ends with the message.
        if message.startswith(f"Caught {type(self).__name__} in DataLoader worker"):
            message = message.rpartition(f"{type(self).__name__}: ")[2]
        super().__init__(" ".join(message.split()))


def reason(error: Exception) -> str:
    """Why transformers could not open a checkpoint, for a UserError's message.

    A checkpoint that brings code of its own gets a sentence of ours: transformers would advise to let the code run.
    """
    if "trust_remote_code" in str(error):
        return "it needs Python code that comes with it, and llmkit never runs such code: choose another checkpoint"
    return str(error)


def exit_on_user_error(main: Callable[..., None]) -> Callable[..., None]:
    """Decorate an entry point so that a user's mistake ends it with one line and status 2.

    A full disk is told the same way, and Ctrl-C ends quietly with status 130. Any other exception is a defect and
    keeps its traceback. Of several local ranks only the first one speaks.
    """

    @functools.wraps(main)
    def wrapper(*args, **kwargs) -> None:
        logging.setLogRecordFactory(ShownLogRecord)
        gc.set_threshold(GARBAGE_THRESHOLD)  # saves a second of importing torch and transformers
        # Otherwise Python searches all their objects once more at exit, which takes 1.5 seconds. What only a reference
        # cycle still holds then is not finalized: a file that is to be whole has to be closed.
        atexit.register(gc.freeze)
        try:
            main(*args, **kwargs)
        except UserError as error:
            _exit(str(error), error.of_one_rank)
        except KeyboardInterrupt:
            sys.exit(130)
        except BrokenPipeError:  # `llmkit ... | head`: whoever read has enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python flushes into it at exit
            sys.exit(141)
        except Exception as error:
            if (message := _disk_full(error) or _wrong_path(error)) is None:
                raise
            _exit(message)

    return wrapper


def _exit(message: str, of_one_rank: bool = False) -> NoReturn:
    if of_one_rank or os.environ.get("LOCAL_RANK", "0") == "0":
        print(f"error: {shown(message, sys.stderr)}", file=sys.stderr, flush=True)
    sys.exit(2)


def _wrong_path(error: Exception) -> str | None:
    """The line to print if a file stands where a folder should be, or the like."""
    if isinstance(error, OSError) and error.errno in WRONG_PATH and error.filename is not None and error.strerror:
        return f"{error.filename}: {error.strerror.lower()}: give another path"
    return None


def _disk_full(error: BaseException | None) -> str | None:
    """The line to print if `error`, or what caused it, is a full disk."""
    while error is not None:
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            where = f" while writing {error.filename}" if error.filename is not None else ""
            return f"the disk is full{where}: free some space and start again"
        # safetensors writes from Rust and raises its own exception, which has no errno.
        if f"(os error {errno.ENOSPC})" in str(error):
            return "the disk is full: free some space and start again"
        error = error.__cause__ or error.__context__
    return None
