"""Tables in files, row by row: JSON, CSV, TSV and Parquet. Nothing in them is executed.

A column is named once: a header or an object that names one twice is refused, since every reader would choose another.
"""

import csv
import json
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator
from decimal import Decimal
from itertools import chain
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from mixtura.config import UserError
from mixtura.data.rows import Row
from mixtura.data.text_files import format_of, read_lines
from mixtura.errors import reason_of

TABLES = (".jsonl", ".json", ".csv", ".tsv", ".parquet")
_LARGEST_CELL = 2**31 - 1
_OBJECT = 'write objects such as {"text": ...}'


class _DoubledKeyError(ValueError):
    """An object names a key twice."""


def file_rows(path: Path, columns: Collection[str]) -> Iterator[Row]:
    """The rows of one file, in order.

    Args:
        path: the file, of one of `TABLES`.
        columns: what will be asked for; only these are read where the format allows it.

    Raises:
        UserError: the file cannot be read as what its name says, or names a column twice.
    """
    readers: dict[str, Callable[[], Iterator[Row]]] = {
        ".jsonl": lambda: _jsonl_rows(path),
        ".json": lambda: _json_rows(path),
        ".csv": lambda: _csv_rows(path),
        ".tsv": lambda: _tsv_rows(path),
        ".parquet": lambda: _parquet_rows(path, columns),
    }
    return readers[path.suffix.lower()]()


def _jsonl_rows(path: Path) -> Iterator[Row]:
    """An object a line; a file that is one list all the same is read as one."""
    lines = enumerate(read_lines(path), start=1)
    first = True
    for number, line in lines:
        if not line.strip():
            continue
        if first and line.lstrip().startswith("["):
            yield from _array_rows(path, line + "".join(rest for _, rest in lines), first=number)
            return
        first = False
        row = _parse(path, line.strip(), first=number)
        if not isinstance(row, dict):
            raise UserError(f"'{path}' line {number} is not a JSON object: {_OBJECT}, one a line.")
        yield Row(row, f"'{path}' line {number}")


def _json_rows(path: Path) -> Iterator[Row]:
    """A list of objects, alone or as the one list in an object; or objects, one a line."""
    text = "".join(read_lines(path))
    try:
        table = json.loads(text)
    except (ValueError, RecursionError) as error:
        if "Extra data" in str(error):
            return _jsonl_rows(path)
        table = []
    if not isinstance(table, dict):
        return _array_rows(path, text, first=1)
    lists = [value for value in _parse(path, text, first=1).values() if isinstance(value, list)]
    if len(lists) != 1:
        raise UserError(f"'{path}' is one JSON object with {len(lists)} lists: give a list of objects, or a .jsonl.")
    return _list_rows(path, lists[0])


def _array_rows(path: Path, text: str, *, first: int) -> Iterator[Row]:
    table = _parse(path, text, first=first)
    if not isinstance(table, list):
        raise UserError(f"'{path}' is not a list of JSON objects: {_OBJECT}.")
    return _list_rows(path, table)


def _list_rows(path: Path, table: list[Any]) -> Iterator[Row]:
    for number, row in enumerate(table, start=1):
        if not isinstance(row, dict):
            raise UserError(f"'{path}' item {number} is not a JSON object: {_OBJECT}.")
        yield Row(row, f"'{path}' item {number}")


def _parse(path: Path, text: str, *, first: int) -> Any:
    """JSON with the digits of its numbers; `first` is the line of the file on which `text` begins."""
    try:
        return json.loads(text, object_pairs_hook=_unique, parse_float=_written)
    except _DoubledKeyError as error:
        where = "" if "\n" in text else f" line {first}"
        raise UserError(f"'{path}'{where} has an object with two keys '{error}': keep one of them.") from None
    except (ValueError, RecursionError) as error:
        line = first + (error.lineno - 1 if isinstance(error, json.JSONDecodeError) else 0)
        why = error.msg if isinstance(error, json.JSONDecodeError) else reason_of(error)
        advice = format_of(path) or f"line {line} is not JSON ({why}): correct or remove the line"
        raise UserError(f"'{path}' {advice}.") from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) < len(pairs):
        raise _DoubledKeyError(Counter(name for name, _ in pairs).most_common(1)[0][0])
    return table


