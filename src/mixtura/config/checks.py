"""Refuses recipes whose values are well-typed but cannot work together."""

import dataclasses
import math
import re
from collections.abc import Mapping
from functools import partial
from importlib.util import find_spec
from typing import Any

from mixtura.config.arm import SETTINGS, ArmConfig, has_setting
from mixtura.config.controls import check_controls
from mixtura.config.families import facts_of
from mixtura.config.initialization import check_starts, starts_from_checkpoints
from mixtura.config.schema import DataConfig, ModelConfig, Recipe, SearchConfig, TrainingConfig
from mixtura.errors import UserError, refuse_together


def check_recipe(recipe: Recipe) -> None:
    """Refuses values of a pretraining recipe that are well-typed but cannot work together.

    Raises:
        UserError: names the key, the value and the fix.
    """
    data, model = recipe.data, recipe.model
    refuse_together(
        [
            partial(check_frame, recipe),
            partial(check_positive, "data", data),
            partial(check_positive, "model", model),
            partial(_check_fraction, data),
            partial(_check_data, data),
            partial(check_attention_heads, model),
            partial(check_starts, recipe),
            partial(check_controls, recipe),
            *([partial(refuse_scales, recipe.search)] if starts_from_checkpoints(recipe) else []),
            # What checkpoints decide is checked when they are read.
            *(partial(_check_arm, name, recipe) for name in recipe.arms if not starts_from_checkpoints(recipe)),
        ]
    )


def _check_fraction(data: DataConfig) -> None:
    if data.validation_fraction >= 1:  # that it is positive is checked with the other numbers
        raise UserError(f"'data.validation_fraction' is {data.validation_fraction}: it must lie between 0 and 1.")


def _check_arm(name: str, recipe: Recipe) -> None:
    arm = recipe.arms[name]
    check_feed_forward(
        f"arms.{name}", arm, batch_sizes=batch_sizes(recipe), sequence_length=recipe.data.sequence_length
    )
    if arm.route_by != "token":
        raise UserError(
            f"'arms.{name}.route_by' is '{arm.route_by}', but plain text has no language pairs: "
            'use "token", or a recipe with task = "translation".'
        )


def batch_sizes(recipe: Recipe) -> dict[str, int]:
    """Sequences that come together, in training and in evaluation, by the key that sets them."""
    training = recipe.training
    return {"training.batch_size": training.batch_size, "training.eval_sequences": training.eval_sequences}


def check_frame(recipe: Any) -> None:
    """Refuses what makes no sense in any kind of recipe: name, baseline, seeds, training, search, arm names.

    Raises:
        UserError: names the key, the value and the fix.
    """
    refuse_together(
        [
            partial(_check_recipe_name, recipe.name),
            partial(_check_baseline, recipe),
            partial(_check_seeds, "search.seeds", recipe.search.seeds),
            partial(_check_seeds, "seeds", recipe.seeds),
            partial(check_positive, "training", recipe.training),
            partial(_check_training, recipe.training),
            partial(_check_search, recipe.search),
            partial(_check_compile, recipe),
            *(partial(_check_name, name) for name in recipe.arms),
        ]
    )


def _check_compile(recipe: Recipe) -> None:
    """Compiled layers may not change from step to step: each would be compiled anew."""
    for name, arm in recipe.arms.items() if recipe.training.compile else ():
        changing = ("first_temperature", "zero_fill", "alone_fraction", "transition_fraction")
        found = next((key for key in changing if getattr(arm, key)), None)
        if found is not None:
            raise UserError(
                f"'training.compile' is true, but 'arms.{name}.{found}' changes layers while they train: set it to "
                "false, or leave the other out."
            )


_LONGEST_NAME = 60
"""Characters of a name that becomes a folder: file systems take 255 bytes, of which a letter may need four."""


def _check_recipe_name(name: str) -> None:
    if not re.fullmatch(rf"\w[\w. -]{{0,{_LONGEST_NAME - 1}}}", name):
        raise UserError(
            f"The recipe's name '{name}' cannot be a folder: set 'name' to letters, digits, '-', '_', '.' and spaces "
            f"only, {_LONGEST_NAME} at most."
        )


def _check_baseline(recipe: Any) -> None:
    if not recipe.arms:
        raise UserError("The recipe has no arm: add one, such as a section [arms.dense].")
    if recipe.baseline not in recipe.arms:
        raise UserError(f"'baseline' is '{recipe.baseline}', which is no arm: choose one of {', '.join(recipe.arms)}.")


