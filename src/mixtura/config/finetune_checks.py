"""Refuses fine-tuning recipes whose values are well-typed but cannot work together."""

from collections.abc import Callable, Mapping
from functools import partial

from mixtura.config.arm import ArmConfig
from mixtura.config.checks import check_attention_heads, check_feed_forward, check_frame, check_positive, refuse_scales
from mixtura.config.controls import refuse_control
from mixtura.config.families import FAMILIES, facts_of
from mixtura.config.initialization import SCALE_KEYS, names_scales
from mixtura.config.languages import check_distinct_names, parse_pairs
from mixtura.config.schema import (
    AdapterConfig,
    ChatArmConfig,
    ChatDataConfig,
    ChatRecipe,
    ClassificationArmConfig,
    ClassificationDataConfig,
    ClassificationRecipe,
    FinetuneRecipe,
    TranslationArmConfig,
    TranslationDataConfig,
    TranslationRecipe,
)
from mixtura.errors import UserError, refuse_together

_OF_DRAWN_LAYERS = (
    *("init_from", "control", "control_of", "moe_intermediate_size", "num_shared_experts", "mixtures_per_expert"),
    *("combine", "first_temperature", "alone_fraction", "zero_fill_unit", "population_rate", "transition_fraction"),
)
"""Settings of layers that are drawn at random, or that a whole model of ours follows through its training."""
_LORA, _MIXED, _MOT, _SPECIALIZED = "lora", "mixture_of_lora", "mixture_of_tokens", "expert_specialized"
_READ_BY: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("rank", "alpha", "dropout"), (_LORA, _MIXED, _MOT)),
    "targets": (_LORA, _MIXED),
    "num_experts": (_MIXED, _MOT),
    **dict.fromkeys(("router", "top_k", "threshold_max", "scope", "share_a"), (_MIXED,)),
    "router_aux_loss_coef": (_MIXED, _SPECIALIZED),
    **dict.fromkeys(("group_size", "alone_top_k", "zero_fill"), (_MOT,)),
    "expert_share": (_SPECIALIZED,),
}
"""The methods that read a setting of an adapter; `route_by` has a check of its own."""

_SHORTEST = 8
"""Tokens of a text or a chat, at the least."""


def check_finetune_recipe(recipe: FinetuneRecipe) -> None:
    """Refuses values that are well-typed but cannot work together.

    Raises:
        UserError: names the key, the value and the fix.
    """
    own = _own_checks(recipe)
    refuse_together(
        [
            partial(check_frame, recipe),
            partial(refuse_scales, recipe.search),
            partial(check_positive, "data", recipe.data),
            partial(_check_layers, recipe),
            partial(_check_quantized, recipe),
            partial(_check_source, recipe.data),
            *own,
            partial(_check_ranks, recipe.baseline, {name: arm.adapter for name, arm in recipe.arms.items()}),
        ]
    )


def _own_checks(recipe: FinetuneRecipe) -> list[Callable[[], object]]:
    if isinstance(recipe, TranslationRecipe):
        return _translation_checks(recipe)
    return _chat_checks(recipe) if isinstance(recipe, ChatRecipe) else _classification_checks(recipe)


def _check_layers(recipe: FinetuneRecipe) -> None:
    if recipe.base.num_layers is not None and recipe.base.num_layers < 1:
        raise UserError(f"'base.num_layers' is {recipe.base.num_layers}: keep at least 1 layer, or leave it out.")


def _check_quantized(recipe: FinetuneRecipe) -> None:
    """Refuses to train weights that are stored in few bits; only what is beside them can be."""
    quantize = recipe.base.quantize
    if quantize == "none":
        return
    if isinstance(recipe, TranslationRecipe):
        raise UserError(f"'base.quantize' is '{quantize}', which chat and classification know: leave it out.")
    for name, arm in recipe.arms.items():
        frozen = isinstance(arm, ClassificationArmConfig) and arm.tune == "frozen"
        if not frozen and (arm.adapter is None or arm.adapter.method == _SPECIALIZED):
            raise UserError(
                f"'base.quantize' is '{quantize}', but arm '{name}' trains the base's own weights: give it an adapter "
                "beside them, such as a lora, or leave the key out."
            )


