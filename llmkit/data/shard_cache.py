"""Shards at a URL, in a cache on this machine: fetched whole, and removed again when others need the room.

fsspec's caches and the Hub's know neither a bound in bytes, nor the manifest's checksums, nor what another process is
reading. The cache is a folder of files that all processes of a user share: `HF_HOME/llmkit/shards`, with a folder for
each manifest. A file has its name when it is whole. One process fetches it, under a lock, while the others wait.
Whoever holds a shard has a shared lock on its file, and a file is removed under an exclusive one, so the system itself
forgets what a killed process held.
"""

import fcntl
import os
import threading
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import FileIO
from pathlib import Path

import numpy as np
from filelock import FileLock

from llmkit.data import fetching
from llmkit.data.manifest import Manifest
from llmkit.data.shard_files import OpenFiles
from llmkit.files import checksum, sync

WHOLE, ROOM, PARTIAL = ".bin", ".room", ".partial"  # a shard; of one on its way the room that is kept, and what came
_at_a_time = threading.BoundedSemaphore(8)  # downloads of a process
_held: weakref.WeakSet[FileIO] = weakref.WeakSet()


def _close_in_child() -> None:
    """A DataLoader's worker would keep the locks, and the room, of what was held when it was forked."""
    for file in list(_held):
        file.close()


os.register_at_fork(after_in_child=_close_in_child)


class ShardCache:
    """The shards of one manifest.

    Args:
        manifest: of shards at a URL.
        limit: bytes of all shards in the cache, those of other manifests too.
    """

    def __init__(self, manifest: Manifest, limit: int):
        assert manifest.url is not None and manifest.directory is not None
        self.url, self.folder, self.limit = manifest.url, manifest.directory, limit
        self.itemsize = np.dtype(manifest.dtype).itemsize
        self.shards = {shard.name: shard for split in manifest.splits.values() for shard in split.shards}

    def size(self, name: str) -> int:
        """Bytes of a shard."""
        return self.shards[name].tokens * self.itemsize

    def hold(self, name: str) -> FileIO:
        """A shard's file, which stays in the cache as long as it is open.

        Raises:
            UserError: it cannot be fetched, or there is no room for it.
        """
        path, deadline = self.folder / name, time.monotonic() + fetching.PATIENCE
        while True:
            with suppress(FileNotFoundError):
                file = FileIO(path)
                fcntl.flock(file, fcntl.LOCK_SH)
                if os.fstat(file.fileno()).st_nlink:  # else it was removed before the lock was there
                    os.utime(file.fileno())
                    _held.add(file)
                    return file
                file.close()
            self._fetch(path, deadline)

    def _fetch(self, path: Path, deadline: float) -> None:
        url, partial = f"{self.url}/{path.name}", path.with_suffix(PARTIAL)

        def attempt() -> None:
            with self._room(path):
                fetching.download(url, partial)
                if problem := self._problem(partial, path.name):
                    raise OSError(problem)
                sync(partial)
                partial.replace(path)

        self.folder.mkdir(parents=True, exist_ok=True)
        with _at_a_time, FileLock(path.with_suffix(".lock")):
            if not path.exists():  # another process may have fetched it
                fetching.patiently(attempt, url, deadline)

    def _problem(self, path: Path, name: str) -> str | None:
        if (found := path.stat().st_size) != (size := self.size(name)):
            return f"{found:,} bytes came instead of {size:,}"
        return None if checksum(path) == self.shards[name].xxh3_64 else "what came has another checksum"

    @contextmanager
    def _room(self, path: Path) -> Iterator[None]:
        """Keep room for a shard, by a sparse file of its size; those are removed that nobody has held for longest."""
        room, size = path.with_suffix(ROOM), self.size(path.name)
        with FileLock(self.folder.parent / ".lock"):
            room.unlink(missing_ok=True)  # of a process that was killed
            files = []
            for file in self.folder.parent.glob("*/*"):
                with suppress(FileNotFoundError):
                    files += [(file.stat(), file)] if file.suffix in (WHOLE, ROOM) else []
            total = sum(stat.st_size for stat, _ in files)
            for stat, file in sorted(files, key=lambda found: found[0].st_mtime):
                if total + size > self.limit and _removed(file):
                    total -= stat.st_size
            if total + size > self.limit:
                used, limit = total / 1e9, self.limit / 1e9
                raise OSError(f"{used:.3g} GB of the shard cache are in use, and it takes up to {limit:.3g}")
            kept = room.open("wb")
            fcntl.flock(kept, fcntl.LOCK_SH)
            kept.truncate(size)
        with kept:
            try:
                yield
            finally:
                for file in (room, path.with_suffix(PARTIAL)):
                    file.unlink(missing_ok=True)


def _removed(file: Path) -> bool:
    """Remove a file that nobody holds."""
    with suppress(FileNotFoundError, BlockingIOError), file.open("rb") as opened:
        fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
        file.unlink()
        file.with_suffix(PARTIAL).unlink(missing_ok=True)
        return True
    return False


class CachedFiles(OpenFiles):
    """Opens shards of the cache, and fetches them if need be. They may be removed from the cache while they are open.

    That does no harm to who reads them, and what a DataLoader's worker has opened does not keep others from the room.
    A run itself holds what it needs (`ReadAhead`).
    """

    def __init__(self, cache: ShardCache, most: int):
        super().__init__(most)
        self.cache = cache

    def open(self, path: Path) -> FileIO:
        file = self.cache.hold(path.name)
        fcntl.flock(file, fcntl.LOCK_UN)
        _held.discard(file)
        return file
