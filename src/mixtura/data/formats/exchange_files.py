"""The forms in which translators exchange parallel text: memories, translated documents, and a text for each language.

A memory (.tmx, TMX 1.4b, section 3) has units, and a unit a variant for each language. A document under translation
(.xliff, .xlf, XLIFF 1.2 and 2) has units of a source and a target; those that nobody has translated yet are left out.
Codes of a program's formatting inside are left out too, the text that they format stays. Nothing outside the file is
read, whatever its document type says.

Texts in a file for each language, such as corpus.en and corpus.de, have a line for each sentence, the same in both (as
the corpora of OPUS and WMT come).
"""

from collections.abc import Collection, Iterable, Iterator
from itertools import zip_longest
from pathlib import Path
from xml.etree import ElementTree as XML

from mixtura.config import UserError
from mixtura.config.languages import find_language
from mixtura.data.formats.text_files import (
    UNREADABLE,
    cannot_be_read,
    ending,
    format_of,
    open_bytes,
    read_lines,
    without_ending,
)
from mixtura.data.held_out import Unit
from mixtura.errors import reason_of

MEMORIES = (".tmx", ".xliff", ".xlf")
"""Endings of files whose units say their languages themselves."""
_LANGUAGE = "{http://www.w3.org/XML/1998/namespace}lang"
_CODES = {"bpt", "ept", "it", "ph", "ut"}
"""Elements of a variant that hold formatting in place of text."""
_UNITS, _LARGER = {"tu", "trans-unit", "segment"}, {"unit"}
_UNTRANSLATED = {"new", "needs-translation", "initial"}
"""States of a target in XLIFF (of its segment in version 2), which may hold the source until somebody translates it."""


def memory_variants(path: Path) -> Iterator[dict[str, str]]:
    """The units of a memory or a translated document in order: the text of every language, under its code as written.

    Raises:
        UserError: the file is no such file, or cannot be read.
    """
    parents: list[XML.Element] = []
    languages: dict[str, str | None] = {}
    try:
        with open_bytes(path) as file:
            for event, element in XML.iterparse(file, ("start", "end")):
                if event == "start":
                    parents.append(element)
                    languages |= _languages(element)
                    continue
                parents.pop()
                if _name(element) in _UNITS:
                    variants = map(_variant, element) if _name(element) == "tu" else _sides(element, languages)
                    yield dict(filter(None, variants))
                if _name(element) in _UNITS | _LARGER:
                    for parent in parents[-1:]:
                        parent.remove(element)  # a memory may be larger than this machine's
    except (XML.ParseError, RecursionError) as error:
        fault = (
            f"is no whole XML file ({reason_of(error)}): repair it, or export it as .tsv, a column for each language"
        )
        raise UserError(f"'{path}' {format_of(path) or fault}.") from None
    except UNREADABLE as error:
        raise UserError(f"'{path}' {cannot_be_read(error)}.") from None
    except (LookupError, ValueError) as error:
        raise UserError(f"'{path}' cannot be read ({reason_of(error)}): save it anew as UTF-8.") from None


def _variant(element: XML.Element) -> tuple[str, str] | None:
    language = element.get(_LANGUAGE) or element.get("lang")
    segment = next((child for child in element if _name(child) == "seg"), None)
    return None if _name(element) != "tuv" or language is None or segment is None else (language, _text(segment))


def _languages(element: XML.Element) -> dict[str, str | None]:
    """Those of source and target, where an element of XLIFF says them: version 1.2 for a file, version 2 for all."""
    if _name(element) == "file" and element.get("source-language") is not None:
        return {"source": element.get("source-language"), "target": element.get("target-language")}
    if _name(element) == "xliff":
        return {"source": element.get("srcLang"), "target": element.get("trgLang")}
    return {}


def _sides(unit: XML.Element, languages: dict[str, str | None]) -> Iterator[tuple[str, str]]:
    sides = {_name(child): child for child in unit if _name(child) in ("source", "target")}
    target = sides.get("target")
    states = {unit.get("state"), None if target is None else target.get("state")}
    if unit.get("translate") != "no" and not states & _UNTRANSLATED:
        for name, side in sides.items():
            if (language := languages.get(name)) is not None:
                yield language, _text(side)


def _text(element: XML.Element) -> str:
    inside = ("" if _name(child) in _CODES else _text(child) for child in element)
    tails = (child.tail or "" for child in element)
    return (element.text or "") + "".join(part for parts in zip(inside, tails, strict=True) for part in parts)


def _name(element: XML.Element) -> str:
    return element.tag.rpartition("}")[2]


def memory_units(path: Path, languages: Collection[str]) -> Iterator[Unit]:
    """The units of a memory, in the languages that are asked for; of two variants of one language the first counts.

    Raises:
        UserError: see `memory_variants`, or it has not two of the languages anywhere.
    """
    there: set[str] = set()
    for variants in memory_variants(path):
        texts: dict[str, str] = {}
        for code, text in variants.items():
            if (language := find_language(code, languages)) is not None:
                texts.setdefault(language, text)
        there |= texts.keys()
        yield Unit({language: text for language, text in texts.items() if language in languages})
    if len(there & set(languages)) < 2:
        found = ", ".join(sorted(there)) or "no language"
        raise UserError(
            f"'{path}' has {found}, not two of {', '.join(sorted(languages))}: set 'data.pairs' to languages of it."
        )


def endings_of(languages: Iterable[str]) -> dict[str, str]:
    """The endings of files in these languages: "pt_br" has .pt_br and .pt-br."""
    return {f".{form}": language for language in languages for form in (language, language.replace("_", "-"))}


def texts_by_stem(files: list[Path], languages: Collection[str]) -> list[dict[str, Path]]:
    """Files in a language each, gathered by what stands before their ending; a single one is joined by its siblings.

    Raises:
        UserError: a file has no sibling in another of the languages.
    """
    endings = endings_of(languages)
    if len(files) == 1:
        stem = without_ending(files[0])
        beside = sorted(path for path in files[0].parent.iterdir() if path.is_file())
        files = [path for path in beside if without_ending(path) == stem and ending(path) in endings]
    found: dict[Path, dict[str, Path]] = {}
    for file in files:
        found.setdefault(without_ending(file), {})[endings[ending(file)]] = file
    for stem, texts in found.items():
        if len(texts) < 2:
            wanted = " or ".join(f"'{stem.name}.{language}'" for language in languages if language not in texts)
            raise UserError(
                f"'{next(iter(texts.values()))}' has no {wanted} beside it: give the text in the other language the "
                "same name and its own ending."
            )
    return list(found.values())


def aligned_units(paths: dict[str, Path]) -> Iterator[Unit]:
    """A unit for each line of some texts, by language.

    Raises:
        UserError: a file cannot be read, or they have different numbers of lines.
    """
    for number, lines in enumerate(zip_longest(*map(read_lines, paths.values())), start=1):
        if None in lines:
            names = [path.name for path, line in zip(paths.values(), lines, strict=True) if line is None]
            raise UserError(
                f"'{names[0]}' ends after {number - 1:,} lines, before the texts beside it in '{_folder(paths)}': "
                "aligned texts have a line for each sentence, so give those from before a sentence was lost."
            )
        yield Unit(dict(zip(paths, lines, strict=True)))


def _folder(paths: dict[str, Path]) -> Path:
    return next(iter(paths.values())).parent
