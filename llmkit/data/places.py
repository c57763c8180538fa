"""Where the shards of several tasks come together: a folder that all tasks see, or a URL that fsspec can write to.

Both keep files under names such as `parts/00003/train_00000.bin`. In a folder a task works at its place and goes on
where it was killed. Behind a URL it works in a temporary folder, from which each shard is uploaded and removed when it
is full; what is uploaded counts for nothing until the task's record says so, and a task that was killed begins anew.
"""

import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath

from llmkit.data.files import file_system, reading
from llmkit.data.manifest import MANIFEST, Manifest, load_manifest, parse_manifest
from llmkit.data.shards import full_disk_is_user_error, working_alone
from llmkit.errors import UserError
from llmkit.files import write_whole

Finished = Callable[[Path], None]  # what is done with a shard that is full
PROBE = ".llmkit-can-write-here"


class LocalPlace:
    """A folder here, or on a file system that all machines share."""

    def __init__(self, directory: Path):
        self.directory = directory.absolute()
        self.name = self.directory.name

    def __str__(self) -> str:
        return str(self.directory)

    def size(self, name: str) -> int | None:
        """In bytes; None if there is no such file."""
        path = self.directory / name
        return path.stat().st_size if path.exists() else None

    def read(self, name: str) -> bytes:
        return (self.directory / name).read_bytes()

    def write(self, name: str, data: bytes) -> None:
        path = self.directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, data)

    def move(self, name: str, to: str) -> None:
        (self.directory / name).replace(self.directory / to)

    def remove(self, name: str) -> None:
        """A folder with all that is in it, if it is there."""
        shutil.rmtree(self.directory / name, ignore_errors=True)

    @contextmanager
    def working(self, name: str) -> Iterator[tuple[Path, Finished | None]]:
        """The folder in which the shards of a task are written, and what is to be done with each when it is full."""
        folder = self.directory / name
        with working_alone(folder), full_disk_is_user_error(folder):
            yield folder, None

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Keep other commands from working on the whole."""
        with working_alone(self.directory):
            yield

    def manifest(self) -> Manifest:
        """What the shards are; their sizes are checked."""
        return load_manifest(self.directory)


class RemotePlace:
    """A folder behind a URL. Nothing keeps two commands from writing to it at once.

    Raises:
        UserError: no such file system here, or one that is not written to.
    """

    def __init__(self, url: str):
        self.url = url.rstrip("/")
        self.fs, self.root = file_system(self.url)
        self.name = PurePosixPath(self.root).name
        with reading(self.url, "written"):
            self.fs.invalidate_cache()
        self.write(PROBE, b"")
        with reading(self.url, "written"):
            self.fs.rm_file(self._path(PROBE))

    def __str__(self) -> str:
        return self.url

    def _path(self, name: str) -> str:
        return f"{self.root}/{name}"

    def _put(self, name: str, put: Callable[[str], None]) -> None:
        path = self._path(name)
        with reading(self.url, "written"):
            try:
                put(path)
            except FileNotFoundError:
                if not path.startswith("/"):  # an object store, which has no folders: its bucket is missing
                    raise
                self.fs.makedirs(path.rpartition("/")[0], exist_ok=True)
                put(path)

    def size(self, name: str) -> int | None:
        """In bytes; None if there is no such file."""
        with reading(self.url):
            try:
                return int(self.fs.info(self._path(name))["size"])
            except FileNotFoundError:
                return None

    def read(self, name: str) -> bytes:
        with reading(self.url):
            return self.fs.cat_file(self._path(name))  # pyrefly: ignore[bad-return]  bytes, of one path

    def write(self, name: str, data: bytes) -> None:
        """Under another name first, so that nobody reads half of it."""
        self._put(f"{name}.tmp", lambda path: self.fs.pipe_file(path, data))
        self.move(f"{name}.tmp", name)

    def upload(self, file: Path, name: str) -> None:
        """Raises UserError if it did not arrive whole."""
        self._put(name, lambda path: self.fs.put_file(str(file), path))
        if (size := self.size(name)) != (expected := file.stat().st_size):
            raise UserError(f"{self.url}/{name}: {size} of {expected:,} bytes arrived: give the command again")

    def move(self, name: str, to: str) -> None:
        with reading(self.url, "written"):
            self.fs.mv(self._path(name), self._path(to))

    def remove(self, name: str) -> None:
        """A file, or a folder with all that is in it, if it is there."""
        with reading(self.url, "written"), suppress(FileNotFoundError):
            self.fs.rm(self._path(name), recursive=True)

    def names(self, folder: str = "") -> list[str]:
        """Of all files in a folder and below it."""
        with reading(self.url):
            base = f"{self.root}/{folder}".rstrip("/")
            return [str(path)[len(self.root) + 1 :] for path in self.fs.find(base)]

    @contextmanager
    def working(self, name: str) -> Iterator[tuple[Path, Finished | None]]:
        """A temporary folder, and what uploads a shard from it."""

        def upload(shard: Path) -> None:
            self.upload(shard, f"{name}/{shard.name}")
            shard.unlink()

        with tempfile.TemporaryDirectory(prefix="llmkit-shards-") as folder, full_disk_is_user_error(Path(folder)):
            yield Path(folder), upload

    @contextmanager
    def alone(self) -> Iterator[None]:
        """See what other processes have written."""
        with reading(self.url):
            self.fs.invalidate_cache()
        yield

    def manifest(self) -> Manifest:
        """What the shards are; they are not looked at."""
        return parse_manifest(self.read(MANIFEST), f"{self.url}/{MANIFEST}", None)


Place = LocalPlace | RemotePlace
