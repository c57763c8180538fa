"""Where text comes from: text files, JSONL, Parquet, any Hub dataset, or the embedded corpus.

A corpus is a sequence of documents in a fixed order. Empty documents (no character at all) are not part of it.
"""

import codecs
import glob
import hashlib
import itertools
import json
import logging
import os
import platform
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path

from llmkit.data.sample_data import stdlib_sources
from llmkit.errors import UserError


class Corpus(ABC):
    """A sequence of documents; `open_corpus` makes one."""

    description: str

    @abstractmethod
    def documents(self, skip: int = 0) -> Iterator[str]:
        """The documents, in the same order each time, without the first `skip` ones.

        Raises:
            UserError: while iterating, for a file that cannot be read; the line names it.
        """

    @abstractmethod
    def num_bytes(self) -> int | None:
        """UTF-8 bytes of text: exact for text files, else an estimate, or None where only reading all would tell."""

    @abstractmethod
    def fingerprint(self) -> str:
        """A hash that changes when the documents do, and not when their folder is moved or copied."""


def open_corpus(
    text_files: list[str] | None = None,
    dataset_name: str | None = None,
    dataset_config: str | None = None,
    dataset_split: str = "train",
    text_column: str = "text",
    streaming: bool = False,
) -> Corpus:
    """Open a corpus and check what is cheap to check, so that a mistake shows before anything is written.

    With neither files nor a dataset it is the embedded corpus, the standard library's own sources.

    Args:
        text_files: paths or globs (`books/*.txt`, `data/**/*.jsonl`). `.jsonl`, `.json` (compressed as well) and
            `.parquet` hold one document a row, in `text_column`; any other file is UTF-8 text, one document.
        dataset_name: a dataset's name on the Hub, or a local folder; with `dataset_config` and `dataset_split`.
        text_column: the column of a table that holds the text.
        streaming: read a dataset while it downloads, instead of storing it first.

    Raises:
        UserError: nothing there, an empty or binary file, no such column, a column that is not text, no documents.
    """
    if text_files and dataset_name:
        raise UserError("text_files and dataset_name are both set: set one of them")
    if text_files:
        return FileCorpus(_expand(text_files), text_column, _without_folders(text_files))
    if dataset_name:
        return DatasetCorpus(dataset_name, dataset_config, dataset_split, text_column, streaming)
    sources = stdlib_sources()
    if not sources:
        raise UserError("this Python comes without its standard library's sources: set text_files or dataset_name")
    version = ".".join(platform.python_version_tuple()[:2])
    return FileCorpus(sources, text_column, f"the Python {version} standard library's sources")


class FileCorpus(Corpus):
    """Local files, in sorted order."""

    def __init__(self, files: list[Path], text_column: str, name: str):
        self.files = files
        self.text_column = text_column
        self.description = name if len(files) == 1 else f"{name} ({len(files):,} files)"
        for path in files:
            _check_start(path)
        # The first rows of one table: their column and its type are what people get wrong.
        table = next(filter(_table_kind, files), None)
        if table and next(self._documents([table]), None) is None and next(self.documents(), None) is None:
            raise UserError(f"{name}: no documents, for {text_column!r} is empty in every row")

    def documents(self, skip: int = 0) -> Iterator[str]:
        # A text file is one document: up to the first table, skipping needs no reading.
        texts = sum(1 for _ in itertools.takewhile(lambda path: _table_kind(path) is None, self.files))
        unread = min(skip, texts)
        return itertools.islice(self._documents(self.files[unread:]), skip - unread, None)

    def _documents(self, files: list[Path]) -> Iterator[str]:
        for path in files:
            yield from _read_table(path, self.text_column) if _table_kind(path) else [_read_text(path)]

    def num_bytes(self) -> int:
        return sum(_text_bytes(path, self.text_column) for path in self.files)

    def fingerprint(self) -> str:
        column = self.text_column if any(map(_table_kind, self.files)) else None
        return _hash(column, _content_hash(self.files))