def _written(text: str) -> Decimal | float:
    """A number that keeps its digits: a label 1.50 is the same class here and in CSV."""
    try:
        return Decimal(text)
    except ArithmeticError:  # an exponent of more than 18 digits
        return float(text)


def _csv_rows(path: Path) -> Iterator[Row]:
    """Cells between commas; between semicolons, tabs or bars where the first line has these and no comma."""
    csv.field_size_limit(_LARGEST_CELL)
    lines = read_lines(path)
    opening = next((line for line in lines if line.strip()), "")
    mark = next((mark for mark in ",;\t|" if mark in opening), ",")
    reader = csv.reader(chain([opening], lines), delimiter=mark, strict=True)
    try:
        header = _header(path, next(reader, []))
        for cells in reader:
            if len(cells) > 1 or "".join(cells).strip():
                yield _table_row(path, reader.line_num, header, cells, advice=f"quote cells that hold '{mark}'")
    except csv.Error as error:
        why = "it has a carriage return alone" if "new-line" in str(error) else str(error)
        raise UserError(f"'{path}' line {reader.line_num} is not CSV ({why}): correct the line.") from None


def _tsv_rows(path: Path) -> Iterator[Row]:
    """A tab always ends a cell and a line a row: sentences may hold a lone quote, which CSV would take for a start."""
    header: list[str] = []
    for number, line in enumerate(read_lines(path), start=1):
        if not line.strip():
            continue
        cells = [_unquote(cell) for cell in line.rstrip("\n").split("\t")]
        if header:
            yield _table_row(path, number, header, cells, advice="remove tabs and line breaks inside cells")
        header = header or _header(path, cells)


def _unquote(text: str) -> str:
    """Undoes the quoting of spreadsheets, which write a cell with quotes in it as \"a \"\"b\"\"\"."""
    inner = text[1:-1]
    quoted = len(text) > 1 and text[0] == text[-1] == '"' and '"' not in inner.replace('""', "")
    return inner.replace('""', '"') if quoted else text


def _header(path: Path, cells: Iterable[str]) -> list[str]:
    names = [cell.strip() for cell in cells]
    _check_names(path, names)
    return names


def _check_names(path: Path, names: Iterable[str]) -> None:
    """Refuses a name that stands for two columns; columns without a name are nobody's."""
    doubled = [name for name, times in Counter(names).items() if times > 1 and name]
    if doubled:
        raise UserError(
            f"'{path}' has two columns named '{doubled[0]}', and only one of them can be read: rename or remove one."
        )


def _table_row(path: Path, number: int, header: list[str], cells: list[str], *, advice: str) -> Row:
    extra = cells[len(header) :]
    if any(cell.strip() for cell in extra):
        raise UserError(
            f"'{path}' line {number} has {len(cells)} cells but the first line names {len(header)} columns: {advice}."
        )
    filled: list[str | None] = [*cells[: len(header)], *[None] * (len(header) - len(cells))]
    values = dict(zip(header, filled, strict=True))
    values.pop("", None)
    return Row(values, f"'{path}' line {number}")


def _parquet_rows(path: Path, columns: Collection[str]) -> Iterator[Row]:
    try:
        with pq.ParquetFile(path) as file:
            names = file.schema_arrow.names
            _check_names(path, names)
            outer = {name if name in names else name.partition(".")[0] for name in columns}
            # All of them where one is missing, so that the message about it can list them.
            wanted = [name for name in names if name in outer] if outer <= set(names) else names
            for batch in file.iter_batches(batch_size=1000, columns=wanted):
                yield from (Row(row, f"'{path}'") for row in batch.to_pylist())
    except UserError:
        raise
    except (pa.ArrowException, OSError, ValueError) as error:
        advice = format_of(path, besides=b"PAR1") or f"cannot be read as Parquet ({reason_of(error)}): check the file"
        raise UserError(f"'{path}' {advice}.") from None
