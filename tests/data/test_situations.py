"""What files look like: each works, or is refused in one sentence that names the file or the row and the fix."""

import bz2
import gzip
import json
import lzma
import zipfile
from io import BytesIO
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mixtura.config import ClassificationDataConfig, DataConfig, TranslationDataConfig, UserError
from mixtura.data.labelled import load_labelled
from mixtura.data.parallel import load_parallel
from mixtura.data.sources import load_corpus

NUMBER = 40
ROWS = [{"text": f"example {i} here", "label": "good" if i % 2 else "bad"} for i in range(NUMBER)]
PAIRS = [{"source": f"number {i} here", "target": f"Nummer {i} hier"} for i in range(NUMBER)]


class Case(NamedTuple):
    """A file and what is made of it."""

    name: str
    content: bytes
    result: int | str
    """How many rows are used, or a part of the sentence that refuses the file."""
    skipped: dict[str, int] = {}  # noqa: RUF012
    settings: dict[str, object] = {}  # noqa: RUF012


def jsonl(rows: list, *more: object) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in [*rows, *more]).encode()


def csv(*more: str, header: str = "text,label", end: str = "\n", mark: str = ",") -> bytes:
    lines = [mark.join(row.values()) for row in ROWS]
    return "".join(line + end for line in [header, *lines, *more]).encode()


def parquet(table: pa.Table) -> bytes:
    file = BytesIO()
    pq.write_table(table, file)
    return file.getvalue()


def archive(name: str, content: bytes) -> bytes:
    file = BytesIO()
    with zipfile.ZipFile(file, "w") as opened:
        opened.writestr(name, content)
    return file.getvalue()


CHATS = [{"messages": [{"role": "user", "content": row["text"]}], "label": row["label"]} for row in ROWS]
COLUMNS = [[row["text"] for row in ROWS], [row["label"] for row in ROWS]]

