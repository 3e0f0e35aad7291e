"""Aligned text before it has a direction, and how texts are compared and ordered."""

import hashlib
import sys
import unicodedata
from collections.abc import Mapping
from functools import cache
from typing import NamedTuple


class Unit(NamedTuple):
    """One sentence, paragraph or verse in several languages."""

    texts: Mapping[str, object]
    """Language code to text; a row of a user's file may hold something else."""
    group: str | None = None
    """What is held out together with it, such as a book; None stands alone."""
    bilingual: bool = False
    """Whether it is a row of two languages, in which no third one can be missing."""


def anchor_of(languages: Mapping[str, object]) -> str:
    """The language whose text names a unit: English if it is there, else the first by code.

    A row from German to English and one from English to German thus have one name.
    """
    return min(languages, key=lambda language: (language != "en", language))


@cache
def _separators() -> dict[int, str]:
    """Every character that is neither letter, mark nor digit, to a space."""
    categories = {code: unicodedata.category(chr(code)) for code in range(sys.maxunicode + 1)}
    return {code: " " for code, category in categories.items() if category in ("Cc", "Cf") or category[0] in "PSZ"}


def normalise(text: str) -> str:
    """What two texts must share to count as equal: letters and digits, without case, punctuation and spacing."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    return " ".join(folded.translate(_separators()).split()) or text.strip()


def is_utf8(text: str) -> bool:
    """Whether UTF-8 can hold a text: JSON can spell half a character, a lone surrogate."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def text_hash(*texts: str) -> bytes:
    """A hash that shuffles texts the same way on every machine, in whatever order they come."""
    return hashlib.blake2b("\0".join(texts).encode(), digest_size=16).digest()
