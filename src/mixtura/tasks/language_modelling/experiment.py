"""Language modelling as an experiment: models that differ in their feed-forward layers, each at the same cost.

An arm starts from random weights, or from a checkpoint with an architecture of its own; all arms share one tokenizer.
"""

import copy
import dataclasses
import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, final

import torch

from mixtura.checkpoints.pretrained import resolve_base
from mixtura.checkpoints.source import count_parameters, decoder_config, load_decoder, probe_config, weights_digest
from mixtura.config import ArmConfig, DataConfig, Recipe, UserError, starts_from_checkpoints
from mixtura.config.arm import has_setting, model_settings
from mixtura.config.checks import batch_sizes, check_feed_forward
from mixtura.config.describe import shown_settings
from mixtura.config.families import facts_of
from mixtura.config.initialization import INITIALIZER_RANGE, SHAPE_KEYS, TRAINED_KEYS, names_scales
from mixtura.config.requests import Amounts, with_batches_for
from mixtura.data.prepare import PreparedData, load_tokenizer, prepare_data
from mixtura.data.short_texts import fit_held_out
from mixtura.diagnostics.leak import LeakReport, probe_causal_lm
from mixtura.evaluation import evaluation_modes
from mixtura.models import MixtureConfig, MixtureForCausalLM
from mixtura.models.build import build_model_config, shared_width_config
from mixtura.models.transition import finished_config
from mixtura.planning import active_parameters, flops_per_token, flops_ratio, model_parameters
from mixtura.planning.formulas import FLOPS_TOLERANCE, router_parameters
from mixtura.planning.shapes import feed_forward_shapes
from mixtura.results import ArmDescription, Leaks
from mixtura.tasks.language_modelling.task import LanguageModelling
from mixtura.training.interface import Arm, Experiment
from mixtura.training.optimization import OPTIMIZER_NAMES, SCHEDULE_NAMES


def with_checkpoints_tokenizer(recipe: Recipe) -> DataConfig:
    """The recipe's `[data]`, read with the tokenizer of the baseline's checkpoint, which all arms must share.

    Raises:
        UserError: a checkpoint has no tokenizer, or another one.
    """
    for arm in recipe.arms.values():
        decoder_config(str(arm.init_from))  # its errors say more clearly what is wrong with a checkpoint
    folders = {name: resolve_base(str(arm.init_from)) for name, arm in recipe.arms.items()}
    own = load_tokenizer(folders[recipe.baseline])
    for name, folder in folders.items():
        if name != recipe.baseline and load_tokenizer(folder).get_vocab() != own.get_vocab():
            raise UserError(
                f"'arms.{name}.init_from' has another tokenizer than 'arms.{recipe.baseline}.init_from': losses a "
                "token could not be compared; start both from one model."
            )
    return dataclasses.replace(recipe.data, tokenizer=folders[recipe.baseline])


def continued_arm(recipe: Recipe, name: str, *, vocab_size: int) -> tuple[ArmConfig, MixtureConfig]:
    """An arm with the settings of its checkpoint filled in, and the configuration of its model.

    Args:
        recipe: all of whose arms start from checkpoints.
        name: of the arm.
        vocab_size: of the tokenizer.

    Raises:
        UserError: the checkpoint cannot be used, or does not fit the recipe's batches and sequences.
    """
    arm = recipe.arms[name]
    config: Any = copy.deepcopy(decoder_config(str(arm.init_from)))
    if config.expert_bias_update_rate > 0 and arm.expert_bias_update_rate == 0 and arm.family == "token_choice":
        raise UserError(
            f"'arms.{name}.expert_bias_update_rate' is 0, but the experts of 'arms.{name}.init_from' are chosen with a "
            "bias, which would be lost: leave it out, or make it very small."
        )
    for key in TRAINED_KEYS:
        setattr(config, key, getattr(arm, key))
    config.population = config.population or arm.population_rate > 0
    decided = {
        each.name: getattr(config, field)
        for each, field in model_settings()
        if each.name in SHAPE_KEYS and has_setting(arm.family, each.name)
    }
    filled = dataclasses.replace(arm, **decided)
    if vocab_size > config.vocab_size:
        raise UserError(
            f"'arms.{name}.init_from' has {config.vocab_size} embeddings for {vocab_size} tokens: give a whole model."
        )
    length = recipe.data.sequence_length
    if length > config.max_position_embeddings:
        raise UserError(
            f"'data.sequence_length' is {length}, but 'arms.{name}.init_from' has {config.max_position_embeddings} "
            "positions: lower it."
        )
    kept = filled if filled.inference_mode != "population" else dataclasses.replace(filled, population_rate=1.0)
    check_feed_forward(f"arms.{name}", kept, batch_sizes=batch_sizes(recipe), sequence_length=length)
    return filled, config