def _check_seeds(key: str, seeds: tuple[int, ...]) -> None:
    if not seeds or len(set(seeds)) != len(seeds):
        raise UserError(f"'{key}' is {list(seeds)}: give at least one seed, each once.")
    for seed in seeds:
        if not 0 <= seed < 2**32:
            raise UserError(f"'{key}' has {seed}: a seed must lie between 0 and {2**32 - 1}.")


def refuse_scales(search: SearchConfig) -> None:
    """Refuses a search of scales in a recipe whose models are not language models from random weights.

    Raises:
        UserError: names the key and the fix.
    """
    if search.scales:
        raise UserError(
            f"'search.scales' is {list(search.scales)}, but only language models from random weights are searched for "
            "scales: leave it out."
        )


_AT_MOST = {"threads": 1024, "num_hidden_layers": 10_000}
"""With many more threads a process crashes before it could say why; millions of layers take minutes to count."""
_MAY_BE_ZERO = {
    *("weight_decay", "threads", "shards", "warmup_fraction", "min_learning_rate_fraction"),
    *("adam_beta1", "adam_beta2"),
}


def check_positive(name: str, section: Any) -> None:
    """Refuses numbers of a section, called `name` in messages, that are not finite or not positive.

    Raises:
        UserError: names the key, the value and the fix.
    """
    numbers = [
        (key, value)
        for key, value in dataclasses.asdict(section).items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    ]
    refuse_together(partial(_check_number, f"'{name}.{key}' is {value}", key, value) for key, value in numbers)


def _check_number(where: str, key: str, value: float) -> None:
    if not math.isfinite(value):
        raise UserError(f"{where}: it must be a finite number.")
    if value < 0 or (value == 0 and key not in _MAY_BE_ZERO):
        least = "zero or more" if key in _MAY_BE_ZERO else "greater than zero"
        raise UserError(f"{where}: it must be {least}.")
    if value > _AT_MOST.get(key, math.inf):
        raise UserError(f"{where}: it must be at most {_AT_MOST[key]}.")


def _check_training(training: TrainingConfig) -> None:
    for key in ("warmup_fraction", "min_learning_rate_fraction", "decay_fraction"):
        if getattr(training, key) > 1:
            raise UserError(f"'training.{key}' is {getattr(training, key)}: it must lie between 0 and 1.")
    for key in ("adam_beta1", "adam_beta2"):
        if getattr(training, key) >= 1:
            raise UserError(f"'training.{key}' is {getattr(training, key)}: it must be less than 1.")
    if training.optimizer == "adamw_8bit" and find_spec("torchao") is None:
        raise UserError(
            "'training.optimizer' is 'adamw_8bit' but torchao is not installed: pip install torchao, or choose "
            "adamw or adafactor."
        )


def _check_search(search: SearchConfig) -> None:
    for key in ("learning_rates", "rate_multiples", "scales"):
        tried = getattr(search, key)
        if len(set(tried)) != len(tried):
            raise UserError(f"'search.{key}' is {list(tried)}: give each once.")
        for value in tried:
            if not 0 < value < math.inf:
                raise UserError(f"'search.{key}' has {value}: each must be a finite number greater than zero.")
    if search.rate_multiples and search.learning_rates:
        raise UserError(
            f"'search.learning_rates' is {list(search.learning_rates)} and 'search.rate_multiples' is "
            f"{list(search.rate_multiples)}: give one of them, rates for all arms or multiples of each arm's own."
        )
    if search.scales and not search.trials:
        raise UserError(
            f"'search.scales' is {list(search.scales)} but 'search.learning_rates' is empty: name the rates that each "
            "scale is tried with, one at least, or 'search.rate_multiples'."
        )
    if search.steps is not None and search.steps < 1:
        raise UserError(f"'search.steps' is {search.steps}: it must be greater than zero.")


def _check_data(data: DataConfig) -> None:
    if data.source == "hub" and not data.name:
        raise UserError("'data.source' is 'hub' but 'data.name' is missing: name the dataset, such as \"wikitext\".")
    if data.source == "local" and not data.path:
        raise UserError("'data.source' is 'local' but 'data.path' is missing: name a file or folder.")
    if data.sequence_length < 2:
        raise UserError(f"'data.sequence_length' is {data.sequence_length}: it must be 2 or more, to predict a token.")
    if data.tokenizer == "train" and data.vocab_size < 259:
        raise UserError(f"'data.vocab_size' is {data.vocab_size}: it must be 259 or more, for 256 bytes and 3 marks.")