LABELLED = {
    # Rows
    "a row without its label": Case("a.jsonl", jsonl(ROWS, {"text": "x"}), 40, {"without 'label'": 1}),
    "a row without its text": Case("a.jsonl", jsonl(ROWS, {"label": "x"}), 40, {"without 'text'": 1}),
    "an empty object": Case("a.jsonl", jsonl(ROWS, {}), 40, {"without 'text'": 1}),
    "null for a text": Case("a.jsonl", jsonl(ROWS, {"text": None, "label": "x"}), 40, {"not text": 1}),
    "null for a label": Case("a.jsonl", jsonl(ROWS, {"text": "x", "label": None}), 40, {"no label": 1}),
    "a number for a text": Case("a.jsonl", jsonl(ROWS, {"text": 3, "label": "good"}), 40, {"not text": 1}),
    "a list for a label": Case("a.jsonl", jsonl(ROWS, {"text": "x", "label": ["good"]}), 40, {"label is a list": 1}),
    "an object for a text": Case("a.jsonl", jsonl(ROWS, {"text": {"en": "x"}, "label": "good"}), 40, {"not text": 1}),
    "half a character": Case("a.jsonl", jsonl(ROWS, {"text": "\ud800", "label": "good"}), 40, {"not text": 1}),
    "half a character as a label": Case("a.jsonl", jsonl(ROWS, {"text": "x", "label": "\ud800"}), 40, {"no label": 1}),
    "no row has the key": Case(
        "a.jsonl", jsonl([{"Text": "x", "label": 1}] * 9), "to 'Text', the nearest of Text, label"
    ),
    "a row that is a list": Case("a.jsonl", jsonl(ROWS, ["x", "good"]), "line 41 is not a JSON object"),
    "a row that is null": Case("a.jsonl", jsonl(ROWS, None), "line 41 is not a JSON object"),
    "a broken line": Case("a.jsonl", jsonl(ROWS) + b'{"text": "x", \n', "line 41 is not JSON"),
    "two objects on a line": Case("a.jsonl", jsonl(ROWS) + b"{} {}\n", "line 41 is not JSON (Extra data)"),
    "single quotes": Case("a.jsonl", b"{'text': 'x'}\n", "line 1 is not JSON"),
    "a key twice": Case(
        "a.jsonl", jsonl(ROWS) + b'{"text": "x", "label": 1, "label": 2}', "line 41 has an object with two"
    ),
    "a number beyond all bounds": Case(
        "a.jsonl", jsonl(ROWS) + b'{"text": "x", "label": 1e99999999999999999999}\n', 40, {}
    ),
    "blank lines": Case("a.jsonl", b"\n" + jsonl(ROWS).replace(b"\n", b"\n \n\n"), 40),
    "a byte order mark": Case("a.jsonl", b"\xef\xbb\xbf" + jsonl(ROWS), 40),
    "Windows line ends in JSON": Case("a.jsonl", jsonl(ROWS).replace(b"\n", b"\r\n"), 40),
    "capitals in the name": Case("A.JSONL", jsonl(ROWS), 40),
    "a separator of lines inside a text": Case("a.jsonl", jsonl(ROWS, {"text": "x\u2028y", "label": "good"}), 41),
    # JSON files
    "a list in .json": Case("a.json", json.dumps(ROWS, indent=1).encode(), 40),
    "a list in .jsonl": Case("a.jsonl", json.dumps(ROWS, indent=1).encode(), 40),
    "lines in .json": Case("a.json", jsonl(ROWS), 40),
    "a list inside an object": Case("a.json", json.dumps({"version": "1", "data": ROWS}).encode(), 40),
    "an object of columns": Case("a.json", json.dumps({"text": ["x"], "label": ["y"]}).encode(), "object with 2 lists"),
    "a broken .json": Case("a.json", b'[\n{"text": "x"},\n{"text" "y"}\n]', "line 3 is not JSON"),
    "a list of texts": Case("a.json", b'["x", "y"]', "item 1 is not a JSON object"),
    "a key twice in .json": Case("a.json", b'[{"text": 1, "text": 2}]', "two keys 'text'"),
    # CSV and TSV
    "a doubled column": Case("a.csv", csv(header="text,label,label"), "two columns named 'label'"),
    "a doubled column with spaces": Case("a.csv", csv(header="text,label, label"), "two columns named 'label'"),
    "a doubled column of tabs": Case("a.tsv", csv(header="text\ttext", mark="\t"), "two columns named 'text'"),
    "columns without names": Case(
        "a.csv", csv(header="text,label,,").replace(b"\n", b",,\n").replace(b",,,,", b",,"), 40
    ),
    "spaces in the header": Case("a.csv", csv(header=" text , label"), 40),
    "only a header": Case("a.csv", b"text,label\n", "it has no rows"),
    "no header": Case("a.csv", csv(header="first text,good"), "to two of first text, good"),
    "a short row": Case("a.csv", csv("only a text"), 40, {"no label": 1}),
    "a long row": Case("a.csv", csv("one, two,good"), "line 42 has 3 cells but the first line names 2 columns"),
    "empty cells at the end": Case("a.csv", csv("one,good,,"), 41),
    "a row of empty cells": Case("a.csv", csv(","), 40, {"empty": 1}),
    "blank lines in CSV": Case("a.csv", b"\n" + csv("", "  ", ""), 40),
    "Windows line ends": Case("a.csv", csv(end="\r\n"), 40),
    "old line ends": Case("a.csv", csv(end="\r"), "it has a carriage return alone"),
    "quotes and commas": Case("a.csv", csv('"He said ""no"", twice",good'), 41),
    "a line break in a cell": Case("a.csv", csv('"one\r\ntwo",good'), 41),
    "an open quote": Case("a.csv", csv('"one,good'), "is not CSV"),
    "a lone quote between tabs": Case("a.tsv", csv('"one\tgood', header="text\tlabel", mark="\t"), 41),
    "semicolons": Case("a.csv", csv(header="text;label", mark=";"), 40),
    "a comma among semicolons": Case("a.csv", csv(header='text;label;"a, b, c, d"', mark=";"), 40),
    "a comma in a name": Case("a.csv", csv("one;good;", header="text;label;Dauer, Sekunden", mark=";"), 41),
    "Excel's own first line": Case("a.csv", b"sep=;\r\n" + csv(header="text;label", mark=";"), 40),
    "tabs in .csv": Case("a.csv", csv(header="text\tlabel", mark="\t"), 40),
    "a cell of a megabyte": Case("a.csv", csv(f"{'x' * 2**20},good"), 41),
    "words for nothing": Case("a.csv", csv("one,NA", "two,NA", "three,None", "four,nan", "five,null"), 42, {}),
    # Encodings and containers
    "an empty file": Case("a.csv", b"", "which is empty"),
    "only white space": Case("a.csv", b" \n\n", "it has no rows"),
    "Latin-1": Case(
        "a.csv", csv("caf\u00e9,good").replace(b"\xc3\xa9", b"\xe9"), "CP1252 -t UTF-8`, or save it anew as 'CSV UTF-8'"
    ),
    "UTF-16": Case("a.csv", csv().decode().encode("utf-16"), "is UTF-16 text: convert it"),
    "a NUL": Case("a.csv", csv("a\0b,good"), "holds a NUL byte"),
    "gzip": Case("a.csv.gz", gzip.compress(csv()), 40),
    "bzip2": Case("a.JSONL.BZ2", bz2.compress(jsonl(ROWS)), 40),
    "xz": Case("a.json.xz", lzma.compress(json.dumps(ROWS).encode()), 40),
    "gzip, cut short": Case("a.csv.gz", gzip.compress(csv())[:-20], "cannot be unpacked"),
    "gzip, spoilt": Case("a.csv.gz", gzip.compress(csv())[:30] + b"xyzxyz" * 20, "cannot be unpacked"),
    "xz, cut short": Case("a.csv.xz", lzma.compress(csv())[:-20], "cannot be unpacked"),
    "xz, spoilt": Case("a.csv.xz", lzma.compress(csv())[:20] + b"xyzxyz" * 20, "cannot be unpacked"),
    "gzip in name only": Case("a.csv.gz", csv(), "cannot be unpacked (Not a gzipped file"),
    "UTF-16 in gzip": Case("a.csv.gz", gzip.compress(csv().decode().encode("utf-16")), "is UTF-16 text: convert it"),
    "zstd": Case("a.csv.zst", b"x", "is packed: unpack it"),
    "Parquet in gzip": Case("a.parquet.gz", gzip.compress(b"PAR1"), "is packed: unpack it"),
    "gzip of something": Case("a.gz", gzip.compress(csv()), "is packed: unpack it"),
    "gzip under another name": Case("a.csv", gzip.compress(csv()), "is packed by gzip: unpack it"),
    "bzip2 under another name": Case("a.jsonl", bz2.compress(jsonl(ROWS)), "is packed by bzip2"),
    "xz under another name": Case("a.jsonl", lzma.compress(jsonl(ROWS)), "is packed by xz"),
    "a spreadsheet": Case("a.xlsx", archive("sheet.xml", b"x"), "is a spreadsheet: save it as CSV UTF-8"),
    "a translation memory": Case("a.tmx", b"<tmx></tmx>", "is a translation memory: export it as .tsv"),
    "a spreadsheet named .csv": Case("a.csv", archive("sheet.xml", b"x"), "is a zip archive or a spreadsheet"),
    "Parquet named .csv": Case("a.csv", parquet(pa.table(COLUMNS, ["text", "label"])), "is a Parquet file"),
    "a pointer of Git LFS": Case(
        "a.parquet", b"version https://git-lfs.github.com/spec/v1\noid 1\n", "pointer of Git LFS"
    ),
    "no ending": Case("data", jsonl(ROWS), "is none of .jsonl, .json, .csv, .tsv, .parquet"),
    # Parquet
    "Parquet": Case("a.parquet", parquet(pa.table(COLUMNS, ["text", "label"])), 40),
    "a doubled Parquet column": Case(
        "a.parquet", parquet(pa.table([*COLUMNS, COLUMNS[1]], ["text", "label", "label"])), "named 'label'"
    ),
    "categories": Case(
        "a.parquet", parquet(pa.table([COLUMNS[0], pa.array(COLUMNS[1]).dictionary_encode()], ["text", "label"])), 40
    ),
    "no rows": Case("a.parquet", parquet(pa.table([[], []], ["text", "label"])), "it has no rows"),
    "cut short": Case("a.parquet", parquet(pa.table(COLUMNS, ["text", "label"]))[:-20], "cannot be read as Parquet"),
    # Chats
    "chats": Case("a.jsonl", jsonl(CHATS), "set 'data.text_column' to 'messages.content', which joins"),
    "chats whose answer is the label": Case(
        "a.jsonl",
        jsonl({"messages": [{"content": row["text"]}, {"content": row["label"]}]} for row in ROWS),
        "set 'data.text_column' to 'messages.0.content' and 'data.label_column' to 'messages.1.content'",
    ),
    "labels in lists": Case("a.jsonl", jsonl({"text": row["text"], "label": [row["label"]]} for row in ROWS), 40),
    "one of the labels in a list": Case(
        "a.jsonl",
        jsonl({"text": row["text"], "label": [row["label"]]} for row in ROWS),
        40,
        {},
        {"label_column": "label.0"},
    ),
    "chats, joined": Case("a.jsonl", jsonl(CHATS), 40, {}, {"text_column": "messages.content"}),
    "no header, asked by number": Case(
        "a.csv", csv(header="a first text,good"), 41, {}, {"text_column": "1", "label_column": "2"}
    ),
    "no header in a .tsv": Case(
        "a.tsv",
        csv(header="a first text\tgood", mark="\t"),
        41,
        {},
        {"text_column": "1", "label_column": "2"},
    ),
    "no header, two columns": Case(
        "a.csv", csv(header="a first text,good"), 41, {}, {"text_column": "1+2", "label_column": "2"}
    ),
    "no header, one name twice": Case(
        "a.csv", csv(header="good,good"), 41, {}, {"text_column": "1", "label_column": "2"}
    ),
    "no header and no numbers": Case(
        "a.csv", csv(header="a text that is much too long to be the name of a column,good"), "number them where the"
    ),
    "a number that is a name": Case("a.csv", csv(header="1,label"), 40, {}, {"text_column": "1"}),
    "too large a number": Case("a.csv", csv(), "to one of 1, 2.", {}, {"text_column": "7", "label_column": "2"}),
    "two columns": Case("a.csv", csv(), 40, {}, {"text_column": "text + label"}),
    "two columns of Parquet": Case(
        "a.parquet", parquet(pa.table(COLUMNS, ["text", "label"])), 40, {}, {"text_column": "label+text"}
    ),
    "two columns, one of them wrong": Case(
        "a.csv", csv(), "set 'data.text_column' to one of text, label", {}, {"text_column": "title+text"}
    ),
    "two columns, one of them nested": Case(
        "a.jsonl", jsonl(CHATS), "holds lists or objects", {}, {"text_column": "label+messages"}
    ),
    "chats as text": Case("a.jsonl", jsonl(CHATS), "holds lists or objects", {}, {"text_column": "messages"}),
    "chats in Parquet": Case(
        "a.parquet", parquet(pa.Table.from_pylist(CHATS)), 40, {}, {"text_column": "messages.0.content"}
    ),
}


