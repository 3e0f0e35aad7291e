"""Rows of tables: each format, nested columns, and each way a file can be wrong."""

import itertools
import json
import math
from collections import Counter

import datasets
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mixtura.config import UserError
from mixtura.data.formats.rows import Row, find_cell
from mixtura.data.formats.table_files import file_rows, hub_rows, select

ROWS = [{"de": 'Er sagte "Hallo", dann ging er.', "en": 'He said "hello", then left.'}, {"de": '"Nein."', "en": "No."}]


def values(path, columns=("en", "de")) -> list[dict]:
    return [dict(row.values) for row in file_rows(path, columns)]


def test_all_formats_give_the_same_rows(tmp_path):
    frame = pd.DataFrame(ROWS)
    frame.to_csv(tmp_path / "a.csv", index=False)
    frame.to_csv(tmp_path / "a.tsv", index=False, sep="\t")
    frame.to_parquet(tmp_path / "a.parquet")
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    for kind in ("csv", "tsv", "parquet", "jsonl"):
        assert values(tmp_path / f"a.{kind}") == ROWS


def test_a_lone_quote_in_a_tsv_file_swallows_nothing(tmp_path):
    path = tmp_path / "a.tsv"
    path.write_text('en\tde\n"Hello, he said.\tHallo.\nYes."\tJa.\n')
    assert [row["en"] for row in values(path)] == ['"Hello, he said.', 'Yes."']


@pytest.mark.parametrize("columns", [["en", "de"], ["de", "en"]], ids=["first", "last"])
@pytest.mark.parametrize("text", ["one\ntwo", 'say ""\n\nthree\nfour', '\n"a" b'], ids=["two", "more", "marks"])
def test_a_cell_of_several_lines_in_a_tsv_file_is_refused(tmp_path, columns, text):
    path = tmp_path / "a.tsv"
    frame = pd.DataFrame([*ROWS, {"en": text, "de": "eins"}, *ROWS])
    frame[columns].to_csv(path, index=False, sep="\t")
    with pytest.raises(UserError, match=r"a.tsv' line 4 has a cell of several lines, .* save the table as .csv or"):
        values(path)


def test_quotation_marks_of_sentences_are_no_cells_of_several_lines(tmp_path):
    path = tmp_path / "a.tsv"
    path.write_text('en\tde\nHe said:\t"Er sagte:\nHello.\tHallo."\nBye."\nYes.\t"Ja.\nNo.\nOh\tOh\n')
    assert [row["en"] for row in values(path)] == ["He said:", "Hello.", 'Bye."', "Yes.", "No.", "Oh"]


def test_a_quote_left_open_is_no_cell_of_several_lines(tmp_path):
    path = tmp_path / "a.tsv"
    path.write_text('en\tde\nHello\tHallo\n"Come in, he said.\nBye\tTschuess\n')
    assert [(row["en"], row["de"]) for row in values(path)] == [
        ("Hello", "Hallo"),
        ('"Come in, he said.', None),
        ("Bye", "Tschuess"),
    ]
    path.write_text('en\tde\tnote\none\teins\t"left open\n5" disk\tzwei\nthree\tdrei\tz\n')
    assert [row["en"] for row in values(path)] == ["one", '5" disk', "three"]


def test_numbers_of_few_bits_are_as_they_would_be_written(tmp_path, monkeypatch):
    path = tmp_path / "a.parquet"
    columns = {kind: pa.array([1.1, None, float("nan")], kind()) for kind in (pa.float16, pa.float32, pa.float64)}
    pq.write_table(pa.table(list(columns.values()), names=["half", "single", "double"]), path)
    first, second, third = values(path, ("half", "single", "double"))
    assert first == {"half": 1.1, "single": 1.1, "double": 1.1} and set(second.values()) == {None}
    assert all(math.isnan(value) for value in third.values())
    features = datasets.Features({"label": datasets.Value("float32")})
    served = datasets.Dataset.from_dict({"label": [1.1, None]}, features=features).to_iterable_dataset()
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: served)
    assert [row.values for row in hub_rows("some/set", None, "train")] == [{"label": 1.1}, {"label": None}]


