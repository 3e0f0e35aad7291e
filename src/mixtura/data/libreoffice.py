"""The help of LibreOffice as parallel text: the same paragraphs in every language, as `make assets` laid them out.

A language is one table in the cache folder, with the columns file, element and text; file and element are the same in
all languages. Texts are under the Mozilla Public License 2.0.
"""

from collections.abc import Collection, Iterable, Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from mixtura.config import UserError
from mixtura.config.assets import cache_folder
from mixtura.data.units import Unit
from mixtura.errors import reason_of

_COLUMNS = ("file", "element", "text")


def help_table(language: str) -> Path:
    """The table of a language, such as "de" or "pt_br"; it need not exist."""
    return cache_folder() / "libreoffice-help" / f"{language}.parquet"


def write_help_table(paragraphs: Iterable[tuple[str, str, str]], version: str, path: Path) -> int:
    """Writes a table of file, element and text; returns its number of rows."""
    columns = [pa.array(column, pa.string()) for column in zip(*paragraphs, strict=True)]
    table = pa.table(dict(zip(_COLUMNS, columns, strict=True)), metadata={"version": version})
    pq.write_table(table, path, compression="zstd")
    return table.num_rows


def help_languages() -> tuple[str, ...]:
    """The languages that are on this machine, English among them.

    Raises:
        UserError: there are none.
    """
    folder = help_table("en").parent
    languages = tuple(sorted(path.stem for path in folder.glob("*.parquet")))
    if "en" not in languages:
        raise UserError(
            f"The data source 'libreoffice-help' is not in '{folder}': run `make assets`, which needs apt-get, "
            'or set \'data.source\' to "bible", "local" or "hub".'
        )
    return languages


def help_version(languages: Collection[str]) -> str:
    """The version of LibreOffice that the tables were made from.

    Raises:
        UserError: they were made from different ones, whose paragraphs differ, or one cannot be read.
    """
    versions = {language: _version(help_table(language)) for language in languages}
    if len(set(versions.values())) > 1:
        listed = ", ".join(f"{language} {version}" for language, version in sorted(versions.items()))
        raise UserError(
            f"The LibreOffice help in '{help_table('en').parent}' is of several versions ({listed}): remove that "
            "folder and run `make assets`."
        )
    return next(iter(versions.values()))


def help_units(languages: Collection[str]) -> Iterator[Unit]:
    """Paragraphs in the order of files and elements, each in the languages it has.

    Raises:
        UserError: a table cannot be read.
    """
    paragraphs: dict[tuple[str, str], dict[str, str]] = {}
    for language in languages:
        path = help_table(language)
        try:
            columns = pq.read_table(path, columns=list(_COLUMNS)).columns
        except (pa.ArrowException, OSError, ValueError) as error:
            raise _damaged(path, error) from None
        for file, element, text in zip(*(column.to_pylist() for column in columns), strict=True):
            paragraphs.setdefault((file, element), {})[language] = text
    return (Unit(texts) for _, texts in sorted(paragraphs.items()))


def _version(path: Path) -> str:
    try:
        return (pq.read_schema(path).metadata or {}).get(b"version", b"unknown").decode()
    except (pa.ArrowException, OSError, ValueError) as error:
        raise _damaged(path, error) from None


def _damaged(path: Path, error: Exception) -> UserError:
    return UserError(f"'{path}' cannot be read ({reason_of(error)}): remove it and run `make assets`.")
