"""Labelled text: classes, what is left out, and the held-out split."""

import json
from pathlib import Path

import datasets
import pandas as pd
import pytest

from mixtura.config import ClassificationDataConfig, UserError
from mixtura.data.held_out import normalise
from mixtura.data.labelled import LabelledCorpus, load_labelled


def rows(number: int = 60, labels: tuple[object, ...] = ("bad", "good")) -> list[dict]:
    return [{"text": f"example {i} of {number}", "label": labels[i % len(labels)]} for i in range(number)]


def load(path: Path, lines: list[dict], **changes: object) -> LabelledCorpus:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    settings = {"validation_examples": 10, "test_examples": 10, **changes}
    return load_labelled(ClassificationDataConfig(source="local", path=str(path), **settings))  # pyright: ignore[reportArgumentType]


def sides(corpus: LabelledCorpus) -> list[set[str]]:
    return [{normalise(example.text) for example in side} for side in (corpus.train, corpus.validation, corpus.test)]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "a.jsonl"


def test_sides_have_the_sizes_asked_for_and_share_no_text(path):
    corpus = load(path, rows())
    train, validation, test = sides(corpus)
    assert (len(train), len(validation), len(test)) == (40, 10, 10)
    assert not train & test and not train & validation and not validation & test
    assert corpus.labels == ("bad", "good")
    assert "2 classes (training: bad " in corpus.description


def test_labels_keep_their_texts(path):
    corpus = load(path, rows())
    for example in corpus.train:
        assert corpus.labels[example.label] == ("bad", "good")[int(example.text.split()[1]) % 2]


def test_whole_numbers_and_their_text_are_the_same_class_sorted_by_value(path):
    corpus = load(path, rows(labels=(10, "2", 2.0, "10", -1, "-1.0", 0.5)))
    assert corpus.labels == ("-1", "0.5", "2", "10")


def test_the_split_does_not_depend_on_the_order_of_the_rows(path):
    assert load(path, rows()) == load(path, rows()[::-1])


def test_every_bad_row_is_counted_by_its_reason(path):
    bad = [
        {"text": None, "label": "bad"},
        {"text": " ", "label": "bad"},
        {"text": "no label", "label": None},
        {"text": "no number", "label": float("nan")},
        {"label": "bad"},
        {"text": "no key"},
        {"text": "EXAMPLE\u00a00  of 60 ", "label": "bad"},
        {"text": "example 1 of 60", "label": "bad"},
    ]
    corpus = load(path, rows() + bad)
    expected = {"contradictory labels": 2, "duplicate": 1, "empty": 1, "no label": 2, "not text": 1}
    expected |= {"without 'label'": 1, "without 'text'": 1}
    assert corpus.skipped == expected
    assert all(f"{count} {reason}" in corpus.description for reason, count in expected.items())
    assert sum(map(len, sides(corpus))) + sum(expected.values()) == 68


def test_max_examples_is_a_fixed_choice_for_training_alone(path):
    whole, part = load(path, rows()), load(path, rows(), max_examples=20)
    assert part.train == whole.train[:20]
    assert part.test == whole.test
    assert part.skipped["beyond max_examples"] == 20


MISTAKES = {
    "one class": (rows(labels=("good",)), {}, r"All 60 examples of the file a.jsonl have the label 'good'"),
    "no label column": (
        rows(),
        {"label_column": "stars"},
        r"No row of the file a.jsonl has 'stars': set 'data.label_column' to one of text, lab",
    ),
    "no text column": (rows(), {"text_column": "review"}, r"set 'data.text_column' to one of text, label"),
    "no text": ([{"text": "", "label": 1}], {}, r"No example is left of the file a.jsonl .1 empty"),
    "too few": (rows(20), {}, r"The file a.jsonl has 20 usable examples, but .* give more or lower these"),
}


