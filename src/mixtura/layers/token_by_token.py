"""Mixture of Tokens for tokens that have no group: how a trained layer is deployed, and what stands for the others.

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

So a token needs to know of its neighbours only log Z and x_bar. Those of a population have its averages, which
`Population` keeps.

Shapes: T tokens, D hidden, E experts, C mixtures an expert has, S = E*C mixtures, K mixtures that run for a token, N
groups, G tokens of a group.
"""

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from mixtura import kernels
from mixtura.kernels import ExpertWeights
from mixtura.layers.experts import Experts
from mixtura.layers.feed_forward import FeedForward
from mixtura.layers.routing import Router


class Neighbours(NamedTuple):
    """The other members of a token's group, as every mixture sees them."""

    log_mass_S: Tensor | float
    """Log of the summed exp(logit) of the other G - 1 tokens."""
    combine_log_mass_S: Tensor | float
    """The same for the router that spreads the outputs back; unused where it is the same router."""
    mean_SD: Tensor | None = None
    """The other tokens' weighted mean; None is zero."""
    output_SD: Tensor | None = None
    """What the mixture's expert makes of that mean; None is zero, as experts without biases make of zero."""


def zero_neighbours(group_size: int) -> Neighbours:
    """G - 1 zero tokens: their logits are 0."""
    return Neighbours(math.log(group_size - 1), math.log(group_size - 1))


class Observation(NamedTuple):
    """Averages over the groups of a batch."""

    log_mass_S: Tensor
    combine_log_mass_S: Tensor
    mean_SD: Tensor


@torch.no_grad()
def observe(x_NGD: Tensor, logits_NGS: Tensor, combine_logits_NGS: Tensor) -> Observation:
    """What the last member of every group has for neighbours, averaged over the groups.

    Taking the group apart, instead of subtracting a member from its sums, loses no digits where one member holds nearly
    all of a mixture. The logarithm is averaged, not the mass: the weight is a sigmoid in it, and a mean of masses would
    be that of the few groups in which a mixture has found its token.
    """
    others_NgS, others_NgD = logits_NGS[:, :-1], x_NGD[:, :-1]
    weight_TS = others_NgS.softmax(1).flatten(0, 1)
    return Observation(
        log_mass_S=others_NgS.logsumexp(1).mean(0),
        combine_log_mass_S=combine_logits_NGS[:, :-1].logsumexp(1).mean(0),
        mean_SD=weight_TS.T @ others_NgD.flatten(0, 1).to(weight_TS.dtype) / len(x_NGD),
    )


class Population(nn.Module):
    """Averages over many groups, saved with the model: S log masses and S means, and the experts' outputs for these."""

    log_mass: Tensor
    combine_log_mass: Tensor
    mean: Tensor
    output: Tensor
    updates: Tensor

    def __init__(self, num_mixtures: int, hidden_size: int, *, group_size: int) -> None:
        """Starts as a population of zeros, with which a layer computes what it computes alone."""
        super().__init__()
        self.group_size = group_size
        self.register_buffer("log_mass", torch.empty(num_mixtures))
        self.register_buffer("combine_log_mass", torch.empty(num_mixtures))
        self.register_buffer("mean", torch.empty(num_mixtures, hidden_size))
        self.register_buffer("output", torch.empty(num_mixtures, hidden_size))
        self.register_buffer("updates", torch.empty(()))
        self.reset()

    @torch.no_grad()
    def reset(self) -> None:
        """Forgets everything."""
        self.log_mass.fill_(math.log(self.group_size - 1))
        self.combine_log_mass.fill_(math.log(self.group_size - 1))
        for buffer in (self.mean, self.output, self.updates):
            buffer.zero_()

    @torch.no_grad()
    def update(self, seen: Observation, experts: Experts, *, rate: float = 0.0) -> None:
        """Moves the averages towards an observation.

        Args:
            seen: averages over a batch.
            experts: those of the layer, whose outputs for the means are kept too.
            rate: the least weight of an observation. The n-th has weight 1/n until that falls below the rate, so a rate
                of 0 is the plain mean of all, and no start value lingers.
        """
        self.updates += 1
        weight = torch.clamp_min(1 / self.updates, rate)  # a tensor: the host need not wait for it
        for kept, new in zip((self.log_mass, self.combine_log_mass, self.mean), seen, strict=True):
            kept.lerp_(new.to(kept), weight.to(kept))
        self.refresh(experts)

    @torch.no_grad()
    def refresh(self, experts: Experts) -> None:
        """Computes the experts' outputs for the means again, as they change with the weights."""
        self.output.copy_(experts(self.mean, _on_their_mixtures))

    @property
    def neighbours(self) -> Neighbours:
        """The other members of a group as they are on average."""
        return Neighbours(self.log_mass, self.combine_log_mass, self.mean, self.output)


def _on_their_mixtures(mean_SD: Tensor, experts: ExpertWeights) -> Tensor:
    """(S, D) -> (S, D): the output of each mixture's expert."""
    mean_ECD = mean_SD.to(experts.up.dtype).unflatten(0, (len(experts.up), -1))
    return kernels.batched_ffn(mean_ECD, experts).flatten(0, 1)


class ServedTokenByToken(FeedForward):
    """The state of a layer that is trained in groups and may be served without them; families inherit it."""

    gate: Router
    group_size: int
    population: Population | None
    observing: bool
    """Whether passes in groups leave what they saw in `observed`, the latest in place of any before."""
    observed: Observation | None

    def start_serving(
        self,
        num_mixtures: int,
        hidden_size: int,
        mode: Literal["group", "alone", "population"],
        top_k: int | None,
        zero_fill: float,
        population: bool,
    ) -> None:
        """Called once, by the constructor; the arguments are those of `MixtureOfTokens`."""
        self._num_mixtures = num_mixtures
        self.population = None
        if population:
            self.population = Population(num_mixtures, hidden_size, group_size=self.group_size)
        self.observing, self.observed = False, None
        self.set_inference_mode(mode, top_k=top_k)
        self.set_zero_fill(zero_fill)

    def keep_population(self) -> Population:
        """The averages that the layer keeps, from now on if it kept none, then at first those of zeros."""
        if self.population is None:
            population = Population(*self.gate.weight.shape, group_size=self.group_size)
            self.population = population.to(self.gate.weight)
        return self.population

    def set_inference_mode(self, mode: Literal["group", "alone", "population"], *, top_k: int | None = None) -> None:
        """Sets how eval() runs; `top_k` limits the mixtures that run for a token without a group."""
        if mode not in ("group", "alone", "population"):
            raise ValueError(f"inference_mode is {mode!r}: it must be group, alone or population.")
        if mode == "population" and self.population is None:
            raise ValueError(
                "inference_mode is 'population' but the layer keeps no population's averages: calibrate it."
            )
        if top_k is not None and not 1 <= top_k <= self._num_mixtures:
            raise ValueError(
                f"alone_top_k is {top_k}: it must lie between 1 and {self._num_mixtures}, "
                "the number of mixtures, or be None for all."
            )
        self.inference_mode, self.alone_top_k = mode, top_k

    def set_zero_fill(self, share: float) -> None:
        """Sets the share of the groups that training leaves otherwise empty."""
        if not 0 <= share <= 1:
            raise ValueError(f"zero_fill is {share}: it is a share of the groups and must lie between 0 and 1.")
        self.zero_fill = share


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
