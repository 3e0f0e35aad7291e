"""The LibreOffice help: from pages to paragraphs to tables to pairs."""

import shutil
import subprocess

import pytest

from mixtura.config import TranslationDataConfig, UserError
from mixtura.data.help_download import fetch_help, page_paragraphs
from mixtura.data.parallel import load_parallel
from mixtura.data.parallel_sources import help_table, help_version, write_help_table
from mixtura.files import cache_folder

PAGE = """<html><body>
<div id="Contents"><p id="bm_1">bookmark</p></div>
<h1 id="hd_1">Find <a href="x">Bar</a></h1>
<p id="par_1">Press <span class="switchinline"><span hidden="true" id="MACx" class="MAC">Command</span>
<span hidden="true" id="defaultx"><span class="keycode">Ctrl</span></span></span>+F<br>to search.</p>
<p id="par_1">The same element again.</p>
<p id="par_2" class="code">Print x</p>
<p id="par_3">12.5 %</p>
<p id="par_4">See [text/a.xhp#b not found].</p>
<p id="par_5">&lt;META NAME="x"&gt; is markup</p>
<p id="par_6">a &lt; b</p>
<footer><h3>Help content debug info:</h3><p>This page is: /text/a.xhp</p></footer>
</body></html>"""


def test_paragraphs_are_prose_alone_in_the_default_variant():
    assert list(page_paragraphs(PAGE)) == [
        ("hd_1", "Find Bar"),
        ("par_1", "Press Ctrl+F to search."),
        ("par_6", "a < b"),
    ]


@pytest.fixture
def tables(tmp_path, monkeypatch):
    monkeypatch.setenv("MIXTURA_CACHE", str(tmp_path))
    paragraphs = [("a.html", f"par_{i}", f"number {i}") for i in range(40)]
    paragraphs += [("b.html", "par_0", "Number 0"), ("b.html", "par_1", "only English")]
    for language in ("en", "de", "fr"):
        path = help_table(language)
        path.parent.mkdir(exist_ok=True)
        translated = [(file, name, text.replace("umber", f"ombre {language}")) for file, name, text in paragraphs]
        rows = paragraphs if language == "en" else [line for line in translated if "only" not in line[2]]
        write_help_table(rows, "7.4.7", path)
    return tmp_path


def test_paragraphs_align_by_file_and_element_and_are_held_out_together(tables):
    config = TranslationDataConfig(pairs=("en-de", "de-fr"), validation_sources=3, test_sources=5)
    corpus = load_parallel(config)
    assert corpus.description.startswith("paragraphs of the LibreOffice 7.4.7 help (MPL-2.0), en-de, de-fr, 3 valid")
    assert corpus.skipped["missing side"] == 1
    numbers = {
        direction: {p.source.split()[-1] for p in corpus.test if p.pair == direction} for direction in corpus.counts
    }
    assert len(numbers["en-de"]) == 5
    assert numbers["en-de"] == numbers["de-fr"]
    assert not numbers["en-de"] & {pair.source.split()[-1] for pair in corpus.train}


def test_a_language_without_a_table_is_refused_with_those_there_are(tables):
    with pytest.raises(
        UserError, match=r"'ja' is not in the LibreOffice help .*: pair two of de, en, fr, .*make assets"
    ):
        load_parallel(TranslationDataConfig(pairs=("en-ja",)))


def test_tables_of_two_versions_are_refused(tables):
    write_help_table([("a.html", "par_0", "x")], "25.2.3", help_table("fr"))
    with pytest.raises(UserError, match=r"several versions .en 7.4.7, fr 25.2.3"):
        help_version(["en", "fr"])


def test_a_damaged_table_is_refused(tables):
    help_table("de").write_bytes(b"PAR1 not really")
    with pytest.raises(UserError, match=r"de.parquet' cannot be read"):
        load_parallel(TranslationDataConfig(pairs=("en-de",)))


def test_missing_tables_are_named_with_the_command(tmp_path, monkeypatch):
    monkeypatch.setenv("MIXTURA_CACHE", str(tmp_path))
    with pytest.raises(UserError, match=r"run `make assets`"):
        load_parallel(TranslationDataConfig())


# Fetching


def test_what_is_there_is_not_fetched_again(tables, monkeypatch):
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("ran a command"))
    said: list[str] = []
    fetch_help(["de"], said.append)
    assert said == [f"LibreOffice help is in {tables / 'libreoffice-help'} already: de, en."]


def test_without_apt_the_bible_is_offered(tmp_path, monkeypatch):
    monkeypatch.setenv("MIXTURA_CACHE", str(tmp_path))
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(UserError, match=r"set .data.source. to .bible. instead"):
        fetch_help(["de"], print)


def test_an_unknown_package_leaves_nothing_behind(tmp_path, monkeypatch):
    def fail(command, **_):
        return subprocess.CompletedProcess(command, 100, "", "E: Unable to locate package libreoffice-help-xx\nmore")

    monkeypatch.setenv("MIXTURA_CACHE", str(tmp_path))
    monkeypatch.setattr(shutil, "which", lambda name: name)
    monkeypatch.setattr(subprocess, "run", fail)
    with pytest.raises(UserError, match=r"not give 'libreoffice-help-en-us' .Unable to locate package") as caught:
        fetch_help(["xx"], print)
    assert "\n" not in str(caught.value)
    assert list((tmp_path / "libreoffice-help").iterdir()) == []


def test_the_help_on_this_machine_is_clean():
    if not help_table("nl").is_file():
        pytest.skip(f"the LibreOffice help is not in {cache_folder()}: make assets")
    corpus = load_parallel(TranslationDataConfig(pairs=("en-nl",), max_characters=80))
    assert corpus.counts["en-nl"]["train"] > 15_000
    assert not any("not found]" in pair.source or "debug info" in pair.source for pair in corpus.train)
    held_out = {normal for pair in corpus.test for normal in (pair.source.casefold(), pair.target.casefold())}
    assert not any(pair.source.casefold() in held_out or pair.target.casefold() in held_out for pair in corpus.train)
