"""Units of aligned text, and which of them are held out or must leave training because of those.

A sentence is held out in all languages at once: a model that has seen the German of a test sentence has an advantage on
its French. A hash of the text chooses the side, so the choice depends neither on the order of the rows nor, but for the
last few, on what other rows there are.
"""

import hashlib
import sys
import unicodedata
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from functools import cache
from typing import NamedTuple


class Unit(NamedTuple):
    """One sentence, paragraph or verse in several languages."""

    texts: Mapping[str, object]
    """Language code to text; a row of a user's file may hold something else."""
    group: str | None = None
    """The units of a group, such as a book, are held out together; None is held out by itself."""
    bilingual: bool = False
    """Whether it is a row of exactly two languages, so that others are not counted as missing."""


def anchor_of(languages: Mapping[str, object]) -> str:
    """The language whose text names a unit: English if it is there, else the first by code.

    A row from German to English and one from English to German thus have one name.
    """
    return min(languages, key=lambda language: (language != "en", language))


@cache
def _separators() -> dict[int, str]:
    """Every character that is neither letter, mark nor digit, to a space."""
    categories = {code: unicodedata.category(chr(code)) for code in range(sys.maxunicode + 1)}
    return {code: " " for code, category in categories.items() if category in ("Cc", "Cf") or category[0] in "PSZ"}


def fold(text: str) -> str:
    """A text without case and spacing, in one of Unicode's forms: what only these tell apart is the same text."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def normalise(text: str) -> str:
    """A text reduced to letters and digits: texts with the same are near enough to be on one side, not always equal."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    return " ".join(folded.translate(_separators()).split()) or text.strip()


def text_hash(*texts: str) -> bytes:
    """A hash that shuffles texts the same way on every machine, in whatever order they come."""
    return hashlib.blake2b("\0".join(texts).encode(), digest_size=16).digest()


class Candidate(NamedTuple):
    """A cleaned pair, with the texts that decide which side it is on."""

    source: str
    target: str
    source_language: str
    target_language: str
    anchor: str
    """The normalised text that names its sentence in every direction."""
    group: str | None
    source_key: str
    """The normalised source; texts are equal where these are."""
    target_key: str


class Sides(NamedTuple):
    """Pairs by side."""

    train: list[Candidate]
    validation: list[Candidate]
    test: list[Candidate]


class _Key(NamedTuple):
    """A sentence to hold out: its anchor within its group, which is the anchor itself where there are no groups."""

    group: str
    anchor: str


def hold_out(
    candidates: Sequence[Candidate],
    *,
    num_validation: int,
    num_test: int,
    skipped: Counter[str],
    groups: Collection[str] | None = None,
) -> Sides:
    """Splits pairs so that no text of a held-out pair is in training, in any language or direction.

    Args:
        candidates: pairs without duplicates.
        num_validation: sentences to hold out for validation, each in every direction it has.
        num_test: sentences to hold out for the test.
        skipped: gets the pairs that belong to no side, by reason.
        groups: the groups that may be held out; None allows all. What is in the group of a held-out sentence is never
            trained on.
    """
    keys = sorted(
        {_key(candidate) for candidate in candidates if groups is None or candidate.group in groups},
        key=lambda key: (text_hash(key.group), text_hash(key.anchor)),
    )
    test_keys, rest = _take_groups(keys, num_test)
    validation_keys, _ = _take_groups(rest, num_validation)
    closed_groups = {key.group for key in test_keys | validation_keys}

    test = list(_one_translation(candidates, test_keys, skipped))
    test_texts = _texts(test)
    test_anchors = {key.anchor for key in test_keys}
    validation: list[Candidate] = []
    for candidate in _one_translation(candidates, validation_keys, skipped):
        if _shares(candidate, test_anchors, test_texts):
            skipped["validation equal to test"] += 1
        else:
            validation.append(candidate)
    held_out_texts = test_texts | _texts(validation)
    held_out_anchors = test_anchors | {key.anchor for key in validation_keys}
    train: list[Candidate] = []
    for candidate in candidates:
        key = _key(candidate)
        if key in test_keys or key in validation_keys:
            continue
        if key.group in closed_groups:
            skipped["in a held-out book"] += 1
        elif _shares(candidate, held_out_anchors, held_out_texts):
            skipped["equal to held-out text"] += 1
        else:
            train.append(candidate)
    return Sides(train, validation, test)


def _key(candidate: Candidate) -> _Key:
    return _Key(candidate.anchor if candidate.group is None else candidate.group, candidate.anchor)


def _take_groups(keys: list[_Key], number: int) -> tuple[set[_Key], list[_Key]]:
    """The first `number` keys, and the keys of the groups that were not begun."""
    taken = set(keys[:number])
    begun = {key.group for key in taken}
    return taken, [key for key in keys if key.group not in begun]


def _one_translation(
    candidates: Iterable[Candidate], keys: Collection[_Key], skipped: Counter[str]
) -> Iterator[Candidate]:
    """Held-out pairs, a source sentence only once in each direction, so that each counts the same in a score."""
    chosen: dict[tuple[str, str, str], Candidate] = {}
    for candidate in candidates:
        if _key(candidate) not in keys:
            continue
        place = (candidate.source_language, candidate.target_language, candidate.source_key)
        other = chosen.get(place)
        if other is not None:
            skipped["another translation of a held-out sentence"] += 1
        if other is None or _order(candidate) < _order(other):
            chosen[place] = candidate
    return iter(chosen.values())


def _order(candidate: Candidate) -> bytes:
    return text_hash(candidate.source, candidate.target)


def _texts(pairs: Iterable[Candidate]) -> set[str]:
    return {key for pair in pairs for key in (pair.source_key, pair.target_key)}


def _shares(candidate: Candidate, anchors: Collection[str], texts: Collection[str]) -> bool:
    return candidate.anchor in anchors or candidate.source_key in texts or candidate.target_key in texts
