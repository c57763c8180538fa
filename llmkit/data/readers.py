"""Reading files of text: piece by piece, or row by row from JSON and Parquet."""

import codecs
import io
import json
import re
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from fsspec.compression import compr
from fsspec.utils import infer_compression

from llmkit.data.files import file_size, open_file, reading, table_kind
from llmkit.errors import UserError

if TYPE_CHECKING:
    import pyarrow

_MIB = 1 << 20
_BLOCK = 1 << 18
# Up to the last word in a block that white space follows: see `split_document`.
_WHOLE_WORDS = re.compile(r"(?s:.*)\S(?=[ \n])")
_WORD_END = re.compile(r"\S(?=[ \n])")
_ROWS_WITHOUT_COLUMN = 1000  # of JSON, where a row may lack any key, before the column is taken for a mistake
# Bytes of a row of JSON, and characters of text without white space: both are read whole, and take a process several
# times as much memory.
LONGEST = 1 << 26
_SPACE = re.compile(r"[ \t\n\r]*")  # JSON's


def split_document(document: str, size: int = 1 << 16) -> Iterator[str]:
    """Cut a long document into pieces of about `size` characters that together have the ids of the whole.

    Holds for a character tokenizer and for GPT-2's pre-tokenization: the cut falls between a word and the white
    space after it, where every pre-token ends. A text without such a place stays whole.
    """
    start = 0
    while len(document) - start > size and (cut := _WORD_END.search(document, start + size)):
        yield document[start : cut.end()]
        start = cut.end()
    yield document[start:]


class TextFile:
    """A text file as one document: its pieces, read anew each time it is gone through.

    A piece has about 256 K characters, more only where a text has no white space. A byte order mark is not text.
    """

    def __init__(self, file: str):
        self.file = file

    @property
    def is_plain(self) -> bool:
        """Whether the file holds just the bytes of its text."""
        return infer_compression(self.file) is None

    def __iter__(self) -> Iterator[str]:
        """Raises UserError at bytes that are no UTF-8, and for a file without any text, or too much of it in one."""
        rest: list[str] = []  # stretches without a place to cut
        for text in self._blocks():
            if words := _WHOLE_WORDS.match(text):
                yield "".join([*rest, words.group()])
                rest = []
            rest.append(text[words.end() :] if words else text)
            if len(rest) * _BLOCK > LONGEST and sum(map(len, rest)) > LONGEST:
                raise UserError(
                    f"{self.file}: more than {LONGEST:,} characters without white space, which would have to be "
                    "tokenized in one piece: leave it out, or put spaces or line ends into it"
                )
        if not (last := "".join(rest)):
            raise UserError(f"{self.file}: the file is empty: leave it out")
        yield last

    def _blocks(self) -> Iterator[str]:
        decoder = codecs.getincrementaldecoder("utf-8")()
        with reading(self.file), open_file(self.file) as file:
            position = 0
            while True:
                block = file.read(_BLOCK)
                begun = len(decoder.getstate()[0])  # bytes of a character that lies across two blocks
                try:
                    text = decoder.decode(block, final=not block)
                except UnicodeDecodeError as error:
                    offset = position - begun + error.start
                    raise UserError(
                        f"{self.file}: not UTF-8 text (byte offset {offset}): convert it to UTF-8 or leave it out"
                    ) from error
                if text:
                    yield text.removeprefix("\ufeff") if position == 0 else text
                if not block:
                    return
                position += len(block)


def read_table(file: str, text_column: str, row_groups: list[int] | None = None) -> Iterator[str]:
    """The texts in one column of a JSON, JSONL or Parquet file, without the empty ones.

    Args:
        row_groups: those of a Parquet file that are read; all by default.

    Raises:
        UserError: a damaged file, no such column, a value that is not text.
    """
    if table_kind(file) == "json":
        return _read_json(file, text_column)
    return _read_parquet(file, text_column, row_groups)


def row_group_bytes(file: str, text_column: str) -> list[int]:
    """Bytes of text in each row group of a Parquet file."""
    import pyarrow.parquet as pq

    with reading(file), open_file(file) as opened:
        metadata = pq.ParquetFile(opened).metadata
    return [
        sum(
            column.total_uncompressed_size
            for column in map(metadata.row_group(i).column, range(metadata.num_columns))
            if column.path_in_schema == text_column
        )
        for i in range(metadata.num_row_groups)
    ]


def _read_parquet(file: str, text_column: str, row_groups: list[int] | None) -> Iterator[str]:
    import pyarrow.parquet as pq

    with reading(file), open_file(file) as opened:
        table = pq.ParquetFile(opened)
        _check_column(table.schema_arrow, text_column, file)
        batches = table.iter_batches(batch_size=1000, row_groups=row_groups, columns=[text_column])
        yield from rows_of_arrow(batches, text_column, file)


def rows_of_arrow(batches: Iterable, text_column: str, source: str) -> Iterator[str]:
    """The texts in one column of Arrow's batches, without the empty ones.

    Raises:
        UserError: no such column, a column that is not text, a batch that cannot be read.
    """
    with reading(source):
        for batch in batches:
            _check_column(batch.schema, text_column, source)
            yield from filter(None, batch.column(text_column).to_pylist())


