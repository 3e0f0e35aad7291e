"""Recipes that fit the user's own data: what is held out, batches, groups and experts, bounded by what there is.

A value that the data can hold is never changed, so that a recipe means the same on the data it was written for. What
was changed is a difference between two recipes, `changes`, which a run says in one line and stores with its recipe.
"""

import dataclasses
import math
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple, TypeVar

from mixtura.config.arm import ArmConfig
from mixtura.config.families import facts_of
from mixtura.config.schema import (
    AdapterConfig,
    AnyRecipe,
    ChatDataConfig,
    ChatRecipe,
    ClassificationDataConfig,
    ClassificationRecipe,
    Recipe,
    TranslationDataConfig,
    TranslationRecipe,
)

VALIDATION_SHARE, TEST_SHARE = 0.1, 0.2
"""Of the usable examples, where a recipe leaves open how many are held out."""
MOST_EXAMPLES, MOST_SOURCES, MOST_CHATS = (500, 1000), (100, 200), (100, 200)
"""Labelled texts, source sentences and chats, for validation and the test, that are enough for any score."""
COMMON_SHARE = 0.95
"""Of the examples, that a length which a recipe leaves open holds whole."""
MOST_CHARACTERS, MOST_TEXT_TOKENS, MOST_PAIR_TOKENS, MOST_CHAT_TOKENS = 400, 128, 512, 1024
"""The largest such lengths: of a sentence, of a labelled text, of a prompt with its translation, of a chat."""


def held_out_examples(data: ClassificationDataConfig, available: int) -> ClassificationDataConfig:
    """The section with a number of validation and test examples where it leaves them open."""
    validation, test = _hold_out((data.validation_examples, data.test_examples), MOST_EXAMPLES, available)
    return dataclasses.replace(data, validation_examples=validation, test_examples=test)


def held_out_sources(data: TranslationDataConfig, available: int) -> TranslationDataConfig:
    """The section with a number of validation and test sentences where it leaves them open."""
    validation, test = _hold_out((data.validation_sources, data.test_sources), MOST_SOURCES, available)
    return dataclasses.replace(data, validation_sources=validation, test_sources=test)


def held_out_chats(data: ChatDataConfig, available: int) -> ChatDataConfig:
    """The section with a number of validation and test chats where it leaves them open."""
    validation, test = _hold_out((data.validation_chats, data.test_chats), MOST_CHATS, available)
    return dataclasses.replace(data, validation_chats=validation, test_chats=test)


def _hold_out(given: tuple[int | None, int | None], most: tuple[int, int], available: int) -> tuple[int, int]:
    shares = (VALIDATION_SHARE, TEST_SHARE)
    validation, test = (
        own if own is not None else min(bound, max(1, int(share * available)))
        for own, bound, share in zip(given, most, shares, strict=True)
    )
    return validation, test


def common_length(lengths: Sequence[int], *, most: int) -> int:
    """The length that 95 % of some texts stay within, a multiple of 8, and `most` at most."""
    ordered = sorted(lengths)
    common = ordered[min(len(ordered) - 1, int(COMMON_SHARE * len(ordered)))]
    return min(most, max(8, math.ceil(common / 8) * 8))


def with_experts_of(recipe: TranslationRecipe, directions: Collection[str]) -> TranslationRecipe:
    """The recipe with one expert for each language or pair where these name the experts.

    Args:
        recipe: the comparison.
        directions: those that the data has, such as "en-de".
    """
    side = {"source": 0, "target": 1}
    arms = dict(recipe.arms)
    for name, arm in arms.items():
        route_by = arm.feed_forward.route_by
        if (recipe.base.name is None or arm.upcycle is not None) and route_by != "token":
            named = {pair.split("-")[side[route_by]] if route_by in side else pair for pair in directions}
            layer = dataclasses.replace(arm.feed_forward, num_experts=len(named))
            arms[name] = dataclasses.replace(arm, feed_forward=layer)
    return dataclasses.replace(recipe, arms=arms)


class Amounts(NamedTuple):
    """How many examples there are on each side, and may come together in a group."""

    train: int
    validation: int
    test: int


_Kind = TypeVar("_Kind", Recipe, TranslationRecipe, ClassificationRecipe, ChatRecipe)


