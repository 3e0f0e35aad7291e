"""From the pages of the LibreOffice help to paragraphs of plain text."""

import re
from collections.abc import Iterator
from pathlib import Path

import lxml.html
from lxml.html import HtmlElement

PARAGRAPHS = ("p", "h1", "h2", "h3", "h4", "h5", "h6")
# Others are the frame of a page: bookmarks, search, the footer that tells developers which file it came from.
_ELEMENT = re.compile(r"(par|hd)_")
# Program text, formulas, captions of pictures, and titles that every page repeats.
_NO_PROSE = {"code", "codeintable", "smathcode", "example", "image", "imageintable", "related", "youtube_consent"}

# Examples of markup, and places where a page that should be included was missing when the help was built.
_NO_PROSE_TEXT = re.compile(r"</?[A-Z!]+[ >]|not found\]")


def page_paragraphs(page: str) -> Iterator[tuple[str, str]]:
    """Element id and text of every paragraph and heading of prose, without markup; an id comes once.

    Where a text differs between systems or programs, the default is taken.
    """
    seen: set[str] = set()
    for element in lxml.html.document_fromstring(page).iter(*PARAGRAPHS):
        name = element.get("id", "")
        if name in seen or not _ELEMENT.match(name) or _NO_PROSE & set(element.get("class", "").split()):
            continue
        seen.add(name)
        for switch in list(element.iter("span")):
            if switch.get("class") in ("switchinline", "switch"):
                _keep_default(switch)
        for line_break in element.iter("br"):
            line_break.tail = " " + (line_break.tail or "")
        text = " ".join(element.text_content().split())
        if any(character.isalpha() for character in text) and not _NO_PROSE_TEXT.search(text):
            yield name, text


def _keep_default(switch: HtmlElement) -> None:
    """Leaves one of the variants of a switch."""
    variants = [child for child in switch if child.get("hidden")]
    kept = [child for child in variants if child.get("id", "").startswith("default")]
    kept = kept or [child for child in variants if child.get("class") != "MAC"] or variants
    for child in variants:
        if child is not kept[0]:
            child.drop_tree()


def folder_paragraphs(folder: Path) -> Iterator[tuple[str, str, str]]:
    """File, element and text of all pages below a folder, in sorted order."""
    for path in sorted(folder.rglob("*.html")):
        file = path.relative_to(folder).as_posix()
        yield from ((file, name, text) for name, text in page_paragraphs(path.read_text(encoding="utf-8")))