def check_attention_heads(model: ModelConfig) -> None:
    """Refuses a width that the attention heads cannot share evenly.

    Raises:
        UserError: names the key, the value and the fix.
    """
    heads, kv_heads = model.num_attention_heads, model.num_key_value_heads or model.num_attention_heads
    if model.hidden_size % heads or (model.hidden_size // heads) % 2:
        raise UserError(
            f"'model.hidden_size' is {model.hidden_size} for {heads} attention heads: each needs an even, whole width."
        )
    if heads % kv_heads:
        raise UserError(f"'model.num_key_value_heads' is {kv_heads}: it must divide the {heads} attention heads.")


def _check_name(name: str) -> None:
    if not name.replace("_", "").replace("-", "").isalnum() or len(name) > _LONGEST_NAME:
        raise UserError(
            f"The arm name '{name}' cannot be a folder: use letters, digits, '-' and '_' only, {_LONGEST_NAME} at most."
        )


def check_feed_forward(
    where: str, arm: ArmConfig, *, batch_sizes: Mapping[str, int], sequence_length: int | None
) -> None:
    """Refuses settings of a mixture that cannot work together, or whose groups a batch does not fill.

    Args:
        where: dotted key of the arm, for messages.
        arm: the mixture.
        batch_sizes: examples that come together, by the key that sets them.
        sequence_length: tokens of an example, where all have as many.

    Raises:
        UserError: names the key, the value and the fix.
    """
    checks = [
        partial(setting.check, f"{where}.{key}", getattr(arm, key))
        for key, setting in SETTINGS.items()
        if arm.family in setting.families
    ]
    checks.append(partial(check_own_settings, where, arm))
    checks.append(partial(_check_choice, where, arm))
    if facts_of(arm.family).group_over:
        checks.append(partial(_check_groups, where, arm, batch_sizes, sequence_length))
    if arm.family == "mixture_of_tokens":
        checks.append(partial(_check_mixture_of_tokens, where, arm))
    refuse_together(checks)


def check_own_settings(where: str, arm: ArmConfig) -> None:
    """Refuses settings that the arm's family does not read, since they would change nothing.

    Defaults pass: the recipe that a run writes into its folder names every setting.

    Raises:
        UserError: names each key, its value, the family and the families that read it.
    """
    if arm.control == "shared_width":
        return  # it has taken over the settings of the arm whose shared experts it is as wide as
    refuse_together(
        partial(_refuse_foreign, f"{where}.{key}", getattr(arm, key), arm.family, setting.families)
        for key, setting in SETTINGS.items()
        if arm.family not in setting.families and getattr(arm, key) != setting.default
    )


def _refuse_foreign(key: str, value: object, family: str, owners: tuple[str, ...]) -> None:
    *others, last = owners
    named = f"{', '.join(others)} or {last}" if others else last
    said = "'none'" if value is None else str(value).lower() if isinstance(value, bool) else repr(value)
    raise UserError(f"'{key}' is {said}, which {family} does not read: leave it out, or choose the family {named}.")


def _check_mixture_of_tokens(where: str, arm: ArmConfig) -> None:
    mixtures = arm.num_experts * arm.mixtures_per_expert
    if arm.alone_top_k is not None and arm.alone_top_k > mixtures > 0:
        raise UserError(
            f"'{where}.alone_top_k' is {arm.alone_top_k} but there are only {mixtures} mixtures, "
            f'{arm.mixtures_per_expert} for each of {arm.num_experts} experts: lower it, or set it to "none" for all.'
        )
    if arm.zero_fill == 0 and arm.zero_fill_unit != "group":
        raise UserError(
            f"'{where}.zero_fill_unit' is '{arm.zero_fill_unit}' but '{where}.zero_fill' is 0, so nothing runs alone: "
            "set it to 0.0625, say, or leave the unit out."
        )
    _check_transition(where, arm)
    if arm.inference_mode == "population" and arm.population_rate == 0:
        raise UserError(
            f"'{where}.inference_mode' is 'population' but '{where}.population_rate' is 0, so no averages are kept: "
            "set it to 0.01, say."
        )


def _check_transition(where: str, arm: ArmConfig) -> None:
    if (arm.transition_to is None) != (arm.transition_fraction == 0):
        raise UserError(
            f"'{where}.transition_to' is '{arm.transition_to or 'none'}' and '{where}.transition_fraction' is "
            f"{arm.transition_fraction}: name what the layers become and for which share of the steps, or neither."
        )
    if arm.transition_to is None:
        return
    if arm.first_temperature is not None:
        raise UserError(
            f"'{where}.first_temperature' is {arm.first_temperature} and '{where}.transition_to' is "
            f"'{arm.transition_to}': token choice has no temperature, so leave one of them out."
        )
    if arm.alone_fraction > 0:
        raise UserError(
            f"'{where}.alone_fraction' is {arm.alone_fraction} and '{where}.transition_fraction' is "
            f"{arm.transition_fraction}: both are the last steps, so set one of them to 0."
        )
    if arm.mixtures_per_expert > 1 or arm.combine == "separate" or arm.alone_top_k is None:
        raise UserError(
            f"'{where}.transition_to' is '{arm.transition_to}', which needs one mixture an expert, one router and "
            f"a number of experts a token: set '{where}.mixtures_per_expert' to 1, '{where}.combine' to \"same\" and "
            f"'{where}.alone_top_k' to 2, say."
        )


def _check_choice(where: str, arm: ArmConfig) -> None:
    if has_setting(arm.family, "top_k") and arm.top_k > arm.num_experts > 0:
        raise UserError(
            f"'{where}.top_k' is {arm.top_k} but there are {arm.num_experts} experts: lower top_k or raise num_experts."
        )
    if arm.family == "token_choice":
        _check_expert_groups(where, arm)
    free = arm.zero_experts + arm.copy_experts + arm.constant_experts
    if free and (arm.capacity_factor is not None or arm.expert_groups > 1 or arm.dense_router_gradient):
        raise UserError(
            f"'{where}.zero_experts', '.copy_experts' and '.constant_experts' are {free} together, which works with "
            f"neither '{where}.capacity_factor', '.expert_groups' nor '.dense_router_gradient': leave these out."
        )
    if (free or arm.latent_size) and arm.route_by != "token":
        raise UserError(
            f"'{where}.route_by' is '{arm.route_by}', where languages name the experts: leave out zero_experts, "
            "copy_experts, constant_experts and latent_size."
        )
    if arm.dense_router_gradient and (arm.capacity_factor is not None or arm.route_by != "token"):
        raise UserError(
            f"'{where}.dense_router_gradient' is true, which runs all experts and so needs a router and no capacity: "
            f"set it to false, or '{where}.capacity_factor' to \"none\" and '{where}.route_by' to \"token\"."
        )


def _check_expert_groups(where: str, arm: ArmConfig) -> None:
    if arm.num_experts % arm.expert_groups:
        raise UserError(
            f"'{where}.expert_groups' is {arm.expert_groups}, into which {arm.num_experts} experts do not divide: "
            "set it to a divisor, or to 1 for no groups."
        )
    if arm.groups_per_token > arm.expert_groups:
        raise UserError(
            f"'{where}.groups_per_token' is {arm.groups_per_token} of {arm.expert_groups} groups: lower it or raise "
            f"'{where}.expert_groups'."
        )
    within = arm.groups_per_token * arm.num_experts // arm.expert_groups
    if arm.top_k > within:
        raise UserError(
            f"'{where}.top_k' is {arm.top_k} but a token's groups have {within} experts: lower it, or raise "
            f"'{where}.groups_per_token'."
        )
    if arm.expert_groups > 1 and arm.route_by != "token":
        raise UserError(f"'{where}.expert_groups' is {arm.expert_groups}, but languages name the experts: set it to 1.")


def _check_groups(where: str, arm: ArmConfig, batch_sizes: Mapping[str, int], sequence_length: int | None) -> None:
    if arm.group_over not in facts_of(arm.family).group_over:
        raise UserError(f"'{where}.group_over' is '{arm.group_over}', which {arm.family} does not have: use 'batch'.")
    if arm.group_size < 2:
        raise UserError(f"'{where}.group_size' is {arm.group_size}: a group needs at least 2 tokens.")
    sizes = dict(batch_sizes)
    if arm.group_over == "sequence":
        sizes = {} if sequence_length is None else {"data.sequence_length": sequence_length}
    for key, size in sizes.items():
        if size % arm.group_size:
            raise UserError(
                f"'{key}' is {size}, which is no multiple of '{where}.group_size' {arm.group_size}: "
                f"set it to {max(1, size // arm.group_size) * arm.group_size} or change the group size."
            )
