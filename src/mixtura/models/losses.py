"""What the decoder and its heads return, the router losses in it, and the loss of a head without its logits.

Since the model adds the router losses itself, any trainer balances the experts without knowing of them. The fields that
transformers' classes for mixtures have come first and in their order, so that code written for Mixtral finds them at
the same place. Mixtura's own fields come last.

`logits_and_loss` is what Mixtura's own models call. `run_without_logits` does the same for any model of transformers.
The logits of a batch are often the largest tensor of a training step, and cross-entropy keeps three of that size. Here
the gradients are formed in the forward pass, from the logits of some rows that are then dropped, so that no product is
computed twice and the backward pass only has to scale them.

Shapes: B batch, L length, K places of a row that have logits, T rows, D hidden, V vocabulary.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, cast
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.modeling_outputs import (
    BaseModelOutputWithPast,
    MoeCausalLMOutputWithPast,
    SequenceClassifierOutputWithPast,
)
from transformers.utils import logging

from mixtura.config import UserError
from mixtura.kernels.expert_weights import at_autocast_dtype
from mixtura.layers import RoutingStats
from mixtura.layers.remoe import l1_penalty
from mixtura.layers.statistics import balance_counts, load_balancing_loss
from mixtura.models.configuration_mixture import MixtureConfig
from mixtura.planning.step_memory import LARGE_LOGITS, ROWS_BYTES, ROWS_BYTES_ON_CPU


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


IGNORED = -100


def logits_and_loss(
    model: Any, hidden_BLD: Tensor, labels_BL: Tensor | None, *, skip_logits: bool, **kwargs: Any
) -> tuple[Any, Any]:
    """The logits (B, L, V) of a language model, None if they are skipped, and its loss, None without
    labels.

    `skip_logits` is the name that transformers' Trainer uses for a caller who wants the loss alone. Without labels the
    logits are all there is to give. `kwargs` are for the loss.
    """
    vocab_size = model.config.vocab_size
    if labels_BL is None:
        return model.lm_head(hidden_BLD), None
    # Small logits are computed as ever, so that the numbers of small models stay the same to the last bit.
    long = skip_logits and large(hidden_BLD.shape[:-1].numel(), vocab_size)
    if long and _is_plain(model.lm_head, model.loss_function):
        return None, head_loss(hidden_BLD, model.lm_head.weight, labels_BL, **kwargs)
    logits_BLV = model.lm_head(hidden_BLD)
    loss = model.loss_function(logits_BLV, labels_BL, vocab_size, **kwargs)
    return None if skip_logits else logits_BLV, loss


def _is_plain(head: nn.Module, loss_function: Any) -> bool:
    """Whether nothing has changed the head (an adapter, offloading, a device mesh) nor, like a user, the loss."""
    return is_plain_head(head) and loss_function is ForCausalLMLoss


def is_plain_head(head: Any) -> bool:
    """Whether a head is one product with a weight that this process holds whole, and nothing listens to it."""
    if type(head) is not nn.Linear or type(head.weight) not in (Tensor, nn.Parameter) or head.bias is not None:
        return False
    return not (head._forward_hooks or head._forward_pre_hooks or head._backward_hooks or "forward" in vars(head))


class Hidden(NamedTuple):
    """What the head of a model was given, and the head's weight."""

    states_BKD: Tensor
    weight_VD: Tensor

    def summed_loss(self, targets_BK: Tensor) -> Tensor:
        """The sum of the cross-entropies of all targets; -100 marks places without one."""
        real_BK = targets_BK.ne(IGNORED)
        return _summed(self.states_BKD[real_BK], self.weight_VD, targets_BK[real_BK], IGNORED)

    @torch.no_grad()
    def nats(self, targets_BK: Tensor) -> Tensor:
        """The cross-entropy of every target (B, K), zero where there is none."""
        real_BK = targets_BK.ne(IGNORED)
        hidden_TD, weight_VD = at_autocast_dtype(self.states_BKD[real_BK], self.weight_VD)
        rows = _rows_at_once(hidden_TD, weight_VD)
        parts = zip(hidden_TD.split(rows), targets_BK[real_BK].split(rows), strict=True)
        found = [F.cross_entropy((part @ weight_VD.T).float(), labels, reduction="none") for part, labels in parts]
        nats_BK = torch.zeros(targets_BK.shape, device=targets_BK.device)
        return nats_BK.masked_scatter_(real_BK, torch.cat(found)) if found else nats_BK


