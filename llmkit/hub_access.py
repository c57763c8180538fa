"""Whether the Hub can be reached is asked once; and what of it is on this machine."""

import os
import sys
from functools import cache

from llmkit.paths import local_path

TIMEOUT = 10  # seconds


@cache
def ask_hub_once() -> None:
    """Go on with the files of the cache if the Hub cannot be reached, and say so; call it before a name is opened.

    huggingface_hub tries each request six times, over half a minute, and a model takes several requests. With this
    they are refused at once, as they are with HF_HUB_OFFLINE=1.
    """
    from huggingface_hub import constants, get_session
    from huggingface_hub.errors import OfflineModeIsEnabled

    if constants.is_offline_mode():
        return
    session = get_session()
    try:
        session.head(constants.ENDPOINT, timeout=TIMEOUT)
    except Exception as error:  # of httpx or httpx2, by the version of huggingface_hub
        message = f"the Hub ({constants.ENDPOINT}) cannot be reached ({error})"

        def refuse(request) -> None:
            raise OfflineModeIsEnabled(message)

        hooks = session.event_hooks
        session.event_hooks = {**hooks, "request": [*hooks["request"], refuse]}
        if os.environ.get("LOCAL_RANK", "0") == "0":
            print(f"{message}: only files that were downloaded before can be opened", file=sys.stderr)


def is_here(name: str, repo_type: str) -> bool:
    """Whether a local path or a name on the Hub can be opened without a download.

    Args:
        repo_type: "model" or "dataset".

    Raises:
        UserError: it is a local path, and nothing is there.
    """
    return local_path(name) is not None or is_cached(name, repo_type)


def is_cached(name: str, repo_type: str) -> bool:
    """Whether files of a repository on the Hub were downloaded before."""
    from huggingface_hub import scan_cache_dir
    from huggingface_hub.errors import CacheNotFound

    try:
        return any(repo.repo_id == name and repo.repo_type == repo_type for repo in scan_cache_dir().repos)
    except CacheNotFound:
        return False
