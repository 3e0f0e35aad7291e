"""Parallel text: sentence pairs with the directions of a recipe, cleaned, counted, and held out by sentence.

Every row ends in exactly one place: a side, or a reason in `skipped`. Reasons are counted for each direction.
"""

import dataclasses
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import NamedTuple, TypeGuard

from mixtura.config import TranslationDataConfig, UserError
from mixtura.config.languages import Pair, parse_pairs
from mixtura.config.requests import MOST_CHARACTERS, MOST_SOURCES, common_length, held_out_sources
from mixtura.data.held_out import Candidate, Sides, Unit, anchor_of, hold_out, normalise, text_hash
from mixtura.data.parallel_sources import Source, open_source
from mixtura.errors import is_utf8

# A hub dataset may have many millions of rows: with `max_pairs` it is read until there are so many times as many usable
# pairs of each direction as are wanted, and the choice is made among those.
HUB_CHOICE = 4


class SentencePair(NamedTuple):
    """A sentence and its translation."""

    source: str
    target: str
    source_language: str
    target_language: str

    @property
    def pair(self) -> str:
        """The direction, such as "en-de"."""
        return f"{self.source_language}-{self.target_language}"


@dataclass(frozen=True)
class ParallelCorpus:
    """Sentence pairs of a run, held out by sentence in all languages at once."""

    train: list[SentencePair]
    """Shuffled, all directions mixed."""
    validation: list[SentencePair]
    """Sentence by sentence, each in all directions it has, so that any number of the first ones covers all alike."""
    test: list[SentencePair]
    """Ordered like `validation`."""
    description: str
    """One phrase for reports: source, directions, what was skipped."""
    skipped: dict[str, int]
    """Pairs and rows left out, by reason."""
    counts: dict[str, dict[str, int]]
    """Pairs by direction and side: counts["en-de"]["train"]."""
    config: TranslationDataConfig
    """The configuration that was read, with the numbers of held-out sentences filled in."""


def load_parallel(config: TranslationDataConfig) -> ParallelCorpus:
    """Reads the sentence pairs of a recipe, cleans them, and holds some out.

    Raises:
        UserError: the source is missing or unreadable, has not the languages or columns, or too few pairs are left.
    """
    pairs = parse_pairs(config.pairs)
    skipped: Counter[str] = Counter()
    source = open_source(config, pairs, skipped)
    candidates, is_cut = _candidates(source, config, pairs, skipped)
    description = f"{source.description}, {', '.join(map(str, pairs))}"
    if is_cut:
        description += f", read as far as {HUB_CHOICE} times 'data.max_pairs' needs"
    if not candidates:
        raise UserError(_nothing_left(description, config, skipped))
    if config.max_characters is None:
        return load_parallel(dataclasses.replace(config, max_characters=_common_characters(candidates)))
    config = held_out_sources(config, _num_sources(candidates, source.groups))
    sides = hold_out(
        candidates,
        num_validation=config.validation_sources or 0,
        num_test=config.test_sources or 0,
        skipped=skipped,
        groups=source.groups,
    )
    sides = sides._replace(train=_choose(sides.train, config.max_pairs, skipped))
    _check_sides(sides, description, config, candidates, skipped)
    held_out = " and ".join(
        f"{len({pair.anchor for pair in side}):,} {name}"
        for name, side in zip(("validation", "test"), sides[1:], strict=True)
    )
    description += f", {held_out} sentences held out"
    reasons = ", ".join(f"{count:,} {reason}" for reason, count in sorted(skipped.items()) if count)
    return ParallelCorpus(
        *(list(map(_sentence_pair, side)) for side in (sides.train, *map(_in_order, sides[1:]))),
        description=description + (f"; pairs skipped: {reasons}" if reasons else ""),
        skipped={reason: count for reason, count in sorted(skipped.items()) if count},
        counts=_counts(sides, pairs),
        config=config,
    )


def _common_characters(candidates: list[Candidate]) -> int:
    """The length that nearly all sentences stay within."""
    return common_length([max(len(pair.source), len(pair.target)) for pair in candidates], most=MOST_CHARACTERS)


def _num_sources(candidates: list[Candidate], groups: tuple[str, ...] | None) -> int:
    """The number of different sentences that may be held out."""
    return len({pair.anchor for pair in candidates if groups is None or pair.group in groups})


def _candidates(
    source: Source, config: TranslationDataConfig, pairs: tuple[Pair, ...], skipped: Counter[str]
) -> tuple[list[Candidate], bool]:
    """Cleaned pairs without duplicates, and whether reading stopped before the end of a hub dataset."""
    wanted = float("inf")
    if config.source == "hub" and config.max_pairs is not None:
        validation, test = config.validation_sources, config.test_sources
        held_out = sum(most if n is None else n for n, most in zip((validation, test), MOST_SOURCES, strict=True))
        wanted = HUB_CHOICE * (config.max_pairs + held_out)
    seen: dict[Pair, set[tuple[str, str]]] = {pair: set() for pair in pairs}
    candidates: list[Candidate] = []
    for unit in source.units:
        for pair, candidate in _clean(unit, config, pairs, skipped):
            if (candidate.source, candidate.target) in seen[pair]:
                skipped["duplicate"] += 1
                continue
            seen[pair].add((candidate.source, candidate.target))
            candidates.append(candidate)
        if all(len(texts) >= wanted for texts in seen.values()):
            return candidates, True
    return candidates, False


