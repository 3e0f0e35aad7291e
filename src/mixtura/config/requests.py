"""From what a user asks for, and what the data holds, to a recipe.

A path, a task and its data, or a checkpoint to start from become a recipe; and what is held out, batches, groups and
experts are bounded by what there is. A value that the data can hold is never changed, so that a recipe means the same
on the data it was written for. What was changed is a difference between two recipes, `changes`, which a run says in one
line and stores with its recipe.
"""

import dataclasses
import json
import math
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from mixtura.config.arm import ArmConfig
from mixtura.config.families import facts_of
from mixtura.config.languages import language_of_column
from mixtura.config.load import TASKS, load_recipe, preset_path
from mixtura.config.schema import (
    AdapterConfig,
    AnyRecipe,
    ChatDataConfig,
    ChatRecipe,
    ClassificationDataConfig,
    ClassificationRecipe,
    FinetuneRecipe,
    Recipe,
    TranslationDataConfig,
    TranslationRecipe,
)
from mixtura.errors import UserError

VALIDATION_SHARE, TEST_SHARE = 0.1, 0.2
"""Of the usable examples, where a recipe leaves open how many are held out."""
MOST_EXAMPLES, MOST_SOURCES, MOST_CHATS = (500, 1000), (100, 200), (100, 200)
"""Labelled texts, source sentences and chats, for validation and the test, that are enough for any score."""
FAR_SHARE = 3
"""A held-out part is far from the share that was asked for where it is so many times as much, or so many times less."""
COMMON_SHARE = 0.95
"""Of the examples, that a length which a recipe leaves open holds whole."""
MOST_CHARACTERS, MOST_TEXT_TOKENS, MOST_PAIR_TOKENS, MOST_CHAT_TOKENS = 400, 128, 512, 1024
"""The largest such lengths: of a sentence, of a labelled text, of a prompt with its translation, of a chat."""


def is_far_share(held_out: float, asked: float) -> bool:
    """Whether the share that is held out is far from the one that was asked for."""
    return not asked / FAR_SHARE <= held_out <= asked * FAR_SHARE


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


_COLUMNS = {
    "translation": ("source", "target", "source_language", "target_language"),
    "classification": ("text", "label"),
    "chat": ("prompt", "completion"),
}
"""What --columns names, by task."""


def as_recipe(recipe: AnyRecipe | Path | str, overrides: Sequence[str] = ()) -> tuple[Path | None, AnyRecipe]:
    """The path of a recipe, if it was given by one, and the recipe.

    Raises:
        UserError: see `load_recipe`; or `overrides` are given for a recipe that is in memory.
    """
    if not isinstance(recipe, Recipe | FinetuneRecipe):
        return Path(recipe), load_recipe(Path(recipe), overrides)
    if overrides:
        raise UserError(f"'{overrides[0]}' changes a recipe file: change a recipe in memory with dataclasses.replace.")
    return None, recipe


def one_arm(recipe: AnyRecipe, arm: str | None) -> str:
    """The name of the arm that is meant: the one that is asked for, or the only one there is.

    Raises:
        UserError: there is no such arm, or there are several and none is asked for.
    """
    if arm is None and len(recipe.arms) > 1:
        raise UserError(f"The recipe has {len(recipe.arms)} arms: choose one with --arm {'|'.join(recipe.arms)}.")
    name = arm or next(iter(recipe.arms))
    if name not in recipe.arms:
        raise UserError(f"The recipe has no arm '{name}': choose one of {', '.join(recipe.arms)}.")
    return name


def start_overrides(
    recipe: AnyRecipe | Path | str, *, arm: str | None, start: str | None, text: Path | str | None
) -> list[str]:
    """The changes of a recipe that training from a checkpoint, or on a text of one's own, asks for.

    Args:
        recipe: a recipe, or the path of one.
        arm: which of its arms; None where it has one.
        start: the checkpoint that the arm starts from.
        text: a file or folder.

    Raises:
        UserError: see `load_recipe` and `one_arm`.
    """
    # JSON's strings are TOML's.
    changes = []
    if start is not None:
        named = json.dumps(start, ensure_ascii=False)
        changes.append(f"arms.{one_arm(as_recipe(recipe)[1], arm)}.init_from={named}")
    if text is not None:
        changes += ['data.source="local"', f"data.path={json.dumps(str(text), ensure_ascii=False)}"]
    return changes