def write(folder: Path, case: Case) -> str:
    path = folder / case.name
    path.write_bytes(case.content)
    return str(path)


def assert_refused(case: Case, load: object, config: object) -> None:
    with pytest.raises(UserError) as caught:
        load(config)  # pyright: ignore[reportCallIssue]
    sentence = str(caught.value)
    assert str(case.result) in sentence
    assert "\n" not in sentence and sentence.endswith(".") and len(sentence) < 500


@pytest.mark.parametrize("case", LABELLED.values(), ids=LABELLED)
def test_labelled_text(case, tmp_path):
    settings = {"validation_examples": 5, "test_examples": 5, **case.settings}
    config = ClassificationDataConfig(source="local", path=write(tmp_path, case), **settings)
    if isinstance(case.result, str):
        assert_refused(case, load_labelled, config)
        return
    corpus = load_labelled(config)
    left_out = {reason: count for reason, count in corpus.skipped.items() if count}
    lost = left_out.pop("label without training examples", 0)
    assert len(corpus.train + corpus.validation + corpus.test) + lost >= case.result
    assert left_out == case.skipped


TURNS = [{"messages": [{"content": row["source"]}, {"content": row["target"]}]} for row in PAIRS]
NESTED = [{"translation": {"en": row["source"], "de": row["target"]}} for row in PAIRS]
CODED = [{**row, "source_language": "eng_Latn", "target_language": "pt-BR"} for row in PAIRS]