@final
class PretrainingArm(Arm):
    """One family of feed-forward layers, in a model that is trained from scratch or from a checkpoint on."""

    def __init__(
        self,
        name: str,
        config: ArmConfig,
        model_config: MixtureConfig,
        *,
        task: LanguageModelling,
        learning_rate: float,
        sequence_length: int,
    ) -> None:
        """Takes what `Pretraining` prepared."""
        self.name, self.config, self.model_config = name, config, model_config
        self.family = config.family
        self.label = config.family if name == config.family else name
        self.task, self.learning_rate, self.sequence_length = task, learning_rate, sequence_length
        self._language_modelling = task
        self.trained_config = finished_config(model_config)
        self.grouped = evaluation_modes(model_config)[0] == "group"
        # The finished model has token choice where a transition was planned.
        self.training_mode = "causal" if config.transition_to or not self.grouped else "group"
        if self.training_mode == "group" and self._always_alone:
            self.training_mode = "alone"
        self.deployed_mode = _deployed_mode(config)

    @property
    def _always_alone(self) -> bool:
        """Whether no step of the training has groups, as in a mixture of tokens that was a dense model."""
        return has_setting(self.family, "zero_fill") and self.model_config.zero_fill == 1

    def build(self, seed: int) -> MixtureForCausalLM:
        """A freshly initialised model, the same rule and seed for every arm; or the checkpoint's, whatever the seed."""
        torch.manual_seed(seed)
        if self.config.init_from is not None:
            return load_decoder(self.config.init_from, self.model_config)
        # A copy: a model writes its inference mode into its configuration.
        return MixtureForCausalLM(copy.deepcopy(self.model_config))

    def at_scale(self, scale: float) -> "PretrainingArm":
        """The same arm but for the scale of its feed-forward weights."""
        model_config = copy.deepcopy(self.model_config)
        model_config.feed_forward_scale = scale
        return PretrainingArm(
            self.name,
            dataclasses.replace(self.config, feed_forward_scale=scale),
            model_config,
            task=self._language_modelling,
            learning_rate=self.learning_rate,
            sequence_length=self.sequence_length,
        )

    def describe(self, baseline: Arm) -> ArmDescription:
        """What it is and costs, by the formulas of `planning`."""
        assert isinstance(baseline, PretrainingArm)
        shape: Any = self.model_config
        length = self.sequence_length
        settings = shown_settings(self.config)
        if self.family != "dense":
            settings |= {"expert_width": shape.moe_intermediate_size, "placement": _placement(shape)}
        total = planned = model_parameters(shape)
        active = active_parameters(shape, sequence_length=length, deployed=self.deployed_mode is not None)
        if self.config.init_from is not None:
            settings["init_from"] = self.config.init_from
            total = count_parameters(shape)
        elif names_scales(self.config):
            settings["initialization"] = _scales_in_words(shape)
        return ArmDescription(
            settings={key: value for key, value in settings.items() if value is not None},
            parameters_total=total,
            parameters_active=active + total - planned,
            parameters_trainable=total - _fixed_parameters(shape, sequence_length=length),
            flops_per_token=flops_per_token(shape, sequence_length=length),
            flops_ratio=flops_ratio(shape, baseline=baseline.model_config, sequence_length=length),
        )

    def leaks(self) -> Leaks:
        """Whether information leaks from the future or from other examples, measured on the arm's untrained model."""
        model = self._untrained().eval()
        deployed = self._probe(model) if self.deployed_mode else None
        if facts_of(self.family).serving == "token by token":
            model.set_inference_mode("alone" if self._always_alone else "group")
        trained = self._probe(model)
        return Leaks(trained.future, trained.batch, None if deployed is None else deployed.batch)

    def _untrained(self) -> MixtureForCausalLM:
        """An untrained model with the arm's layers; small where a checkpoint is large, since probes run in float64."""
        if self.config.init_from is None:
            return self.build(seed=0)
        torch.manual_seed(0)
        return MixtureForCausalLM(probe_config(self.model_config))

    def _probe(self, model: MixtureForCausalLM) -> LeakReport:
        config = self.model_config
        batch = config.group_size if self.grouped and config.group_over == "batch" else 4
        length = config.group_size if config.group_over == "sequence" else 8
        return probe_causal_lm(model, vocab_size=config.vocab_size, batch=batch, length=length)


