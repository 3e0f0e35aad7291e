"""Labelled text that is no table: folders of texts and lines with their labels in them."""

import os
from pathlib import Path

import pytest

from mixtura.config import ClassificationDataConfig, UserError
from mixtura.data.labelled import LabelledCorpus, load_labelled


def load(path: Path) -> LabelledCorpus:
    return load_labelled(
        ClassificationDataConfig(source="local", path=str(path), validation_examples=3, test_examples=3)
    )


def named(corpus: LabelledCorpus) -> dict[str, set[str]]:
    sides = (corpus.train, corpus.validation, corpus.test)
    return {each.text: {corpus.labels[label] for label in each.labels} for side in sides for each in side}


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def test_a_folder_of_texts_for_each_class_is_read(tmp_path):
    """The layout of IMDb's reviews, with what nobody labelled and a list of addresses beside the texts."""
    texts = {}
    for side in ("train", "test"):
        for label in ("pos", "neg"):
            for number in range(10):
                texts[f"{side} {label} {number}\n\nsecond"] = {label}
                write(tmp_path / side / label / f"{number}_7.txt", f"{side} {label} {number}<br /><br />second\n")
    write(tmp_path / "train/unsup/0_0.txt", "unlabelled")
    write(tmp_path / "urls.txt", "http://somewhere")
    corpus = load(tmp_path)
    assert named(corpus) == texts
    assert corpus.skipped["no label"] == 1 and "in 2 folders" in corpus.description
    assert len(named(load(tmp_path / "train"))) == 20


def test_lines_with_their_label_are_read(tmp_path):
    """The format of fastText, whose labels may stand anywhere in a line."""
    lines = [f"__label__{'good' if i % 2 else 'bad'} example {i} here" for i in range(30)]
    corpus = load(write(tmp_path / "a.txt", "\n".join([*lines, "", "tail __label__good", "no label here"])))
    assert named(corpus)["example 4 here"] == {"bad"} and named(corpus)["tail"] == {"good"}
    assert not corpus.several and corpus.skipped["no label"] == 1
    assert corpus.description.startswith("the file a.txt, 2 classes")


def test_a_line_may_have_several_labels(tmp_path):
    lines = [f"__label__{i % 2} __label__{2 + i % 3} example {i}" for i in range(30)]
    corpus = load(write(tmp_path / "texts/a.txt", "\n".join([*lines, "nothing"])).parent)
    assert corpus.several and named(corpus)["example 5"] == {"1", "4"} and named(corpus)["nothing"] == set()


def test_tables_come_before_texts(tmp_path):
    write(tmp_path / "notes/readme.txt", "not read")
    write(tmp_path / "a.csv", "text,label\n" + "".join(f"example {i},{i % 2}\n" for i in range(20)))
    corpus = load(tmp_path)
    assert len(named(corpus)) == 20 and "(1 of other kinds not read: .txt)" in corpus.description


def test_folders_of_classes_come_before_a_table_of_something_else(tmp_path):
    texts = {f"{label} {number}": {label} for label in ("pos", "neg") for number in range(10)}
    for text, (label,) in texts.items():
        write(tmp_path / label / f"{text}.txt", text)
    write(tmp_path / "meta.json", '[{"name": "mine", "size": 20}]')
    write(tmp_path / "broken.json", "[{")
    corpus = load(tmp_path)
    assert named(corpus) == texts and "20 texts in 2 folders" in corpus.description
    assert "(2 of other kinds not read: .json)" in corpus.description
    write(tmp_path / "a.csv", "text,label\n" + "".join(f"example {i},{i % 2}\n" for i in range(20)))
    (tmp_path / "broken.json").unlink()
    assert set(corpus.labels) & set(load(tmp_path).labels) == set()


def test_a_folder_is_walked_once(tmp_path, monkeypatch):
    write(tmp_path / "a.csv", "text,label\n" + "".join(f"example {i},{i % 2}\n" for i in range(20)))
    walks, walk = [], os.walk
    monkeypatch.setattr(os, "walk", lambda *args, **rest: walks.append(args) or walk(*args, **rest))
    assert len(named(load(tmp_path))) == 20 and len(walks) == 1


def test_a_text_without_labels_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"a.txt' has no labels: give a table, a folder of texts for each class, or"):
        load(write(tmp_path / "a.txt", "plain text\n"))
    with pytest.raises(UserError, match=r"All 1 examples of 1 texts in 1 folders of .* have the label 'one'"):
        load(write(tmp_path / "more/one/a.txt", "plain text\n").parents[1])