@pytest.mark.parametrize(("lines", "changes", "message"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_refused_in_one_sentence(path, lines, changes, message):
    with pytest.raises(UserError, match=message) as caught:
        load(path, lines, **changes)
    assert "\n" not in str(caught.value)


def test_a_class_without_training_examples_is_refused(path):
    held_out = load(path, rows()).test[0].text
    lines = [{**line, "label": "bad" if line["text"] == held_out else "good"} for line in rows()]
    with pytest.raises(UserError, match=r"No training example of the file a.jsonl has the label 'bad'"):
        load(path, lines)


def test_hub_sets_with_other_names_are_mapped_by_two_keys(monkeypatch):
    def stream():
        yield from ({"sentence": row["text"], "stars": i % 3} for i, row in enumerate(rows()))

    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: datasets.IterableDataset.from_generator(stream))
    config = ClassificationDataConfig(
        source="hub",
        name="some/set",
        text_column="sentence",
        label_column="stars",
        validation_examples=5,
        test_examples=5,
    )
    corpus = load_labelled(config)
    assert corpus.labels == ("0", "1", "2")
    assert len(corpus.train) == 50


def test_movie_reviews_are_clean_and_in_the_part_asked_for(monkeypatch):
    frame = pd.DataFrame(
        {
            "text": [f"film {i}\nfine" for i in range(60)],
            "label": [i % 2 for i in range(60)],
            "source": ["imdb"] * 40 + ["rotten_tomatoes"] * 20,
        }
    )
    monkeypatch.setattr("mixtura.data.labelled.read_movie_reviews", lambda: frame)
    corpus = load_labelled(ClassificationDataConfig(part="imdb", validation_examples=5, test_examples=5))
    assert corpus.labels == ("negative", "positive")
    assert len(corpus.train) == 30
    assert "IMDb, package movie-reviews" in corpus.description


def test_a_class_that_nobody_could_learn_is_left_out_and_counted(path):
    lines = rows()
    whole = load(path, lines)
    rare = {whole.test[0].text, whole.validation[0].text}
    corpus = load(path, [{**line, "label": "rare" if line["text"] in rare else line["label"]} for line in lines])
    assert corpus.labels == ("bad", "good") and corpus.unlearnt == ("rare",)
    assert corpus.skipped["label without training examples"] == 2
    assert (len(corpus.validation), len(corpus.test)) == (9, 9) and corpus.train == whole.train


def test_a_column_of_texts_is_no_column_of_labels(path):
    lines = [{**line, "id": f"row {i}"} for i, line in enumerate(rows())]
    with pytest.raises(UserError, match=r"'id' of the file a.jsonl has 60 different labels in 60 examples"):
        load(path, lines, label_column="id")
    with pytest.raises(UserError, match=r"'data.text_column' and 'data.label_column' are both 'text': name two"):
        load(path, lines, label_column="text")


def test_texts_that_only_symbols_tell_apart_are_texts_of_their_own(path):
    languages, faces = ("C", "C++", "C#", "Go", "Rust"), "\U0001f600\U0001f621"
    lines = [{"text": f"{i} ways to sort in {name}", "label": name} for i in range(48) for name in languages]
    lines += [{"text": f"the food in town {i} {face}", "label": face} for i in range(20) for face in faces]
    lines += [{"text": f"{i} {sign} {i + 1}", "label": sign} for i in range(20) for sign in "<>"]
    corpus = load(path, lines)
    assert set(corpus.labels) == {*languages, *faces, "<", ">"} and corpus.unlearnt == ()
    assert (corpus.skipped["contradictory labels"], corpus.skipped["duplicate"]) == (0, 0)
    assert [len(side) for side in (corpus.test, corpus.validation, corpus.train)] == [10, 10, 300]
    train, validation, test = sides(corpus)
    assert not train & test and not train & validation and not validation & test


def test_of_texts_with_one_label_that_only_punctuation_tells_apart_one_is_kept(path):
    lines = [*rows(), {"text": "Example 0, of 60!", "label": rows()[0]["label"]}]
    corpus = load(path, lines)
    assert (corpus.skipped["contradictory labels"], corpus.skipped["duplicate"]) == (0, 1)
    assert sum(map(len, (corpus.train, corpus.validation, corpus.test))) == len(rows())


def test_texts_that_case_and_spacing_tell_apart_are_one_text(path):
    lines = [*rows(), {"text": "Example\u00a00\nof 60", "label": "bad"}, {"text": "EXAMPLE 1 of 60", "label": "bad"}]
    corpus = load(path, lines)
    assert (corpus.skipped["contradictory labels"], corpus.skipped["duplicate"]) == (2, 1)


def test_near_equals_that_no_side_has_room_for_are_trained_on_or_refused(path):
    many = [{"text": f"same{mark}", "label": place % 2} for place, mark in enumerate("!?.,;:+-*/%<>")]
    corpus = load(path, [*rows(), *many])
    assert {line["text"] for line in many} <= {example.text for example in corpus.train}
    with pytest.raises(UserError, match=r"has 13 usable examples, too many of them equal but for punctua") as caught:
        load(path, many, validation_examples=2, test_examples=2)
    assert "\n" not in str(caught.value)


def test_a_class_that_cleaning_took_whole_is_named(path):
    worst = [{"text": f"example {i} of 60", "label": "worst"} for i in (0, 2)]
    corpus = load(path, [*rows(), *worst, {"text": "", "label": "none"}])
    assert corpus.labels == ("bad", "good") and corpus.unlearnt == ("none", "worst")
    assert corpus.skipped["contradictory labels"] == 4
    contradicting = [{**line, "label": label} for line in rows() for label in ("bad", "good")]
    only = [{"text": f"only {i}", "label": "bad"} for i in range(30)]
    with pytest.raises(UserError, match=r"that are left .120 contradictory labels. have the label 'bad'"):
        load(path, [*contradicting, *only])


LABELS = {
    "text": ["a", "b"],
    "unicode": ["caf\u00e9", "cafe\u0301", "th\u00e9"],
    "whole numbers": [1, 2, 10],
    "whole numbers in a table with gaps": [1.0, 2.0, None],
    "numbers": [0.5, 1.5, -2.25],
    "zeros": [0.0, -0.0, 1.0],
    "both": [1, 2.5],
    "truth": [True, False],
    "numbers as text": ["1", "1.0", "01", "1.50", "1.5", "1.0.3"],
    "words for nothing": ["None", "nan", "NA", "null"],
    "odd": ["a/b", "..", "<b>x</b>", "\N{GRINNING FACE}", "a,b", 'say "x"', "x" * 300, "-", "--1", "$HOME", "a\nb"],
    "white space": [" a ", "a", "b\u00a0c", "b c"],
}


@pytest.mark.parametrize("labels", LABELS.values(), ids=LABELS)
def test_labels_are_the_same_in_every_format(tmp_path, labels):
    frame = pd.DataFrame(
        {"text": [f"example {i}" for i in range(60)], "label": [labels[i % len(labels)] for i in range(60)]}
    )
    frame.to_csv(tmp_path / "a.csv", index=False)
    frame.to_csv(tmp_path / "a.tsv", index=False, sep="\t")
    frame.to_json(tmp_path / "a.jsonl", orient="records", lines=True)
    frame.to_json(tmp_path / "a.json", orient="records")
    frame.to_parquet(tmp_path / "a.parquet")
    kinds = ["csv", "jsonl", "json", "parquet", *(["tsv"] if not any("\n" in str(label) for label in labels) else [])]
    settings = {"validation_examples": 5, "test_examples": 5}
    found = [
        load_labelled(ClassificationDataConfig(source="local", path=str(tmp_path / f"a.{kind}"), **settings))
        for kind in kinds
    ]
    assert len({(corpus.labels, tuple(corpus.train), tuple(corpus.test)) for corpus in found}) == 1


def test_a_number_of_a_json_file_is_the_label_that_a_csv_cell_is(tmp_path):
    numbers = ["1e5", "1E+2", "0.0000001", "1.50", "-0.0", "2e-400"]
    labels = [numbers[i % len(numbers)] for i in range(60)]
    rows = [f'{{"text": "example {i}", "label": {label}}}' for i, label in enumerate(labels)]
    (tmp_path / "a.jsonl").write_text("\n".join(rows))
    cells = [f"example {i},{label}" for i, label in enumerate(labels)]
    (tmp_path / "a.csv").write_text("\n".join(["text,label", *cells]))
    settings = {"validation_examples": 5, "test_examples": 5}
    json_labels, csv_labels = (
        load_labelled(ClassificationDataConfig(source="local", path=str(tmp_path / name), **settings)).labels
        for name in ("a.jsonl", "a.csv")
    )
    assert json_labels == csv_labels == tuple(sorted({*numbers, "0"} - {"-0.0"}))


SEVERAL = [[], ["b"], ["b", "a"], ["a", "a"], ["c"]]
JOINED = ["", "b", "b| a", "a||a", "c"]


def several(cells: list[object], column: str = "label") -> list[dict]:
    return [{"text": f"example {i}", column: cells[i % len(cells)]} for i in range(60)]


def sets(corpus: LabelledCorpus) -> set[tuple[str, ...]]:
    return {tuple(corpus.labels[label] for label in of.labels) for of in corpus.train}


def test_lists_separators_and_columns_of_flags_are_the_same_labels(path, tmp_path):
    listed = load(path, several(SEVERAL))
    assert listed.several and listed.labels == ("a", "b", "c")
    assert sets(listed) == {(), ("b",), ("a", "b"), ("a",), ("c",)}
    assert (
        "3 labels (training: a 32.5 %, b 45.0 %, c 22.5 %; 1.00 labels a text, 17.5 % without any)"
        in listed.description
    )
    pd.DataFrame(several(JOINED)).to_csv(tmp_path / "joined.csv", index=False)
    flags = [{"text": row["text"], **{name: int(name in row["label"]) for name in "cab"}} for row in several(SEVERAL)]
    pd.DataFrame(flags).to_csv(tmp_path / "flags.csv", index=False)
    held_out = {"validation_examples": 10, "test_examples": 10}
    for name, keys in (("joined", {"label_separator": "|"}), ("flags", {"label_columns": ("a", "b", "c")})):
        config = ClassificationDataConfig(source="local", path=str(tmp_path / f"{name}.csv"), **keys, **held_out)
        corpus = load_labelled(config)
        assert (corpus.labels, corpus.train, corpus.test) == (listed.labels, listed.train, listed.test)


def test_a_lone_label_beside_lists_is_a_list_of_one_and_bad_lists_are_counted(path):
    bad = [{"text": "null", "label": None}, {"text": "hole", "label": ["a", None]}, {"text": "deep", "label": [["a"]]}]
    corpus = load(path, several([["a"], ["a", "b"], "b"]) + bad)
    assert sets(corpus) == {("a",), ("a", "b"), ("b",)} and corpus.skipped["no label"] == 3


def test_some_lists_among_classes_are_left_out_as_before(path):
    corpus = load(path, [*rows(), {"text": "odd", "label": ["good"]}])
    assert not corpus.several and corpus.skipped["label is a list"] == 1


SEVERAL_MISTAKES = {
    "separator that is nowhere": (several(["a", "b"]), {"label_separator": ";"}, r"is ';', which no cell of 'label'"),
    "flags that are none": (
        [{"text": f"example {i}", "a": i % 2, "b": i % 3} for i in range(60)],
        {"label_columns": ("a", "b")},
        r"'b' of the file a.jsonl has '2', but a column of 'data.label_columns' has 1 for texts with that label and 0",
    ),
    "a flag column that is missing": (
        [{"text": f"example {i}", "toxic": i % 2, "rude": i % 2} for i in range(60)],
        {"label_columns": ("toxic", "rud")},
        r"set 'data.label_columns\[1\]' to 'rude'",
    ),
    "lists as text": (
        several(["['a']", "['a', 'b']"]),
        {},
        r"has lists that are written as text, such as \['a', 'b'\]",
    ),
    "the same labels everywhere": (several([["a", "b"]]), {}, r"All 60 examples .* have the label 'a, b'"),
    "no label anywhere": (several([[]]), {}, r"All 60 examples .* have no label"),
}


@pytest.mark.parametrize(("lines", "changes", "message"), SEVERAL_MISTAKES.values(), ids=SEVERAL_MISTAKES)
def test_a_mistake_in_several_labels_is_refused_in_one_sentence(path, lines, changes, message):
    with pytest.raises(UserError, match=message) as caught:
        load(path, lines, **changes)
    assert "\n" not in str(caught.value)
