"""Mixture of Tokens: every expert processes mixtures of the tokens of a group, and spreads its outputs back.

Antoniak et al., arXiv 2310.15961, section 3. A group holds tokens at the same position of different examples, so
nothing leaks within a sequence, every step is differentiable and the load is even by construction; a token's output
does depend on its group. Deployed, a token has no group: see `inference_mode`.

Shapes: B batch, L length, T = B*L tokens, D hidden, E experts, S mixtures of a group, N groups, G tokens of a group.
"""

from typing import Literal

import torch
from torch import Tensor

from mixtura import kernels
from mixtura.layers import token_by_token
from mixtura.layers.experts import Experts
from mixtura.layers.group_mixing import real_places, run_a_share, run_groups, warn_partial_group
from mixtura.layers.limits import check_mixture_of_tokens
from mixtura.layers.routing import ChoiceTap, Router, from_groups, to_groups
from mixtura.layers.statistics import LayerOutput, group_stats, token_stats
from mixtura.layers.token_by_token import Neighbours, ServedTokenByToken, observe, zero_neighbours


class MixtureOfTokens(ServedTokenByToken):
    """Mixture of tokens, as trained (in groups) and as deployed (token by token)."""

    def __init__(
        self,
        hidden_size: int,
        *,
        intermediate_size: int,
        num_experts: int,
        group_size: int,
        mixtures_per_expert: int = 1,
        group_over: Literal["batch", "sequence"] = "batch",
        temperature: float = 1.0,
        combine: Literal["same", "separate"] = "same",
        activation: str = "relu",
        gated: bool = False,
        inference_mode: Literal["group", "alone", "population"] = "alone",
        alone_top_k: int | None = None,
        zero_fill: float = 0.0,
        population: bool = False,
        num_shared_experts: int = 0,
    ) -> None:
        """Builds the layer.

        Args:
            hidden_size: D.
            intermediate_size: F, the width of one expert.
            num_experts: E.
            group_size: G, tokens mixed together; E * F * C / G is the dense width of equal cost.
            mixtures_per_expert: C, mixtures an expert processes for each group, with a router column each.
            group_over: groups of consecutive examples at one position, or of consecutive positions (encoders only).
            temperature: divides the router's logits.
            combine: spread outputs with the dispatch weights, as in the paper, or with those of a second router.
            activation, gated: "relu", "gelu" or "silu"; experts with a gate.
            inference_mode: how eval() runs: "group" as trained, "alone", each token as if the rest of its group were
                zero, or "population", as if the rest were what it is on average. The last two depend on nothing but the
                token. train() uses groups, but for `zero_fill`.
            alone_top_k: mixtures that these two run for a token, those of the largest weights; None runs all.
            zero_fill: share of the groups, drawn anew in every training step, whose tokens each get an otherwise empty
                group, so that they run in training as `alone` runs them. 1 trains in that mode only.
            population: keep a population's averages, saved with the layer; see `observing`.
            num_shared_experts: experts that every token passes through besides, unmixed.

        Raises:
            ValueError: a setting makes no sense; the message names the fix.
        """
        super().__init__()
        check_mixture_of_tokens(group_size, mixtures_per_expert, temperature, group_over, combine)
        self.num_experts, self.group_size, self.mixtures_per_expert = num_experts, group_size, mixtures_per_expert
        self.group_over, self.temperature, self.activation = group_over, temperature, activation
        num_mixtures = num_experts * mixtures_per_expert
        self.start_serving(num_mixtures, hidden_size, inference_mode, alone_top_k, zero_fill, population)
        self.gate = Router(hidden_size, num_mixtures)
        self.combine_gate = Router(hidden_size, num_mixtures) if combine == "separate" else None
        self.choice_tap = ChoiceTap()
        sizes = {"intermediate_size": intermediate_size, "activation": activation, "gated": gated}
        self.experts = Experts(hidden_size, num_experts=num_experts, **sizes)
        self.add_shared_expert(hidden_size, num_shared_experts, **sizes)

    def route_and_run(
        self, x_BLD: Tensor, mask_BL: Tensor | None, want_stats: bool, expert_B: Tensor | None = None
    ) -> LayerOutput:
        """(B, L, D) -> (B, L, D) in groups or token by token; padding counts as zeros, as if it were not there."""
        mode = ("alone" if self.zero_fill == 1 else "group") if self.training else self.inference_mode
        if mode != "group":
            neighbours = zero_neighbours(self.group_size) if mode == "alone" else self.keep_population().neighbours
            x_TD, stats = x_BLD.flatten(0, 1), None
            y_TD = None if want_stats else self._run_few_tokens(x_TD, neighbours, decoding=x_BLD.size(1) == 1)
            if y_TD is None:
                real_T = mask_BL.flatten().bool() if mask_BL is not None and want_stats else None
                y_TD, stats = self._run_tokens(x_TD, real_T, want_stats, neighbours)
            return y_TD.view(x_BLD.shape), stats
        warn_partial_group(x_BLD, self.group_size, self.group_over)
        if mask_BL is not None:
            x_BLD = x_BLD * mask_BL.unsqueeze(-1).to(x_BLD.dtype)
        x_NGD = to_groups(x_BLD, self.group_size, self.group_over)
        real_NG = real_places(x_BLD, mask_BL, self.group_size, self.group_over) if want_stats else None
        share = self.zero_fill if self.training else 0.0
        y_NGD, stats = run_a_share(share, x_NGD, real_NG, want_stats, self._run_groups_alone, self._run_groups)
        return from_groups(y_NGD, x_BLD.size(0), x_BLD.size(1), self.group_over), stats

    def weights_alone(self, x_TD: Tensor) -> tuple[Tensor, Tensor]:
        """Weights (T, S) with which tokens (T, D) enter the mixtures, and get their outputs back, when run alone."""
        return token_by_token.weigh(*self._logits(x_TD), zero_neighbours(self.group_size), x_TD.dtype)

    def _logits(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Those of the router, and those of the second router if there is one."""
        logits, combine_logits = self.gate(x), None if self.combine_gate is None else self.combine_gate(x)
        if self.temperature == 1:
            return logits, combine_logits
        return logits / self.temperature, None if combine_logits is None else combine_logits / self.temperature

    def _run_groups(self, x_NGD: Tensor, real_NG: Tensor | None, want_stats: bool) -> LayerOutput:
        logits_NGS, combine_logits_NGS = self._logits(x_NGD)
        y_NGD = run_groups(self.experts, x_NGD, logits_NGS, combine_logits_NGS, self.num_experts)
        if self.observing:
            self.observed = observe(x_NGD, logits_NGS, logits_NGS if combine_logits_NGS is None else combine_logits_NGS)
        return y_NGD, group_stats(logits_NGS, real_NG, self.num_experts) if want_stats else None

    def _run_groups_alone(self, x_NGD: Tensor, real_NG: Tensor | None, want_stats: bool) -> LayerOutput:
        real_T = None if real_NG is None else real_NG.flatten()
        y_TD, stats = self._run_tokens(x_NGD.flatten(0, 1), real_T, want_stats, zero_neighbours(self.group_size))
        return y_TD.view(x_NGD.shape), stats

    def _run_tokens(self, x_TD: Tensor, real_T: Tensor | None, want_stats: bool, neighbours: Neighbours) -> LayerOutput:
        logits_TS, combine_logits_TS = self._logits(x_TD)
        scale_TS, weight_TS = token_by_token.weigh(logits_TS, combine_logits_TS, neighbours, x_TD.dtype)
        if self.alone_top_k is None:
            y_TD = token_by_token.run_all(self.experts, x_TD, scale_TS, weight_TS, neighbours, self.num_experts)
            used_TS = scale_TS * weight_TS
            self.choice_tap(used_TS)
        else:
            choice = token_by_token.choose(scale_TS, weight_TS, self.alone_top_k, self.mixtures_per_expert)
            self.choice_tap(choice.scale_TK * choice.weight_TK, choice.expert_TK)
            y_TD = token_by_token.run_chosen(self.experts, x_TD, choice, weight_TS, neighbours)
            used_TS = torch.zeros_like(scale_TS).scatter(1, choice.mixture_TK, 1.0) if want_stats else scale_TS
        return y_TD, token_stats(logits_TS, used_TS, real_T, self.num_experts) if want_stats else None

    def _run_few_tokens(self, x_TD: Tensor, neighbours: Neighbours, decoding: bool) -> Tensor | None:
        """`_run_tokens` as one kernel: the same, but for the rounding of a decoding step; None where it cannot be."""
        top_k = self.alone_top_k or (self._num_mixtures if decoding else None)
        unsuited = self.choice_tap.watched or self.combine_gate is not None
        if unsuited or not kernels.can_run_token_by_token(x_TD, top_k, self.activation, *neighbours):
            return None
        settings = (self.temperature, neighbours.log_mass_S, *neighbours[2:], top_k, self.mixtures_per_expert, decoding)
        return self.experts(x_TD, kernels.token_by_token_ffn, self.gate(x_TD), *settings)
