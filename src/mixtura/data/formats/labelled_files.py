"""Labelled text that is no table: a folder of texts for each class, as IMDb's reviews come, and lines with their labels
in them, as fastText reads them.
"""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from mixtura.config import UserError
from mixtura.data.formats.table_files import TABLES
from mixtura.data.formats.text_files import ending, local_files, read_lines

_TEXT = ".txt"
_MARK = "__label__"
_WITHOUT_LABEL = "unsup"
"""The folder of IMDb's reviews that nobody labelled."""


def labelled_texts(path: str | None, skipped: Counter[str]) -> tuple[Iterator[tuple[str, object]], str] | None:
    """Text and label of every text file in a folder named like its class, or of every line of a text file.

    A label is a list where a line has several.

    Args:
        path: the file, or the folder of folders; files that lie in it directly are not read.
        skipped: gets the texts left out, while they are read.

    Returns:
        The rows, and what to call the source; None where the path has tables, or neither.

    Raises:
        UserError: there is nothing at the path, a file cannot be read, or its lines have no labels.
    """
    start = Path(str(path)).expanduser()
    files, others = local_files(path, (*TABLES, _TEXT))
    if any(ending(file) in TABLES for file in files):
        return None
    inside = [file for file in files if file.parent != start]
    if inside and start.is_dir():
        classes = sorted({file.parent.name for file in inside} - {_WITHOUT_LABEL})
        return _folder_rows(inside, skipped), f"{len(inside)} texts in {len(classes)} folders of {path}{others}"
    name = f"the file {files[0].name}" if files == [start] else f"{len(files)} files in {path}"
    return _line_rows(files), name + others


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