def with_batches_for(recipe: _Kind, amounts: Amounts, *, group_sizes: Collection[int] | None = None) -> _Kind:
    """The recipe with batches, groups and evaluations that its data can fill; as it is where it does so already.

    A batch holds no example twice. Where examples are mixed, batches are evaluated whole, so that the smaller held-out
    side bounds them too; groups become smaller only where not even one would be full. What not even groups of two can
    be made of is left for the tasks to refuse.

    Args:
        recipe: the comparison.
        amounts: its examples.
        group_sizes: of checkpoints, which decide them; None where the recipe does.
    """
    groups = _groups(recipe) if group_sizes is None else {}
    most = min(amounts) if groups or group_sizes else amounts.train
    if most < 2 and groups:
        return recipe
    sizes = {path: _group_size(config.group_size, most) for path, config in groups.items()}
    multiple = math.lcm(*sizes.values(), *(group_sizes or ()))
    if groups and multiple > most:
        sizes = dict.fromkeys(sizes, _power_of_two(most))
        multiple = _power_of_two(most)
    training, batch_size = recipe.training, recipe.training.batch_size
    if batch_size > most or batch_size % multiple:
        batch_size = max(1, min(batch_size, most) // multiple) * multiple
    eval_sequences, known = training.eval_sequences, amounts.validation
    if eval_sequences > known or (isinstance(recipe, Recipe) and eval_sequences % multiple):
        eval_sequences = max(1, min(eval_sequences, known) // multiple) * multiple
    training = dataclasses.replace(training, batch_size=batch_size, eval_sequences=eval_sequences)
    for path, size in sizes.items():
        recipe = _replaced(recipe, path, group_size=size)
    return dataclasses.replace(recipe, training=training)


def _groups(recipe: AnyRecipe) -> dict[tuple[str, ...], ArmConfig | AdapterConfig]:
    """What mixes tokens of several examples, by its place in the recipe."""
    found: dict[tuple[str, ...], ArmConfig | AdapterConfig] = {}
    arms: dict[str, Any] = dict(recipe.arms)
    for name, arm in arms.items():
        if isinstance(recipe, Recipe):
            parts: dict[tuple[str, ...], Any] = {(): arm}
        elif isinstance(recipe, ClassificationRecipe):
            parts = {("head", "feed_forward"): arm.head.feed_forward, ("adapter",): arm.adapter}
        elif isinstance(recipe, ChatRecipe):
            parts = {("adapter",): arm.adapter}
        else:
            parts = {("feed_forward",): arm.feed_forward, ("adapter",): arm.adapter}
        found |= {("arms", name, *place): part for place, part in parts.items() if _mixes_examples(part)}
    return found


def _mixes_examples(part: ArmConfig | AdapterConfig | None) -> bool:
    if isinstance(part, AdapterConfig):
        return part.method == "mixture_of_tokens"
    return part is not None and bool(facts_of(part.family).group_over) and part.group_over != "sequence"


def _group_size(size: int, most: int) -> int:
    return size if size <= most else _power_of_two(most)


def _power_of_two(most: int) -> int:
    """The largest power of two that is at most `most`."""
    return 1 << (most.bit_length() - 1)


def _replaced(value: Any, path: tuple[str, ...], **changes: Any) -> Any:
    """A copy of nested dataclasses and dictionaries with changes at a place inside."""
    if not path:
        return dataclasses.replace(value, **changes)
    first, *rest = path
    if isinstance(value, dict):
        return value | {first: _replaced(value[first], tuple(rest), **changes)}
    return dataclasses.replace(value, **{first: _replaced(getattr(value, first), tuple(rest), **changes)})


def changes(given: AnyRecipe, adapted: AnyRecipe) -> list[str]:
    """What differs between two recipes, as phrases such as "training.batch_size = 14 (not 32)"."""
    return list(_changes(dataclasses.asdict(given), dataclasses.asdict(adapted), ""))


def _changes(before: Any, after: Any, where: str) -> Any:
    if isinstance(before, dict) and isinstance(after, dict):
        for key in before:
            yield from _changes(before[key], after[key], f"{where}.{key}" if where else key)
    elif before != after:
        yield f"{where} = {after}" + ("" if before is None else f" (not {before})")
