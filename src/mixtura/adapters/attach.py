"""Adapters on any Hugging Face language model, encoder or encoder-decoder: one function applies what a recipe says.

Mixtures of LoRA and of tokens and expert-specialised tuning are PEFT methods of their own, so that what
`save_pretrained` writes is a stock PEFT folder (`adapter_config.json`, safetensors), and after
`import mixtura.adapters.attach` PEFT's own `PeftModel.from_pretrained(base, folder)` loads it.

Shapes: B batch, L length.
"""

import copy
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from peft.config import PeftConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
from safetensors.torch import load_file
from torch import Tensor, nn

from mixtura.adapters.expert_specialized import apply_expert_specialized
from mixtura.adapters.mixture_lora import MixtureLoraConfig, MixtureLoraLayer
from mixtura.adapters.mot import MotAdapterConfig, input_width
from mixtura.adapters.targets import (
    Block,
    RankCost,
    count_parameters,
    feed_forward_linears,
    find_blocks,
    has_mixtures,
    lora_cost,
    match_linears,
    mixture_lora_cost,
    mot_adapter_cost,
)
from mixtura.adapters.tuner import RoutedTuner
from mixtura.config import AdapterConfig, UserError
from mixtura.errors import reason_of
from mixtura.files import check_inside
from mixtura.layers import RoutingStats
from mixtura.layers.statistics import load_balancing_loss
from mixtura.models.batch_context import batch_context


class Reach(NamedTuple):
    """What an adapter reaches."""

    trained: int
    """Trained parameters."""
    total: int
    """All parameters, with those of the frozen base."""
    layers: int
    """Adapted layers, each of which changed the output when it was perturbed."""


def apply_adapter(
    model: nn.Module,
    config: AdapterConfig,
    *,
    baseline_parameters: int | None = None,
    num_tasks: int | None = None,
    sample: Iterable[Mapping[str, Any]] | None = None,
    seed: int,
) -> PeftModel:
    """Freezes a model and puts an adapter on it, in place.

    Args:
        model: a transformers model, or a module that holds one.
        config: the adapter. Without targets it goes to the feed-forward layers.
        baseline_parameters: trained parameters of the baseline arm, which a config without a rank stays at or below, as
            near as a whole rank allows; `describe` says by how much it is below.
        num_tasks: number of tasks or languages, which is the number of experts of an adapter that routes by task;
            `config.num_experts` is then not read.
        sample: batches that show which experts the data uses, for expert-specialised tuning alone.
        seed: of the adapter's first weights.

    Raises:
        UserError: a target does not exist, or the settings cannot work.
    """
    if config.method == "expert_specialized":
        if sample is None:
            raise UserError("Expert-specialised tuning needs a sample of the data to choose experts: give 'sample'.")
        with _without_deprecations():
            return apply_expert_specialized(model, sample, expert_share=config.expert_share)
    num_experts = _num_experts(config, num_tasks)
    plan = _plan(model, config, num_experts)
    rank = config.rank if config.rank is not None else _solve_rank(plan.cost, config, baseline_parameters)
    peft_config = _peft_config(config, rank=rank, num_experts=num_experts, targets=plan.targets)
    _refuse_experts_in_their_place(peft_config, model, plan.targets)
    with torch.random.fork_rng(), _without_deprecations():
        torch.manual_seed(seed)
        return get_peft_model(model, peft_config)  # pyright: ignore[reportReturnType]


def load_adapter(model: nn.Module, folder: str | Path, *, trainable: bool = False) -> PeftModel:
    """`PeftModel.from_pretrained` for a folder that `save_pretrained` wrote, without the warnings of PEFT's own.

    Raises:
        UserError: the folder holds no adapter, or one that cannot be read or is another model's.
    """
    if not (Path(folder) / "adapter_config.json").is_file():
        raise UserError(f"'{folder}' holds no adapter: name a folder with an adapter_config.json.")
    check_inside(Path(folder))
    try:
        with _without_deprecations():
            return PeftModel.from_pretrained(model, str(folder), is_trainable=trainable)
    except Exception as error:  # PEFT, safetensors and torch each have their own for a file that does not fit
        raise UserError(f"The adapter in '{folder}' cannot be loaded ({reason_of(error)}): train it again.") from error


def restore_adapter(model: PeftModel, folder: Path) -> None:
    """Puts the stored weights of the same adapter back into a model, in place.

    Raises:
        UserError: the file cannot be read, or belongs to another model.
    """
    file = folder / "adapter_model.safetensors"
    try:
        found: Any = set_peft_model_state_dict(model, load_file(file))
    except Exception as error:  # safetensors, OSError and torch each have their own for a file that does not fit
        raise UserError(
            f"The adapter in '{folder}' cannot be loaded ({error}): remove the folder to start over."
        ) from error
    if found.unexpected_keys:
        raise UserError(f"The adapter in '{folder}' is of another model: it has {found.unexpected_keys[0]}.")


