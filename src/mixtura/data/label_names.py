"""Names of labels: what the cells of a table call a class, or any number of labels, by one rule for every format.

A text has several labels where its cell is a list, where a separator is declared, or where each label is a column of 0
and 1. The labels of a text are a sorted tuple; an empty one says that the text has none.
"""

import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from decimal import Decimal

from mixtura.config import ClassificationDataConfig, UserError
from mixtura.data.formats.rows import WrittenNumber
from mixtura.errors import is_utf8

LabelSet = tuple[str, ...]
_WHOLE = re.compile(r"([+-]?[0-9]+)\.0+")
_FLAGS = {"1": True, "true": True, "0": False, "false": False}


def label_name(value: object) -> str | None:
    """The name of a class from what stands in a table: one rule for every format, so that it depends on none.

    A label is text, in Unicode's composed form (NFC) and with single spaces; "None", "nan" and "NA" are as good as any.
    A number is the text of its digits as it is written: 1, "1" and, since tables with gaps write whole numbers so, 1.0
    are the label "1"; "01", "1.50" and "1e5" are labels of their own. There is one zero: -0.0 is the label "0". True,
    TRUE and true are the label "true", as formats write it in all three ways.

    Returns:
        None for what is no label: null, not a number, empty or nested values, and text that UTF-8 cannot hold.
    """
    if isinstance(value, Decimal):
        value = f"{value:f}"  # str would write a small one with an exponent
    if isinstance(value, int | float | WrittenNumber):  # truth values among them
        value = str(value)
        if value == "nan":
            return None
    if not isinstance(value, str) or not is_utf8(value):
        return None
    name = " ".join(unicodedata.normalize("NFC", value).split())
    if name.lower() in ("true", "false"):
        return name.lower()
    whole = _WHOLE.fullmatch(name)
    digits = whole[1] if whole else name
    return "0" if digits == "-0" else digits or None


def label_set(value: object, separator: str | None) -> LabelSet | None:
    """The labels in a cell that may hold several, sorted and each once.

    Args:
        value: a list of labels, or text.
        separator: what stands between two labels of a text; None takes the whole text for one.

    Returns:
        None for what is neither: null, and lists with something else in them.
    """
    if isinstance(value, str) and separator is not None:
        value = [part for part in value.split(separator) if part.strip()]
    names = [label_name(part) for part in (value if isinstance(value, list) else [value])]
    known = {name for name in names if name is not None}
    return None if None in names else tuple(sorted(known))


def holds_several(values: Iterable[object], config: ClassificationDataConfig) -> bool:
    """Whether a text may have several labels: so a recipe says, or most cells that are not empty are lists."""
    if config.label_separator is not None or config.label_columns:
        return True
    lists = others = 0
    for value in values:
        lists += isinstance(value, list)
        others += not isinstance(value, list) and label_name(value) is not None
    return lists > others


def flagged_labels(
    rows: Iterable[Sequence[object]], columns: Sequence[str], *, source: str
) -> Iterator[tuple[object, object]]:
    """Text and list of labels of every row whose labels are columns of 0 and 1; the list is None where a cell is empty.

    Raises:
        UserError: a cell holds something else.
    """
    for text, *cells in rows:
        names = [label_name(cell) for cell in cells]
        for column, name in zip(columns, names, strict=True):
            if name is not None and name not in _FLAGS:
                raise UserError(
                    f"'{column}' of {source} has '{name}', but a column of 'data.label_columns' has 1 for texts with "
                    "that label and 0 for the others: correct it, or name one 'data.label_column'."
                )
        has = [column for column, name in zip(columns, names, strict=True) if name is not None and _FLAGS[name]]
        yield text, None if None in names else has


def check_separator(values: Iterable[object], separator: str | None, *, column: str, source: str) -> None:
    """Refuses a separator that no cell has.

    Raises:
        UserError: see above.
    """
    if separator is not None and not any(
        isinstance(value, list) or (isinstance(value, str) and separator in value) for value in values
    ):
        raise UserError(
            f"'data.label_separator' is {separator!r}, which no cell of '{column}' of {source} has: name what stands "
            "between two labels, or leave it out where every text has one."
        )
