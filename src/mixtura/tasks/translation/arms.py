"""The arms of a comparison of translation models: what each builds, costs and leaks."""

import copy
import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, final

import torch
from torch import Tensor, nn
from transformers import M2M100ForConditionalGeneration

from mixtura.adapters.attach import apply_adapter
from mixtura.adapters.expert_specialized import SAMPLE_SIZE
from mixtura.adapters.targets import count_parameters, measured_flops_per_token
from mixtura.checkpoints.few_layers import load_few_layers
from mixtura.checkpoints.pretrained import load_base
from mixtura.config import ArmConfig, TranslationArmConfig, TranslationRecipe, UserError
from mixtura.config.arm import has_setting
from mixtura.config.describe import shown_settings
from mixtura.config.families import FAMILIES, facts_of
from mixtura.diagnostics.leak import LeakReport, probe_causal_lm
from mixtura.models import MixtureConfig, MixtureForCausalLM
from mixtura.models.build import build_model_config
from mixtura.planning import active_parameters, flops_per_token, model_parameters
from mixtura.results import ArmDescription, Facts, Leaks
from mixtura.tasks.translation.batches import PairDataset, collate_rows
from mixtura.tasks.translation.decoding import ExampleRouting
from mixtura.tasks.translation.encoder_decoder import (
    EncoderDecoderPrompts,
    collate_pairs,
    new_encoder_decoder,
    own_encoder_decoder,
    probe_pairs,
)
from mixtura.tasks.translation.prompts import Prompts
from mixtura.tasks.translation.task import TranslationData, TranslationTask
from mixtura.tasks.tuning import adapter_settings, check_groups, find_leaks, mixed_examples, naming_adapter, stirred
from mixtura.training.interface import Arm
from mixtura.upcycling.copied_layers import inactive_parameters, upcycle_sides

_CALIBRATION_BATCHES = 4


def make_arm(recipe: TranslationRecipe, name: str, data: TranslationData) -> "TranslationArm":
    """Arm `name` of a recipe, for encoded data.

    Raises:
        UserError: its settings cannot work, or not on this data.
    """
    arm = recipe.arms[name]
    if recipe.base.name is None:
        make = _scratch_arm if arm.architecture == "decoder" else _encoder_decoder_arm
    else:
        make = _base_arm if arm.upcycle is None else _upcycled_arm
    return make(recipe, name, arm, data)


