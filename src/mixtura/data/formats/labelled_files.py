"""Labelled text that is no table: a folder of texts for each class, as IMDb's reviews come, and lines with their labels
in them, as fastText reads them.
"""

from collections import Counter
from collections.abc import Collection, Iterator
from pathlib import Path

from mixtura.config import UserError
from mixtura.data.formats.rows import find_cell
from mixtura.data.formats.table_files import TABLES, file_rows
from mixtura.data.formats.text_files import Listing, ending, read_lines

_TEXT = ".txt"
_MARK = "__label__"
_WITHOUT_LABEL = "unsup"
"""The folder of IMDb's reviews that nobody labelled."""


def labelled_texts(
    listing: Listing, path: str | None, columns: Collection[str], skipped: Counter[str]
) -> tuple[Iterator[tuple[str, object]], str] | None:
    """Text and label of every text file in a folder named like its class, or of every line of a text file.

    A label is a list where a line has several. Tables come first, but one without the columns is no reason to pass over
    folders of classes: data sets describe themselves in tables too.

    Args:
        listing: the file, or the folder of folders; texts that lie in it directly are not read.
        path: what it is called.
        columns: of a table with labelled texts.
        skipped: gets the texts left out, while they are read.

    Returns:
        The rows, and what to call the source; None where tables are to be read.

    Raises:
        UserError: there is nothing to read, a file cannot be read, or its lines have no labels.
    """
    files, others = listing.of_kinds((*TABLES, _TEXT))
    tables = [file for file in files if ending(file) in TABLES]
    inside = [file for file in files if ending(file) == _TEXT and file.parent != listing.start != file]
    classes = {file.parent.name for file in inside} - {_WITHOUT_LABEL}
    if tables:
        if len(classes) < 2 or any(_has_columns(table, columns) for table in tables):
            return None
        _, others = listing.of_kinds((_TEXT,))
    if inside:
        return _folder_rows(inside, skipped), f"{len(inside)} texts in {len(classes)} folders of {path}{others}"
    name = f"the file {files[0].name}" if files == [listing.start] else f"{len(files)} files in {path}"
    return _line_rows(files), name + others


def _has_columns(table: Path, columns: Collection[str]) -> bool:
    try:
        first = next(file_rows(table, columns), None)
    except UserError:
        return False
    return first is not None and all(find_cell(first, column)[0] for column in columns)


def begins_with_label(file: Path) -> bool:
    """Whether the first line with text of a text file has its labels in it.

    Raises:
        UserError: it cannot be read.
    """
    return next((line for line in read_lines(file) if line.strip()), "").lstrip().startswith(_MARK)


def _folder_rows(files: list[Path], skipped: Counter[str]) -> Iterator[tuple[str, object]]:
    for file in files:
        if file.parent.name == _WITHOUT_LABEL:
            skipped["no label"] += 1
        else:
            yield "".join(read_lines(file)).replace("<br />", "\n"), file.parent.name


def _line_rows(files: list[Path]) -> Iterator[tuple[str, object]]:
    rows: list[tuple[str, list[str]]] = []
    for file in files:
        words = [line.split() for line in read_lines(file)]
        if not any(word.startswith(_MARK) for line in words for word in line):
            raise UserError(
                f"'{file}' has no labels: give a table, a folder of texts for each class, or lines that begin with "
                f"{_MARK} and a class."
            )
        for line in filter(None, words):
            labels = [word.removeprefix(_MARK) for word in line if word.startswith(_MARK)]
            rows.append((" ".join(word for word in line if not word.startswith(_MARK)), labels))
    several = any(len(labels) > 1 for _, labels in rows)
    yield from ((text, labels if several else next(iter(labels), None)) for text, labels in rows)