def _clean(
    unit: Unit, config: TranslationDataConfig, pairs: tuple[Pair, ...], skipped: Counter[str]
) -> Iterator[tuple[Pair, Candidate]]:
    """The pairs of a unit in every direction that was asked for and that it has."""
    texts = {language: " ".join(text.split()) for language, text in unit.texts.items() if _is_text(text)}
    usable = []
    for pair in pairs:
        known = (pair.source in unit.texts, pair.target in unit.texts)
        if all(known) if unit.bilingual else any(known):
            fault = _fault(texts, pair, config.max_characters)
            if fault is None:
                usable.append(pair)
            else:
                skipped[fault] += 1
    if not usable:
        return
    name = anchor_of(texts)
    keys = {language: normalise(texts[language]) for language in {name, *(code for pair in usable for code in pair)}}
    for pair in usable:
        source_key, target_key = keys[pair.source], keys[pair.target]
        if source_key == target_key:
            skipped["untranslated"] += 1
            continue
        sides = (texts[pair.source], texts[pair.target], pair.source, pair.target)
        yield pair, Candidate(*sides, keys[name], unit.group, source_key, target_key)


def _is_text(value: object) -> TypeGuard[str]:
    """Whether it is text that UTF-8 can hold, which a lone surrogate is not."""
    return isinstance(value, str) and is_utf8(value)


def _fault(texts: dict[str, str], pair: Pair, max_characters: int | None) -> str | None:
    """Why a pair cannot be used; None when it can."""
    if pair.source not in texts or pair.target not in texts:
        return "missing side"
    lengths = (len(texts[pair.source]), len(texts[pair.target]))
    if min(lengths) == 0:
        return "empty side"
    return "too long" if max_characters is not None and max(lengths) > max_characters else None


def _choose(train: Iterable[Candidate], max_pairs: int | None, skipped: Counter[str]) -> list[Candidate]:
    """The training pairs, shuffled by hash; of each direction only the first `max_pairs`."""
    taken: Counter[tuple[str, str]] = Counter()
    chosen = []
    for candidate in sorted(train, key=lambda pair: text_hash(*pair[:4])):
        direction = (candidate.source_language, candidate.target_language)
        if max_pairs is not None and taken[direction] >= max_pairs:
            skipped["beyond max_pairs"] += 1
            continue
        taken[direction] += 1
        chosen.append(candidate)
    return chosen


def _in_order(side: list[Candidate]) -> list[Candidate]:
    return sorted(side, key=lambda pair: (text_hash(pair.anchor), *pair[:4]))


def _sentence_pair(candidate: Candidate) -> SentencePair:
    return SentencePair(*candidate[:4])


def _counts(sides: Sides, pairs: tuple[Pair, ...]) -> dict[str, dict[str, int]]:
    counts = {str(pair): dict.fromkeys(Sides._fields, 0) for pair in pairs}
    for name, side in zip(Sides._fields, sides, strict=True):
        for direction, group in groupby(sorted(f"{pair[2]}-{pair[3]}" for pair in side)):
            counts[direction][name] = len(list(group))
    return counts


def _nothing_left(description: str, config: TranslationDataConfig, skipped: Counter[str]) -> str:
    reasons = ", ".join(f"{count:,} {reason}" for reason, count in skipped.most_common()) or "it has no rows"
    advice = {
        "local": "check 'data.source_column', 'data.target_column', 'data.pairs' and 'data.max_characters'",
        "hub": "check 'data.source_column', 'data.target_column', 'data.pairs' and 'data.max_characters'",
    }.get(config.source, "raise 'data.max_characters' or name other 'data.pairs'")
    return f"No sentence pair is left of {description} ({reasons}): {advice}."


def _check_sides(
    sides: Sides, description: str, config: TranslationDataConfig, candidates: list[Candidate], skipped: Counter[str]
) -> None:
    number = len({candidate.anchor for candidate in candidates})
    reason, most = max(skipped.items(), key=lambda item: item[1], default=("", 0))
    left_out = f", and most of the pairs left out are '{reason}' ({most:,})" if most else ""
    wanted = {"validation": config.validation_sources, "test": config.test_sources}
    for name in ("train", *(name for name, count in wanted.items() if count)):
        if not getattr(sides, name):
            raise UserError(
                f"No {name} pairs: {description} has {number:,} usable source sentences, of which "
                f"'data.validation_sources' {config.validation_sources} and 'data.test_sources' {config.test_sources} "
                f"are held out{left_out}: give more text or lower these."
            )
