"""A run on shards at URLs: it holds those of the windows that come next, and fetches those after them meanwhile."""

import bisect
import itertools
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from io import FileIO

from llmkit.data.order import WindowOrder
from llmkit.data.shard_cache import ShardCache
from llmkit.data.windows import TokenWindows
from llmkit.errors import UserError

Wanted = dict[tuple[ShardCache, str], None]  # shards by name, in the order in which they are wanted
ANY = range(sys.maxsize)
LOOK = 0.2  # seconds between two looks at whether the run was asked to stop


class ReadAhead:
    """The shards of URLs that a run holds: all for validation, and those of the groups it is at, was at and comes to.

    Those it was at may still be read by a DataLoader's workers. Sources in local folders are left out.

    Args:
        sources: of each source the windows to train on, their order, and how many are drawn in the whole run.
        held_out: the windows for validation.
    """

    def __init__(self, sources: Sequence[tuple[TokenWindows, WindowOrder, int]], held_out: Sequence[TokenWindows]):
        self.sources = sources
        self.always: Wanted = {}
        for windows in held_out:
            self.always |= _shards(windows, 0, len(windows))
        self.here: Wanted = {}
        self.groups: list[tuple[range, range]] = []  # of each source, the places of the first group here, and the last
        self.files: dict[tuple[ShardCache, str], Future[FileIO]] = {}

    def check_room(self, most: int) -> None:
        """Refuse a cache that is too small for what is held at a time.

        Args:
            most: windows of each source that are asked for at a time.

        Raises:
            UserError: the cache is too small.
        """
        need = _bytes(self.always)
        for windows, order, _ in self.sources:
            groups = [(_bytes(_shards(windows, *ends)), ends) for ends in itertools.pairwise(order.bounds)]
            groups.sort(reverse=True)
            # The one that is at work, one before and one after it; and all that may lie between these.
            held = [size for size, _ in groups[:3]] + [size for size, (a, b) in groups[3:] if b - a <= most]
            need += min(sum(held), _bytes(_shards(windows, 0, len(windows))))
        limits = [windows.cache.limit for windows, *_ in self.sources if windows.cache]
        if limits and need > limits[0]:
            raise UserError(
                f"shard_cache_gb={limits[0] / 1e9:g}: three groups of shards and the validation split take up to "
                f"{need / 1e9:.3g} GB: give as much, or a smaller shard_group"
            )

    def move(self, places: Sequence[tuple[int, int]]) -> bool:
        """Begin to fetch the shards of the groups at these places of each source's order, and of those after them.

        Returns:
            Whether these are others than before, so that `wait` has something to wait for.
        """
        if self.here and all(map(_both_in, places, self.groups)):
            return False
        here: Wanted = dict(self.always)
        after: Wanted = {}
        self.groups = []
        for (windows, order, total), (place, stop) in zip(self.sources, places, strict=True):
            groups = [] if windows.cache else [ANY]
            while windows.cache:
                _, group, begin = order.group_at(place)
                ends = order.bounds[group], order.bounds[group + 1]
                if begin >= stop and groups:
                    after |= _shards(windows, *ends) if begin < total else {}
                    break
                here |= _shards(windows, *ends)
                place = begin + ends[1] - ends[0]
                groups.append(range(begin, place))
            self.groups.append((groups[0], groups[-1]))
        if here == self.here:
            return False
        for key in self.files.keys() - (self.here | here | after).keys():
            self.files.pop(key).add_done_callback(_close)
        self.here = here
        for key in here | after:
            if key not in self.files or _failed(self.files[key]):
                self.files[key] = _in_thread(*key)
        return True

    def wait(self, is_asked_to_stop: Callable[[], bool]) -> None:
        """Wait for the shards that are wanted now, or until the run is asked to stop.

        Raises:
            UserError: one cannot be fetched.
        """
        futures = [self.files[key] for key in self.here]
        while not is_asked_to_stop() and not all(future.done() for future in futures):
            wait(futures, timeout=LOOK)
        for future in futures:
            if future.done():
                future.result()

    def close(self) -> None:
        """Hold nothing any more."""
        while self.files:
            self.files.popitem()[1].add_done_callback(_close)
        self.here = {}


def _both_in(places: tuple[int, int], groups: tuple[range, range]) -> bool:
    return places[0] in groups[0] and max(places[0], places[1] - 1) in groups[1]


def _shards(windows: TokenWindows, first: int, stop: int) -> Wanted:
    """Of the windows from `first` to before `stop`, with that of their last target; none of a local folder."""
    if windows.cache is None or first == stop:
        return {}
    tokens = first * windows.block_size, min(stop * windows.block_size, windows.num_tokens - 1)
    begin, end = (bisect.bisect_right(windows.starts, token) for token in tokens)
    shards = windows.manifest.splits[windows.split].shards[begin - 1 : end]
    return {(windows.cache, shard.name): None for shard in shards}


def _bytes(shards: Wanted) -> int:
    return sum(cache.size(name) for cache, name in shards)


def _in_thread(cache: ShardCache, name: str) -> Future[FileIO]:
    """A thread that the process does not wait for at its end, as it would for an executor's."""
    future: Future[FileIO] = Future()

    def work() -> None:
        try:
            future.set_result(cache.hold(name))
        except BaseException as error:  # raised where it is waited for
            future.set_exception(error)

    threading.Thread(target=work, daemon=True).start()
    return future


def _failed(future: Future) -> bool:
    return future.done() and future.exception() is not None


def _close(future: Future[FileIO]) -> None:
    if not _failed(future):
        future.result().close()
