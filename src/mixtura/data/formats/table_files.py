"""Tables in files, row by row, and the values of their columns: JSON, CSV, TSV and Parquet. Nothing is executed.

A column is named once: a header or an object that names one twice is refused, since every reader would choose another.
Columns of a table without a header have numbers, from 1 on: whoever asks for "2" says that the first line is a row.
The same rules hold for documents, parallel text and labelled text. A row has its place in a file, for messages.
"""

import csv
import difflib
import json
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mixtura.config import UserError
from mixtura.data.formats.rows import Row, WrittenNumber, find_cell, joined_columns
from mixtura.data.formats.text_files import ending, format_of, read_lines
from mixtura.errors import need, reason_of

COMMON_SHARE = 0.01
"""If a smaller share of the rows has a column, its name is taken for a mistake; else rows without it are left out."""
JUDGED_ROWS = 100_000
"""That is decided after so many rows, so that no huge dataset is read for a column that it does not have."""
_LISTED, _LONGEST_NAME = 20, 40
_QUOTED = re.compile(r'"[^"]*"')
_MARK_OF_EXCEL = re.compile(r"sep=([,;\t|])\s*")
_NARROW = {"float": np.float32, "float32": np.float32, "halffloat": np.float16, "float16": np.float16}
"""Numbers of few bits, as pyarrow and datasets call them."""
_CHAT_TEXT = re.compile(r"(messages?|conversations?|chat|dialog(?:ue)?|turns)\.(content|value|text)")


def hub_rows(name: str, subset: str | None, split: str) -> Iterator[Row]:
    """The rows of a Hugging Face dataset, streamed.

    Raises:
        UserError: it cannot be read, or the connection breaks.
    """
    datasets = need("datasets")
    where = f"the hub dataset '{name}'"
    try:
        dataset = datasets.load_dataset(name, subset, split=split, streaming=True)
        features = getattr(dataset, "features", None) or {}
        narrow = {key: str(getattr(kind, "dtype", "")) for key, kind in features.items()}
        for row in dataset:
            yield Row({key: _as_written(value, narrow.get(key, "")) for key, value in row.items()}, where)
    except Exception as error:  # The hub stack raises many unrelated classes: HTTP, file system, parser, its own.
        raise UserError(
            f"The hub dataset '{name}' cannot be read ({reason_of(error)}): "
            "check 'data.name', 'data.subset', 'data.split' and the network."
        ) from error


def _as_written(value: object, dtype: str) -> object:
    """A number of few bits as it would be written: the 1.1 of float32 is 1.10000002384 in the bits of Python's."""
    return float(str(_NARROW[dtype](value))) if dtype in _NARROW and isinstance(value, float) else value


def select(
    rows: Iterable[Row], columns: Mapping[str, str], skipped: Counter[str], *, source: str
) -> Iterator[tuple[Row, list[object]]]:
    """The rows that have all of some columns, each with what it holds in them.

    The others are counted by the column they lack. A column that no row has, or fewer than `COMMON_SHARE` of them, is
    refused with the columns that there are, and so is one that holds lists or objects in place of text.

    Args:
        rows: rows of one or several tables.
        columns: column expressions by the key of the recipe that names them, such as "data.text_column".
        skipped: gets the rows that are left out, as "without 'label'".
        source: what the rows are of, to stand inside a sentence, such as "the file a.csv".

    Raises:
        UserError: see above.
    """
    if len(set(columns.values())) < len(columns):
        listed, column = " and ".join(f"'{key}'" for key in columns), next(iter(columns.values()))
        raise UserError(f"{listed} are both '{column}': name two columns.")
    missing, nested, names = Counter[str](), Counter[str](), dict[str, None]()
    wanted, number = list(columns.values()), 0
    for number, row in enumerate(rows, start=1):
        cells = [find_cell(row, column) for column in wanted]
        lacking: list[str] = []
        if any(not present or isinstance(value, dict | list) for present, value in cells):
            lacking = [column for column, (present, _) in zip(wanted, cells, strict=True) if not present]
            missing.update(lacking)
            nested.update(column for column, (_, value) in zip(wanted, cells, strict=True) if _is_nested(value))
            if len(names) < _LISTED:
                names.update(dict.fromkeys(_columns(row.values)))
        if number == JUDGED_ROWS:
            _judge(number, columns, missing, nested, list(names), source)
        if lacking:
            skipped[f"without '{lacking[0]}'"] += 1
        else:
            yield row, [value for _, value in cells]
    if number < JUDGED_ROWS:
        _judge(number, columns, missing, nested, list(names), source)