def finetune_recipe(
    task: str,
    recipe: Path | str | None = None,
    *,
    preset: str = "default",
    data: str | None = None,
    columns: str | None = None,
    pairs: str | None = None,
    base: str | None = None,
    overrides: Sequence[str] = (),
) -> tuple[Path, list[str]]:
    """The path of a recipe for fine-tuning, and the changes of it that its user asks for; both are checked.

    Args:
        task: one of `TASKS`.
        recipe: the path; None takes the task's own recipe that `preset` names.
        preset: "quick" or "default".
        data: a file, or "hub:NAME".
        columns: "SOURCE,TARGET", with ",SOURCE_LANGUAGE,TARGET_LANGUAGE" where rows name their languages,
            "TEXT,LABEL", with more labels where these are columns of 0 and 1, "PROMPT,COMPLETION" or "MESSAGES".
        pairs: directions of translation, separated by commas.
        base: the pretrained model.
        overrides: "section.key=value" changes, which come last.

    Raises:
        UserError: there is no such task or preset, the recipe is for another task, or a value cannot be used.
    """
    if task not in TASKS:
        raise UserError(f"There is no task '{task}': choose one of {', '.join(TASKS)}.")
    if recipe is None and preset not in ("quick", "default"):
        raise UserError(f"There is no preset '{preset}' for {task}: choose quick or default, or give a recipe's path.")
    path = Path(recipe) if recipe is not None else preset_path(task if preset == "default" else f"{task}-{preset}")
    if recipe is None and task == "translation" and base is not None:
        # A pretrained model is adapted; what the presets compare are models from scratch.
        path = path.with_name("translation-smollm2.toml")
    changes = [*data_overrides(task, data=data, columns=columns, pairs=pairs, base=base), *overrides]
    found = getattr(load_recipe(path, changes), "task", "pretraining")
    if found != task:
        raise UserError(f"'{path}' is a recipe for {found}: give one for {task}.")
    return path, changes


def data_overrides(
    task: str, *, data: str | None, columns: str | None, pairs: str | None, base: str | None
) -> list[str]:
    """The changes of a fine-tuning recipe that its user's own data asks for, in the form of `--set`.

    Args:
        task: one of `TASKS`.
        data: a file, or "hub:NAME".
        columns: "SOURCE,TARGET", with ",SOURCE_LANGUAGE,TARGET_LANGUAGE" where rows name their languages,
            "TEXT,LABEL", with more labels where these are columns of 0 and 1, "PROMPT,COMPLETION" or "MESSAGES".
        pairs: directions of translation, separated by commas; None takes columns that are named after languages.
        base: the pretrained model.

    Raises:
        UserError: `columns` are too few or too many, or a text cannot stand in a recipe.
    """
    values: dict[str, str | list[str]] = {}
    if data is not None:
        if not data.removeprefix("hub:").strip():
            raise UserError(f"--data is '{data}': name a file, or a hub dataset as hub:NAME.")
        hub = data.startswith("hub:")
        values |= {"data.source": "hub", "data.name": data[4:]} if hub else {"data.source": "local", "data.path": data}
    if columns is not None:
        names = [name.strip() for name in columns.split(",")]
        values |= _column_keys(task, columns, names)
        codes = [language_of_column(name) for name in names]
        if task == "translation" and pairs is None and len(names) == 2 and None not in codes and codes[0] != codes[1]:
            pairs = f"{codes[0]}-{codes[1]}"
    if pairs is not None:
        if task != "translation":
            raise UserError(f"--pairs is '{pairs}', but {task} has no directions: leave it out.")
        values["data.pairs"] = [pair.strip() for pair in pairs.split(",")]
    if base is not None:
        values["base.name"] = base
    # JSON's strings and lists are TOML's.
    return [f"{key}={json.dumps(value, ensure_ascii=False)}" for key, value in values.items()]


def _column_keys(task: str, columns: str, names: Sequence[str]) -> dict[str, str | list[str]]:
    """The keys that name columns, by what was typed for --columns."""
    keys = _COLUMNS[task]
    if task == "classification" and len(names) > len(keys) and all(names):
        return {"data.text_column": names[0], "data.label_columns": list(names[1:])}
    if task == "chat" and len(names) == 1 and all(names):
        return {"data.messages_column": names[0]}
    if len(names) not in (2, len(keys)) or not all(names):
        wanted = f"two names, {','.join(keys[:2]).upper()}"
        if task == "chat":
            wanted += ", or the one column of messages"
        if task == "translation":
            wanted += ", or four with SOURCE_LANGUAGE,TARGET_LANGUAGE where rows name them"
        raise UserError(f"--columns is '{columns}': give {wanted}.")
    return {f"data.{key}_column": name for key, name in zip(keys, names, strict=False)}
