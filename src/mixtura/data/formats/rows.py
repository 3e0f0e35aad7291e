"""Rows of tables, and what a column expression finds in one.

A column expression names a column and, after dots, a part of its value. "translation.en" is a key of an object.
"messages.content" is that key of every object in a list, as one text with a line for each; "messages.0.content" is that
of the first object, "messages.-1.content" of the last. "title+text" is both, with a blank line between them, or the one
that is not empty.
"""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import NamedTuple


class Row(NamedTuple):
    """One row of a table."""

    values: Mapping[str, object]
    where: str
    """The place, to stand inside a sentence: "'a.jsonl' line 3"."""


@dataclass(frozen=True, repr=False)
class WrittenNumber:
    """A number of a file of text, as it is written there: 1.50 and 1e5 are the same labels in JSON and in CSV."""

    digits: str

    def __str__(self) -> str:
        """The digits."""
        return self.digits

    __repr__ = __str__


def find_cell(row: Row, column: str) -> tuple[bool, object]:
    """Whether a row has a column, and what it holds there; `column` is an expression, see above."""
    if column in row.values:
        return True, row.values[column]
    present, value = _look(row.values, column)
    if present or "+" not in column:
        return present, value
    found = [find_cell(row, part) for part in joined_columns(column)]
    cells = [_joined(cell) if isinstance(cell, list) else cell for _, cell in found]
    nested = [cell for cell in cells if isinstance(cell, list | Mapping)]
    texts = ["" if cell is None else str(cell).strip() for cell in cells]
    return all(there for there, _ in found), nested[0] if nested else "\n\n".join(filter(None, texts))


def joined_columns(column: str, names: Collection[str] = ()) -> list[str]:
    """The parts of an expression that joins columns; itself where it joins none, or is one of the `names` there are."""
    return [column] if column in names else [part.strip() for part in column.split("+")]


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