def _judge(
    number: int, columns: Mapping[str, str], missing: Counter[str], nested: Counter[str], names: list[str], source: str
) -> None:
    """Refuses columns that are not what the rows have."""
    most = (1 - COMMON_SHARE) * number
    wrong = {key: column for key, column in columns.items() if missing[column] > most}
    if wrong:
        least = number - max(missing[column] for column in wrong.values())
        whose = f"Only {least:,} of the {number:,} rows of {source} have" if least else f"No row of {source} has"
        listed = " or ".join(f"'{column}'" for column in wrong.values())
        raise UserError(f"{whose} {listed}: {_advice(wrong, names)}.")
    deep = {key: column for key, column in columns.items() if nested[column] > most}
    if deep:
        key, column = next(iter(deep.items()))
        inside = [name for name in names if name.startswith(f"{column}.")]
        raise UserError(
            f"'{column}' of {source} is no text but holds lists or objects: {_advice({key: column}, inside)}."
        )


def _advice(wrong: Mapping[str, str], names: Sequence[str]) -> str:
    """Which columns to name instead: those of a chat, the nearest, or all there are."""
    keys = " and ".join(f"'{key}'" for key in wrong)
    chat = next((name for name in names if _CHAT_TEXT.fullmatch(name)), None)
    if chat is not None:
        outer, _, inner = chat.partition(".")
        turns = {"data.source_column": f"{outer}.0.{inner}", "data.target_column": f"{outer}.1.{inner}"}
        if {"data.text_column", "data.label_column"} <= wrong.keys():  # the answer is the label
            turns |= {"data.text_column": f"{outer}.0.{inner}", "data.label_column": f"{outer}.1.{inner}"}
        parts = [f"'{key}' to '{turns.get(key, chat)}'" for key in wrong if key in turns or key != "data.label_column"]
        how = "which takes one message of a chat" if turns.keys() & wrong.keys() else "which joins a chat's messages"
        if parts:
            return f"set {' and '.join(parts)}, {how}"
    listed = ", ".join(map(_short, names[:_LISTED])) + (", ..." if len(names) > _LISTED else "") or "none"
    if any(len(name) > _LONGEST_NAME for name in names):
        listed += " (or number them where the first line names none: 1 is the first)"
    if len(wrong) > 1:
        return f"set {keys} to {'two' if len(wrong) == 2 else len(wrong)} of {listed}"
    (column,) = wrong.values()
    folded = {name.casefold().strip(): name for name in names}
    near = [] if "+" in column else difflib.get_close_matches(column.casefold(), folded, n=1, cutoff=0.75)
    return (
        f"set {keys} to '{_short(folded[near[0]])}', the nearest of {listed}"
        if near
        else f"set {keys} to one of {listed}"
    )


def _short(name: str) -> str:
    """A name on one line: that of a column may be a whole sentence where the first line is no header."""
    line = " ".join(name.split())
    return line if len(line) <= _LONGEST_NAME else f"{line[: _LONGEST_NAME - 3]}..."


def _columns(values: Mapping[str, object], prefix: str = "") -> Iterator[str]:
    for name, value in values.items():
        inside = value[0] if isinstance(value, list) and value else value
        if isinstance(inside, Mapping) and inside:
            yield from _columns(inside, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


def _is_nested(value: object) -> bool:
    return isinstance(value, Mapping) or (isinstance(value, list) and any(isinstance(item, Mapping) for item in value))


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
        ".csv": lambda: _csv_rows(path, columns),
        ".tsv": lambda: _tsv_rows(path, columns),
        ".parquet": lambda: _parquet_rows(path, columns),
    }
    return readers[ending(path)]()


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
        return json.loads(text, object_pairs_hook=_unique, parse_float=WrittenNumber)
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


