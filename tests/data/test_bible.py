"""Verses without the marks that print and the database put into them."""

import pytest

from mixtura.data.parallel_sources import clean_verse

MARKED = {
    "other numbering": ("(3:3) Combien qui disent", False, "Combien qui disent"),
    "numbering inside": ("Psaume. (3:2) Dieu!", False, "Psaume. Dieu!"),
    "supplied words": ("Moses gave [inheritance] to the tribe", False, "Moses gave inheritance to the tribe"),
    "parentheses stay": ("(of whom the world) was", False, "(of whom the world) was"),
    "soft hyphen and line break": ("David. \u00adOH Dio\n\t\t", False, "David. OH Dio"),
    "opening capitals": ("EN el principio", True, "En el principio"),
    "capitals elsewhere": ("EN el principio", False, "EN el principio"),
    "single letter": ("Y la tierra", True, "Y la tierra"),
    "backtick": ("God`s Spirit", False, "God's Spirit"),
}


@pytest.mark.parametrize(("text", "opening", "expected"), MARKED.values(), ids=MARKED)
def test_marks_are_stripped(text, opening, expected):
    assert clean_verse(text, opening=opening) == expected
