"""Where text comes from: text files, JSONL, Parquet, any Hub dataset, or the embedded corpus.

A corpus is a sequence of documents in a fixed order. Empty documents (no character at all) are not part of it.
"""

import bisect
import copy
import hashlib
import itertools
import json
import os
import platform
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from llmkit.data.files import (
    base_name,
    collection_name,
    content_hash,
    file_size,
    find_files,
    is_remote,
    remote_version,
    table_kind,
)
from llmkit.data.readers import (
    TextFile,
    read_table,
    row_group_bytes,
    rows_of_arrow,
    split_document,
    table_text_bytes,
)
from llmkit.data.sample_data import stdlib_sources
from llmkit.errors import UserError
from llmkit.hub_access import ask_hub_once

FILES_A_PART = 8  # with so many files for each part, files need not be divided for parts of about the same size


class Corpus(ABC):
    """A sequence of documents; `open_corpus` makes one.

    Attributes:
        name: short, for the name of a folder.
        description: for people; it does not say where the text is kept.
        remarks: lines that a user should read before the text is used.
    """

    name: str
    description: str
    remarks: Sequence[str] = ()

    @abstractmethod
    def in_pieces(self, skip: int = 0) -> Iterator[Iterable[str]]:
        """The documents, in the same order each time, without the first `skip` ones.

        Each is a series of consecutive pieces, cut as `split_document` cuts, and can be gone through again: a text
        file is read piece by piece, so that its size does not matter.

        Raises:
            UserError: while iterating, for a file that cannot be read; the line names it.
        """

    def documents(self, skip: int = 0) -> Iterator[str]:
        """`in_pieces`, with each document in one string."""
        return ("".join(pieces) for pieces in self.in_pieces(skip))

    @abstractmethod
    def num_bytes(self) -> int | None:
        """UTF-8 bytes of text: exact for text files, else an estimate, or None where only reading all would tell."""

    def divided(self, count: int) -> Sequence["Corpus"]:
        """Parts of about equal size, in the order of the corpus: one after the other they are its documents.

        The parts can be sent to other processes, and their files are not checked again.

        Raises:
            UserError: it cannot be divided so often.
        """
        raise UserError(f"{self.description}: it cannot be divided into tasks")

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
        text_files: paths, folders, globs (`books/*.txt`, `data/**/*.jsonl`) or URLs (`s3://bucket/*.parquet`).
            `.jsonl`, `.json` and `.parquet` hold one document a row, in `text_column`; any other file is UTF-8 text,
            one document. All but Parquet may be compressed (`.gz`, `.bz2`, `.xz`, `.zst`).
        dataset_name: a dataset's name on the Hub, or a local folder; with `dataset_config` and `dataset_split`.
        text_column: the column of a table that holds the text.
        streaming: read a dataset while it downloads, instead of storing it first.

    Raises:
        UserError: nothing there, an empty or binary file, no such column, a column that is not text, no documents.
    """
    if text_files and dataset_name:
        raise UserError("text_files and dataset_name are both set: set one of them")
    if text_files:
        files, remarks = find_files(text_files)
        return FileCorpus(files, text_column, collection_name(text_files, files), remarks)
    if dataset_name:
        return DatasetCorpus(dataset_name, dataset_config, dataset_split, text_column, streaming)
    sources = [str(path) for path in stdlib_sources()]
    if not sources:
        raise UserError("this Python comes without its standard library's sources: set text_files or dataset_name")
    version = ".".join(platform.python_version_tuple()[:2])
    corpus = FileCorpus(
        sources, text_column, f"the Python {version} standard library's sources ({len(sources)} files)"
    )
    corpus.name = "stdlib"
    return corpus


class FileCorpus(Corpus):
    """Files here or elsewhere, in sorted order."""

    def __init__(self, files: list[str], text_column: str, description: str, remarks: Sequence[str] = ()):
        self.files, self.text_column = files, text_column
        self.row_groups: dict[str, list[int]] = {}  # of Parquet files of which a part has not all rows
        self.description, self.remarks = description, remarks
        self.name = folder_name(description.split(" (")[0])
        # The first rows of one table: their column and its type are what people get wrong.
        table = next(filter(table_kind, files), None)
        if table and not any([*itertools.islice(self._documents([table]), 1000)]) and not next(self.in_pieces(), None):
            raise UserError(f"{description}: no documents, for {text_column!r} is empty in every row")

    def in_pieces(self, skip: int = 0) -> Iterator[Iterable[str]]:
        # A text file is one document: up to the first table, skipping needs no reading.
        texts = sum(1 for _ in itertools.takewhile(lambda file: table_kind(file) is None, self.files))
        unread = min(skip, texts)
        return itertools.islice(self._documents(self.files[unread:]), skip - unread, None)

    def _documents(self, files: list[str]) -> Iterator[Iterable[str]]:
        for file in files:
            if table_kind(file):
                texts = read_table(file, self.text_column, self.row_groups.get(file))
                yield from (list(split_document(text)) for text in texts)
            else:
                text = TextFile(file)
                start = list(itertools.islice(text, 2))
                yield text if len(start) > 1 else start  # a short one is read once

    def num_bytes(self) -> int:
        return sum(_text_bytes(file, self.text_column) for file in self.files)

    def divided(self, count: int) -> Sequence[Corpus]:
        units: list[tuple[str, int | None, int]] = []  # a file, its row group or None for all of it, bytes
        for file in self.files:
            if len(self.files) < FILES_A_PART * count and table_kind(file) == "parquet":
                groups = row_group_bytes(file, self.text_column)
                units += [(file, number, size) for number, size in enumerate(groups)]
            else:
                units.append((file, None, file_size(file)))
        if count > len(units):
            raise UserError(
                f"{self.description}: it can be divided into {len(units):,} parts at most (files, and row groups of "
                f"Parquet files), not {count:,}: give fewer tasks"
            )
        parts = []
        for part_units in _balanced(units, count):
            part = copy.copy(self)
            part.files, part.row_groups = list(dict.fromkeys(file for file, _, _ in part_units)), {}
            for file, group, _ in part_units:
                if group is not None:
                    part.row_groups.setdefault(file, []).append(group)
            parts.append(part)
        return parts

    def fingerprint(self) -> str:
        column = self.text_column if any(map(table_kind, self.files)) else None
        local = content_hash([file for file in self.files if not is_remote(file)])
        return _hash(column, local, *(remote_version(file) for file in self.files if is_remote(file)))


class DatasetCorpus(Corpus):
    """A split of a dataset that `datasets.load_dataset` can read, on the Hub or in a local folder.

    Unless it is streamed, it may be a part of a split or several, as `datasets` writes them: `train[:10%]+test`.
    """

    def __init__(self, name: str, config: str | None, split: str, text_column: str, streaming: bool):
        from datasets import IterableDataset, ReadInstruction, load_dataset_builder
        from datasets.exceptions import DatasetsError

        self.dataset, self.config, self.split = name, config, split
        self.text_column = text_column
        self.streaming = streaming
        self._part: tuple[int, int] | None = None  # which of how many, in a corpus that is divided
        shown = Path(name).name if os.path.isdir(name) else name
        self.name = folder_name(base_name(name))
        self.description = f"dataset {shown}{f' ({config})' if config else ''}, split {split}"
        whole = [part.partition("[")[0].strip() for part in split.split("+")]
        self._is_part = whole != [split]
        if streaming and self._is_part:
            raise UserError(f"dataset_split={split}: streaming reads one whole split: set streaming to false")
        if not os.path.exists(name):
            ask_hub_once()
        try:
            ReadInstruction.from_spec(split)  # before anything is downloaded
            self._builder = load_dataset_builder(name, config)
            stream = [self._builder.as_streaming_dataset(split=part) for part in whole][0]
        except (DatasetsError, ValueError, AssertionError, OSError) as error:
            raise UserError(f"dataset {name}: {error}") from error
        assert isinstance(stream, IterableDataset), "one split was asked for"
        self._stream = stream
        # The first rows, from the stream even if all is downloaded later, so that a wrong column shows before that.
        if next(self._texts(self._stream), None) is None:
            raise UserError(f"{self.description}: no documents, for {text_column!r} is empty in every row")
        files = self._builder.config.data_files or {}
        self._files = [str(file) for part in dict.fromkeys(whole) for file in files.get(part, [])]
        self._is_local = bool(self._files) and all(map(os.path.exists, self._files))

    def _texts(self, dataset) -> Iterator[str]:
        batches = dataset.with_format("arrow").iter(batch_size=1000)
        return rows_of_arrow(batches, self.text_column, f"dataset {self.dataset}")

    def in_pieces(self, skip: int = 0) -> Iterator[Iterable[str]]:
        from datasets import Dataset, IterableDataset

        rows = self._stream
        if not self.streaming:
            self._builder.download_and_prepare()
            try:
                rows = self._builder.as_dataset(split=self.split)
            except (ValueError, AssertionError) as error:  # as a part that lies beyond the split's end
                raise UserError(f"{self.description}: {error}") from error
        if self._part:
            assert isinstance(rows, Dataset | IterableDataset), "one split was asked for"
            index, count = self._part
            rows = rows.shard(num_shards=count, index=index, contiguous=True)
        return (list(split_document(text)) for text in itertools.islice(self._texts(rows), skip, None))

    def divided(self, count: int) -> Sequence[Corpus]:
        """Into parts of consecutive rows; of a dataset that is streamed, of consecutive files."""
        if self.streaming and count > (files := self._stream.num_shards):
            raise UserError(
                f"{self.description}: streaming, it can be divided into {files:,} parts at most (its files), "
                f"not {count:,}: give fewer tasks, or leave out streaming"
            )
        if not self.streaming:
            self._builder.download_and_prepare()  # once, and not in each task
        parts = []
        for index in range(count):
            part = copy.copy(self)
            part._part = (index, count)
            parts.append(part)
        return parts

    def num_bytes(self) -> int | None:
        if self._is_part:
            return None
        if self._is_local and all(map(table_kind, self._files)):
            return sum(_text_bytes(file, self.text_column) for file in self._files)
        splits = self._builder.info.splits or {}
        if self.split not in splits:
            return None
        # The Hub counts the rows; how long one is, the first thousand tell.
        sample = list(itertools.islice(self._texts(self._stream), 1000))
        return sum(len(text.encode()) for text in sample) * splits[self.split].num_examples // len(sample)

    def fingerprint(self) -> str:
        # A file on the Hub has the commit in its address, hf://datasets/name@commit/path.
        files = content_hash(self._files) if self._is_local else [self.dataset, *self._files]
        return _hash(self.config, self.split, self.text_column, files)


def _balanced(units: list[tuple[str, int | None, int]], count: int) -> Iterator[list[tuple[str, int | None, int]]]:
    """`count` runs of consecutive units, none empty, of about the same size together."""
    ends = list(itertools.accumulate(size for _, _, size in units))
    start = 0
    for part in range(1, count + 1):
        goal = ends[-1] * part / count
        stop = bisect.bisect_right(ends, goal, lo=start)
        if stop < len(units) and ends[stop] - goal < goal - (ends[stop - 1] if stop else 0):
            stop += 1  # nearer to the goal
        stop = min(max(stop, start + 1), len(units) - (count - part)) if part < count else len(units)
        yield units[start:stop]
        start = stop


def folder_name(text: str) -> str:
    """A short name that any file system takes, for a folder made from this text."""
    return re.sub(r"[^\w.-]+", "-", Path(text).stem if "." in text[1:] else text)[:40].strip("-.") or "text"


def _text_bytes(file: str, text_column: str) -> int:
    if is_remote(file) or (table_kind(file) is None and TextFile(file).is_plain):
        return file_size(file)
    return table_text_bytes(file, text_column)


def _hash(*parts: object) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]