def _check_source(data: TranslationDataConfig | ClassificationDataConfig | ChatDataConfig) -> None:
    if data.source == "hub" and not data.name:
        raise UserError("'data.source' is 'hub' but 'data.name' is missing: name the dataset, such as \"imdb\".")
    if data.source == "local" and not data.path:
        raise UserError(
            "'data.source' is 'local' but 'data.path' is missing: name a .jsonl, .json, .csv, .tsv or .parquet."
        )


def _translation_checks(recipe: TranslationRecipe) -> list[Callable[[], object]]:
    checks: list[Callable[[], object]] = [partial(_check_pairs, recipe), partial(_check_translation, recipe)]
    if recipe.base.name is None:
        checks += [partial(check_positive, "model", recipe.model), partial(check_attention_heads, recipe.model)]
    return checks + [partial(_check_translation_arm, f"arms.{name}", arm, recipe) for name, arm in recipe.arms.items()]


def _check_pairs(recipe: TranslationRecipe) -> None:
    pairs = parse_pairs(recipe.data.pairs)
    if recipe.base.name is not None:
        check_distinct_names(pairs)


def _check_translation(recipe: TranslationRecipe) -> None:
    if recipe.data.tokenizer == "train" and recipe.data.vocab_size < 300:
        raise UserError(f"'data.vocab_size' is {recipe.data.vocab_size}: it must be 300 or more, for bytes and marks.")
    if recipe.data.teacher_mix and recipe.data.teacher is None:
        raise UserError("'data.teacher_mix' is true, but 'data.teacher' is missing: name the teacher, or leave it out.")
    if recipe.num_beams < 1:
        raise UserError(f"'num_beams' is {recipe.num_beams}: it must be 1, which is greedy, or more.")


def _check_translation_arm(where: str, arm: TranslationArmConfig, recipe: TranslationRecipe) -> None:
    _check_rate(where, arm.learning_rate)
    pretrained = recipe.base.name is not None
    if arm.adapter is not None and not pretrained:
        raise UserError(
            f"'{where}.adapter' adapts a pretrained model, but 'base.name' is missing: name one such as \"smollm2\"."
        )
    if arm.architecture == "encoder_decoder":
        _check_encoder_decoder(where, arm, recipe)
    if arm.upcycle is not None:
        _check_upcycled(where, arm, recipe)
        return
    if pretrained:
        if arm.feed_forward.family != "dense":
            raise UserError(
                f"'{where}.feed_forward' is for models from scratch, but 'base.name' is '{recipe.base.name}': "
                "give an adapter instead, leave out the base, or set 'upcycle' for an encoder-decoder."
            )
        _check_adapter(f"{where}.adapter", arm.adapter, recipe.training.batch_size)
        return
    feed_forward, key = arm.feed_forward, f"{where}.feed_forward"
    if facts_of(feed_forward.family).serving == "never":
        *served, last = (family for family, facts in FAMILIES.items() if facts.serving != "never")
        raise UserError(
            f"'{key}.family' is '{feed_forward.family}', which cannot translate one sentence alone: use "
            f"{', '.join(served)} or {last}."
        )
    sizes = {"training.batch_size": recipe.training.batch_size}
    refuse_control(key, feed_forward)
    check_feed_forward(key, feed_forward, batch_sizes=sizes, sequence_length=None)
    _check_language_experts(key, arm)


