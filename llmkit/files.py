"""Files that are whole or not there: atomic writes, checksums, a folder's record of them, and the lock that keeps a
folder to one process."""

import hashlib
import json
import os
from pathlib import Path

import filelock
import xxhash

from llmkit.errors import UserError

COMPLETE = "complete.json"
LOCK = ".lock"
PATIENCE = 30.0  # seconds: a killed launcher's ranks may still be saving

_held: dict[Path, filelock.BaseFileLock] = {}


def write_whole(path: Path, data: bytes) -> None:
    """Write a file in one step: it is there whole or not at all, after a power cut too."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    sync(path.parent)


def write_json(path: Path, fields: dict) -> None:
    """Write a JSON file in one step."""
    write_whole(path, json_bytes(fields))


def json_bytes(fields: dict) -> bytes:
    """What `write_json` writes."""
    return json.dumps(fields, indent=1).encode()


def sync(path: Path) -> None:
    """Wait until a file's contents, or a folder's names, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def checksum(path: Path) -> str:
    """The XXH3 hash of a file's contents, 64 bits, as shards have it."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, xxhash.xxh3_64).hexdigest()


def write_record(folder: Path, **facts: object) -> None:
    """Write `complete.json` into a folder: the size and the checksum of every file in it, and the given facts.

    Raises:
        OSError: the disk is full or gone.
    """
    files = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        sync(path)
        files[path.relative_to(folder).as_posix()] = [path.stat().st_size, checksum(path)]
    write_whole(folder / COMPLETE, _render({**facts, "files": files}))


def read_record(folder: Path) -> dict:
    """What `write_record` wrote into a folder.

    Raises:
        FileNotFoundError: it has no record.
        ValueError: its record is damaged.
    """
    try:
        raw = (folder / COMPLETE).read_bytes()
        record = json.loads(raw)["checkpoint"]
        if raw != _render(record):
            raise ValueError
    except FileNotFoundError:
        raise
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{COMPLETE} is damaged") from error
    return record


def _render(record: dict) -> bytes:
    """The record's only spelling, with its own checksum, so that no byte of it can change without being noticed."""
    text = json.dumps(record, sort_keys=True).encode()
    return json.dumps({"checkpoint": record, "xxh3_64": xxhash.xxh3_64_hexdigest(text)}, sort_keys=True).encode()


def changed_file(folder: Path, record: dict) -> str | None:
    """What has happened to the first file that is not as the folder's record has it, or None. Every byte is read."""
    for name, (size, expected) in record["files"].items():
        path = folder / name
        try:
            if path.stat().st_size != size:
                return f"{name} has {path.stat().st_size:,} bytes instead of {size:,}"
            if checksum(path) != expected:
                return f"{name} is damaged: its checksum is another"
        except FileNotFoundError:
            return f"{name} is missing"
        except OSError as error:
            return f"{name} cannot be read: {error.strerror}"
    return None


def hold_folder(folder: str | Path) -> None:
    """Keep a folder to this process until it ends, however it ends.

    Raises:
        UserError: another process has held it for `PATIENCE` seconds from now.
    """
    path = Path(folder).resolve() / LOCK
    if path in _held:
        return
    lock = filelock.FileLock(path)
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        print(f"another process is training in {folder}: waiting up to {PATIENCE:.0f} s for it to end", flush=True)
        try:
            lock.acquire(timeout=PATIENCE)
        except filelock.Timeout as error:
            raise UserError(
                f"another process is training in {folder}: end it, wait for it, or take another --output_dir"
            ) from error
    _held[path] = lock


def release_folder(folder: str | Path) -> None:
    """Let another process have a folder that this one holds."""
    if lock := _held.pop(Path(folder).resolve() / LOCK, None):
        lock.release()


def is_held(folder: str | Path) -> bool | None:
    """Whether a living process holds a folder; None where nothing tells."""
    path = Path(folder).resolve() / LOCK
    if path in _held:
        return True
    if not path.exists():
        return None
    lock = filelock.FileLock(path)
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        return True
    except OSError:  # a folder that may only be read
        return None
    lock.release()
    return False