@contextmanager
def _without_deprecations() -> Iterator[None]:
    """Hides a deprecation warning: PEFT reads a property that newer transformers deprecate."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*gradient_checkpointing", category=FutureWarning)
        yield


class _Plan(NamedTuple):
    targets: list[str]
    cost: RankCost


def _num_experts(config: AdapterConfig, num_tasks: int | None) -> int:
    if config.method != "mixture_of_lora" or config.router != "task":
        return config.num_experts
    if num_tasks is None:
        raise UserError("'adapter.router' is 'task' but this data has no tasks or languages: choose another router.")
    return num_tasks


def _plan(model: nn.Module, config: AdapterConfig, num_experts: int) -> _Plan:
    """The modules that get the adapter, and how many parameters that trains for each rank."""
    whole_layers = config.method == "mixture_of_tokens" or (
        config.method == "mixture_of_lora" and config.scope == "feed_forward"
    )
    if whole_layers:
        return _plan_blocks(model, config, num_experts)
    targets = match_linears(model, config.targets) if config.targets else feed_forward_linears(model)
    shapes = [_shape(model, name) for name in targets]
    if config.method == "lora":
        return _Plan(targets, lora_cost(shapes))
    return _Plan(targets, mixture_lora_cost([[shape] for shape in shapes], config, num_experts=num_experts))


def _plan_blocks(model: nn.Module, config: AdapterConfig, num_experts: int) -> _Plan:
    if config.targets:
        raise UserError(
            f"'adapter.targets' is {list(config.targets)}, but this adapter goes to whole feed-forward layers: remove "
            "it."
        )
    blocks = find_blocks(model, mixtures=config.method == "mixture_of_tokens")
    if not blocks and has_mixtures(model):
        raise UserError(
            f"This adapter goes to whole dense feed-forward layers, and those of {type(model).__name__} are mixtures "
            "already: set 'adapter.scope' to \"linear\" and name linear layers in 'adapter.targets', such as q_proj."
        )
    if not blocks:
        feed_forward_linears(model)  # its message names what there is
    targets = [block.name for block in blocks]
    if config.method == "mixture_of_tokens":
        widths = [input_width(model.get_submodule(name)) for name in targets]
        return _Plan(targets, mot_adapter_cost(widths, num_experts=num_experts))
    layers = [_block_shapes(model, block) for block in blocks]
    return _Plan(targets, mixture_lora_cost(layers, config, num_experts=num_experts))


def _block_shapes(model: nn.Module, block: Block) -> list[tuple[int, int]]:
    return [_shape(model, name) for name in block.linears]


def _shape(model: nn.Module, name: str) -> tuple[int, int]:
    linear: Any = model.get_submodule(name)
    return linear.in_features, linear.out_features


def _refuse_experts_in_their_place(peft_config: PeftConfig, model: nn.Module, targets: list[str]) -> None:
    """Refuses linear layers beside stacked experts that PEFT's LoRA would take for these experts, by their names alone.

    PEFT keeps adapters working that were trained when experts were linear layers: what is called as those were is put
    on the stacked experts, and a linear layer of that name, such as a shared expert's, gets none.
    """
    converted: Any = copy.deepcopy(peft_config)
    try:
        convert_peft_config_for_transformers(converted, model, None)
        if not getattr(converted, "target_parameters", None):
            return
    except ValueError:  # only some of the names that stand for one tensor
        pass
    names = sorted({target.rpartition(".")[2] for target in targets} - {*getattr(converted, "target_modules", ())})
    raise UserError(
        f"{type(model).__name__} has experts in stacked tensors, and PEFT would put LoRA there in place of its linear "
        f"layers {', '.join(names)}: name other linear layers in 'adapter.targets', such as q_proj and v_proj."
    )


def _solve_rank(cost: RankCost, config: AdapterConfig, baseline_parameters: int | None) -> int:
    if baseline_parameters is None:
        raise UserError("'adapter.rank' is missing and there is no baseline to equal in parameters: set it, such as 8.")
    rank = cost.largest_rank(baseline_parameters)
    if rank < 1:
        raise UserError(
            f"A {config.method} adapter of rank 1 trains {cost.parameters(1):,} parameters, more than the baseline's "
            f"{baseline_parameters:,}: lower 'adapter.num_experts', or set 'adapter.rank' to compare it all the same."
        )
    return rank


def _peft_config(config: AdapterConfig, *, rank: int, num_experts: int, targets: list[str]) -> PeftConfig:
    alpha = 2.0 * rank if config.alpha is None else config.alpha
    if config.method == "lora":
        # PEFT annotates an integer, but only divides by the rank.
        return LoraConfig(
            r=rank,
            lora_alpha=alpha,  # pyright: ignore[reportArgumentType]
            lora_dropout=config.dropout,
            target_modules=targets,
        )
    if config.method == "mixture_of_tokens":
        return MotAdapterConfig(
            r=rank,
            alpha=alpha,
            dropout=config.dropout,
            num_experts=num_experts,
            group_size=config.group_size,
            alone_top_k=config.alone_top_k,
            zero_fill=config.zero_fill,
            target_modules=targets,
        )
    return MixtureLoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=config.dropout,
        num_experts=num_experts,
        router=config.router,
        top_k=config.top_k,
        threshold_max=config.threshold_max if config.router == "threshold" else None,
        scope=config.scope,
        share_a=config.share_a,
        router_aux_loss_coef=config.router_aux_loss_coef,
        target_modules=targets,
    )


def adapted_layers(model: nn.Module) -> dict[str, BaseTunerLayer]:
    """The layers that carry an adapter, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)}