def _check_encoder_decoder(where: str, arm: TranslationArmConfig, recipe: TranslationRecipe) -> None:
    """An encoder-decoder from scratch has dense layers and heads of one width."""
    if recipe.base.name is not None:
        raise UserError(
            f"'{where}.architecture' is for models from scratch, but 'base.name' is '{recipe.base.name}': leave it out."
        )
    if arm.feed_forward.family != "dense":
        raise UserError(
            f"'{where}.feed_forward.family' is '{arm.feed_forward.family}', but an encoder-decoder from scratch has "
            'dense layers: leave it out, or set architecture to "decoder".'
        )
    model = recipe.model
    if model.num_key_value_heads not in (None, model.num_attention_heads) or not model.tie_word_embeddings:
        raise UserError(
            f"'{where}.architecture' is 'encoder_decoder', which has as many key as query heads and one table of "
            "embeddings: leave 'model.num_key_value_heads' and 'model.tie_word_embeddings' out."
        )


def _check_upcycled(where: str, arm: TranslationArmConfig, recipe: TranslationRecipe) -> None:
    """Upcycled layers are copies of a base's, and only some settings have a meaning for those."""
    layer, key = arm.feed_forward, f"{where}.feed_forward"
    if recipe.base.name is None or arm.adapter is not None:
        missing = "'base.name' is missing" if recipe.base.name is None else "it has an adapter too"
        raise UserError(
            f"'{where}.upcycle' makes mixtures of a base model's layers, but {missing}: choose one of both."
        )
    if layer.family not in ("token_choice", "mixture_of_tokens"):
        raise UserError(f"'{key}.family' is '{layer.family}': upcycled layers are token_choice or mixture_of_tokens.")
    default = ArmConfig(family=layer.family)
    changed = [name for name in (*_OF_DRAWN_LAYERS, *SCALE_KEYS) if getattr(layer, name) != getattr(default, name)]
    if changed:
        raise UserError(f"'{key}.{changed[0]}' has no meaning for copies of a base model's layers: leave it out.")
    if layer.family == "token_choice" and layer.route_by == "token" and layer.top_k == 1 and layer.normalize_top_k:
        raise UserError(
            f"'{key}.top_k' is 1 and a single normalised weight is always 1, so the router would never learn: set "
            "top_k to 2, or normalize_top_k to false."
        )
    sizes = {"training.batch_size": recipe.training.batch_size}
    check_feed_forward(key, layer, batch_sizes=sizes, sequence_length=None)
    if layer.family == "mixture_of_tokens" and (layer.inference_mode != "alone" or layer.group_over != "batch"):
        raise UserError(f'\'{key}\' must have inference_mode "alone" and group_over "batch" to translate: set them.')
    _check_language_experts(key, arm)


def _check_language_experts(where: str, arm: TranslationArmConfig) -> None:
    """How many experts there are follows from the pairs; see `config.adapt`."""
    route_by, top_k = arm.feed_forward.route_by, arm.feed_forward.top_k
    if route_by != "token" and top_k != 1:
        raise UserError(f"'{where}.top_k' is {top_k}, but a {route_by} names one expert: set it to 1.")


def _classification_checks(recipe: ClassificationRecipe) -> list[Callable[[], object]]:
    arms = [partial(_check_classification_arm, f"arms.{name}", arm, recipe) for name, arm in recipe.arms.items()]
    base = partial(_check_base, recipe, 'classify with, such as "minilm"')
    return [base, partial(_check_budgets, recipe), partial(_check_labels, recipe.data), *arms]


def _check_budgets(recipe: ClassificationRecipe) -> None:
    budgets = recipe.data.budgets
    if recipe.setfit and not budgets:
        raise UserError(
            "'setfit' is true, but SetFit is for few texts and 'data.budgets' names no number of them: set it, such as "
            "[8, 64]."
        )
    if len(set(budgets)) < len(budgets) or any(budget < 1 for budget in budgets):
        raise UserError(
            f"'data.budgets' is {list(budgets)}: give different numbers of rows of each class, 1 or more, such as "
            "[8, 64]."
        )


