"""Reading the files of shards while a run trains, when other processes, or the disk itself, may change them."""

import os
from io import FileIO
from pathlib import Path

import numpy as np

from llmkit.errors import UserError

MAX_OPEN = 256  # files of a split; the system lets a process have 1,024 in all


class DamagedShard(UserError):
    """A shard is not what its manifest says. The rank that found it says so, for only it may have read the place."""

    of_one_rank = True


class OpenFiles:
    """Files that are open for reading, `MAX_OPEN` or `most` of them. A copy for another process starts with none."""

    def __init__(self, most: int | None = None) -> None:
        self.most = most
        self.opened: dict[Path, FileIO] = {}

    def open(self, path: Path) -> FileIO:
        """The file, opened for reading."""
        return FileIO(path)

    def read(self, path: Path, start: int, size: int) -> bytes:
        """`size` bytes from the byte `start` on, or as many of them as there are."""
        file = self.opened.get(path)
        if file is None:
            if len(self.opened) >= (self.most or MAX_OPEN):
                self.opened.pop(next(iter(self.opened))).close()
            file = self.opened[path] = self.open(path)
        return os.pread(file.fileno(), size, start)

    def __getstate__(self) -> dict:
        return {**vars(self), "opened": {}}


class ShardFile:
    """The tokens of a shard, read from its file where they are wanted: `shard[start:stop]` is an array.

    They are not memory-mapped. If such a file is truncated under a run, or its disk fails, the kernel ends the process
    with SIGBUS, which Python cannot catch; a read that fails is an error that names the file. Nor does a read keep
    the file's pages in the process. A window of 1,025 tokens takes 3.5 microseconds so, and 1.5 where it is mapped
    (both from the system's cache, on an EPYC): a millisecond more in a step of half a million tokens.
    """

    def __init__(self, path: Path, dtype: np.dtype, tokens: int, files: OpenFiles):
        self.path, self.dtype, self.tokens, self.files = path, dtype, tokens, files

    def __len__(self) -> int:
        return self.tokens

    def __getitem__(self, place: slice) -> np.ndarray:
        """The tokens of a slice without a step.

        Raises:
            DamagedShard: the file is shorter than it was, is gone, or cannot be read.
        """
        start, stop, _ = place.indices(self.tokens)
        wanted = max(0, stop - start) * self.dtype.itemsize
        try:
            data = self.files.read(self.path, start * self.dtype.itemsize, wanted)
        except OSError as error:
            raise self._damaged(f"cannot be read: {error.strerror}") from error
        if len(data) < wanted:
            raise self._damaged(f"has become shorter than {stop * self.dtype.itemsize:,} bytes")
        return np.frombuffer(data, dtype=self.dtype)

    def _damaged(self, what: str) -> DamagedShard:
        return DamagedShard(
            f"{self.path} {what}: put the file back, or delete the folder and prepare the shards again, and resume "
            "from the last checkpoint"
        )
