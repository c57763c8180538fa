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
# What to do where a server refuses to give a file.
FOR_HUB = "give a token that may read it, with `hf auth login` or HF_TOKEN"
FOR_OTHERS = "check the credentials, and that they may read it; object stores also answer so if the file is missing"

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
        Unreachable: no attempt has succeeded, there is no such file, or the server refuses to give it.
    """
    pause = FIRST_PAUSE
    while True:
        try:
            return attempt()
        except (UserError, MemoryError, ImportError, TypeError, AttributeError):
            raise
        except Exception as error:  # each file system has its own, with no common base
            if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise UserError("the disk with the shard cache is full: free some space, or set HF_HOME") from error
            if refusal := _refusal(error):
                advice = FOR_HUB if url.startswith("hf://") else FOR_OTHERS
                raise Unreachable(f"{url} cannot be fetched: {refusal}: {advice}") from error
            reason = _reason(error)
            if isinstance(error, FileNotFoundError) or time.monotonic() + pause > deadline:
                raise Unreachable(f"{url} cannot be fetched: {reason}") from error
        _tell(f"{url} cannot be fetched now, trying again in {pause:.0f} s: {reason}", pause)
        time.sleep(pause)
        pause = min(2 * pause, LONGEST_PAUSE)


def _refusal(error: BaseException | None) -> str | None:
    """What is answered to somebody without credentials, or without permission, who would be answered so again.

    Each file system has its own error: that of HTTP has a `status`, the Hub's a `response`, that of GCS a `code` or
    this one word; that of S3 is Python's, or the lack of credentials is in its name.
    """
    while error is not None:
        status = getattr(error, "status", None) or getattr(error, "code", None)
        if (status := status or getattr(getattr(error, "response", None), "status_code", None)) in (401, 403):
            return f"the server answers {status}"
        is_told = str(error).startswith("Forbidden: ") or "Credentials" in type(error).__name__
        if is_told or isinstance(error, PermissionError):
            return _reason(error)
        error = error.__cause__
    return None


def _reason(error: BaseException) -> str:
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
