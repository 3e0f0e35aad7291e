"""Mixture of Tokens for tokens that have no group: how a trained layer is deployed.

The group's formula is kept, and what the other members would have added to it is put in as a number and a vector for
each mixture (`Neighbours`). Take mixture s and a token x with router logit l, and let the others have logits l_i,
tokens x_i, mass Z = sum exp(l_i) and weighted mean x_bar = sum exp(l_i) x_i / Z. The softmax over the group gives x the
weight

    m = exp(l) / (exp(l) + Z) = sigmoid(l - log Z),

and the others together the remaining 1 - m, so the mixture is z = m x + (1 - m) x_bar: exactly the training formula,
whatever the size of the group. The token then gets back m * f(z) from the mixture's expert f. What the others get back
is not computed, since nobody reads it.

With zero neighbours Z = G - 1 and x_bar = 0, so z = m x, and the token's output depends on nothing but the token.

Running every mixture costs as much as G tokens together, so a deployed layer runs the K mixtures of the largest m. For
the others z is close to x_bar, and f(x_bar) is the same for every token: it is computed once (`output_SD`), and m times
it stands in for the mixtures that do not run. With zero neighbours that is zero, as experts without biases map zero to
zero.

Shapes: T tokens, D hidden, E experts, C mixtures an expert has, S = E*C mixtures, K mixtures that run for a token.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from mixtura import kernels
from mixtura.layers.experts import Experts
from mixtura.layers.neighbours import Neighbours


class Choice(NamedTuple):
    """The mixtures that run for each token."""

    mixture_TK: Tensor
    expert_TK: Tensor
    scale_TK: Tensor
    """The token's share m of its mixtures."""
    weight_TK: Tensor
    """The weight with which it gets their outputs back: m, unless a second router gives these."""


def weigh(
    logits_TS: Tensor, combine_logits_TS: Tensor | None, neighbours: Neighbours, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """The token's share m of every mixture (T, S), and the weights (T, S) of the outputs.

    Without logits of a second router both are one tensor, which `choose` and the kernels recognise.
    """
    scale_TS = weight_TS = torch.sigmoid(logits_TS - neighbours.log_mass_S).to(dtype)
    if combine_logits_TS is not None:
        weight_TS = torch.sigmoid(combine_logits_TS - neighbours.combine_log_mass_S).to(dtype)
    return scale_TS, weight_TS


def choose(scale_TS: Tensor, weight_TS: Tensor, top_k: int, mixtures_per_expert: int) -> Choice:
    """The mixtures with the largest product of both weights: how far the token reaches the output through each.

    With one router that product is m squared, which sorts as m does, so m is sorted as it is.
    """
    same = weight_TS is scale_TS
    gate_TK, mixture_TK = (scale_TS if same else scale_TS * weight_TS).topk(top_k, dim=-1)
    scale_TK = gate_TK if same else scale_TS.gather(1, mixture_TK)
    weight_TK = gate_TK if same else weight_TS.gather(1, mixture_TK)
    # Mixtures of one expert lie side by side.
    expert_TK = mixture_TK if mixtures_per_expert == 1 else mixture_TK // mixtures_per_expert
    return Choice(mixture_TK, expert_TK, scale_TK, weight_TK)


def run_all(
    experts: Experts, x_TD: Tensor, scale_TS: Tensor, weight_TS: Tensor, neighbours: Neighbours, num_experts: int
) -> Tensor:
    """(T, D) -> (T, D): sum over all mixtures of weight * f(z)."""
    # The kernel runs every expert once on every token, so with C mixtures an expert it is called C times.
    scale_TEC, weight_TEC = (t.unflatten(-1, (num_experts, -1)) for t in (scale_TS, weight_TS))
    mean_ECD = None
    if neighbours.mean_SD is not None:
        mean_ECD = neighbours.mean_SD.to(x_TD.dtype).unflatten(0, (num_experts, -1))
    parts = [
        experts(
            x_TD,
            kernels.scaled_ffn,
            scale_TEC[..., c],
            weight_TEC[..., c],
            None if mean_ECD is None else mean_ECD[:, c],
        )
        for c in range(scale_TEC.size(-1))
    ]
    return torch.stack(parts).sum(0) if len(parts) > 1 else parts[0]


def run_chosen(experts: Experts, x_TD: Tensor, choice: Choice, weight_TS: Tensor, neighbours: Neighbours) -> Tensor:
    """(T, D) -> (T, D): sum over the chosen mixtures of weight * f(z), and over the others of weight * f(x_bar)."""
    x_T1D = x_TD.unsqueeze(1)
    if neighbours.mean_SD is None:
        # z = m x: one input for all choices, which the kernel scales.
        y_TD = experts(x_T1D, kernels.chosen_ffn, choice.expert_TK, choice.scale_TK, choice.weight_TK)
    else:
        mean_TKD = neighbours.mean_SD.to(x_TD.dtype)[choice.mixture_TK]
        z_TKD = torch.lerp(mean_TKD, x_T1D, choice.scale_TK.unsqueeze(-1))  # x_bar + m (x - x_bar)
        y_TD = experts(z_TKD, kernels.chosen_ffn, choice.expert_TK, None, choice.weight_TK)
    if neighbours.output_SD is None:
        return y_TD
    others_TS = weight_TS.scatter(1, choice.mixture_TK, 0.0).to(y_TD.dtype)
    return y_TD + others_TS @ neighbours.output_SD.to(y_TD.dtype)