PARALLEL = {
    "a row without its target": Case("a.jsonl", jsonl(PAIRS, {"source": "x"}), 40, {"without 'target'": 1}),
    "null for a target": Case("a.jsonl", jsonl(PAIRS, {"source": "x", "target": None}), 40, {"missing side": 1}),
    "no row has the keys": Case("a.jsonl", jsonl([{"English": "x", "German": "y"}]), "to two of English, German"),
    "one column twice": Case("a.jsonl", jsonl(PAIRS), "are both 'source'", {}, {"target_column": "source"}),
    "a doubled column": Case("a.csv", b"source,target,source\na,b,c\n", "two columns named 'source'"),
    "only a header": Case("a.csv", b"source,target\n", "it has no rows"),
    "an object a row": Case(
        "a.jsonl", jsonl(NESTED), "one of translation.en, translation.de", {}, {"source_column": "translation"}
    ),
    "nested columns": Case(
        "a.jsonl", jsonl(NESTED), 40, {}, {"source_column": "translation.en", "target_column": "translation.de"}
    ),
    "chats": Case(
        "a.jsonl", jsonl(TURNS), "'data.source_column' to 'messages.0.content' and 'data.target_column' to 'messages.1"
    ),
    "turns of chats": Case(
        "a.jsonl", jsonl(TURNS), 40, {}, {"source_column": "messages.0.content", "target_column": "messages.1.content"}
    ),
    "codes of any kind": Case("a.jsonl", jsonl(CODED), 40, {}, {"pairs": ("en-pt-BR",)}),
    "a region that was not asked for": Case("a.jsonl", jsonl(CODED), 40, {}, {"pairs": ("en-pt",)}),
    "a row without codes": Case(
        "a.jsonl", jsonl(CODED, PAIRS[0]), 40, {"no language code": 1}, {"pairs": ("en-pt", "en-de")}
    ),
    "no codes for several pairs": Case(
        "a.jsonl",
        jsonl(PAIRS),
        "says which languages the file a.jsonl has (there is no 'source_language')",
        {},
        {"pairs": ("en-de", "en-fr")},
    ),
    "one column of codes": Case(
        "a.jsonl", jsonl([{**row, "target_language": "de"} for row in PAIRS]), "no 'source_language' in"
    ),
    "names for codes": Case(
        "a.jsonl",
        jsonl([{**row, "source_language": "English", "target_language": "German"} for row in PAIRS]),
        "40 no language code",
    ),
}