def _csv_rows(path: Path, columns: Collection[str]) -> Iterator[Row]:
    """Cells between commas, semicolons, tabs or bars: whichever the first line has most, outside quotation marks."""
    csv.field_size_limit(_LARGEST_CELL)
    lines = read_lines(path)
    opening = next((line for line in lines if line.strip()), "")
    told = _MARK_OF_EXCEL.fullmatch(opening)
    if told:
        opening = next(lines, "")
    mark = told[1] if told else max(",;\t|", key=_QUOTED.sub("", opening).count)
    reader = csv.reader(chain([opening], lines), delimiter=mark, strict=True)
    try:
        first = next(reader, [])
        header, is_row = _header(path, first, columns)
        for cells in chain([first] if is_row else [], reader):
            if len(cells) > 1 or "".join(cells).strip():
                yield _table_row(path, reader.line_num, header, cells, advice=f"quote cells that hold '{mark}'")
    except csv.Error as error:
        why = "it has a carriage return alone" if "new-line" in str(error) else str(error)
        raise UserError(f"'{path}' line {reader.line_num} is not CSV ({why}): correct the line.") from None


def _tsv_rows(path: Path, columns: Collection[str]) -> Iterator[Row]:
    """A tab always ends a cell and a line a row: sentences may hold a lone quote, which CSV would take for a start.

    So a cell of several lines cannot be written, and where one was, its lines are rows that lack cells: they are
    refused where one opens a quotation mark and a later one closes it, not where sentences merely have one.
    """
    header: list[str] = []
    opened, opened_short = 0, False  # the last line that may begin such a cell, 0 for none, and if it lacks cells
    for number, line in enumerate(read_lines(path), start=1):
        if not line.strip():
            continue
        written = line.rstrip("\n").split("\t")
        cells = [_unquote(cell) for cell in written]
        is_row = bool(header)
        if not header:
            header, is_row = _header(path, cells, columns)
        if is_row:
            opens, is_short = _opens(written[-1]), len(cells) < len(header)
            if opened and (is_short or opened_short) and _closes(written[0]):
                raise UserError(
                    f"'{path}' line {opened} has a cell of several lines, but in a .tsv every line is a row: "
                    "save the table as .csv or .jsonl."
                )
            if opens or not is_short:
                opened, opened_short = number if opens else 0, is_short
            yield _table_row(path, number, header, cells, advice="remove tabs and line breaks inside cells")


def _opens(text: str) -> bool:
    """Whether a cell begins with a quotation mark that nothing closes."""
    return text.startswith('"') and text.count('"') % 2 == 1


def _closes(text: str) -> bool:
    """Whether a cell ends with a quotation mark that nothing opens."""
    return text.rstrip().endswith('"') and text.count('"') % 2 == 1


def _unquote(text: str) -> str:
    """Undoes the quoting of spreadsheets, which write a cell with quotes in it as \"a \"\"b\"\"\"."""
    inner = text[1:-1]
    quoted = len(text) > 1 and text[0] == text[-1] == '"' and '"' not in inner.replace('""', "")
    return inner.replace('""', '"') if quoted else text


def _header(path: Path, cells: Sequence[str], columns: Collection[str]) -> tuple[list[str], bool]:
    """Names of the columns, and whether the first line is a row already: where a column is asked for by its number."""
    names = [cell.strip() for cell in cells]
    if any(part.isdecimal() and part not in names for column in columns for part in joined_columns(column, names)):
        return [str(place) for place in range(1, len(names) + 1)], True
    _check_names(path, names)
    return names, False


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
            parts = [part for name in columns for part in joined_columns(name, names)]
            outer = {name if name in names else name.partition(".")[0] for name in parts}
            # All of them where one is missing, so that the message about it can list them.
            wanted = [name for name in names if name in outer] if outer <= set(names) else names
            narrow = {field.name: str(field.type) for field in file.schema_arrow if str(field.type) in _NARROW}
            for batch in file.iter_batches(batch_size=1000, columns=wanted):
                for row in batch.to_pylist():
                    written = {name: _as_written(row[name], narrow[name]) for name in narrow.keys() & row.keys()}
                    yield Row(row | written, f"'{path}'")
    except UserError:
        raise
    except (pa.ArrowException, OSError, ValueError) as error:
        advice = format_of(path, besides=b"PAR1") or f"cannot be read as Parquet ({reason_of(error)}): check the file"
        raise UserError(f"'{path}' {advice}.") from None
