"""The help of LibreOffice 7.4 as parallel text: the same paragraphs in every language, as `make assets` laid them out.

A language is one table in the cache folder, with the columns file, element and text; file and element are the same in all
languages. Texts are under the Mozilla Public License 2.0.
"""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from mixtura.config import UserError
from mixtura.config.assets import cache_folder
from mixtura.data.rows import reason_of
from mixtura.data.units import Unit

HELP_FOLDER = "libreoffice-help-7.4"


def help_folder() -> Path:
    """The folder of the tables; it need not exist."""
    return cache_folder() / HELP_FOLDER


def help_languages() -> tuple[str, ...]:
    """The languages that are on this machine, English among them.

    Raises:
        UserError: there are none.
    """
    languages = tuple(sorted(path.stem for path in help_folder().glob("*.parquet")))
    if "en" not in languages:
        raise UserError(
            f"The data source 'libreoffice-help' is not in '{help_folder()}': run `make assets`, which needs apt-get, "
            'or set \'data.source\' to "bible", "local" or "hub".'
        )
    return languages


def help_units(languages: tuple[str, ...], skipped: Counter[str]) -> Iterator[Unit]:
    """Paragraphs with at least two languages, in the order of files and elements.

    Raises:
        UserError: a table cannot be read.
    """
    paragraphs: dict[tuple[str, str], dict[str, str]] = {}
    for language in languages:
        for file, element, text in _read_table(help_folder() / f"{language}.parquet"):
            paragraphs.setdefault((file, element), {})[language] = text
    for _, texts in sorted(paragraphs.items()):
        yield Unit(texts)


def _read_table(path: Path) -> Iterator[tuple[str, str, str]]:
    try:
        columns = pq.read_table(path, columns=["file", "element", "text"]).columns
    except (pa.ArrowException, OSError, ValueError) as error:
        raise UserError(f"'{path}' cannot be read ({reason_of(error)}): remove it and run `make assets`.") from None
    return zip(*(column.to_pylist() for column in columns), strict=True)
