"""Rows of tables, from files and from the hub: read once here for documents, parallel text and labelled text.

A row is what its place holds, as named columns, and where it stands, for messages. Nothing in it is executed.
"""

import csv
import json
import os
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from mixtura.config import UserError
from mixtura.errors import need, reason_of

TABLES = (".jsonl", ".csv", ".tsv", ".parquet")
_LARGEST_CELL = 2**31 - 1


class Row(NamedTuple):
    """One row of a table."""

    values: Mapping[str, object]
    where: str
    """The place, to stand inside a sentence: "'a.jsonl' line 3"."""


def find_cell(row: Row, column: str) -> tuple[bool, object]:
    """Whether a row has a column, and what it holds there; "translation.en" looks into a nested column."""
    if column in row.values:
        return True, row.values[column]
    outer, dot, inner = column.partition(".")
    nested = row.values.get(outer)
    if dot and isinstance(nested, Mapping):
        return find_cell(Row(nested, row.where), inner)
    return False, None


def cell(row: Row, column: str, *, key: str) -> object:
    """What a row holds in a column.

    Args:
        row: the row.
        column: its name, or "outer.inner" for a nested one.
        key: the key of the recipe that named the column, such as "data.text_column".

    Raises:
        UserError: there is no such column.
    """
    found, value = find_cell(row, column)
    if found:
        return value
    raise UserError(
        f"There is no '{column}' in {row.where}: set '{key}' to one of {', '.join(_columns(row.values)) or 'none'}."
    )


