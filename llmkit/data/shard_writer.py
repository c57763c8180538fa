"""Writing the shards of one split, so that a run that was killed can go on with them.

A shard is called `<name>.partial` until it is full and a journal says so (see `shards.py`).
"""

import os
from contextlib import suppress
from pathlib import Path

import numpy as np
import xxhash

from llmkit.data.manifest import SPLITS, Shard
from llmkit.errors import UserError


class ShardWriter:
    """The shards of one split. The last one is open, and called `<name>.partial`."""

    def __init__(self, directory: Path, split: str, dtype: np.dtype, shards: list[Shard]):
        """Go on from the shards of a journal (or from one empty shard), and give the finished ones their names."""
        self.directory, self.split, self.dtype, self.shards = directory, split, dtype, shards
        for shard in self.finished_shards:
            partial = self._partial(shard)
            if partial.exists():  # killed between the journal and the new name
                partial.replace(directory / shard.name)
            shard.check_file(directory, dtype)
        self._open()

    @property
    def finished_shards(self) -> list[Shard]:
        return self.shards[:-1]

    @property
    def open_shard(self) -> Shard:
        return self.shards[-1]

    def _partial(self, shard: Shard) -> Path:
        return self.directory / f"{shard.name}.partial"

    def _open(self) -> None:
        path, size = self._partial(self.open_shard), self.open_shard.tokens * self.dtype.itemsize
        self.checksum = xxhash.xxh3_64()
        if size:
            os.truncate(path, size)
            with path.open("rb") as file:
                while chunk := file.read(1 << 24):
                    self.checksum.update(chunk)
            if self.checksum.hexdigest() != self.open_shard.xxh3_64:
                raise UserError(f"{path} is damaged: delete the folder and prepare the shards again")
        self.file = path.open("ab" if size else "wb", buffering=1 << 20)

    def append(self, ids: np.ndarray) -> None:
        self.file.write(ids.data)
        self.checksum.update(ids.data)
        self.open_shard.tokens += len(ids)

    def flush(self) -> None:
        self.file.flush()
        os.fsync(self.file.fileno())
        self.open_shard.xxh3_64 = self.checksum.hexdigest()

    def close_shard(self) -> tuple[Path, Path]:
        """Open the next shard. Returns the full one's present name and the name that it has earned."""
        self.flush()
        self.file.close()
        full = self.open_shard
        self.shards.append(Shard(f"{self.split}_{len(self.shards):05d}.bin"))
        self._open()
        return self._partial(full), self.directory / full.name

    def close(self) -> None:
        with suppress(OSError):  # on a full disk the last buffer does not go out, and nobody will need it
            self.file.close()


def partial_files(directory: Path) -> list[Path]:
    """What a preparation leaves behind besides finished shards and its journal."""
    return [path for split in SPLITS for path in directory.glob(f"{split}_*.partial")] + list(directory.glob("*.tmp"))
