"""Files at URLs that do not come at once: fetched again and again, for a stated time.

fsspec does the transport, and what its file systems try again by themselves comes before this.
"""

import errno
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from llmkit.console import say
from llmkit.data.files import file_system
from llmkit.errors import UserError

Result = TypeVar("Result")

PATIENCE = 600.0  # seconds in which it is tried again
FIRST_PAUSE, LONGEST_PAUSE = 1.0, 60.0  # seconds; each pause is twice the one before
STALLED = 60.0  # seconds without a byte, after which a connection counts as lost (HTTP; others have their own)

_telling = threading.Lock()
_told_until = 0.0  # several files that fail at a time are told once


class Unreachable(UserError):
    """A file at a URL could not be fetched in the time that was given."""


def read(url: str) -> bytes:
    """A small file."""
    fs, path = file_system(url, **_options(url))
    return fs.cat_file(path)  # pyrefly: ignore[bad-return]  bytes, where nothing but a path is given


def download(url: str, path: Path) -> None:
    """Fetch a file to `path`, over whatever is there."""
    fs, remote = file_system(url, **_options(url))
    fs.get_file(remote, str(path))


def _options(url: str) -> dict:
    """For HTTP, whose five minutes for a whole file would be too short for some, and too long where nothing comes."""
    if not url.startswith(("http://", "https://")):
        return {}
    import aiohttp

    return {"client_kwargs": {"timeout": aiohttp.ClientTimeout(total=None, sock_connect=STALLED, sock_read=STALLED)}}


def patiently(attempt: Callable[[], Result], url: str, deadline: float) -> Result:
    """What `attempt` gives, which is made again when it has failed, after growing pauses.

    Args:
        url: what it fetches, for messages.
        deadline: no attempt but the first begins after it, on the clock of `time.monotonic`.

    Raises:
        Unreachable: no attempt has succeeded, or there is no such file.
    """
    pause = FIRST_PAUSE
    while True:
        try:
            return attempt()
        except (UserError, MemoryError, ImportError, TypeError, AttributeError):
            raise
        except Exception as error:  # each file system has its own, with no common base
            reason = _reason(error)
            if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise UserError("the disk with the shard cache is full: free some space, or set HF_HOME") from error
            is_final = isinstance(error, (FileNotFoundError, PermissionError))
            if is_final or time.monotonic() + pause > deadline:
                raise Unreachable(f"{url} cannot be fetched: {reason}") from error
        _tell(f"{url} cannot be fetched now, trying again in {pause:.0f} s: {reason}", pause)
        time.sleep(pause)
        pause = min(2 * pause, LONGEST_PAUSE)


def _reason(error: Exception) -> str:
    if isinstance(error, FileNotFoundError):
        return "there is no such file"
    return (isinstance(error, OSError) and error.strerror) or str(error) or type(error).__name__


def _tell(line: str, pause: float) -> None:
    global _told_until
    with _telling:
        if (now := time.monotonic()) < _told_until:
            return
        _told_until = now + pause / 2
    if os.environ.get("LOCAL_RANK", "0") == "0":
        say(line)