def _check_labels(data: ClassificationDataConfig) -> None:
    _check_length(data.max_length, "text")
    keys = {"label_separator": data.label_separator is not None, "label_columns": bool(data.label_columns)}
    given = [key for key, there in keys.items() if there]
    if given and data.source == "movie-reviews":
        raise UserError(
            f"'data.{given[0]}' is for texts with several labels, but the movie reviews have one each: leave it out."
        )
    if len(given) == 2:
        raise UserError(
            "'data.label_separator' splits the cells of 'data.label_column', but 'data.label_columns' takes its place: "
            "leave one out."
        )
    if data.label_separator is not None and not data.label_separator:
        raise UserError("'data.label_separator' is empty: name what stands between two labels, such as \"|\".")
    if len({data.text_column, *data.label_columns}) < len(data.label_columns) + 1:
        raise UserError(
            f"'data.label_columns' is {list(data.label_columns)}: name different columns, none of which is "
            "'data.text_column'."
        )


def _check_base(recipe: ClassificationRecipe | ChatRecipe, use: str) -> None:
    if recipe.base.name is None:
        raise UserError(f"'base.name' is missing: name the model to {use}.")


def _chat_checks(recipe: ChatRecipe) -> list[Callable[[], object]]:
    arms = [partial(_check_chat_arm, f"arms.{name}", arm, recipe) for name, arm in recipe.arms.items()]
    return [partial(_check_base, recipe, 'tune, such as "smollm2"'), partial(_check_columns, recipe.data), *arms]


def _check_columns(data: ChatDataConfig) -> None:
    if (data.prompt_column is None) != (data.completion_column is None):
        there, other = ("prompt", "completion") if data.completion_column is None else ("completion", "prompt")
        raise UserError(
            f"'data.{there}_column' is named and 'data.{other}_column' is not: name both, or neither for chats in "
            "'data.messages_column'."
        )
    _check_length(data.max_length, "chat")


def _check_length(max_length: int | None, what: str) -> None:
    """Refuses a length that the tokenizer's own marks fill."""
    if max_length is not None and max_length < _SHORTEST:
        raise UserError(
            f"'data.max_length' is {max_length}, which holds no {what}: set it to {_SHORTEST} tokens or more."
        )


def _check_chat_arm(where: str, arm: ChatArmConfig, recipe: ChatRecipe) -> None:
    _check_rate(where, arm.learning_rate)
    if arm.adapter is not None and arm.adapter.router == "task" and arm.adapter.method == "mixture_of_lora":
        raise UserError(
            f"'{where}.adapter.router' is 'task', but chats have no tasks or languages: use top_k, dense or threshold."
        )
    _check_adapter(f"{where}.adapter", arm.adapter, recipe.training.batch_size)


def _check_classification_arm(where: str, arm: ClassificationArmConfig, recipe: ClassificationRecipe) -> None:
    _check_rate(where, arm.learning_rate)
    if (arm.adapter is not None) != (arm.tune == "adapter"):
        fix = "add an adapter section" if arm.tune == "adapter" else "set tune to 'adapter'"
        raise UserError(f"'{where}.tune' is '{arm.tune}' and it has {_has(arm.adapter)}: {fix}.")
    if arm.head.per_token and arm.head.kind != "layer_mix":
        raise UserError(f"'{where}.head.per_token' weighs layers, but the head is '{arm.head.kind}': use 'layer_mix'.")
    if arm.head.kind == "best_layer" and arm.tune != "frozen":
        raise UserError(
            f"'{where}.head.kind' is 'best_layer', which is chosen on a frozen model, but 'tune' is '{arm.tune}': set "
            "tune to 'frozen', or use last_layer or layer_mix."
        )
    _check_adapter(f"{where}.adapter", arm.adapter, recipe.training.batch_size)
    if arm.head.feed_forward is not None:
        sizes = {"training.batch_size": recipe.training.batch_size}
        check_feed_forward(f"{where}.head.feed_forward", arm.head.feed_forward, batch_sizes=sizes, sequence_length=None)
        refuse_control(f"{where}.head.feed_forward", arm.head.feed_forward)
        if names_scales(arm.head.feed_forward):
            raise UserError(
                f"'{where}.head.feed_forward' names one of {', '.join(SCALE_KEYS)}, but heads start from one rule: "
                "leave it out."
            )
        if arm.head.feed_forward.route_by != "token":
            raise UserError(f"'{where}.head.feed_forward.route_by' is not 'token': a classifier has no languages.")