def describe(model: PeftModel, *, baseline_parameters: int | None = None) -> str:
    """One sentence on what is trained, and on how far that is from the baseline."""
    total, trained = count_parameters(model)
    config: Any = model.active_peft_config
    rank = f" of rank {config.r}" if hasattr(config, "r") else ""
    sentence = (
        f"{str(config.peft_type.value).lower()}{rank} on {len(adapted_layers(model))} layers: {trained:,} of {total:,} "
        f"parameters are trained ({100 * trained / total:.2f} %)"
    )
    if baseline_parameters is None:
        return f"{sentence}."
    difference = trained - baseline_parameters
    side = "as many as" if not difference else f"{abs(difference):,} {'more' if difference > 0 else 'fewer'} than"
    return f"{sentence}, {side} the baseline's {baseline_parameters:,}."


def routing_stats(model: nn.Module) -> tuple[RoutingStats, ...]:
    """Statistics of the adapters' routing in the last forward, in the order of the layers; empty where nothing routes.

    They are recorded in train(), and in eval() under `observe_routing`. A layer that runs twice because of gradient
    checkpointing is listed once.
    """
    if not any(isinstance(module, RoutedTuner) for module in model.modules()):
        return ()
    return tuple(batch_context(model).stats.values())


def router_losses(model: nn.Module) -> tuple[Tensor, Tensor] | None:
    """Unweighted load-balancing and z-loss of the last forward, means over the routed layers; padding does not count.

    None where nothing has to be balanced: without a router, with routing by task, and in mixtures of tokens. With dense
    gates the first is 1 + cv^2 of the experts' importance (LoRAMoE's loss, up to its constant) with half its gradient.

    Raises:
        UserError: the layers ran under reentrant checkpointing, which hides the routers from the losses.
    """
    keys = {
        module.key
        for module in model.modules()
        if isinstance(module, MixtureLoraLayer)
        and any(experts.router != "task" for experts in module.mixture_lora_experts.values())
    }
    if not keys:
        return None
    stats = [layer for key, layer in batch_context(model).stats.items() if key in keys]
    if not stats:
        return None
    if torch.is_grad_enabled() and model.training and not stats[0].importance_E.requires_grad:
        raise UserError(
            "Router losses have no gradient: turn checkpointing of activations on without use_reentrant=True, or off."
        )
    aux_losses = [load_balancing_loss(layer.tokens_per_expert_E, layer.importance_E) for layer in stats]
    return torch.stack(aux_losses).mean(), torch.stack([layer.router_z_loss for layer in stats]).mean()


def reach(model: nn.Module, batch: Mapping[str, Any]) -> Reach:
    """Counts what an adapter trains, and proves that each of its layers affects the output.

    One layer after another gets its adapter perturbed, and the output must change. The model is left as it was.

    Args:
        model: with an adapter; it is run in eval().
        batch: keyword arguments of its forward.

    Raises:
        UserError: names the layers whose adapter does nothing.
    """
    layers = adapted_layers(model)
    training = model.training
    model.eval()
    try:
        before = first_output(model, batch)
        silent = [
            name
            for name, layer in layers.items()
            if not change_when_perturbed(model, adapter_parameters(layer), batch, before)
        ]
    finally:
        model.train(training)
    if silent or not layers:
        raise UserError(
            f"The adapter does nothing in {len(silent)} of {len(layers)} layers ({', '.join(silent[:3]) or 'none'}): "
            "adapt other layers."
        )
    total, trained = count_parameters(model)
    return Reach(trained, total, len(layers))


@torch.no_grad()
def change_when_perturbed(
    model: nn.Module, parameters: Sequence[nn.Parameter], batch: Mapping[str, Any], before: Tensor
) -> float:
    """The largest change of the output `before` when standard normal noise is put on parameters, which are restored."""
    saved = [parameter.clone() for parameter in parameters]
    # Noise and not a constant: a constant of the wrong sign could switch off every ReLU of a layer.
    generator = torch.Generator().manual_seed(0)
    for parameter in parameters:
        parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter))
    after = first_output(model, batch)
    for parameter, value in zip(parameters, saved, strict=True):
        parameter.copy_(value)
    return (after.float() - before.float()).abs().max().item()


def adapter_parameters(layer: BaseTunerLayer) -> list[nn.Parameter]:
    """The parameters that an adapter has in one layer."""
    names = layer.adapter_layer_names
    return [parameter for attribute in names for parameter in getattr(layer, attribute).parameters()]


@torch.no_grad()
def first_output(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    """The logits, or the first tensor of a model's output; a loss that comes before it is skipped."""
    output: Any = model(**batch)
    values = list(output.values()) if isinstance(output, Mapping) else list(output) if _is_many(output) else [output]
    return next(value for value in values if isinstance(value, Tensor) and value.dim() > 0)


def _is_many(output: Any) -> bool:
    return isinstance(output, tuple | list)
