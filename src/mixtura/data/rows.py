"""Rows of tables and the values of their columns, the same for documents, parallel text and labelled text.

A row has named columns, and its place in a file, for messages. A column expression names a column and, after dots, a
part of its value. "translation.en" is a key of an object. "messages.content" is that key of every object in a list, as
one text with a line for each; "messages.0.content" is that of the first object, "messages.-1.content" of the last.
"""

import difflib
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from mixtura.config import UserError
from mixtura.errors import need, reason_of

COMMON_SHARE = 0.01
"""If a smaller share of the rows has a column, its name is taken for a mistake; else rows without it are left out."""
JUDGED_ROWS = 100_000
"""That is decided after so many rows, so that no huge dataset is read for a column that it does not have."""
_LISTED = 20
_CHAT_TEXT = re.compile(r"(messages?|conversations?|chat|dialog(?:ue)?|turns)\.(content|value|text)")


class Row(NamedTuple):
    """One row of a table."""

    values: Mapping[str, object]
    where: str
    """The place, to stand inside a sentence: "'a.jsonl' line 3"."""


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


def find_cell(row: Row, column: str) -> tuple[bool, object]:
    """Whether a row has a column, and what it holds there; `column` is an expression, see above."""
    if column in row.values:
        return True, row.values[column]
    return _look(row.values, column)


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
        parts = [f"'{key}' to '{turns.get(key, chat)}'" for key in wrong if key != "data.label_column"]
        how = "which takes one message of a chat" if turns.keys() & wrong.keys() else "which joins a chat's messages"
        if parts:
            return f"set {' and '.join(parts)}, {how}"
    listed = ", ".join(map(_short, names[:_LISTED])) + (", ..." if len(names) > _LISTED else "") or "none"
    if len(wrong) > 1:
        return f"set {keys} to {'two' if len(wrong) == 2 else len(wrong)} of {listed}"
    (column,) = wrong.values()
    folded = {name.casefold().strip(): name for name in names}
    near = difflib.get_close_matches(column.casefold(), folded, n=1, cutoff=0.75)
    return (
        f"set {keys} to '{_short(folded[near[0]])}', the nearest of {listed}"
        if near
        else f"set {keys} to one of {listed}"
    )


def _short(name: str) -> str:
    """A name on one line: that of a column may be a whole sentence where the first line is no header."""
    line = " ".join(name.split())
    return line if len(line) <= 40 else f"{line[:37]}..."


def _columns(values: Mapping[str, object], prefix: str = "") -> Iterator[str]:
    for name, value in values.items():
        inside = value[0] if isinstance(value, list) and value else value
        if isinstance(inside, Mapping) and inside:
            yield from _columns(inside, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


def _is_nested(value: object) -> bool:
    return isinstance(value, Mapping) or (isinstance(value, list) and any(isinstance(item, Mapping) for item in value))


def _look(value: object, column: str) -> tuple[bool, object]:
    """What an expression finds in an object or a list; a list of texts that lies inside one is joined."""
    head, dot, rest = column.partition(".")
    if isinstance(value, Mapping):
        if column in value:
            return True, value[column]
        if not dot or head not in value:
            return False, None
        present, found = _look(value[head], rest)
        return present, _joined(found) if present and isinstance(found, list) else found
    if isinstance(value, list):
        if re.fullmatch(r"-?\d{1,9}", head):
            place = int(head)
            inside = -len(value) <= place < len(value)
            return (_look(value[place], rest) if dot else (True, value[place])) if inside else (False, None)
        parts = [found for present, found in (_look(item, column) for item in value) if present]
        return (True, parts) if parts or not value else (False, None)
    return False, None


def _joined(parts: list[object]) -> object:
    """A line for each text, those of messages that are made of parts too; the list itself where it holds no text."""
    texts = []
    for part in parts:
        inner = _joined(part) if isinstance(part, list) else part.get("text") if isinstance(part, Mapping) else part
        texts += [inner] if isinstance(inner, str) else []
    return "\n".join(texts) if texts or not parts else parts
