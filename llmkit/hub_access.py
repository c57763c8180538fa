"""Whether the Hub can be reached is asked once."""

import os
import sys
from functools import cache

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