def _columns(values: Mapping[str, object], prefix: str = "") -> Iterator[str]:
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from _columns(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


def file_rows(path: Path, columns: Collection[str]) -> Iterator[Row]:
    """The rows of one .jsonl, .csv, .tsv or .parquet file, in order.

    Args:
        path: the file, of one of `TABLES`.
        columns: what will be asked for; only these are read where the format allows it.

    Raises:
        UserError: the file cannot be read as what its name says.
    """
    readers: dict[str, Callable[[], Iterator[Row]]] = {
        ".jsonl": lambda: _jsonl_rows(path),
        ".csv": lambda: _csv_rows(path),
        ".tsv": lambda: _tsv_rows(path),
        ".parquet": lambda: _parquet_rows(path, columns),
    }
    return readers[path.suffix.lower()]()


def hub_rows(name: str, subset: str | None, split: str) -> Iterator[Row]:
    """The rows of a Hugging Face dataset, streamed.

    Raises:
        UserError: it cannot be read, or the connection breaks.
    """
    datasets = need("datasets")
    where = f"the hub dataset '{name}'"
    try:
        for row in datasets.load_dataset(name, subset, split=split, streaming=True):
            yield Row(dict(row), where)
    except Exception as error:  # The hub stack raises many unrelated classes: HTTP, file system, parser, its own.
        raise UserError(
            f"The hub dataset '{name}' cannot be read ({reason_of(error)}): "
            "check 'data.name', 'data.subset', 'data.split' and the network."
        ) from error


def local_files(path: str | None, kinds: tuple[str, ...]) -> tuple[list[Path], int]:
    """Files to read, sorted, and the number of files of other kinds.

    A folder is read with its subfolders; links to folders are not followed.

    Raises:
        UserError: there are none, or they cannot be listed.
    """
    try:
        start = Path(str(path)).expanduser()
        found = [start] if start.is_file() else _walk(start)
    except (OSError, RuntimeError) as error:
        raise UserError(f"'data.path' is '{path}', which cannot be read ({reason_of(error)}): correct it.") from None
    listed = ", ".join(kinds)
    if found == [start]:
        if start.suffix.lower() not in kinds:
            raise UserError(f"'data.path' is '{start}', which is none of {listed}: give a file of one of these kinds.")
        if start.stat().st_size == 0:
            raise UserError(f"'data.path' is '{start}', which is empty: give a file with text in it.")
        return [start], 0
    files = [file for file in found if file.suffix.lower() in kinds]
    if not files:
        raise UserError(f"'data.path' is '{start}', a folder without any file of {listed}: give one that has text.")
    return files, len(found) - len(files)


def read_lines(path: Path) -> Iterator[str]:
    """Lines of a UTF-8 file with \\n line ends, without a byte order mark.

    Raises:
        UserError: it cannot be read, or is no UTF-8 text.
    """
    offset = 0
    try:
        with path.open("rb") as file:
            for line in file:
                if b"\0" in line:
                    place = offset + line.index(b"\0")
                    raise UserError(
                        f"'{path}' holds a NUL byte at {place}, so it is no UTF-8 text: convert or remove it."
                    )
                text = line.decode().replace("\r\n", "\n")
                yield text if offset else text.removeprefix("\ufeff")
                offset += len(line)
    except UnicodeDecodeError as error:
        raise UserError(
            f"'{path}' is not UTF-8 text at byte {offset + error.start}: convert it, as with `iconv -t UTF-8`."
        ) from None
    except OSError as error:
        raise UserError(f"'{path}' cannot be read ({reason_of(error)}): check its permissions.") from None


def _walk(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise UserError(f"'data.path' is '{folder}', where there is no file or folder: correct the path.")

    def refuse(error: OSError) -> None:  # os.walk passes over unreadable folders unless told otherwise
        raise UserError(f"The folder '{error.filename}' cannot be read ({error.strerror}): check its permissions.")

    paths = (Path(parent, name) for parent, _, names in os.walk(folder, onerror=refuse) for name in names)
    return sorted(path for path in paths if path.is_file())


def _jsonl_rows(path: Path) -> Iterator[Row]:
    for number, line in enumerate(read_lines(path), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"'{path}' line {number} is not JSON ({error}): correct or remove the line.") from None
        if not isinstance(row, dict):
            raise UserError(f"'{path}' line {number} is not a JSON object: write lines such as {{\"text\": ...}}.")
        yield Row(row, f"'{path}' line {number}")


def _csv_rows(path: Path) -> Iterator[Row]:
    csv.field_size_limit(_LARGEST_CELL)
    reader = csv.reader(read_lines(path), strict=True)
    try:
        header = next(reader, [])
        for cells in reader:
            if cells:
                yield _table_row(path, reader.line_num, header, cells, advice="quote cells that hold commas")
    except csv.Error as error:
        raise UserError(f"'{path}' line {reader.line_num} is not CSV ({error}): correct the line.") from None


def _tsv_rows(path: Path) -> Iterator[Row]:
    """A tab always ends a cell and a line a row: sentences may hold a lone quote, which CSV would take for a start."""
    header: list[str] = []
    for number, line in enumerate(read_lines(path), start=1):
        if not line.strip():
            continue
        cells = [_unquote(cell) for cell in line.rstrip("\n").split("\t")]
        if header:
            yield _table_row(path, number, header, cells, advice="remove tabs and line breaks inside cells")
        header = header or cells


def _unquote(text: str) -> str:
    """Undoes the quoting of spreadsheets, which write a cell with quotes in it as \"a \"\"b\"\"\"."""
    inner = text[1:-1]
    quoted = len(text) > 1 and text[0] == text[-1] == '"' and '"' not in inner.replace('""', "")
    return inner.replace('""', '"') if quoted else text


def _table_row(path: Path, number: int, header: list[str], cells: list[str], *, advice: str) -> Row:
    if len(cells) > len(header):
        raise UserError(
            f"'{path}' line {number} has {len(cells)} cells but the first line names {len(header)} columns: {advice}."
        )
    filled: list[str | None] = [*cells, *[None] * (len(header) - len(cells))]
    return Row(dict(zip(header, filled, strict=True)), f"'{path}' line {number}")


def _parquet_rows(path: Path, columns: Collection[str]) -> Iterator[Row]:
    try:
        with pq.ParquetFile(path) as file:
            names = file.schema_arrow.names
            outer = {name if name in names else name.partition(".")[0] for name in columns}
            # All of them where one is missing, so that the message about it can list them.
            wanted = [name for name in names if name in outer] if outer <= set(names) else names
            for batch in file.iter_batches(batch_size=1000, columns=wanted):
                yield from (Row(row, f"'{path}'") for row in batch.to_pylist())
    except (pa.ArrowException, OSError, ValueError) as error:
        raise UserError(f"'{path}' cannot be read as Parquet ({reason_of(error)}): check the file.") from None