def test_a_quoted_line_break_stays_in_its_csv_cell(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text('en,de\n"one\ntwo",eins\n')
    assert values(path) == [{"en": "one\ntwo", "de": "eins"}]


def test_a_short_row_misses_its_last_cells(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("en,de\nhello\n")
    assert values(path) == [{"en": "hello", "de": None}]


def test_a_csv_row_with_too_many_cells_is_refused_with_its_line(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("en,de\nyes,ja\nhello, you,hallo\n")
    with pytest.raises(UserError, match=r"line 3 has 3 cells but the first line names 2 columns: quote cells"):
        values(path)


def test_an_unclosed_csv_quote_is_refused(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text('en,de\n"yes,ja\n')
    with pytest.raises(UserError, match="is not CSV"):
        values(path)


def test_a_dotted_column_looks_into_a_nested_one(tmp_path):
    path = tmp_path / "a.parquet"
    pd.DataFrame({"id": [1], "translation": [{"en": "yes", "de": "ja"}]}).to_parquet(path)
    (row,) = file_rows(path, ["translation.en"])
    assert find_cell(row, "translation.en") == (True, "yes")
    assert "id" not in row.values


CHAT = [
    {"role": "user", "content": "Is it late?"},
    {"role": "assistant", "content": [{"type": "text", "text": "It is"}, {"type": "image"}, {"text": "noon."}]},
    {"role": "tool", "content": None},
]
EXPRESSIONS = {
    "messages.content": (True, "Is it late?\nIt is\nnoon."),
    "messages.role": (True, "user\nassistant\ntool"),
    "messages.0.content": (True, "Is it late?"),
    "messages.-1.role": (True, "tool"),
    "messages.3.content": (False, None),
    "messages.name": (False, None),
    "columns.content": (True, "one\ntwo"),
    "dotted.name": (True, "as it stands"),
    "nobody": (False, None),
    "text.content": (False, None),
    "none.content": (True, ""),
    "dotted.name+text": (True, "as it stands\n\nplain"),
    "text + messages.0.content": (True, "plain\n\nIs it late?"),
    "none + text": (True, "plain"),
    "text+nobody": (False, "plain"),
    "text+messages": (True, CHAT),
    "number+null+text": (True, "3\n\nplain"),
    "a+b": (True, "a column"),
}


@pytest.mark.parametrize(("column", "found"), EXPRESSIONS.items(), ids=EXPRESSIONS)
def test_an_expression_flattens_chats(column, found):
    values = {
        "messages": CHAT,
        "columns": {"content": ["one", "two"]},  # how the hub gives a list of objects
        "dotted.name": "as it stands",
        "text": "plain",
        "none": [],
        "number": 3,
        "null": None,
        "a+b": "a column",
        "a": "not read",
    }
    assert find_cell(Row(values, "here"), column) == found


def picked(rows: list[dict], *columns: str, **keys: str) -> tuple[list[list[object]], Counter]:
    skipped: Counter[str] = Counter()
    wanted = keys or {f"data.{column}_column": column for column in columns}
    found = select([Row(row, "here") for row in rows], wanted, skipped, source="the file a.jsonl")
    return [values for _, values in found], skipped


def test_rows_without_a_column_are_left_out_and_counted_by_it():
    rows = [{"text": "a", "label": 1}, {"text": "b"}, {"label": 0}, {}, {"text": None, "label": None}]
    values, skipped = picked(rows, "text", "label")
    assert values == [["a", 1], [None, None]]
    assert skipped == {"without 'label'": 1, "without 'text'": 2}


def test_a_column_that_nearly_no_row_has_is_refused():
    rows = [{"text": "a"}, *({"body": "b"} for _ in range(149))]
    with pytest.raises(UserError, match=r"^Only 1 of the 150 rows of the file a.jsonl have 'text': set .* one of body"):
        picked(rows, "text")
    assert len(picked(rows[:100], "text")[0]) == 1


def test_no_endless_dataset_is_read_for_a_column_it_does_not_have(monkeypatch):
    monkeypatch.setattr("mixtura.data.formats.table_files.JUDGED_ROWS", 50)
    endless = (Row({"body": "b"}, "here") for _ in itertools.count())
    with pytest.raises(UserError, match="No row of some set has 'text'"):
        list(select(endless, {"data.text_column": "text"}, Counter(), source="some set"))


REFUSALS = {
    "all columns": (
        {"id": 1, "x": {"en": "a", "de": "b"}},
        ["source"],
        "'data.source_column' to one of id, x.en, x.de",
    ),
    "nearest": ({"Review": "a", "Sentiment": "b"}, ["sentiments"], "to 'Sentiment', the nearest of Review, Sentiment"),
    "case": ({"TEXT": "a"}, ["text"], "to 'TEXT', the nearest of TEXT"),
    "two": ({"a": 1, "b": 2}, ["source", "target"], "has 'source' or 'target': set 'data.source_column' and 'data.t"),
    "chat": ({"messages": CHAT}, ["text"], "set 'data.text_column' to 'messages.content', which joins"),
    "shared chat": ({"conversations": [{"value": "a"}]}, ["text"], "to 'conversations.value', which joins"),
    "chat pairs": ({"messages": CHAT}, ["source", "target"], "to 'messages.0.content' and .* 'messages.1.content'"),
    "a chat itself": ({"messages": CHAT}, ["messages"], "'messages' of .* is no text but holds lists or objects: set"),
    "an object itself": ({"x": {"en": "a"}, "y": 1}, ["x"], "'x' of .* objects: set 'data.x_column' to one of x.en.$"),
    "no header": (
        {"a sentence " * 20: 1},
        ["text"],
        "one of a sentence a sentence a sentence a se[.]{3} .or number them where",
    ),
    "nothing": ({}, ["text"], "to one of none"),
}


@pytest.mark.parametrize(("row", "columns", "message"), REFUSALS.values(), ids=REFUSALS)
def test_a_missing_column_is_refused_with_what_to_name_instead(row, columns, message):
    with pytest.raises(UserError, match=message) as caught:
        picked([row] * 3, *columns)
    assert "\n" not in str(caught.value)
