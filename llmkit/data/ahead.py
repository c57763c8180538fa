"""Windows over shards that are still being written: `prepare: ahead`.

The first pass takes the groups of shards as they lie in the stream, so what a step is trained on depends on the seed
and the step alone, and not on how fast the text is tokenized. From the second pass on the groups are shuffled, too.
What is held out is fixed with the first group: the first shard of the validation split, which is closed with it.
"""

import bisect
import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from llmkit.data.manifest import JOURNAL, MANIFEST, SPLITS, Manifest, Shard, Split, load_manifest
from llmkit.data.order import BatchSizes, WindowBatchSampler, WindowOrder
from llmkit.data.preparation import check_settings
from llmkit.data.shard_files import ShardFile
from llmkit.data.windows import TokenWindows

if TYPE_CHECKING:
    from llmkit.data.prepare_ahead import PreparingProcess

LOOK = 0.5  # seconds between two looks at the journal


class AheadWindows(TokenWindows):
    """The windows of the training split of a folder to which shards may still be added, by groups of them.

    A window belongs to the group with its last token, so that a group is complete when its shards are.

    Args:
        first: the manifest of the first group (`first_group`).
        shard_group: shards of a group.
        expected_tokens: of the whole split, as far as that can be known.
        child: the process that adds them, if it is this one's.

    Attributes:
        complete: whether all shards are there, after the last look.
    """

    def __init__(
        self,
        first: Manifest,
        block_size: int,
        shard_group: int,
        expected_tokens: int | None = None,
        child: "PreparingProcess | None" = None,
    ):
        super().__init__(first, "train", block_size, shard_group)
        assert first.directory is not None and isinstance(self.shards[0], ShardFile), "shards in files"
        self.directory, self.files = first.directory, self.shards[0].files
        self.known = list(first.splits["train"].shards)
        self.expected_tokens, self.child, self.group = expected_tokens, child, shard_group
        self.bounds = [0, self.num_windows]
        self.complete = False
        self.look()

    def __getstate__(self) -> dict:
        return self.__dict__ | {"child": None}  # a worker of a DataLoader has none

    def look(self) -> None:
        """Take in the groups that have become whole."""
        if self.complete:
            return
        shards, complete = finished_shards(self.directory)["train"], (self.directory / MANIFEST).exists()
        if complete:
            shards = load_manifest(self.directory).splits["train"].shards
        whole = len(shards) if complete else len(shards) // self.group * self.group
        for number in range(len(self.known), whole):
            shard = shards[number]
            self.known.append(shard)
            file = ShardFile(self.directory / shard.name, self.dtype, shard.tokens, self.files)
            self.shards = [*self.shards, file]
            self.starts.append(self.starts[-1] + shard.tokens)
            if (number + 1) % self.group == 0 or number + 1 == whole:
                self.bounds.append(max(0, self.starts[-1] - 1) // self.block_size)
        self.num_tokens, self.num_windows, self.complete = self.starts[-1], self.bounds[-1], complete

    def __getitems__(self, indices: Sequence[int]):
        if max(indices, default=-1) >= self.num_windows:  # in a worker, which has not looked since it was started
            self.look()
        return super().__getitems__(indices)

    def verify(self) -> None:
        """Read every shard that is there, and compare its checksum."""
        replace(self.manifest, splits={**self.manifest.splits, "train": Split.of(self.known)}).verify()

    def order(self, seed: int) -> WindowOrder:
        """The order in which a run draws the windows."""
        return _OrderAhead(self, seed)

    def sampler(self, batches: BatchSizes, seed: int) -> WindowBatchSampler:
        """The batches of a run. Who asks for one has seen to it that its groups are whole."""
        return WindowBatchSampler(self.order(seed), batches)


class _OrderAhead(WindowOrder):
    def __init__(self, windows: AheadWindows, seed: int):
        super().__init__(windows.bounds, seed, first_in_order=True)
        self.ahead = windows

    def windows(self, start: int, stop: int) -> list[int]:
        assert self.ahead.complete or stop <= self.bounds[-1], "shards that are not there yet"
        return super().windows(start, stop)


class TokenizedAhead:
    """What a run on `AheadWindows` waits for: as `ReadAhead`, which is for shards at URLs.

    Args:
        total: windows that are drawn in the whole run.
    """

    why = "tokenizing is slower than training"

    def __init__(self, windows: AheadWindows, total: int):
        self.windows, self.total = windows, total
        self.wanted = 0  # windows, counted from the beginning
        self.whole: float = 0  # of these, those of groups that have been waited for, which are whole on all ranks

    def want(self, places: Sequence[tuple[int, int]]) -> bool:
        """Ask for the windows at these places. Returns whether `wait` has to be called, the same on all ranks."""
        ((_, self.wanted),) = places
        return self.wanted > self.whole

    def wait(self) -> bool:
        """Whether what is wanted is here; if not, some time has passed."""
        self.windows.look()
        if not self._has(self.wanted):
            time.sleep(LOOK)
            return False
        bounds = [*self.windows.bounds, math.inf]  # beyond the last one all is there
        self.whole = bounds[bisect.bisect_left(bounds, self.wanted)]
        return True

    def problem(self) -> str | None:
        """What keeps this rank from getting all windows of the run."""
        child = self.windows.child
        if self._has(self.total) or child is None or (problem := child.problem()) is None:
            return None
        self.windows.look()  # it may have made enough before
        return None if self._has(self.total) else problem

    def close(self) -> None:
        """Leave what is still being tokenized as it is; it can go on."""
        if self.windows.child:
            self.windows.child.stop()

    def _has(self, count: int) -> bool:
        return self.windows.complete or len(self.windows) >= count


def first_group(manifest: Manifest, shard_group: int) -> Manifest:
    """The first shards to train on, and what was held out with the first of them: what a run ahead starts with."""
    counts = {"train": shard_group, "validation": 1}
    splits = {split: Split.of(manifest.splits[split].shards[:count]) for split, count in counts.items()}
    return replace(manifest, splits=splits)


def manifest_of_run(manifest: Manifest, data: Mapping) -> Manifest:
    """Of a folder's shards, those that a run with this record has started with: all, or the first group."""
    return first_group(manifest, data["shard_group"]) if data.get("prepare") == "ahead" else manifest


def finished_shards(directory: Path, settings: Mapping | None = None) -> dict[str, list[Shard]]:
    """The shards of each split that the journal calls finished, and that have their names.

    Raises:
        UserError: they were made with other settings.
    """
    try:
        journal = json.loads((directory / JOURNAL).read_text(encoding="utf-8"))
    except FileNotFoundError:  # there is none yet, or all is done
        return {split: [] for split in SPLITS}
    if settings is not None:
        check_settings(directory, journal["settings"], dict(settings))
    found: dict[str, list[Shard]] = {}
    for split in SPLITS:
        shards = [Shard(**shard) for shard in journal["shards"][split][:-1]]
        present = [(directory / shard.name).exists() for shard in shards]
        found[split] = shards[: present.index(False) if False in present else None]
    return found