class DatasetCorpus(Corpus):
    """One split of a dataset that `datasets.load_dataset` can read, on the Hub or in a local folder."""

    def __init__(self, name: str, config: str | None, split: str, text_column: str, streaming: bool):
        from datasets import load_dataset_builder
        from datasets.exceptions import DatasetsError

        self.name, self.config, self.split = name, config, split
        self.text_column = text_column
        self.streaming = streaming
        shown = Path(name).name if os.path.isdir(name) else name
        self.description = f"dataset {shown}{f' ({config})' if config else ''}, split {split}"
        try:
            self._builder = load_dataset_builder(name, config)
            self._stream = self._builder.as_streaming_dataset(split=split)
        except (DatasetsError, ValueError, OSError) as error:
            raise UserError(f"dataset {name}: {error}") from error
        # The first rows, from the stream even if all is downloaded later, so that a wrong column shows before that.
        if next(self._texts(self._stream), None) is None:
            raise UserError(f"{self.description}: no documents, for {text_column!r} is empty in every row")
        files = self._builder.config.data_files or {}
        self._files = [str(file) for file in files.get(split, [])]
        self._is_local = bool(self._files) and all(map(os.path.exists, self._files))

    def _texts(self, dataset) -> Iterator[str]:
        return _column(dataset, self.text_column, f"dataset {self.name}")

    def documents(self, skip: int = 0) -> Iterator[str]:
        if self.streaming:
            return itertools.islice(self._texts(self._stream), skip, None)
        self._builder.download_and_prepare()
        return itertools.islice(self._texts(self._builder.as_dataset(split=self.split)), skip, None)

    def num_bytes(self) -> int | None:
        paths = [Path(file) for file in self._files]
        if self._is_local and all(map(_table_kind, paths)):
            return sum(_text_bytes(path, self.text_column) for path in paths)
        splits = self._builder.info.splits or {}
        if self.split not in splits:
            return None
        # The Hub counts the rows; how long one is, the first thousand tell.
        sample = list(itertools.islice(self._texts(self._stream), 1000))
        return sum(len(text.encode()) for text in sample) * splits[self.split].num_examples // len(sample)

    def fingerprint(self) -> str:
        # A file on the Hub has the commit in its address, hf://datasets/name@commit/path.
        files = _content_hash([Path(file) for file in self._files]) if self._is_local else [self.name, *self._files]
        return _hash(self.config, self.split, self.text_column, files)


# ------------------------------------------------------------------ finding and checking files


def _expand(patterns: list[str]) -> list[Path]:
    """The files that paths and globs stand for, each once, sorted."""
    files: set[str] = set()
    for pattern in patterns:
        path = os.path.expanduser(pattern)
        if os.path.isdir(path):
            example = os.path.join(pattern, "*.txt")
            raise UserError(f"text_files: {pattern} is a folder: name the files in it, such as '{example}'")
        # A name that happens to look like a glob, a[1].txt, is the file of that name if there is one.
        matches = [path] if os.path.isfile(path) else glob.glob(path, recursive=True)
        found = [os.path.abspath(match) for match in matches if os.path.isfile(match)]
        if not found:
            problem = "no file matches" if glob.has_magic(pattern) else "there is no file"
            raise UserError(f"text_files: {problem} {pattern}: check the path, it is relative to {os.getcwd()}")
        files.update(found)
    return [Path(path) for path in sorted(files)]


def _without_folders(patterns: list[str]) -> str:
    """The patterns for a description, without folders: where a user keeps files is nobody else's business."""
    names = list(dict.fromkeys(os.path.basename(pattern) for pattern in patterns))
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def _table_kind(path: Path) -> str | None:
    """Which reader of `datasets` the suffix asks for, "json" or "parquet"; None for a text file."""
    suffixes = [suffix.lower() for suffix in path.suffixes[-2:]]
    if suffixes and suffixes[-1] in (".gz", ".zst", ".bz2", ".xz"):
        suffixes.pop()
    last = suffixes[-1] if suffixes else ""
    return {".jsonl": "json", ".json": "json", ".parquet": "parquet"}.get(last)


def _check_start(path: Path) -> None:
    try:
        with path.open("rb") as file:
            head = file.read(4096)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error
    if head in (b"", codecs.BOM_UTF8):
        raise UserError(f"{path}: the file is empty: leave it out")
    if _table_kind(path):
        return
    if b"\0" in head:
        raise UserError(f"{path}: binary, not text (a zero byte at offset {head.index(0)}): leave it out")
    try:
        codecs.getincrementaldecoder("utf-8")().decode(head)
    except UnicodeDecodeError as error:
        raise _not_utf8(path, error) from error


def _not_utf8(path: Path, error: UnicodeDecodeError) -> UserError:
    return UserError(f"{path}: not UTF-8 text (byte offset {error.start}): convert it to UTF-8 or leave it out")


# ------------------------------------------------------------------ reading them


def _read_text(path: Path) -> str:
    try:
        return path.read_bytes().decode().removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise _not_utf8(path, error) from error