@pytest.mark.parametrize("case", PARALLEL.values(), ids=PARALLEL)
def test_parallel_text(case, tmp_path):
    settings = {"pairs": ("en-de",), "validation_sources": 5, "test_sources": 5, **case.settings}
    config = TranslationDataConfig(source="local", path=write(tmp_path, case), **settings)
    if isinstance(case.result, str):
        assert_refused(case, load_parallel, config)
        return
    corpus = load_parallel(config)
    assert len(corpus.train + corpus.validation + corpus.test) == case.result
    assert corpus.skipped == case.skipped


DOCUMENTS = {
    "a row without its text": Case("a.jsonl", jsonl(ROWS, {"body": "x"}), 40, {"without 'text'": 1}),
    "CSV": Case("a.csv", csv(), 40),
    "TSV": Case("a.tsv", csv(header="text\tlabel", mark="\t"), 40),
    "JSON": Case("a.json", json.dumps(ROWS).encode(), 40),
    "chats": Case("a.jsonl", jsonl(CHATS), "set 'data.text_column' to 'messages.content'"),
    "chats, joined": Case("a.jsonl", jsonl(CHATS), 40, {}, {"text_column": "messages.content"}),
    "paragraphs": Case("a.txt", b"\r\n\r\n".join(row["text"].encode() for row in ROWS), 40),
    "one endless line": Case("a.txt", b"\n\n".join([b"x" * 5_000_000, *(row["text"].encode() for row in ROWS)]), 42),
    "only white space": Case("a.txt", b"\n \n", "There is no text in the file a.txt (it has no rows)"),
    "paragraphs in gzip": Case("a.txt.gz", gzip.compress(b"\n\n".join(row["text"].encode() for row in ROWS)), 40),
    "only a header": Case("a.csv", b"text\n", "There is no text in the file a.csv (it has no rows)"),
    "no row has the key": Case("a.jsonl", jsonl([{"content": "x"}]), "No row of the file a.jsonl has 'text'"),
    "UTF-16": Case("a.txt", "plain text".encode("utf-16"), "is UTF-16 text"),
    "a PDF": Case("a.pdf", b"%PDF-1.7\n\xff", "is none of .txt"),
    "a PDF named .txt": Case("a.txt", b"%PDF-1.7\n\xff", "is a PDF: take the text out of it"),
}