def _check_column(schema: "pyarrow.Schema", text_column: str, source: str) -> None:
    from pyarrow import types

    if text_column not in schema.names:
        raise _no_column(source, text_column, schema.names)
    kind = schema.field(text_column).type
    stored = kind.value_type if types.is_dictionary(kind) else kind
    # Rows without any text have a column of type null, which is no mistake.
    if not any(
        is_text(stored) for is_text in (types.is_string, types.is_large_string, types.is_string_view, types.is_null)
    ):
        raise UserError(
            f"{source}: column {text_column!r} holds {kind}, not text: set text_column to one of: "
            f"{', '.join(schema.names)}"
        )


def _no_column(source: str, text_column: str, names: Iterable[str]) -> UserError:
    return UserError(f"{source}: no column {text_column!r}: set text_column to one of: {', '.join(names)}")


def _read_json(file: str, text_column: str) -> Iterator[str]:
    """One object a line, or an array of objects."""
    number, columns = 0, {}
    with reading(file), open_file(file) as opened:
        for number, row in _json_rows(opened, file):
            if not isinstance(row, dict):
                raise UserError(f"{file}: row {number} is not an object such as {{{text_column!r}: 'some text'}}")
            text = row.get(text_column)
            if text_column not in columns:
                columns |= dict.fromkeys(row)
                if number == _ROWS_WITHOUT_COLUMN and text_column not in columns:
                    break
            if text is not None and not isinstance(text, str):
                raise UserError(
                    f"{file}: row {number}: {text_column!r} holds {json.dumps(text)[:40]}, not text: fix the row, or "
                    f"set text_column to one of: {', '.join(columns)}"
                )
            if text:
                text.encode()  # half of a surrogate pair, as "\ud800", is no text
                yield text
    if number and text_column not in columns:
        raise _no_column(file, text_column, columns)


def _json_rows(opened, file: str) -> Iterator[tuple[int, object]]:
    """The rows and their numbers. One row at a time is in memory, also where all of them are in one line."""
    content = io.BufferedReader(opened)
    if content.peek(len(codecs.BOM_UTF8)).startswith(codecs.BOM_UTF8):
        content.read(len(codecs.BOM_UTF8))
    while (begin := content.peek(1)[:1]).isspace():
        content.read(1)
    if begin == b"[":
        yield from _array_rows(content, file)
        return
    lines = (line for line in iter(lambda: content.readline(LONGEST + 1), b"") if not line.isspace())
    for number, line in enumerate(lines, 1):
        if len(line) > LONGEST:
            raise _too_long(file, number)
        try:
            yield number, json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{file}: cannot be read: row {number} is not JSON: {error}") from error


def _array_rows(content: io.BufferedReader, file: str) -> Iterator[tuple[int, object]]:
    """The elements of an array. Where one is not whole yet, as much again is read, so that few are decoded twice."""
    decode, text = json.JSONDecoder().raw_decode, io.TextIOWrapper(content, encoding="utf-8")
    block, place, number, wanted = "", 0, 0, "["
    while True:
        blanks = _SPACE.match(block, place)
        assert blanks is not None, "none is a match as well"
        place = blanks.end()
        sign = block[place : place + 1]
        if not sign and (block := text.read(_BLOCK)):
            place = 0
        elif sign and sign == wanted:
            place, wanted = place + 1, ""
        elif sign == "]" and (wanted == "," or not number):
            return
        else:
            try:
                if wanted:
                    raise json.JSONDecodeError(f"no {wanted} before it", block, place)
                row, place = decode(block, place)
            except json.JSONDecodeError as error:
                if len(block) - place > LONGEST:
                    raise _too_long(file, number + 1) from error
                if wanted or not (more := text.read(max(_BLOCK, len(block) - place))):
                    problem = f"row {number + 1} is not JSON: {error.msg}"
                    raise UserError(f"{file}: cannot be read: {problem}") from error
                block, place = block[place:] + more, 0
                continue
            number, wanted = number + 1, ","
            yield number, row


def _too_long(file: str, row: int) -> UserError:
    return UserError(
        f"{file}: row {row} has more than {LONGEST:,} bytes, and a row is read whole: divide it into several, or give "
        "its text a file of its own, which is read in pieces"
    )


def table_text_bytes(file: str, text_column: str) -> int:
    """UTF-8 bytes of text in a local file that is a table or compressed, estimated without reading all of it."""
    if table_kind(file) == "parquet":
        return sum(row_group_bytes(file, text_column))
    # From the start: how far the file is compressed, and how much of its lines is text.
    unpack = compr[infer_compression(file)]  # pyrefly: ignore[bad-index]  fsspec's table is typed by its first key
    with reading(file), open(file, "rb") as raw, unpack(raw, mode="rb") as content:
        sample = content.read(_MIB)
        unpacked = len(sample)
        while raw.tell() < _MIB and (more := content.read(_MIB)):
            unpacked += len(more)
        size = file_size(file) * unpacked // max(1, raw.tell())
    if table_kind(file) is None:
        return size
    lines = sample.splitlines(keepends=True)
    if len(sample) == _MIB:
        lines.pop()  # it may be cut
    if not lines:
        return size
    try:
        text = sum(len((json.loads(line)[text_column] or "").encode()) for line in lines if line.strip())
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return size  # not one object a line: an upper bound
    return size * text // max(1, sum(map(len, lines)))