def _has(adapter: AdapterConfig | None) -> str:
    return "no adapter" if adapter is None else "an adapter"


def _check_adapter(where: str, adapter: AdapterConfig | None, batch_size: int) -> None:
    if adapter is None:
        return
    _check_own_settings(where, adapter)
    for key in ("rank", "alpha", "num_experts", "top_k", "threshold_max", "group_size", "alone_top_k"):
        value = getattr(adapter, key)
        if value is not None and value <= 0:
            raise UserError(f"'{where}.{key}' is {value}: it must be greater than zero.")
    if not 0 <= adapter.dropout < 1:
        raise UserError(f"'{where}.dropout' is {adapter.dropout}: it must lie between 0 and 1.")
    if not 0 <= adapter.zero_fill < 1:
        raise UserError(
            f"'{where}.zero_fill' is {adapter.zero_fill}: it is a share of the groups, from 0 to below 1, or nothing "
            "would be mixed."
        )
    _check_adapter_routing(where, adapter)
    if not 0 < adapter.expert_share <= 1:
        raise UserError(f"'{where}.expert_share' is {adapter.expert_share}: it must lie between 0 and 1.")
    if adapter.method == "mixture_of_tokens" and (adapter.group_size < 2 or batch_size % adapter.group_size):
        raise UserError(
            f"'training.batch_size' is {batch_size}, which is no multiple of '{where}.group_size' "
            f"{adapter.group_size}, at least 2: change one of them."
        )


def _check_own_settings(where: str, adapter: AdapterConfig) -> None:
    default = AdapterConfig()
    for key, methods in _READ_BY.items():
        value = getattr(adapter, key)
        if adapter.method not in methods and value != getattr(default, key):
            shown = list(value) if isinstance(value, tuple) else value
            raise UserError(
                f"'{where}.{key}' is {shown!r}, which {adapter.method} does not read: leave it out, or set method to "
                f"{' or '.join(methods)}."
            )


def _check_adapter_routing(where: str, adapter: AdapterConfig) -> None:
    if adapter.route_by != "pair" and (adapter.method, adapter.router) != ("mixture_of_lora", "task"):
        raise UserError(
            f"'{where}.route_by' is '{adapter.route_by}', but this adapter's experts are not named by languages: set "
            "method to 'mixture_of_lora' and router to 'task', or leave it out."
        )
    if adapter.method == "mixture_of_lora" and adapter.router == "top_k":
        if adapter.top_k > adapter.num_experts:
            raise UserError(
                f"'{where}.top_k' is {adapter.top_k} but there are {adapter.num_experts} experts: lower it."
            )
        if adapter.top_k == 1:
            raise UserError(
                f"'{where}.top_k' is 1: its weight is always 1, so the router would never learn; use 2 or more, or "
                "another router."
            )


def _check_ranks(baseline: str, adapters: Mapping[str, AdapterConfig | None]) -> None:
    """A rank left open is solved for the baseline's trainable parameters, so the baseline must name its own."""
    adapter = adapters.get(baseline)
    open_ranks = [name for name, other in adapters.items() if other is not None and other.solves_rank]
    if open_ranks and (adapter is None or adapter.solves_rank):
        raise UserError(
            f"'arms.{open_ranks[0]}.adapter.rank' is missing and the baseline '{baseline}' names no rank to match: "
            "set it, or give the baseline an adapter with a rank."
        )


def _check_rate(where: str, rate: float | None) -> None:
    if rate is not None and not 0 < rate < float("inf"):
        raise UserError(f"'{where}.learning_rate' is {rate}: it must be a number greater than zero.")