_CHANGED_LATER: WeakSet[nn.Module] = WeakSet()
"""Heads whose logits the model changes afterwards, such as by a soft cap or a scale."""


def run_without_logits(model: Any, run: Callable[[], Any], *, rows: int) -> tuple[Any, Hidden | None]:
    """The output of `run()`, which calls the model once, and what the head was given in place of large logits.

    While it runs, the head computes the logits of the first place alone. Were they changed afterwards, the model's
    logits are not the head's, and `run` is called again as usual.

    Args:
        model: a language model of transformers, which an adapter or data parallelism may wrap.
        run: calls it.
        rows: how many rows of logits it would compute.

    Returns:
        The output, with the logits of the first place alone where there is something else beside it, which is None
        where logits are small or the head is no plain product.
    """
    head = getattr(model, "module", model).get_output_embeddings()
    if not is_plain_head(head) or head in _CHANGED_LATER or not large(rows, len(head.weight)):
        return run(), None
    given: list[Tensor] = []

    def first_place(states_BKD: Tensor) -> Tensor:
        given.append(states_BKD)
        return F.linear(states_BKD[:, :1], head.weight)

    head.forward = first_place
    try:
        outputs = run()
    finally:
        del head.forward
    if len(given) == 1:
        with torch.no_grad():
            expected_B1V = head(given[0][:, :1])
        if torch.equal(outputs.logits.to(expected_B1V.dtype), expected_B1V):
            return outputs, Hidden(given[0], head.weight)
    _CHANGED_LATER.add(head)
    return run(), None


def large(rows: int, vocab_size: int) -> bool:
    """Whether the logits of so many rows are too large to hold."""
    return 4 * rows * vocab_size > LARGE_LOGITS


def head_loss(
    hidden_BLD: Tensor,
    weight_VD: Tensor,
    labels_BL: Tensor,
    *,
    num_items_in_batch: Tensor | int | None = None,
    ignore_index: int = IGNORED,
    shift_labels: Tensor | None = None,
    **_: Any,
) -> Tensor:
    """What transformers' loss of causal language models gives for the logits `hidden @ weight.T`, without these.

    Args:
        hidden_BLD: normed hidden states.
        weight_VD: of the head.
        labels_BL: token ids, not shifted.
        num_items_in_batch: the loss is the sum over targets divided by this; None is their mean.
        ignore_index: the label of rows that predict nothing.
        shift_labels: labels that are shifted already, in place of `labels_BL`.
        **_: what else a trainer gives a loss function.
    """
    if shift_labels is None:
        shift_labels = F.pad(labels_BL, (0, 1), value=ignore_index)[..., 1:]
    label_T = shift_labels.reshape(-1).to(hidden_BLD.device)
    summed = _summed(hidden_BLD.flatten(0, -2), weight_VD, label_T, ignore_index)
    if num_items_in_batch is None:
        return summed / label_T.ne(ignore_index).sum()
    divisor = num_items_in_batch.to(summed.device) if isinstance(num_items_in_batch, Tensor) else num_items_in_batch
    return summed / divisor


def run_and_sum(model: Any, run: Callable[[], Any], targets_BK: Tensor) -> tuple[Any, Tensor]:
    """The output of `run()`, and the sum of the cross-entropies of its targets; -100 marks places without one."""
    outputs, hidden = run_without_logits(model, run, rows=targets_BK.numel())
    if hidden is not None:
        return outputs, hidden.summed_loss(targets_BK)
    real_BK = targets_BK.ne(IGNORED)
    return outputs, F.cross_entropy(outputs.logits[real_BK].float(), targets_BK[real_BK], reduction="sum")


