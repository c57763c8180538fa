"""The order in which a run draws the windows of a source: pass after pass, each shuffled by the seed.

Which window stands at a place of the run is a function of the seed and the place, so nothing is replayed when a run is
resumed. accelerate gives rank r of W the batches r, r + W, ..., so the windows of an optimizer step are the same at
any number of ranks.
"""

import bisect
from collections.abc import Iterable, Iterator, Sequence, Sized
from typing import Protocol

import numpy as np
from torch.utils.data import Sampler


class WindowOrder:
    """An endless run of passes, in each of which every window comes once.

    A pass goes through groups of consecutive windows, one group after another, and the windows of a group are shuffled
    by (seed, pass, group). So a pass reads one group of the stream at a time, and one group's order is in memory, with
    4 bytes a window. With a single group, a pass is a permutation of all windows.

    The order of the groups is seeded as well. With `first_in_order` the first pass takes them as they lie in the
    stream. Its places up to `bounds[g + 1]` then depend on `bounds[: g + 2]` alone, so `bounds` may be a list that
    still grows, as long as no place beyond its last entry is asked for.

    Args:
        bounds: the first window of each group, and the number of windows in all.
        first_in_order: whether the first pass takes the groups in the stream's order.
    """

    def __init__(self, bounds: Sequence[int], seed: int, first_in_order: bool = False):
        assert bounds[-1] > 0, "an order without windows never fills a batch"
        self.bounds, self.seed, self.first_in_order = bounds, seed, first_in_order
        self._groups: tuple[int, np.ndarray, np.ndarray] | None = None  # a pass: its groups, and where each begins
        self._last: tuple[int, int, np.ndarray] | None = None  # a pass, a group and its order

    @property
    def num_windows(self) -> int:
        """Windows in one pass."""
        return self.bounds[-1]

    def windows(self, start: int, stop: int) -> list[int]:
        """The windows from place `start` to before `stop` of the whole run's order."""
        found: list[int] = []
        while start < stop:
            number, group, begin = self.group_at(start)
            found += self._shuffled(number, group)[start - begin : stop - begin].tolist()
            start = begin + self.bounds[group + 1] - self.bounds[group]
        return found

    def group_at(self, place: int) -> tuple[int, int, int]:
        """The pass and the group that a place of the order belongs to, and the place where this group begins."""
        number, within = divmod(place, self.num_windows)
        if number == 0 and self.first_in_order:
            group = bisect.bisect_right(self.bounds, within) - 1
            return 0, group, self.bounds[group]
        groups, begins = self._groups_of(number)
        index = int(np.searchsorted(begins, within, side="right")) - 1
        return number, int(groups[index]), number * self.num_windows + int(begins[index])

    def _groups_of(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        if self._groups is None or self._groups[0] != number:
            sizes = np.diff(self.bounds)
            # A group's own seed has its number in the last place, and no group has this one.
            groups = np.random.default_rng([self.seed, number, len(sizes)]).permutation(len(sizes))
            self._groups = number, groups, np.cumsum(sizes[groups]) - sizes[groups]
        return self._groups[1:]

    def _shuffled(self, number: int, group: int) -> np.ndarray:
        # The last one is kept, for a mixture draws a few windows at a time.
        if self._last is None or self._last[:2] != (number, group):
            self._last = None  # so that only one is in memory
            # Shuffled in place: `permutation(n)` would hold 8 bytes a window. 78 million took 6.0 s, on one core of an
            # EPYC.
            order = np.arange(self.bounds[group], self.bounds[group + 1], dtype=np.uint32)
            np.random.default_rng([self.seed, number, group]).shuffle(order)
            self._last = number, group, order
        return self._last[2]


class BatchSizes(Sized, Iterable[int], Protocol):
    """Sizes of batches, in their order."""


class WindowBatchSampler(Sampler[list[int]]):
    """Batches of window numbers; a batch may lie across two groups, or two passes.

    Args:
        batch_sizes: windows of each batch, over all ranks and the whole run, after which the sampler ends.

    Attributes:
        skipped: the first batches that a resumed run does not want; accelerate goes through them, and they are empty.
    """

    drop_last = False  # read by accelerate's BatchSamplerShard, which lets batches without a `batch_size` vary
    skipped = 0

    def __init__(self, order: WindowOrder, batch_sizes: BatchSizes):
        self.orders, self.batch_sizes = [order], batch_sizes

    def __len__(self) -> int:
        return len(self.batch_sizes)

    def __iter__(self) -> Iterator[list[int]]:
        start = 0
        for number, size in enumerate(self.batch_sizes):
            yield [] if number < self.skipped else self.windows(start, start + size)
            start += size

    def windows(self, start: int, stop: int) -> list[int]:
        """The windows from place `start` to before `stop` of the whole run's order."""
        return self.orders[0].windows(start, stop)
