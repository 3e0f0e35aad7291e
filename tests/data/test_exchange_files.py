"""Translation memories, and texts in a file for each language, as sentence pairs."""

import gzip
import lzma
from typing import Any

import pytest

from mixtura.config import TranslationDataConfig, UserError
from mixtura.data.parallel import load_parallel
from mixtura.data.sketch import sketch_recipe

WORDS = ["ban", "den", "fin", "gat", "lit", "mon", "nab", "pol"]
PAIRS = [(f"{word} {other} one", f"{other} {word} um") for word in WORDS for other in WORDS]


def memory(*units, head=""):
    rows = [
        f'<tu><tuv xml:lang="en-US"><seg>{source}</seg></tuv><tuv xml:lang="PT_br"><seg>{target}</seg></tuv></tu>'
        for source, target in PAIRS
    ]
    body = "".join([*rows, *units])
    return f'<?xml version="1.0" encoding="UTF-8"?>\n{head}<tmx version="1.4"><header/><body>{body}</body></tmx>'


def read(path, pairs="en-pt", **keys):
    sizes: dict[str, Any] = {"validation_sources": 4, "test_sources": 4, "max_characters": 60}
    config = TranslationDataConfig(source="local", path=str(path), pairs=tuple(pairs.split(",")), **sizes | keys)
    corpus = load_parallel(config)
    return corpus, {pair[:2] for pair in (*corpus.train, *corpus.validation, *corpus.test)}


def write(path, text):
    path.write_text(text, encoding="utf-8")
    return path


def test_a_memory_is_read_in_the_languages_that_are_asked_for(tmp_path):
    path = write(
        tmp_path / "a.tmx",
        memory(
            '<tu><tuv xml:lang="en"><seg>Open the <bpt i="1">&lt;b></bpt>file<ept i="1">&lt;/b></ept> &amp; go.</seg>'
            "</tuv>"
            '<tuv xml:lang="de"><seg>Nie gelesen.</seg></tuv>'
            '<tuv lang="PT"><prop>x</prop><seg>Abra o <hi>ficheiro <ph>x</ph>e</hi> siga.</seg></tuv></tu>',
            '<tu><tuv xml:lang="en"><seg>Only English.</seg></tuv></tu>',
            head='<!DOCTYPE tmx SYSTEM "tmx14.dtd">',
        ),
    )
    corpus, found = read(path)
    assert found == {*PAIRS, ("Open the file & go.", "Abra o ficheiro e siga.")}
    assert corpus.skipped == {"missing side": 1} and "the file a.tmx" in corpus.description
    _, both = read(path, "en-pt,pt-en")
    assert both == found | {(target, source) for source, target in found}


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        (memory()[:-9], "is no whole XML file"),
        (memory(head="<!DOCTYPE x>") + "<more/>", "is no whole XML file"),
        ("", "which is empty"),
        (memory().replace("en-US", "fr"), r"has fr, pt, not two of en, pt: set 'data.pairs'"),
        ("<tmx/>", "has no language, not two of"),
        ("<tu/>", "has no language, not two of"),
        (
            f'<tmx><tu><tuv lang="en"><seg>{"<hi>" * 9_000}{"</hi>" * 9_000}</seg></tuv></tu></tmx>',
            "is no whole XML file",
        ),
    ],
)
def test_a_memory_that_cannot_be_used_is_refused(tmp_path, text, complaint):
    with pytest.raises(UserError, match=complaint):
        read(write(tmp_path / "a.tmx", text))


def test_a_memory_reaches_nothing_outside_and_cannot_fill_the_memory(tmp_path):
    secret = write(tmp_path / "secret.txt", "hidden words")
    reaching = f'<!DOCTYPE x [<!ENTITY s SYSTEM "{secret.as_uri()}">]>'
    unit = '<tu><tuv xml:lang="en"><seg>a &s; b</seg></tuv><tuv xml:lang="pt"><seg>c &s; d</seg></tuv></tu>'
    try:
        _, found = read(write(tmp_path / "a.tmx", memory(unit, head=reaching)))
        assert not any("hidden" in text for pair in found for text in pair)
    except UserError as error:
        assert "hidden" not in str(error)
    levels = "".join(f'<!ENTITY e{n} "{f"&e{n - 1};" * 10}">' for n in range(1, 10))
    growing = f'<!DOCTYPE x [<!ENTITY e0 "0123456789">{levels}]>'
    with pytest.raises(UserError, match="is no whole XML file"):
        read(write(tmp_path / "b.tmx", memory(unit.replace("&s;", "&e9;"), head=growing)))


@pytest.mark.parametrize("named", ["corpus.en", "corpus.pt", "."])
def test_texts_in_a_file_for_each_language_are_read_line_by_line(tmp_path, named):
    write(tmp_path / "corpus.en", "\n".join(source for source, _ in PAIRS) + "\n")
    write(tmp_path / "corpus.pt", "\n".join(target for _, target in PAIRS))
    write(tmp_path / "corpus.de", "not asked for")
    corpus, found = read(tmp_path / named)
    assert found == set(PAIRS)
    if named != ".":
        assert corpus.description.startswith("the files corpus.en and corpus.pt, ")


def version_1(*units):
    rows = [f"<trans-unit id='x'><source>{s}</source><target>{t}</target></trans-unit>" for s, t in PAIRS]
    head = "<file source-language='en-US' target-language='pt_BR' datatype='plaintext' original='a'>"
    body = f"{head}<body><group>{''.join([*rows, *units])}</group></body></file>"
    other = "<file source-language='de' target-language='fr' original='b'><body><trans-unit id='1'><source>Nein"
    other += "</source><target>Non</target></trans-unit></body></file>"
    return (
        f"<?xml version='1.0'?><xliff version='1.2' xmlns='urn:oasis:names:tc:xliff:document:1.2'>{body}{other}</xliff>"
    )


