"""Files of text, on this machine or elsewhere: which ones a path, folder, glob or URL names, and how they are opened.

A file is a string here: an absolute path, or a URL of any file system that fsspec knows (`s3://`, `gs://`, `https://`).
Files on this machine are listed with `glob`: fsspec's walk took twice as long on 20,000 files, and `*` would match
hidden files.
"""

import codecs
import glob
import hashlib
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

import fsspec
from fsspec.compression import compr
from fsspec.core import OpenFile
from fsspec.implementations.local import LocalFileSystem
from fsspec.utils import infer_compression

from llmkit.errors import UserError

# What file systems tell of a file that changes with its contents, under the names of HTTP, S3, GCS and others.
_VERSION = {"size", "etag", "last-modified", "lastmodified", "mtime", "created", "updated", "md5hash", "content-md5"}
_BLOCK = 1 << 14
_MAX_BLOCKS = 1 << 14  # 256 MiB over all files


def find_files(patterns: Sequence[str]) -> tuple[list[str], list[str]]:
    """The files that paths, folders, globs and URLs name, each once and sorted; and remarks for the user, if any.

    A folder stands for all files below it but the hidden ones. Of these, what is empty or not text is left out with a
    remark; a file that was named, or found by a glob, has to be text.

    Raises:
        UserError: nothing there, or a file that is empty, binary or cannot be read.
    """
    found: list[str] = []
    left_out: list[str] = []
    for pattern in patterns:
        if not pattern.strip() or "\0" in pattern:
            raise UserError(f"text_files: {pattern!r} is no path: give a file, a folder, a glob or a URL")
        files, is_folder = _remote_files(pattern) if is_remote(pattern) else _local_files(pattern, "text_files")
        problems = {file: problem for file in files if (problem := _problem(file))}
        if problems and not is_folder:
            file, problem = next(iter(problems.items()))
            raise UserError(f"{file}: {problem}: leave it out")
        if len(problems) == len(files):
            raise UserError(f"text_files: there is no text in {pattern}: check the path (in {os.getcwd()})")
        left_out += problems
        found += [file for file in files if file not in problems]
    remarks = []
    if left_out:
        names = ", ".join(map(base_name, left_out[:3])) + (", ..." if len(left_out) > 3 else "")
        remarks.append(f"{len(left_out):,} files are not text and were left out: {names}")
    files = sorted(set(found))
    if len(files) < len(found):
        remarks.append(f"{len(found) - len(files):,} files were named more than once and are read once")
    return files, remarks


def check_there(patterns: Sequence[str], field: str = "text_files") -> None:
    """Refuse files on this machine that are not there, without opening any.

    Args:
        field: what the patterns were given as.

    Raises:
        UserError: the line names the first one.
    """
    for pattern in patterns:
        if not is_remote(pattern) and not os.path.isdir(os.path.expanduser(pattern)):
            _local_files(pattern, field)


def is_remote(name: str) -> bool:
    """Whether a path or pattern is a URL."""
    return "://" in name


def base_name(file: str) -> str:
    """The last part of a path or URL, without a query, which may hold a key to the file."""
    return PurePosixPath(re.split(r"[?#]", file)[0] if is_remote(file) else file).name


def collection_name(patterns: Sequence[str], files: Sequence[str]) -> str:
    """What to call these files: the file's name, or the folder's, or how many they are.

    Never where they are, nor the name of a home folder: that is nobody else's business.
    """
    if len(files) == 1:
        return base_name(files[0])
    if len(patterns) == 1:
        fixed = re.split(r"/?[^/]*[*?\[]", os.path.expanduser(patterns[0]), maxsplit=1)[0].rstrip("/")
        name = base_name(fixed)
        if name not in ("", ".", "..") and Path(fixed) != Path.home():
            return f"{name} ({len(files):,} files)"
    return f"{len(files):,} files"


def table_kind(file: str) -> str | None:
    """ "json" or "parquet" for a table of documents, by the file's name; None for a text."""
    suffixes = [suffix.lower() for suffix in PurePosixPath(base_name(file)).suffixes[-2:]]
    if suffixes and suffixes[-1] in (".gz", ".zst", ".bz2", ".xz"):
        suffixes.pop()
    return {".jsonl": "json", ".json": "json", ".parquet": "parquet"}.get(suffixes[-1] if suffixes else "")


def open_file(file: str) -> OpenFile:
    """The file's bytes, decompressed by its suffix; a context manager, to be entered within `reading`."""
    compression = infer_compression(base_name(file))
    if base_name(file).lower().endswith(".zst") and "zstd" not in compr:
        raise UserError(f"{file}: reading .zst needs the zstandard package: pip install zstandard")
    return OpenFile(*file_system(file), compression=compression)