def _placement(config: MixtureConfig) -> str:
    """Which layers are mixtures, in a recipe's words where they are a recipe's."""
    families = config.mlp_layer_types or []
    depths = [depth for depth, family in enumerate(families) if family != "dense"]
    for first, word in ((0, "all"), (len(families) // 2, "later_half")):
        if depths == list(range(first, len(families))):
            return word
    return f"layers {', '.join(map(str, depths))}"


def _scales_in_words(config: MixtureConfig) -> str:
    """The scales that feed-forward weights and routers are drawn at, as a report shows them."""
    scales = {"dense": config.dense_scale, "experts": config.expert_scale, "router": config.router_scale}
    mixture = set(config.mlp_layer_types or []) - {"dense"}
    words = []
    for part, scale in scales.items():
        if part == "dense" or mixture:
            factor = 1.0 if part == "router" else config.feed_forward_scale
            absolute = f"{config.initializer_range * factor:g}"
            words.append(f"{part} {absolute if scale is None else f'{scale * factor:g}/sqrt(fan-in)'}")
    return ", ".join(words) + ("" if config.down_scale == 1 else f", down-projections {config.down_scale:g} times that")


def _fixed_parameters(shape: Any, *, sequence_length: int) -> int:
    """Parameters of routers that a control does not train."""
    if shape.control not in ("uniform_router", "random_routing"):
        return 0
    return sum(map(router_parameters, feed_forward_shapes(shape, sequence_length=sequence_length)))


def _deployed_mode(config: ArmConfig) -> str | None:
    if config.transition_to is not None:
        return "causal"
    serving = facts_of(config.family).serving
    if serving == "token by token":
        # A model that runs in groups needs other requests in its batch, so it cannot answer one request alone.
        return None if config.inference_mode == "group" else config.inference_mode
    return None if serving == "never" else "causal"


def make_pretraining(
    recipe: Recipe, *, cache_dir: Path | None, on_progress: Callable[[str], None] | None = None
) -> "Pretraining":
    """Prepares the recipe's text and makes its arms.

    Args:
        recipe: the comparison.
        cache_dir: where the prepared text is kept; None keeps none.
        on_progress: called with a phrase when a slow part begins, such as "reading".

    Raises:
        UserError: the text cannot be used.
    """
    group_sizes = None
    if starts_from_checkpoints(recipe):
        tokenizer = with_checkpoints_tokenizer(recipe).tokenizer
        recipe, group_sizes = _fitted_to_checkpoints(recipe)
    else:
        tokenizer = recipe.data.tokenizer

    def prepare(section: DataConfig) -> PreparedData:
        section = dataclasses.replace(section, tokenizer=tokenizer)
        return prepare_data(section, cache_dir=cache_dir, on_progress=on_progress)

    section, data = fit_held_out(recipe.data, prepare, wanted=max(recipe.training.batch_size, *(group_sizes or (1,))))
    held_out = data.validation.num_sequences
    recipe = with_batches_for(
        dataclasses.replace(recipe, data=section),
        Amounts(data.train.num_sequences, held_out, held_out),
        group_sizes=group_sizes,
    )
    return Pretraining(recipe, data)


def _fitted_to_checkpoints(recipe: Recipe) -> tuple[Recipe, tuple[int, ...]]:
    """The recipe with sequences that all checkpoints have positions for, and the sizes of their groups over a batch."""
    configs: list[Any] = [decoder_config(str(arm.init_from)) for arm in recipe.arms.values()]
    length = min(recipe.data.sequence_length, *(config.max_position_embeddings for config in configs))
    sizes = []
    for config in configs:
        grouped = any(facts_of(family).group_over for family in config.mlp_layer_types or [])
        if grouped and config.group_over == "sequence":
            length = max(1, length // config.group_size) * config.group_size
        elif grouped:
            sizes.append(config.group_size)
    return dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, sequence_length=length)), tuple(sizes)


@final
class Pretraining(Experiment):
    """Everything a comparison of pretraining runs."""

    recipe: Recipe

    def __init__(self, recipe: Recipe, data: PreparedData) -> None:
        """Makes the recipe's arms, with the vocabulary of the data."""
        self.recipe = recipe
        self.data = dict(data.summary)
        if starts_from_checkpoints(recipe):
            starts = {name: str(arm.init_from) for name, arm in recipe.arms.items()}
            self.data["checkpoints"] = {name: weights_digest(start) for name, start in starts.items()}
        self.data_digest = _digest(data)
        self.arms: dict[str, Arm] = {name: _make_arm(recipe, data, name) for name in recipe.arms}

    def held_equal(self, described: Mapping[str, ArmDescription]) -> list[str]:
        """Tokens and their order, FLOPs with the largest difference, initialisation, and how all are trained."""
        recipe, training = self.recipe, self.recipe.training
        # A control of a shared expert's width costs less by design.
        matched = [arm for name, arm in described.items() if recipe.arms[name].control != "shared_width"]
        apart = max(abs(arm.flops_ratio - 1) for arm in matched)
        tokens = training.batch_size * training.gradient_accumulation_steps * recipe.data.sequence_length
        flops = f"FLOPs a token within {100 * apart:.2g} %" if apart else "FLOPs a token"
        start = _initialization(recipe)
        if starts_from_checkpoints(recipe):
            start = "the tokenizer, and that every arm starts from its checkpoint, the same for all seeds"
        return [
            "the training tokens and their order, paired by seed",
            # A larger difference is a caution of the report: FLOPs are then not held equal.
            *([f"{flops}, routing and mixing counted"] if apart <= FLOPS_TOLERANCE else []),
            f"steps ({training.steps:,}) and tokens a step ({tokens:,})",
            start,
            f"optimizer ({OPTIMIZER_NAMES[training.optimizer]}), warm-up, {SCHEDULE_NAMES[training.schedule]}, "
            "weight decay and gradient clipping",
            "the held-out sequences",
        ]


def _initialization(recipe: Recipe) -> str:
    """How weights start, in words; each arm that names scales of its own shows them among its settings."""
    std = recipe.model.initializer_range
    own = std is None or bool(recipe.search.scales) or any(map(names_scales, recipe.arms.values()))
    scales = "feed-forward weights at each arm's scale, " if own else ""
    return f"the initialisation rule (normal, standard deviation {std or INITIALIZER_RANGE:g}, {scales}seeded)"


def _make_arm(recipe: Recipe, data: PreparedData, name: str) -> PretrainingArm:
    config, vocab_size = recipe.arms[name], data.summary["vocab_size"]
    tokenizer: Any = data.tokenizer
    if config.init_from is not None:
        config, model_config = continued_arm(recipe, name, vocab_size=vocab_size)
    else:
        of_shared = config.control == "shared_width"
        model_config = build_model_config(
            recipe.model,
            recipe.arms[str(config.control_of)] if of_shared else config,
            vocab_size=vocab_size,
            max_position_embeddings=recipe.data.sequence_length,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            width_multiple=recipe.training.width_multiple,
        )
        model_config = shared_width_config(model_config) if of_shared else model_config
    return PretrainingArm(
        name,
        config,
        model_config,
        task=LanguageModelling(data, recipe.training),
        learning_rate=config.learning_rate or recipe.training.learning_rate,
        sequence_length=recipe.data.sequence_length,
    )


def _digest(data: PreparedData) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for packed in (data.train, data.validation):
        digest.update(packed.content())
    return digest.hexdigest()