def version_2(*units):
    rows = [f"<unit id='x'><segment><source>{s}</source><target>{t}</target></segment></unit>" for s, t in PAIRS]
    head = "<xliff version='2.1' xmlns='urn:oasis:names:tc:xliff:document:2.0' srcLang='en' trgLang='pt'>"
    return f"<?xml version='1.0'?>{head}<file id='f'>{''.join([*rows, *units])}</file></xliff>"


DOCUMENTS = {
    "1.2": version_1(
        "<trans-unit id='a'><source>Open the <g id='1'>file</g><x id='2'/> now.</source><target state='final'>Abra o "
        "<g id='1'>ficheiro</g><ph id='2'>&lt;br&gt;</ph> agora.</target><alt-trans><source>a</source>"
        "<target>b</target></alt-trans></trans-unit>",
        "<trans-unit id='b'><source>Not yet.</source><target state='needs-translation'>Not yet.</target></trans-unit>",
        "<trans-unit id='c' translate='no'><source>Mixtura</source><target>Mixtura</target></trans-unit>",
        "<trans-unit id='d'><source>Alone.</source></trans-unit>",
    ),
    "2.1": version_2(
        "<unit id='a'><notes><note>n</note></notes><segment state='final'><source>Open the <pc id='1'>file</pc>"
        "<ph id='2'/> now.</source><target>Abra o <pc id='1'>ficheiro</pc> agora.</target></segment></unit>",
        "<unit id='b'><segment state='initial'><source>Not yet.</source><target>Not yet.</target></segment></unit>",
    ),
}


@pytest.mark.parametrize("version", DOCUMENTS)
@pytest.mark.parametrize("name", ["a.xliff", "a.XLF"])
def test_a_translated_document_is_read_without_what_is_untranslated(tmp_path, version, name):
    path = write(tmp_path / name, DOCUMENTS[version])
    assert read(path)[1] == {*PAIRS, ("Open the file now.", "Abra o ficheiro agora.")}
    assert 'pairs = ["en-pt"]' in sketch_recipe(path, name="mine")


def test_a_document_without_languages_is_refused(tmp_path):
    with pytest.raises(UserError, match="has no language, not two of en, pt"):
        read(write(tmp_path / "a.xlf", DOCUMENTS["2.1"].replace("trgLang", "lang").replace("srcLang", "from")))


def test_packed_files_are_unpacked_in_passing(tmp_path):
    for language, side in (("en", 0), ("pt", 1)):
        text = "\n".join(pair[side] for pair in PAIRS)
        (tmp_path / f"corpus.v1.{language}.gz").write_bytes(gzip.compress(text.encode()))
    assert read(tmp_path / "corpus.v1.en.gz")[1] == set(PAIRS)
    (tmp_path / "b.tmx.xz").write_bytes(lzma.compress(memory().encode()))
    assert read(tmp_path / "b.tmx.xz")[1] == set(PAIRS)
    (tmp_path / "b.tmx.xz").write_bytes(lzma.compress(memory().encode())[:-30])
    with pytest.raises(UserError, match="cannot be unpacked"):
        read(tmp_path / "b.tmx.xz")


@pytest.mark.parametrize("ending", ["pt_br", "pt-br", "pt_BR"])
def test_a_language_of_a_region_may_be_spelled_in_several_ways(tmp_path, ending):
    write(tmp_path / "corpus.en", "\n".join(source for source, _ in PAIRS))
    write(tmp_path / f"corpus.{ending}", "\n".join(target for _, target in PAIRS))
    for named in ("corpus.en", f"corpus.{ending}", "."):
        assert read(tmp_path / named, "en-pt_br")[1] == set(PAIRS)


def test_a_folder_may_be_called_like_a_language(tmp_path):
    folder = tmp_path / "texts.de"
    folder.mkdir()
    write(folder / "a.tmx", memory())
    assert read(folder)[1] == set(PAIRS)


def test_a_folder_may_hold_all_kinds(tmp_path):
    write(tmp_path / "a.tsv", "en\tpt\nfrom a table\tde uma tabela\n")
    write(tmp_path / "b.tmx", memory())
    for ending, text in (("en", "from a text"), ("pt", "de um texto")):
        write(tmp_path / f"c.{ending}", text)
    _, found = read(tmp_path, source_column="en", target_column="pt")
    assert found == {*PAIRS, ("from a table", "de uma tabela"), ("from a text", "de um texto")}


def test_texts_that_are_not_aligned_are_refused(tmp_path):
    write(tmp_path / "corpus.en", "one\ntwo\nthree\n")
    with pytest.raises(UserError, match=r"'.*corpus.en' has no 'corpus.pt' beside it"):
        read(tmp_path / "corpus.en")
    write(tmp_path / "corpus.pt", "um\ndois\n")
    with pytest.raises(UserError, match=r"'corpus.pt' ends after 2 lines, before the texts beside it"):
        read(tmp_path)
    with pytest.raises(UserError, match=r"a text in en by its ending, .* name a direction of en, such as en-de"):
        read(tmp_path / "corpus.en", "de-fr")


def test_a_recipe_is_sketched_for_a_memory(tmp_path):
    text = sketch_recipe(write(tmp_path / "a.tmx", memory()), name="mine")
    assert 'task = "translation"' in text and 'pairs = ["en-pt"]' in text and "source_column" not in text
    assert "source_column" not in sketch_recipe(tmp_path, name="mine")