@pytest.mark.parametrize("case", DOCUMENTS.values(), ids=DOCUMENTS)
def test_documents(case, tmp_path):
    config = DataConfig(source="local", path=write(tmp_path, case), validation_fraction=0.3, **case.settings)
    if isinstance(case.result, str):
        assert_refused(case, load_corpus, config)
        return
    corpus = load_corpus(config)
    assert len(corpus.train + corpus.validation) == case.result
    assert {reason: count for reason, count in corpus.skipped.items() if count} == case.skipped


def test_a_packed_list_that_is_spoilt_is_refused_in_a_folder_too(tmp_path):
    (tmp_path / "a.json.gz").write_bytes(b"no gzip")
    with pytest.raises(UserError, match=r"a.json.gz' cannot be unpacked .Not a gzipped file"):
        load_corpus(DataConfig(source="local", path=str(tmp_path)))


def test_a_folder_is_read_whatever_lies_beside_its_tables(tmp_path):
    """Halves in two formats, a description of the set in .json, a table of something else, and an empty file."""
    (tmp_path / "a.jsonl").write_bytes(jsonl(ROWS[:20]))
    (tmp_path / "b.json").write_bytes(json.dumps(ROWS[20:]).encode())
    (tmp_path / "dataset_info.json").write_bytes(b'{"features": []}')
    (tmp_path / "notes.csv").write_bytes(b"name,value\nsize,40\n")
    (tmp_path / "empty.csv").write_bytes(b"")
    (tmp_path / "folder.csv").mkdir()
    config = ClassificationDataConfig(source="local", path=str(tmp_path), validation_examples=5, test_examples=5)
    corpus = load_labelled(config)
    assert len(corpus.train) == 30
    assert {reason: count for reason, count in corpus.skipped.items() if count} == {"without 'text'": 1}
    assert "(1 of other kinds not read: .json)" in corpus.description