def _summed(hidden_TD: Tensor, weight_VD: Tensor, label_T: Tensor, ignore_index: int) -> Tensor:
    hidden_TD, weight_VD = at_autocast_dtype(hidden_TD, weight_VD)
    rows = _rows_at_once(hidden_TD, weight_VD)
    want_gradients = torch.is_grad_enabled() and (hidden_TD.requires_grad or weight_VD.requires_grad)
    return cast(Tensor, _SummedLoss.apply(hidden_TD, weight_VD, label_T, ignore_index, rows, want_gradients))


def _rows_at_once(hidden_TD: Tensor, weight_VD: Tensor) -> int:
    at_once = ROWS_BYTES_ON_CPU if hidden_TD.device.type == "cpu" else ROWS_BYTES
    return max(1, at_once // (4 * len(weight_VD)))


class _SummedLoss(torch.autograd.Function):
    """The sum of the cross-entropies of all rows, in float32 or, for float64, in that."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_TD: Tensor,
        weight_VD: Tensor,
        label_T: Tensor,
        ignore_index: int,
        rows: int,
        want_gradients: bool,
    ) -> Tensor:
        wide = torch.promote_types(hidden_TD.dtype, torch.float32)
        total = torch.zeros((), dtype=wide, device=hidden_TD.device)
        real_T1 = label_T.ne(ignore_index)[:, None]
        # Labels that are ignored may be no index at all.
        place_T1 = label_T[:, None].masked_fill(~real_T1, 0)
        grad_hidden_TD = grad_weight_VD = None
        if want_gradients:
            grad_hidden_TD = torch.empty_like(hidden_TD)
            if ctx.needs_input_grad[1]:  # an adapter leaves the head as it is
                grad_weight_VD = torch.zeros_like(weight_VD, dtype=wide)
        with torch.autocast(hidden_TD.device.type, enabled=False):
            for start in range(0, len(hidden_TD), rows):
                part = slice(start, start + rows)
                hidden_RD, real_R1, place_R1 = hidden_TD[part], real_T1[part], place_T1[part]
                scores_RV = F.log_softmax(hidden_RD @ weight_VD.T, dim=-1, dtype=wide)
                # Not in place: compiled by torch 2.11, an output that is changed in place has gradients of zero.
                total = total - scores_RV.gather(1, place_R1).masked_fill(~real_R1, 0.0).sum()
                if grad_hidden_TD is not None:
                    ones_R1 = torch.ones_like(place_R1, dtype=wide)
                    grad_RV = scores_RV.exp_().scatter_add_(1, place_R1, -ones_R1).to(hidden_RD.dtype)
                    # Rows that are ignored are cleared where they are narrow.
                    grad_hidden_TD[part] = (grad_RV @ weight_VD) * real_R1
                    if grad_weight_VD is not None:
                        _add_product(grad_weight_VD, grad_RV.T, hidden_RD * real_R1)
                    del grad_RV
                del scores_RV  # or it would be held beside the logits of the next rows
        if want_gradients:
            narrow = None if grad_weight_VD is None else grad_weight_VD.to(weight_VD.dtype)
            ctx.save_for_backward(grad_hidden_TD, narrow)
        return total

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grads: Tensor
    ) -> tuple[Tensor | None, ...]:
        grad_hidden_TD, grad_weight_VD = ctx.saved_tensors
        (grad,) = grads
        own = [
            # In float32, since the factor, one over the targets of a step, is small for 16 bits.
            (value * grad).to(value.dtype) if needed and value is not None else None
            for value, needed in zip((grad_hidden_TD, grad_weight_VD), ctx.needs_input_grad[:2], strict=True)
        ]
        return (*own, None, None, None, None)


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Adds `left @ right` to a total that may be wider."""
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    else:
        total += left @ right
