"""A run on shards at URLs: it waits for those that its next steps read, and fetches those after them meanwhile."""

import bisect
import itertools
import threading
from collections.abc import Sequence
from concurrent.futures import Future, wait
from io import FileIO

import numpy as np

from llmkit.data.order import WindowOrder
from llmkit.data.shard_cache import ShardCache
from llmkit.data.windows import TokenWindows
from llmkit.errors import UserError

Shards = dict[tuple[ShardCache, str], None]  # by name, in the order in which they are wanted
LOOK = 0.2  # seconds of a wait, after which all ranks see whether to stop
MORE = 16  # times as many windows of the same group are looked at as are asked for, so that not every step has to look


class ReadAhead:
    """The shards of URLs that a run holds: all for validation, and those of the groups it is at, was at and comes to.

    Sources in local folders are left out.

    Args:
        sources: of each source the windows to train on, their order, and how many are drawn in the whole run.
        held_out: the windows for validation.
    """

    why = "they are being fetched"

    def __init__(self, sources: Sequence[tuple[TokenWindows, WindowOrder, int]], held_out: Sequence[TokenWindows]):
        self.sources = sources
        self.always: Shards = {}
        for windows in held_out:
            self.always |= _shards(windows, 0, len(windows))
        self.wanted: Shards = {}  # by the next steps, and by those before them in the same groups
        self.held: Shards = {}  # of the groups of these, and of those after them
        self.files: dict[tuple[ShardCache, str], Future[FileIO]] = {}
        self.settled: list[tuple[int, int]] = []  # the places of each source's order that ask for nothing new, if any

    def lack_of_room(self, most: int) -> str | None:
        """Why the cache is too small for what is held at a time, or None.

        Args:
            most: windows of each source that are asked for at a time.
        """
        need = _bytes(self.always)
        for windows, order, _ in self.sources:
            groups = [(_bytes(_shards(windows, *ends)), ends) for ends in itertools.pairwise(order.bounds)]
            groups.sort(reverse=True)
            # The one that is at work, one before and one after it; and all that may lie between these.
            held = [size for size, _ in groups[:3]] + [size for size, (a, b) in groups[3:] if b - a <= most]
            need += min(sum(held), _bytes(_shards(windows, 0, len(windows))))
        limits = [windows.cache.limit for windows, *_ in self.sources if windows.cache]
        if not limits or need <= limits[0]:
            return None
        return (
            f"shard_cache_gb={limits[0] / 1e9:g}: three groups of shards and the validation split take up to "
            f"{need / 1e9:.3g} GB: give as much, or a smaller shard_group"
        )

    def want(self, places: Sequence[tuple[int, int]]) -> bool:
        """Ask for the shards of the windows at these places of each source's order, and of some after them.

        No others are fetched until they are here: the rest of their groups, and the groups after them, when it is
        called again.

        Returns:
            Whether `wait` has to be called, as some of them were not wanted before. All ranks get the same.
        """
        if self.settled and all(
            low <= place and stop <= high for (low, high), (place, stop) in zip(self.settled, places, strict=True)
        ):
            return False
        wanted, held, settled = dict(self.always), dict(self.always), []
        for (windows, order, total), (place, stop) in zip(self.sources, places, strict=True):
            low, high = 0, total  # the places between which nothing changes
            while windows.cache and place < total:
                _, group, begin = order.group_at(place)
                ends = order.bounds[group], order.bounds[group + 1]
                end, shards = begin + ends[1] - ends[0], _shards(windows, *ends)
                held |= shards
                if begin >= stop:
                    high = min(high, begin)
                    break
                seen = min(stop + MORE * (stop - place), end)
                wanted |= {key: None for key in shards if key in self.wanted}
                wanted |= _shards_of(windows, order.windows(place, seen))
                low, high, place = max(low, begin), min(high, seen), end
            settled.append((low, high))
        new = [key for key in wanted if key not in self.wanted]
        if [*held] != [*self.held]:  # in another group, also where a pass ends with that with which the next begins
            for key in self.files.keys() - (self.held | held).keys():
                self.files.pop(key).add_done_callback(_close)
        self.wanted, self.held = wanted, held
        self.settled = [] if new else settled
        for key in new or held:
            if key not in self.files or (new and _failed(self.files[key])):
                self.files[key] = _in_thread(*key)
        return bool(new)

    def wait(self) -> bool:
        """Whether the shards that are wanted are here; if not, one has failed, or some time has passed."""
        done, waiting = wait([self.files[key] for key in self.wanted], timeout=LOOK)
        return not waiting and not any(map(_failed, done))

    def problem(self) -> str | None:
        """Why a shard that is wanted cannot be fetched."""
        try:
            for key in self.wanted:
                if self.files[key].done():
                    self.files[key].result()
        except UserError as error:
            return str(error)
        return None

    def close(self) -> None:
        """Hold nothing any more."""
        while self.files:
            self.files.popitem()[1].add_done_callback(_close)
        self.wanted, self.held, self.settled = {}, {}, []


def _shards(windows: TokenWindows, first: int, stop: int) -> Shards:
    """Of the windows from `first` to before `stop`, with that of their last target; none of a local folder."""
    if windows.cache is None or first == stop:
        return {}
    tokens = first * windows.block_size, min(stop * windows.block_size, windows.num_tokens - 1)
    begin, end = (bisect.bisect_right(windows.starts, token) for token in tokens)
    shards = windows.manifest.splits[windows.split].shards[begin - 1 : end]
    return {(windows.cache, shard.name): None for shard in shards}


def _shards_of(windows: TokenWindows, numbers: list[int]) -> Shards:
    """Of the windows with these numbers, each with that of its last target."""
    assert windows.cache is not None, "those of a folder are there"
    firsts = np.array(numbers, dtype=np.int64)[:, None] * windows.block_size
    ends = np.searchsorted(windows.starts, firsts + [0, windows.block_size], side="right")
    shards = windows.manifest.splits[windows.split].shards
    # Each pair as one number, for `np.unique` takes many times as long for rows.
    base = len(windows.starts) + 1
    pairs = (divmod(pair, base) for pair in np.unique(ends @ [base, 1]).tolist())
    read = (shard for begin, end in pairs for shard in shards[begin - 1 : end])
    return {(windows.cache, shard.name): None for shard in read}


def _bytes(shards: Shards) -> int:
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
