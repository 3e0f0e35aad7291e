"""Fast paths for dense routing: mixing and spreading as batched matrix products, experts as one batched product.

On the CPU in float32 all of it runs in C where that can be compiled: see `native`. Definitions: `reference.py`, whose
shape letters hold here too.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mixtura.kernels import native
from mixtura.kernels.expert_weights import ExpertWeights, activate, activate_backward, at_autocast_dtype


def mixed_ffn(
    x_NGD: Tensor,
    dispatch_NGEC: Tensor,
    combine_NGEC: Tensor,
    experts: ExpertWeights,
) -> Tensor:
    """(N, G, D) -> (N, G, D): mix, experts on the mixtures, spread."""
    experts = experts.at_autocast_dtype(x_NGD.device.type)
    x_NGD, dispatch_NGEC, combine_NGEC = at_autocast_dtype(x_NGD.contiguous(), dispatch_NGEC, combine_NGEC)
    if native.can_run(experts.activation, x_NGD, dispatch_NGEC, combine_NGEC, experts.up, experts.down):
        return _MixedFFN.apply(x_NGD, dispatch_NGEC, combine_NGEC, *experts)
    y_ERD = batched_ffn(mix(x_NGD, dispatch_NGEC), experts)
    return spread(y_ERD, combine_NGEC)


class _MixedFFN(torch.autograd.Function):
    """All three steps in C: mixtures are written where their expert reads them, with no pass to turn them around."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        x_NGD, dispatch_NGEC, combine_NGEC, *weights = arguments
        experts = ExpertWeights(*weights)
        z_ERD, _ = native.mix(dispatch_NGEC, x_NGD)
        counts = [z_ERD.size(1)] * len(z_ERD)
        y_ERD, u_RH = native.forward(z_ERD, None, None, counts, experts)
        ctx.save_for_backward(x_NGD, dispatch_NGEC, combine_NGEC, experts.up, experts.down, z_ERD, y_ERD, u_RH)
        ctx.settings = (counts, experts.activation, experts.gated)
        return native.spread(combine_NGEC, y_ERD)[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        x_NGD, dispatch_NGEC, combine_NGEC, up_EHD, down_EDF, z_ERD, y_ERD, u_RH = ctx.saved_tensors
        counts, *kind = ctx.settings
        experts = ExpertWeights(up_EHD, down_EDF, *kind)
        grad_y_ERD, grad_combine_NGEC = native.mix(combine_NGEC, grad_outputs[0].contiguous(), y_ERD)
        grads = native.backward(grad_y_ERD, z_ERD, None, None, counts, experts, u_RH)
        grad_z_ERD, _, grad_up_EHD, grad_down_EDF = grads
        grad_x_NGD, grad_dispatch_NGEC = native.spread(dispatch_NGEC, grad_z_ERD, x_NGD)
        return grad_x_NGD, grad_dispatch_NGEC, grad_combine_NGEC, grad_up_EHD, grad_down_EDF, None, None


def merged_experts(weight_NE: Tensor, experts: ExpertWeights) -> ExpertWeights:
    """(N, E) weights -> N experts, each the weighted sum of all E, matrix by matrix; definition in `reference`."""
    experts = experts.at_autocast_dtype(weight_NE.device.type)
    (weight_NE,) = at_autocast_dtype(weight_NE)
    up, down = ((weight_NE @ each.flatten(1)).view(-1, *each.shape[1:]) for each in (experts.up, experts.down))
    return experts._replace(up=up, down=down)


def batched_ffn(x_ERD: Tensor, experts: ExpertWeights) -> Tensor:
    """(E, R, D) -> (E, R, D): expert e on its own R rows."""
    return _BatchedFFN.apply(*at_autocast_dtype(x_ERD), *experts.at_autocast_dtype(x_ERD.device.type))


class _BatchedFFN(torch.autograd.Function):
    """Keeps the first projection only, and writes the weights' gradients in the layout of the weights.

    Autograd of the plain products would keep the activated rows too, and hand back transposed gradients that are copied
    once more, which costs a fifth of the layer's time where experts are many and rows few.
    """

    @staticmethod
    def forward(ctx: Any, x_ERD: Tensor, up_EHD: Tensor, down_EDF: Tensor, activation: str, gated: bool) -> Tensor:
        u_ERH = torch.bmm(x_ERD, up_EHD.transpose(1, 2))
        ctx.save_for_backward(x_ERD, up_EHD, down_EDF, u_ERH)
        ctx.settings = (activation, gated)
        return torch.bmm(activate(u_ERH, activation, gated), down_EDF.transpose(1, 2))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        (grad_ERD,) = grad_outputs
        x_ERD, up_EHD, down_EDF, u_ERH = ctx.saved_tensors
        grad_down_EDF = torch.bmm(grad_ERD.transpose(1, 2), activate(u_ERH, *ctx.settings))
        grad_u_ERH = activate_backward(torch.bmm(grad_ERD, down_EDF), u_ERH, *ctx.settings)
        grad_up_EHD = torch.bmm(grad_u_ERH.transpose(1, 2), x_ERD)
        return torch.bmm(grad_u_ERH, up_EHD), grad_up_EHD, grad_down_EDF, None, None


def scaled_ffn(
    x_TD: Tensor,
    scale_TE: Tensor,
    weight_TE: Tensor,
    mean_ED: Tensor | None,
    experts: ExpertWeights,
) -> Tensor:
    """(T, D) -> (T, D): every expert on every token, sum_e weight_e * f_e(scale_e * x + (1 - scale_e) * mean_e).

    The first projection is linear, so no scaled copy of x is needed: one product with all experts' rows stacked, a
    scale in between, and one product back, for which the weights are laid out anew; with few tokens that copy would
    cost more than adding up the experts' outputs. No mean is a mean of zero.
    """
    up_EHD, down_EDF, activation, gated = experts
    num_experts, width, hidden = up_EHD.shape
    scale_TE1 = scale_TE.unsqueeze(-1)
    u_TEH = (x_TD @ up_EHD.reshape(num_experts * width, hidden).T).unflatten(-1, (num_experts, width)) * scale_TE1
    if mean_ED is not None:
        u_TEH = u_TEH + (1 - scale_TE1) * torch.bmm(up_EHD, mean_ED.unsqueeze(-1)).squeeze(-1)
    h_TEF = activate(u_TEH, activation, gated) * weight_TE.unsqueeze(-1)
    if len(x_TD) < hidden:
        return torch.bmm(h_TEF.transpose(0, 1), down_EDF.transpose(1, 2)).sum(0)
    return h_TEF.flatten(1) @ down_EDF.transpose(1, 2).reshape(-1, hidden)


def mix(x_NGD: Tensor, dispatch_NGEC: Tensor) -> Tensor:
    """(N, G, D) tokens, (N, G, E, C) weights -> (E, N*C, D) mixtures: sum over the group of weight * token."""
    num_groups, _, num_experts, num_slots = dispatch_NGEC.shape
    z_NSD = torch.bmm(dispatch_NGEC.flatten(2).transpose(1, 2), x_NGD)
    z_NECD = z_NSD.unflatten(1, (num_experts, num_slots))
    return z_NECD.transpose(0, 1).reshape(num_experts, num_groups * num_slots, -1)


def spread(y_ERD: Tensor, combine_NGEC: Tensor) -> Tensor:
    """(E, N*C, D) expert outputs, (N, G, E, C) weights -> (N, G, D): every token's weighted sum of the outputs."""
    num_groups, _, _, num_slots = combine_NGEC.shape
    y_NECD = y_ERD.unflatten(1, (num_groups, num_slots)).transpose(0, 1)
    return torch.bmm(combine_NGEC.flatten(2), y_NECD.flatten(1, 2))
