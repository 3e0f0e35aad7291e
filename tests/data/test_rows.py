"""Rows of tables: each format, nested columns, and each way a file can be wrong."""

import json

import pandas as pd
import pytest

from mixtura.config import UserError
from mixtura.data.rows import Row, cell, file_rows

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
    assert cell(row, "translation.en", key="data.source_column") == "yes"
    assert "id" not in row.values


def test_a_missing_column_is_refused_with_all_columns_nested_ones_too():
    row = Row({"id": 1, "translation": {"en": "yes", "de": "ja"}}, "'a.jsonl' line 1")
    with pytest.raises(
        UserError, match=r"no 'source' in 'a.jsonl' line 1: set 'data.source_column' to one of id, tran"
    ):
        cell(row, "source", key="data.source_column")
    with pytest.raises(UserError, match=r"translation.en, translation.de"):
        cell(row, "translation.fr", key="data.source_column")