@final
class TranslationArm(Arm):
    """One side of a comparison of translation models."""

    def __init__(
        self,
        name: str,
        *,
        family: str,
        settings: Facts,
        task: TranslationTask,
        learning_rate: float,
        build: Callable[[int], nn.Module],
        probe: Callable[[], nn.Module],
        shape: MixtureConfig | None,
        group_size: int | None,
    ) -> None:
        """`build` makes the model that starts from a seed, `probe` a model in which to look for leaks.

        `shape` is that of a model from scratch; `group_size` is the number of examples that are mixed, None without a
        mixture of tokens.
        """
        self.name, self.family, self.task, self.learning_rate = name, family, task, learning_rate
        self._translation = task
        self.label = family if name == family else name.replace("_", " ")
        self.training_mode, self.deployed_mode = ("group", "alone") if group_size else ("causal", "causal")
        self._settings, self._build, self._probe = settings, build, probe
        self._shape, self._group_size = shape, group_size
        self.trained_config = shape

    def build(self, seed: int) -> nn.Module:
        """A freshly initialised model, or the base model with a fresh adapter."""
        return self._build(seed)

    def describe(self, baseline: Arm) -> ArmDescription:
        """What it is and costs; of a base model with an adapter, FLOPs are measured."""
        assert isinstance(baseline, TranslationArm)
        own, other = self._costs, baseline._costs
        return dataclasses.replace(own, flops_ratio=own.flops_per_token / other.flops_per_token)

    def leaks(self) -> Leaks:
        """Whether information leaks from the future or the batch, in training and deployed; probes a small model."""
        model = self._probe().eval()
        return find_leaks(model, self._leak)

    def _leak(self, model: nn.Module) -> LeakReport:
        if isinstance(self._translation.data.prompts, EncoderDecoderPrompts):
            return probe_pairs(model, self._translation.routing, batch=self._group_size or 4)
        probed: Any = _FirstDirection(model, self._translation)
        size = probed.model.get_input_embeddings().num_embeddings
        return probe_causal_lm(probed, vocab_size=size, batch=self._group_size or 4, length=8, num_probes=12)

    @functools.cached_property
    def _costs(self) -> ArmDescription:
        """What it is and costs, as if it were the baseline."""
        return self._planned() if self._shape is not None else self._measured()

    def _planned(self) -> ArmDescription:
        shape: Any = self._shape
        length = round(self.task.tokens_per_example)
        return ArmDescription(
            settings=self._settings,
            parameters_total=model_parameters(shape),
            parameters_active=active_parameters(shape, sequence_length=length, deployed=True),
            parameters_trainable=model_parameters(shape),
            flops_per_token=flops_per_token(shape, sequence_length=length),
            flops_ratio=1.0,
        )

    def _measured(self) -> ArmDescription:
        """A mixture of adapters runs all its experts, so that all its parameters are active."""
        model: Any = self.build(0).train()
        total, trained = count_parameters(model)
        # Rows of one length, so that all arms are measured without padding, and with half of the tokens as targets.
        tokens = torch.full((min(32, round(self.task.tokens_per_example)),), self._translation.data.prompts.eos)
        row = {"tokens": tokens, "prompt": len(tokens) // 2, "direction": 0}
        batch = self.task.collate([row] * (self._group_size or 2))
        flops = measured_flops_per_token(
            model,
            lambda: self.task.losses(model, batch, num_targets=1).task_loss,
            tokens=len(tokens) * len(batch["input_ids"]),
        )
        if self._translation.base is None:
            # Training computes the head for targets alone, here half of the tokens, and plans count it for every token.
            flops += self._translation.data.vocab_size * model.get_input_embeddings().embedding_dim * 3
        return ArmDescription(
            settings=self._settings,
            parameters_total=total,
            parameters_active=total - inactive_parameters(model),
            parameters_trainable=trained,
            flops_per_token=flops,
            flops_ratio=1.0,
        )


@final
class _FirstDirection(nn.Module):
    """A model as a leak probe calls it, with token ids alone: all examples are in the first direction."""

    def __init__(self, model: nn.Module, task: TranslationTask) -> None:
        super().__init__()
        self.model, self.task = model, task

    def forward(self, ids_BL: Tensor) -> Any:
        named = self.task.routing.name_experts(self.model, ids_BL.new_zeros(len(ids_BL)))
        return self.model(input_ids=ids_BL, use_cache=False, **named)


def _scratch_arm(
    recipe: TranslationRecipe, name: str, arm: TranslationArmConfig, data: TranslationData
) -> TranslationArm:
    feed_forward = arm.feed_forward
    if arm.adapter is not None:
        raise UserError(
            f"'arms.{name}.adapter' needs a base model: set 'base.name', or give the arm a 'feed_forward' instead."
        )
    _check_family(f"arms.{name}.feed_forward", feed_forward, batch_size=recipe.training.batch_size)
    routing, expert_names = _route(f"arms.{name}.feed_forward", feed_forward, data)
    tokenizer: Any = data.prompts.tokenizer
    config = build_model_config(
        recipe.model,
        feed_forward,
        vocab_size=data.vocab_size,
        max_position_embeddings=data.max_length,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        expert_names=expert_names,
        width_multiple=recipe.training.width_multiple,
    )

    def build(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        # A copy: a model writes its inference mode into its configuration.
        return MixtureForCausalLM(copy.deepcopy(config))

    settings = shown_settings(feed_forward)
    if feed_forward.family != "dense":
        settings |= {"expert_width": config.moe_intermediate_size, "placement": feed_forward.placement}
    return TranslationArm(
        name,
        family=feed_forward.family,
        settings=settings,
        task=TranslationTask(
            data, recipe.training, routing=routing, num_beams=recipe.num_beams, comet=recipe.evaluation.comet
        ),
        learning_rate=arm.learning_rate or feed_forward.learning_rate or recipe.training.learning_rate,
        build=build,
        probe=lambda: build(0),
        shape=config,
        group_size=feed_forward.group_size if facts_of(feed_forward.family).group_over else None,
    )


def _encoder_decoder_arm(
    recipe: TranslationRecipe, name: str, arm: TranslationArmConfig, data: TranslationData
) -> TranslationArm:
    """An encoder-decoder from scratch, at the cost of the dense decoder."""
    assert isinstance(data.prompts, Prompts)
    prompts = own_encoder_decoder(data.prompts)
    config = new_encoder_decoder(recipe.model, prompts, vocab_size=data.vocab_size)

    def build(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        return M2M100ForConditionalGeneration(copy.deepcopy(config))

    return TranslationArm(
        name,
        family="dense",
        settings={"architecture": arm.architecture, "feed_forward_width": config.decoder_ffn_dim},
        task=TranslationTask(
            dataclasses.replace(data, prompts=prompts),
            recipe.training,
            routing=ExampleRouting(),
            num_beams=recipe.num_beams,
            comet=recipe.evaluation.comet,
        ),
        learning_rate=arm.learning_rate or arm.feed_forward.learning_rate or recipe.training.learning_rate,
        build=build,
        probe=lambda: build(0),
        shape=None,
        group_size=None,
    )


def _check_family(where: str, arm: ArmConfig, *, batch_size: int) -> None:
    """Refuses what cannot translate one sentence alone, and groups that a batch does not fill."""
    if facts_of(arm.family).serving == "never":
        served = [family for family, facts in FAMILIES.items() if facts.serving != "never"]
        raise UserError(
            f"'{where}.family' is '{arm.family}', whose tokens depend on tokens to come, so that it cannot translate: "
            f"choose one of {', '.join(served)}."
        )
    if facts_of(arm.family).serving != "token by token":
        return
    if arm.inference_mode != "alone" or arm.group_over != "batch":
        raise UserError(
            f"'{where}' mixes tokens in mode '{arm.inference_mode}' over '{arm.group_over}': a translation has no "
            'group, so set inference_mode to "alone" and group_over to "batch".'
        )
    check_groups(where, arm.group_size, batch_size)


def _route(where: str, arm: ArmConfig, data: TranslationData) -> tuple[ExampleRouting, list[str] | None]:
    """The expert of every direction, and the experts' names; neither where tokens choose their experts."""
    if arm.route_by == "token":
        return ExampleRouting(), None
    if not has_setting(arm.family, "route_by"):
        raise UserError(f"'{where}.route_by' is '{arm.route_by}' but the family is {arm.family}: use token_choice.")
    keys = _named_by(arm.route_by, data.directions)
    names = list(dict.fromkeys(keys))
    if arm.num_experts != len(names) or arm.top_k != 1 or arm.capacity_factor or arm.expert_bias_update_rate:
        raise UserError(
            f"'{where}.route_by' is '{arm.route_by}' and the data has {len(names)} of those ({', '.join(names)}): set "
            f"num_experts to {len(names)} and top_k to 1, without capacity_factor and expert_bias_update_rate."
        )
    return ExampleRouting(tuple(names.index(key) for key in keys)), names


def _named_by(route_by: str, directions: Sequence[str]) -> list[str]:
    """What names each direction's expert: the direction itself, or the language of one side."""
    position = {"source": 0, "target": 1}.get(route_by)
    return [name if position is None else name.split("-")[position] for name in directions]


def _base_arm(recipe: TranslationRecipe, name: str, arm: TranslationArmConfig, data: TranslationData) -> TranslationArm:
    adapter, base = arm.adapter, recipe.base
    assert base.name is not None
    routed = adapter is not None and adapter.method == "mixture_of_lora" and adapter.router == "task"
    group_size = mixed_examples(base.name, adapter, arm=name, batch_size=recipe.training.batch_size)
    keys = _named_by("pair" if adapter is None else adapter.route_by, data.directions)
    tasks = list(dict.fromkeys(keys))

    def build(seed: int, load: Callable[..., Any] = load_base) -> nn.Module:
        torch.manual_seed(seed)
        model, _ = load(str(base.name), num_layers=base.num_layers)
        if adapter is None:
            return model
        baseline = _baseline_parameters(recipe, data, load) if adapter.solves_rank else None
        more = {"num_tasks": len(tasks), "sample": _sample(data, recipe.training.batch_size), "seed": seed}
        with naming_adapter(name):
            return apply_adapter(model, adapter, baseline_parameters=baseline, **more)

    return TranslationArm(
        name,
        family="full" if adapter is None else adapter.method,
        settings=adapter_settings(adapter),
        task=TranslationTask(
            data,
            recipe.training,
            routing=ExampleRouting(tuple(map(tasks.index, keys)), "task_ids") if routed else ExampleRouting(),
            adapter=adapter,
            base=_base_facts(recipe),
            num_beams=recipe.num_beams,
            comet=recipe.evaluation.comet,
        ),
        learning_rate=arm.learning_rate or recipe.training.learning_rate,
        build=build,
        probe=lambda: stirred(build(0, load_few_layers)),
        shape=None,
        group_size=group_size,
    )


def _upcycled_arm(
    recipe: TranslationRecipe, name: str, arm: TranslationArmConfig, data: TranslationData
) -> TranslationArm:
    """A base model, tuned whole, with mixtures of copies as feed-forward layers."""
    base, layer, sides = recipe.base, arm.feed_forward, arm.upcycle
    assert base.name is not None and sides is not None
    if not isinstance(data.prompts, EncoderDecoderPrompts):
        raise UserError(
            f"'arms.{name}.upcycle' is for encoder-decoders, and '{base.name}' is a decoder: use `mixtura upcycle`, "
            "and name its output in 'base.name'."
        )
    where = f"arms.{name}.feed_forward"
    routing, expert_names = _route(where, layer, data)
    group_size = layer.group_size if facts_of(layer.family).group_over else None
    if group_size is not None:
        check_groups(where, group_size, recipe.training.batch_size)

    def build(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        model, _ = load_base(str(base.name), num_layers=base.num_layers)
        sample = _sample(data, recipe.training.batch_size)
        batches = itertools.islice(sample, _CALIBRATION_BATCHES)
        upcycle_sides(model, layer, sides=sides, batches=batches, expert_names=expert_names, seed=seed)
        return model

    named = ExampleRouting(routing.expert_of_direction, "task_ids")
    weights = (layer.router_aux_loss_coef, layer.router_z_loss_coef)
    return TranslationArm(
        name,
        family=layer.family,
        settings={"upcycled": sides, "placement": layer.placement, **shown_settings(layer)},
        task=TranslationTask(
            data,
            recipe.training,
            routing=named,
            upcycled=weights,
            base=_base_facts(recipe),
            num_beams=recipe.num_beams,
            comet=recipe.evaluation.comet,
        ),
        learning_rate=arm.learning_rate or layer.learning_rate or recipe.training.learning_rate,
        build=build,
        probe=lambda: build(0),
        shape=None,
        group_size=group_size,
    )


def _base_facts(recipe: TranslationRecipe) -> Facts:
    return {"name": recipe.base.name, "num_layers": recipe.base.num_layers}


def _sample(data: TranslationData, batch_size: int) -> Iterator[dict[str, Tensor]]:
    """Some training pairs, the same for every seed, from which adapters find out which experts to tune."""
    pairs = PairDataset(data.train, names=data.directions, length=SAMPLE_SIZE, batch_size=batch_size, seed=0)
    for start in range(0, len(pairs), batch_size):
        items = [pairs[index] for index in range(start, min(start + batch_size, len(pairs)))]
        if isinstance(data.prompts, EncoderDecoderPrompts):
            batch = collate_pairs(items, data.prompts, data.directions)
        else:
            batch = collate_rows(items, pad=data.prompts.pad)
        yield {key: value for key, value in batch.items() if key not in ("labels", "directions")}


def _baseline_parameters(recipe: TranslationRecipe, data: TranslationData, load: Callable[..., Any]) -> int | None:
    """Trained parameters of the baseline, to which arms without a rank are matched; None if it has no rank itself."""
    baseline = recipe.arms[recipe.baseline].adapter
    if baseline is None or baseline.rank is None:
        return None
    num_tasks = len(set(_named_by(baseline.route_by, data.directions)))
    model, _ = load(str(recipe.base.name), num_layers=recipe.base.num_layers)
    with naming_adapter(recipe.baseline):
        return count_parameters(apply_adapter(model, baseline, num_tasks=num_tasks, seed=0))[1]
