"""What the tasks share: modes, losses, leaks and what is saved of a tuned model, and the p-value of a bootstrap."""

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mixtura.adapters.attach import restore_adapter, router_losses, routing_stats
from mixtura.checkpoints.pretrained import load_base_config
from mixtura.config import AdapterConfig, UserError
from mixtura.diagnostics.leak import LeakReport
from mixtura.errors import rewording
from mixtura.models import MixtureConfig
from mixtura.models.inference import mixing_layers, running_in
from mixtura.results import Facts, Leaks
from mixtura.training import saving as checkpoints
from mixtura.training.interface import StepLosses


def inference_modes(model: nn.Module) -> tuple[str, ...]:
    """The modes in which a model can run, the one that trains first: see `mixtura.evaluation.evaluation_modes`."""
    return ("group", "alone") if mixing_layers(model) else ("causal",)


@contextmanager
def running(model: nn.Module, mode: str) -> Iterator[None]:
    """eval() in a mode of `inference_modes`, for the length of a block and without gradients."""
    was_training = model.training
    model.eval()
    try:
        with running_in(mixing_layers(model), "group" if mode == "group" else "alone"), torch.no_grad():
            yield
    finally:
        model.train(was_training)


def loss_measures(loss: float) -> dict[str, float]:
    """A loss in nats a token, and its perplexity, which stays finite."""
    return {"loss": loss, "perplexity": math.exp(min(loss, 700.0))}


def losses_with_routers(model: nn.Module, outputs: Any, task_loss: Tensor, adapter: AdapterConfig | None) -> StepLosses:
    """A step's losses: the task's, and what the routers of the adapter add, or without one those of the base model."""
    if adapter is None:
        aux_loss, z_loss = getattr(outputs, "aux_loss", None), getattr(outputs, "z_loss", None)
        return StepLosses(task_loss, aux_loss, z_loss, getattr(outputs, "routing", None))
    routing = routing_stats(model) if adapter.method != "lora" else None
    return StepLosses(task_loss, *(router_losses(model) or (None, None)), routing or None)


def save_tuned(model: Any, folder: Path, adapter: AdapterConfig | None) -> None:
    """Writes the adapter, or all weights where all are trained."""
    if adapter is None:
        checkpoints.save_model(model, folder)
    else:
        model.save_pretrained(folder, save_embedding_layers=False)


def load_tuned(model: Any, folder: Path, adapter: AdapterConfig | None) -> None:
    """Reads what `save_tuned` wrote.

    Raises:
        UserError: the files are damaged or of another model.
    """
    if adapter is None:
        checkpoints.load_weights(model, folder)
    else:
        restore_adapter(model, folder)


def find_leaks(model: nn.Module, probe: Callable[[nn.Module], LeakReport]) -> Leaks:
    """What a probe finds in a model as it is deployed, and as it trains."""
    deployed = probe(model)
    with running_in(mixing_layers(model), "group"):
        trained = probe(model)
    return Leaks(trained.future, trained.batch, deployed.batch)


@torch.no_grad()
def stirred(model: nn.Module) -> nn.Module:
    """The model with noise in what is trained: a fresh adapter adds zero, so it would show no leak."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def adapter_settings(adapter: AdapterConfig | None) -> Facts:
    """The settings of an adapter that a report shows: its method, and what differs from the defaults."""
    if adapter is None:
        return {"tuned": "all weights"}
    default = type(adapter)(method=adapter.method)
    changed = {key: value for key, value in vars(adapter).items() if value != getattr(default, key)}
    return {key: list(value) if isinstance(value, tuple) else value for key, value in changed.items()}


def naming_adapter(arm: str) -> AbstractContextManager[None]:
    """Says whose adapter cannot be attached, in the words of a recipe."""
    return rewording({"This adapter": f"The adapter of arm '{arm}'", "'adapter.": f"'arms.{arm}.adapter."})


def mixed_examples(base: str, adapter: AdapterConfig | None, *, arm: str, batch_size: int) -> int | None:
    """The number of examples that an arm mixes, because of its base model or its adapter; None without such mixtures.

    Raises:
        UserError: the batch is no multiple of it.
    """
    config = load_base_config(base)
    mixes = isinstance(config, MixtureConfig) and "mixture_of_tokens" in (config.mlp_layer_types or [])
    sizes = {"base": config.group_size} if mixes else {}
    if adapter is not None and adapter.method == "mixture_of_tokens":
        sizes[f"arms.{arm}.adapter"] = adapter.group_size
    for where, size in sizes.items():
        check_groups(where, size, batch_size)
    return math.lcm(*sizes.values()) if sizes else None


def check_groups(where: str, group_size: int, batch_size: int) -> None:
    """Refuses a batch that groups do not fill; `where` is the part of the recipe that names their size."""
    if batch_size % group_size:
        raise UserError(
            f"'training.batch_size' is {batch_size}, which is no multiple of '{where}.group_size' {group_size}: change "
            "one of them."
        )


def two_sided_p(means_R: np.ndarray) -> float:
    """The p-value of a difference from the means (R,) of R resamples: twice the share on its rarer side of zero.

    One resample more counts on that side, so it is never zero (Koehn 2004, "Statistical Significance Tests for Machine
    Translation Evaluation"; Davison and Hinkley 1997, section 4.2).
    """
    rarer_side = min(int((means_R <= 0).sum()), int((means_R >= 0).sum()))
    return min(1.0, 2 * (rarer_side + 1) / (len(means_R) + 1))