@contextmanager
def reading(file: str, what: str = "read") -> Iterator[None]:
    """Turn whatever file systems, decompressors and decoders raise into one line that names the file."""
    try:
        yield
    except (UserError, MemoryError):
        raise
    except Exception as error:  # each library has its own, with no common base
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error or type(error).__name__
        raise UserError(f"{file}: cannot be {what}: {reason}") from error


def file_size(file: str) -> int:
    """Its size in bytes, as it is stored."""
    with reading(file):
        return int(_info(file).get("size") or 0) if is_remote(file) else os.path.getsize(file)


def content_hash(files: Sequence[str]) -> str:
    """A hash of files on this machine: their names, relative to their common folder, sizes and contents.

    Up to 256 MiB of contents are read, in blocks evenly spread over each file. A smaller corpus in files of about
    the same size is read whole; in a larger one an edit that keeps a file's size can go unnoticed.
    """
    if not files:
        return ""
    root = os.path.commonpath([os.path.dirname(file) for file in files])
    blocks = max(1, _MAX_BLOCKS // len(files))
    digest = hashlib.sha256()
    for name in files:
        size = os.path.getsize(name)
        digest.update(f"{Path(name).relative_to(root).as_posix()}\0{size}\0".encode())
        with open(name, "rb") as file:
            for offset in range(0, size, max(_BLOCK, -(-size // blocks))):
                file.seek(offset)
                digest.update(file.read(_BLOCK))
    return digest.hexdigest()


def remote_version(file: str) -> list:
    """What tells one version of a remote file from the next, as far as its server says."""
    with reading(file):
        told = _info(file).items()
    return [base_name(file), *sorted(f"{key}={value}" for key, value in told if key.lower() in _VERSION)]


def file_system(file: str, **options) -> tuple[fsspec.AbstractFileSystem, str]:
    """What reads a file, and the file's name there.

    Args:
        options: of the file system.
    """
    if not is_remote(file):
        return LocalFileSystem(), file
    try:
        return fsspec.core.url_to_fs(file, **options)
    except (ImportError, ValueError) as error:  # a file system that is not installed, or does not exist
        raise UserError(f"{file}: {error}") from error


def _info(url: str) -> dict:
    fs, path = file_system(url)
    return fs.info(path)


def _local_files(pattern: str, field: str) -> tuple[list[str], bool]:
    path = os.path.abspath(os.path.expanduser(pattern))
    is_folder = os.path.isdir(path)
    if is_folder:
        matches = glob.glob(os.path.join(glob.escape(path), "**"), recursive=True)
    else:
        # A name that happens to look like a glob, a[1].txt, is the file of that name if there is one.
        matches = [path] if os.path.isfile(path) else glob.glob(path, recursive=True)
    files = [os.path.abspath(match) for match in matches if os.path.isfile(match)]
    if not files:
        problem = "there is no file" if is_folder or not glob.has_magic(pattern) else "no file matches"
        where = "in" if is_folder else ""
        raise UserError(f"{field}: {problem} {where} {pattern}: check the path, it is relative to {os.getcwd()}")
    return files, is_folder


def _remote_files(pattern: str) -> tuple[list[str], bool]:
    with reading(pattern):
        fs, path = file_system(pattern)
        if not pattern.endswith("/") and fs.isfile(path):
            return [fs.unstrip_protocol(path)], False
        is_folder = not glob.has_magic(path)
        matches = fs.find(path) if is_folder else [match for match in fs.glob(path) if fs.isfile(match)]
        if not matches:
            raise UserError(f"text_files: there is no file at {pattern}: check the address")
        return [fs.unstrip_protocol(str(match)) for match in matches], is_folder


def _problem(file: str) -> str | None:
    """What keeps a file from being text, as far as its size and, on this machine, its first bytes tell."""
    if file_size(file) == 0:
        return "the file is empty"
    if is_remote(file):
        return None
    with reading(file), open(file, "rb") as opened:
        head = opened.read(4096)
    if head == codecs.BOM_UTF8:
        return "the file is empty"
    if table_kind(file) or infer_compression(file):
        return None
    if b"\0" in head:
        return f"binary, not text (a zero byte at offset {head.index(0)})"
    try:
        codecs.getincrementaldecoder("utf-8")().decode(head)
    except UnicodeDecodeError as error:
        return f"not UTF-8 text (byte offset {error.start}), which other encodings have to be converted to"
    return None