def _read_table(path: Path, text_column: str) -> Iterator[str]:
    from datasets import load_dataset_builder
    from fsspec.compression import compr

    if path.suffix.lower() == ".zst" and "zstd" not in compr:
        raise UserError(f"{path}: reading .zst needs the zstandard package: pip install zstandard")
    kind = _table_kind(path)
    # The reader logs a damaged file besides raising an error for it; the error is enough.
    logging.getLogger(f"datasets.packaged_modules.{kind}.{kind}").setLevel(logging.CRITICAL)
    try:
        rows = load_dataset_builder(kind, data_files=[glob.escape(str(path))]).as_streaming_dataset(split="train")
    except (ValueError, OSError, EOFError) as error:  # from Arrow, or from the decompressor
        raise UserError(f"{path}: cannot be read as {kind}: {error}") from error
    yield from _column(rows, text_column, str(path))


def _column(rows, text_column: str, source: str) -> Iterator[str]:
    """The texts in one column of a `datasets` dataset, without the empty ones."""
    import pyarrow as pa
    from datasets.exceptions import DatasetsError

    try:
        for batch in rows.with_format("arrow").iter(batch_size=1000):
            if text_column not in batch.column_names:
                columns = ", ".join(batch.column_names)
                raise UserError(f"{source}: no column {text_column!r}: set text_column to one of: {columns}")
            kind = batch.schema.field(text_column).type
            # A batch without any text has a column of type null, which is no mistake.
            if not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_null(kind)):
                columns = ", ".join(batch.column_names)
                raise UserError(
                    f"{source}: column {text_column!r} holds {kind}, not text: set text_column to one of: {columns}"
                )
            yield from filter(None, batch.column(text_column).to_pylist())
    except UserError:
        raise
    except (DatasetsError, ValueError, EOFError) as error:  # Arrow's and Unicode's errors are ValueErrors
        raise UserError(f"{source}: cannot be read: {error}") from error


# ------------------------------------------------------------------ measuring them


def _text_bytes(path: Path, text_column: str) -> int:
    match _table_kind(path):
        case "parquet":
            return _parquet_text_bytes(path, text_column)
        case "json":
            return _json_text_bytes(path, text_column)
    return path.stat().st_size


def _parquet_text_bytes(path: Path, text_column: str) -> int:
    import pyarrow.parquet as pq

    metadata = pq.read_metadata(path)
    groups = [metadata.row_group(i) for i in range(metadata.num_row_groups)]
    columns = [group.column(i) for group in groups for i in range(group.num_columns)]
    return sum(column.total_uncompressed_size for column in columns if column.path_in_schema == text_column)


def _json_text_bytes(path: Path, text_column: str) -> int:
    """Estimate from the start: how far the file is compressed, and how much of its lines is text."""
    from fsspec.compression import compr
    from fsspec.utils import infer_compression

    with path.open("rb") as raw, compr[infer_compression(str(path))](raw, mode="rb") as content:
        sample = content.read(_MIB)
        unpacked = len(sample)
        while raw.tell() < _MIB and (more := content.read(_MIB)):
            unpacked += len(more)
        size = path.stat().st_size * unpacked // raw.tell()
    lines = sample.splitlines(keepends=True)
    if len(sample) == _MIB:
        lines.pop()  # it may be cut
    try:
        text = sum(len((json.loads(line)[text_column] or "").encode()) for line in lines if line.strip())
    except (ValueError, TypeError, KeyError):
        return size  # not one object a line: an upper bound
    return size * text // max(1, sum(map(len, lines)))


_MIB = 1 << 20
_BLOCK = 1 << 14
_MAX_BLOCKS = 1 << 14  # 256 MiB over all files


def _content_hash(files: list[Path]) -> str:
    """A hash of the files' names, relative to their common folder, sizes and contents.

    Up to 256 MiB of contents are read, in blocks evenly spread over each file. A smaller corpus in files of about
    the same size is read whole; in a larger one an edit that keeps a file's size can go unnoticed.
    """
    if not files:
        return ""
    root = os.path.commonpath([path.parent for path in files])
    blocks = max(1, _MAX_BLOCKS // len(files))
    digest = hashlib.sha256()
    for path in files:
        size = path.stat().st_size
        digest.update(f"{path.relative_to(root).as_posix()}\0{size}\0".encode())
        with path.open("rb") as file:
            for offset in range(0, size, max(_BLOCK, -(-size // blocks))):
                file.seek(offset)
                digest.update(file.read(_BLOCK))
    return digest.hexdigest()


def _hash(*parts: object) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]
