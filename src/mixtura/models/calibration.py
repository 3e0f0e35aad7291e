"""Averages over a population of groups, for mixture-of-tokens layers that run in `population` mode.

`calibrate` takes them from some text once a model is trained; `observe_population` and `update_population` keep them as
moving averages while it trains.
"""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import torch
from torch import Tensor, nn

from mixtura.config import UserError
from mixtura.layers.token_by_token import Observation
from mixtura.models.inference import running_in
from mixtura.models.modeling_mixture import MixturePreTrainedModel


@torch.no_grad()
def calibrate(model: MixturePreTrainedModel, batches: Iterable[Tensor]) -> int:
    """Replaces the averages of every mixture-of-tokens layer by those over the groups that the batches form.

    Meanwhile the model runs in groups, as it was trained; afterwards it is in the mode that it was in before. Its
    configuration then says that it keeps averages, so that they are saved with its checkpoint. The averages follow from
    the weights, so calibrate again whenever the weights change.

    Args:
        model: a trained model.
        batches: token ids (B, L), B a multiple of the group size; a few thousand groups are plenty.

    Returns:
        How many batches there were.

    Raises:
        UserError: no layer is a mixture of tokens, there is no batch, or one does not fill its groups.
    """
    layers, config = model.mixture_of_tokens_layers(), cast(Any, model.config)
    if not layers:
        raise UserError("The model has no mixture-of-tokens layer, so there is nothing to calibrate.")
    was_training = model.training
    dtypes = [layer.gate.weight.dtype for layer in layers]
    for layer, dtype in zip(layers, dtypes, strict=True):
        population = layer.keep_population()
        population.reset()
        # In 16 bits a sum of many is that of the first few, and a count ends at 256.
        population.to(torch.promote_types(dtype, torch.float32))
    config.population, count = True, 0
    model.eval()
    observe_population(model, True)
    try:
        with running_in(layers, "group"):
            for ids_BL in batches:
                _check_groups(ids_BL, config.group_over, config.group_size)
                model.base_model(input_ids=ids_BL.to(model.device), use_cache=False)
                update_population(model, rate=0.0)
                count += 1
    finally:
        observe_population(model, False)
        for layer, dtype in zip(layers, dtypes, strict=True):
            layer.keep_population().to(dtype)
        model.train(was_training)
    if not count:
        raise UserError("There is no batch to calibrate with: give text that fills at least one.")
    return count


def observe_population(model: MixturePreTrainedModel, observing: bool) -> None:
    """Switches on or off that layers note the averages over their groups, which `update_population` then uses."""
    for layer in model.mixture_of_tokens_layers():
        layer.observing, layer.observed = observing, None


def collect_population(
    model: MixturePreTrainedModel, step: list[Observation | None], *, share: float
) -> list[Observation | None]:
    """Adds what each layer has just seen to what it has seen in a step, and has it forgotten.

    Args:
        model: one whose layers keep averages and observe.
        step: what this returned for the micro-batches before; empty for the first.
        share: of the micro-batch in the step, over all ranks.
    """
    layers = model.mixture_of_tokens_layers()
    found = [layer.observed and Observation(*(share * value for value in layer.observed)) for layer in layers]
    for layer in layers:
        layer.observed = None
    return [
        Observation(*map(torch.add, before, now)) if before and now else now or before
        for before, now in zip(step or [None] * len(found), found, strict=True)
    ]


@torch.no_grad()
def update_population(
    model: MixturePreTrainedModel,
    *,
    rate: float,
    step: list[Observation | None] | None = None,
    average: Callable[[Tensor], Tensor] | None = None,
    reading: Callable[[nn.Module], AbstractContextManager[None]] = nullcontext,
) -> None:
    """Moves the averages towards what was seen in a step, or in the last batch; call it after an optimizer step.

    A layer that is run twice for one batch, as under activation checkpointing, still counts it once.

    Args:
        model: one whose layers keep averages and observe.
        rate: weight of what was seen, see `mixtura.layers.Population.update`.
        step: what `collect_population` returned for a step's micro-batches; None for what was seen last.
        average: returns the sum of a tensor over all ranks where there is a `step`, else the mean, so that all hold the
            same averages; None for one process.
        reading: a block in which the weights of a layer can be used, where they are not always at hand.
    """
    layers = model.mixture_of_tokens_layers()
    for layer, seen in zip(layers, step or [layer.observed for layer in layers], strict=True):
        layer.observed = None
        if layer.population is None or seen is None:
            continue
        if average is not None:
            seen = Observation(*(average(value) for value in seen))
        with reading(layer):
            layer.population.update(seen, layer.experts, rate=rate)


def _check_groups(ids_BL: Tensor, group_over: str, group_size: int) -> None:
    axis, name = (0, "sequences of a batch") if group_over == "batch" else (1, "tokens of a sequence")
    if ids_BL.size(axis) % group_size:
        raise UserError(
            f"The {ids_BL.size(axis)} {name} do not fill groups of {group_size}: make them a multiple of that."
        )
