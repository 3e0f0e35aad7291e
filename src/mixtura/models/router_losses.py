"""What the decoder and its heads return, and the router losses inside a model's own loss.

Since the model adds the router losses itself, any trainer balances the experts without knowing of them.

The fields that transformers' classes for mixtures have come first and in their order, so that code written for Mixtral
finds them at the same place. Mixtura's own fields come last.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_outputs import (
    BaseModelOutputWithPast,
    MoeCausalLMOutputWithPast,
    SequenceClassifierOutputWithPast,
)
from transformers.utils import logging

from mixtura.config import UserError
from mixtura.layers import RoutingStats
from mixtura.layers.remoe import l1_penalty
from mixtura.layers.statistics import balance_counts, load_balancing_loss
from mixtura.models.configuration_mixture import MixtureConfig


@dataclass
class MixtureModelOutput(BaseModelOutputWithPast):
    """The decoder's output.

    `router_logits` has (T, E) logits for every layer of token choice, where `output_router_logits` asks for them.
    `routing` has a `RoutingStats` or None for every layer when it was asked for.
    """

    router_logits: tuple[Tensor, ...] | None = None
    routing: tuple[RoutingStats | None, ...] | None = None


@dataclass
class MixtureCausalLMOutput(MoeCausalLMOutputWithPast):
    """Language model output.

    `loss` is `language_loss`, plus the weighted router losses in training mode. `aux_loss` and `z_loss` are unweighted
    means over the layers that have them. `routing` is as in `MixtureModelOutput`.
    """

    z_loss: Tensor | None = None
    language_loss: Tensor | None = None
    routing: tuple[RoutingStats | None, ...] | None = None


@dataclass
class MixtureClassifierOutput(SequenceClassifierOutputWithPast):
    """Classifier output: `loss` has the weighted router losses in training mode; the rest is as for language models."""

    aux_loss: Tensor | None = None
    z_loss: Tensor | None = None
    router_logits: tuple[Tensor, ...] | None = None
    routing: tuple[RoutingStats | None, ...] | None = None


logger = logging.get_logger(__name__)

Routing = tuple[RoutingStats | None, ...]
_BALANCED = ("token_choice", "remoe")
"""Families whose load a loss evens out, each with a weight of its own."""


def router_losses(config: MixtureConfig, routing: Routing | None) -> tuple[Tensor | None, Tensor | None]:
    """Load-balancing and z-loss, means over the token-choice layers; None where there is no such layer.

    ReMoE's first loss is its penalty. The other families balance their load by construction, and where languages name
    the experts the data decides.

    Raises:
        UserError: the model has layers of both, whose losses have weights of their own.
    """
    if routing is None or config.route_by != "token":
        return None, None
    families = config.mlp_layer_types or []
    stats = [s for s, family in zip(routing, families, strict=True) if s is not None and family in _BALANCED]
    if not stats:
        return None, None
    if set(_BALANCED) <= set(families):
        raise UserError("A model with token_choice and remoe layers cannot be trained: use one of the two families.")
    token_choice = config.num_experts, config.free_expert_balance
    if "remoe" in families:
        aux_losses = [l1_penalty(s, config.num_experts_per_tok) for s in stats]
    elif config.balance_over == "sequence":
        aux_losses = [s.sequence_loss for s in stats]
    else:
        aux_losses = [
            load_balancing_loss(s.tokens_per_expert_E, s.importance_E, balance_counts(s.importance_E, *token_choice))
            for s in stats
        ]
    return torch.stack(aux_losses).mean(), torch.stack([s.router_z_loss for s in stats]).mean()


def weighted_router_losses(
    weights: tuple[Tensor | float, Tensor | float],
    losses: tuple[Tensor | None, Tensor | None],
    *,
    share: Tensor | float | None,
) -> Tensor | None:
    """What the losses of `router_losses` add to the model's; None where there is nothing to balance.

    `share` is that of this batch in the step, see `share_of_step`; None where the trainer averages batches itself.
    """
    aux_loss, z_loss = losses
    if aux_loss is None or z_loss is None:
        return None
    total = weights[0] * aux_loss + weights[1] * z_loss
    return total if share is None else total * share


def share_of_step(counted: Tensor, num_items_in_batch: Tensor | int | None) -> Tensor | None:
    """This batch's share of the targets of its optimizer step; None where the trainer does not count those.

    transformers' Trainer gives the number of targets of all micro-batches (and, where it averages tokens across
    devices, of all ranks) and then only adds up losses. A router loss is a mean over one micro-batch, so it has to be
    multiplied by the share of that micro-batch; otherwise it would grow with the number of micro-batches.

    Args:
        counted: labels of the predictions, -100 where there is none; not the first of a row where labels are shifted.
        num_items_in_batch: the targets of the whole step.
    """
    if num_items_in_batch is None:
        return None
    share = counted.ne(-100).sum() / num_items_in_batch
    return share.to(counted.device)


def warn_of_a_loss_outside(config: MixtureConfig, kwargs: Mapping[str, Any]) -> None:
    """Says once that a trainer forms the loss without the model, so that nothing balances the experts.

    Such a trainer gives the number of targets but no labels: the Trainer does so for label smoothing and for
    `compute_loss_func`.
    """
    balanced = config.router_aux_loss_coef or config.router_z_loss_coef
    if kwargs.get("num_items_in_batch") is not None and config.has_balanced_layers and balanced:
        logger.warning_once(
            "The trainer forms the loss itself (label smoothing, or a loss function of its own), so the router losses "
            "are left out and nothing balances the experts: ask for output_router_logits=True and add "
            "router_aux_loss_coef * outputs.aux_loss, or train without label smoothing."
        )
