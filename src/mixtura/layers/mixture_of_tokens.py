"""Mixture of Tokens: every expert processes mixtures of the tokens of a group, and spreads its outputs back.

Antoniak et al., arXiv 2310.15961, section 3. A group holds tokens at the same position of different examples, so
nothing leaks within a sequence, every step is differentiable and the load is even by construction; a token's output
does depend on its group. Deployed, a token has no group: see `inference_mode`.

Shapes: B batch, L length, T = B*L tokens, D hidden, E experts, C mixtures an expert has in a group, S = E*C,
N groups, G tokens of a group.
"""

import warnings
from typing import Literal

import torch
from torch import Tensor, nn

from mixtura import kernels
from mixtura.layers.experts import Experts, unwrapped
from mixtura.layers.feed_forward import FeedForward
from mixtura.layers.losses import router_z_loss
from mixtura.layers.routing import (
    ChoiceTap,
    DenseRouting,
    Router,
    chosen_experts,
    dense_experts,
    from_groups,
    to_groups,
)
from mixtura.layers.statistics import RoutingStats, count_real, normalized_entropy, pool_stats, sum_of_real
from mixtura.layers.token_by_token import Neighbours, Observation, Population, observe, zero_neighbours


class MixtureOfTokens(FeedForward):
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
            activation: "relu", "gelu" or "silu".
            gated: gated experts.
            inference_mode: how eval() runs: "group" as trained, "alone", each token as if the rest of its group were
                zero, or "population", as if the rest were what it is on average. The last two depend on nothing but the
                token. train() uses groups, but for `zero_fill`.
            alone_top_k: mixtures that these two run for a token, those of the largest weights; None runs all.
            zero_fill: share of the groups, drawn anew in every training step, whose tokens each get an otherwise empty
                group, so that they run in training as `alone` runs them. 1 trains in that mode only.
            population: keep a population's averages, saved with the layer; see `observing`.

        Raises:
            ValueError: a setting makes no sense; the message names the fix.
        """
        super().__init__()
        if group_size < 2:
            raise ValueError(f"group_size is {group_size}: a group needs at least 2 tokens.")
        if mixtures_per_expert < 1:
            raise ValueError(f"mixtures_per_expert is {mixtures_per_expert}: it must be at least 1.")
        if temperature <= 0:
            raise ValueError(f"temperature is {temperature}: it must be greater than zero.")
        for name, value, known in (
            ("group_over", group_over, ("batch", "sequence")),
            ("combine", combine, ("same", "separate")),
        ):
            if value not in known:
                raise ValueError(f"{name} is {value!r}: it must be {' or '.join(known)}.")
        self.num_experts, self.group_size, self.mixtures_per_expert = num_experts, group_size, mixtures_per_expert
        self.group_over, self.temperature = group_over, temperature
        self.population: Population | None = None
        if population:
            self.population = Population(num_experts * mixtures_per_expert, hidden_size, group_size=group_size)
        self.observing = False
        """Whether passes in groups leave what they saw in `observed`, the latest in place of any before."""
        self.observed: Observation | None = None
        self.set_inference_mode(inference_mode, top_k=alone_top_k)
        self.set_zero_fill(zero_fill)
        self.gate = Router(hidden_size, num_experts * mixtures_per_expert)
        self.combine_gate = None
        if combine == "separate":
            self.combine_gate = Router(hidden_size, num_experts * mixtures_per_expert)
        self.choice_tap = ChoiceTap()
        self.experts = Experts(
            hidden_size,
            intermediate_size=intermediate_size,
            num_experts=num_experts,
            activation=activation,
            gated=gated,
        )

    def keep_population(self) -> Population:
        """The averages that the layer keeps, from now on if it kept none, then at first those of zeros."""
        if self.population is None:
            self.population = Population(*self.gate.weight.shape, group_size=self.group_size).to(self.gate.weight)
        return self.population

    def set_inference_mode(self, mode: Literal["group", "alone", "population"], *, top_k: int | None = None) -> None:
        """Sets how eval() runs; `top_k` limits the mixtures that run for a token without a group."""
        if mode not in ("group", "alone", "population"):
            raise ValueError(f"inference_mode is {mode!r}: it must be group, alone or population.")
        if mode == "population" and self.population is None:
            raise ValueError(
                "inference_mode is 'population' but the layer keeps no population's averages: calibrate it."
            )
        if top_k is not None and not 1 <= top_k <= self.num_experts * self.mixtures_per_expert:
            raise ValueError(
                f"alone_top_k is {top_k}: it must lie between 1 and {self.num_experts * self.mixtures_per_expert}, "
                "the number of mixtures, or be None for all."
            )
        self.inference_mode, self.alone_top_k = mode, top_k

    def set_zero_fill(self, share: float) -> None:
        """Sets the share of the groups that training leaves otherwise empty."""
        if not 0 <= share <= 1:
            raise ValueError(f"zero_fill is {share}: it is a share of the groups and must lie between 0 and 1.")
        self.zero_fill = share

    def route_and_run(
        self, x_BLD: Tensor, mask_BL: Tensor | None, want_stats: bool, expert_B: Tensor | None = None
    ) -> tuple[Tensor, RoutingStats | None]:
        """(B, L, D) -> (B, L, D) in groups or token by token; padding counts as zeros, as if it were not there."""
        mode = ("alone" if self.zero_fill == 1 else "group") if self.training else self.inference_mode
        if mode != "group":
            rest = zero_neighbours(self.group_size) if mode == "alone" else self.keep_population().neighbours
            if not want_stats and self._is_decoding_step(x_BLD, rest):
                return self._run_few_apart(x_BLD.flatten(0, 1), rest).view(x_BLD.shape), None
            real_T = mask_BL.flatten().bool() if mask_BL is not None and want_stats else None
            y_TD, stats = self._run_apart(x_BLD.flatten(0, 1), real_T, want_stats, rest)
            return y_TD.view(x_BLD.shape), stats
        batch, length, _ = x_BLD.shape
        self._warn_partial_group(batch if self.group_over == "batch" else length)
        if mask_BL is not None:
            x_BLD = x_BLD * mask_BL.unsqueeze(-1).to(x_BLD.dtype)
        x_NGD = to_groups(x_BLD, self.group_size, self.group_over)
        real_NG = self._real_places(x_BLD, mask_BL) if want_stats else None
        if self.training and self.zero_fill > 0:
            y_NGD, stats = self._run_some_alone(x_NGD, real_NG, want_stats)
        else:
            y_NGD, stats = self._run_groups(x_NGD, real_NG, want_stats)
        return from_groups(y_NGD, batch, length, self.group_over), stats

    def _is_decoding_step(self, x_BLD: Tensor, rest: Neighbours) -> bool:
        """Whether `_run_few_apart` can take the place of `_run_apart`: same numbers, fewer calls, nobody watching."""
        if self.alone_top_k is None or self.combine_gate is not None or self.choice_tap.watched:
            return False
        return kernels.can_run_token_by_token(x_BLD, self.alone_top_k, unwrapped(self.experts).activation, *rest)

    def _run_few_apart(self, x_TD: Tensor, rest: Neighbours) -> Tensor:
        means = (rest.mean_SD, rest.output_SD)
        settings = (self.temperature, rest.log_mass_S, *means, self.alone_top_k, self.mixtures_per_expert)
        return self.experts(x_TD, kernels.token_by_token_ffn, self.gate(x_TD), *settings)

    def _real_places(self, x_BLD: Tensor, mask_BL: Tensor | None) -> Tensor | None:
        """(N, G), true where a group has a token that is neither padding nor filling; None when all are."""
        batch, length, _ = x_BLD.shape
        if mask_BL is None and (batch if self.group_over == "batch" else length) % self.group_size == 0:
            return None
        real_BL = x_BLD.new_ones(batch, length) if mask_BL is None else mask_BL.to(x_BLD.dtype)
        return to_groups(real_BL.unsqueeze(-1), self.group_size, self.group_over).squeeze(-1).bool()

    def _run_some_alone(
        self, x_NGD: Tensor, real_NG: Tensor | None, want_stats: bool
    ) -> tuple[Tensor, RoutingStats | None]:
        """A random share of the groups is left otherwise empty for each of its tokens; the others run as they are.

        Whole groups leave: a member that left by itself would change what its neighbours see, and a group that is empty
        but for one member costs as many expert rows as a full one. The number of groups is fixed up to rounding; the
        draws come from torch's generators alone, whose states checkpoints keep.
        """
        groups = len(x_NGD)
        count = min(groups, int(self.zero_fill * groups + torch.rand(()).item()))
        order_N = torch.randperm(groups, device=x_NGD.device)
        parts, stats = [], []
        for index_N, run in ((order_N[:count], self._run_groups_alone), (order_N[count:], self._run_groups)):
            if len(index_N):
                real_nG = None if real_NG is None else real_NG[index_N]
                y_nGD, part = run(x_NGD[index_N], real_nG, want_stats)
                parts.append(y_nGD)
                stats += [] if part is None else [part]
        y_NGD = torch.cat(parts)[order_N.argsort()]
        return y_NGD, pool_stats(stats) if want_stats else None

    def _run_groups_alone(
        self, x_NGD: Tensor, real_NG: Tensor | None, want_stats: bool
    ) -> tuple[Tensor, RoutingStats | None]:
        real_T, rest = None if real_NG is None else real_NG.flatten(), zero_neighbours(self.group_size)
        y_TD, stats = self._run_apart(x_NGD.flatten(0, 1), real_T, want_stats, rest)
        return y_TD.view(x_NGD.shape), stats

    def _run_groups(
        self, x_NGD: Tensor, real_NG: Tensor | None, want_stats: bool
    ) -> tuple[Tensor, RoutingStats | None]:
        logits_NGS = combine_logits_NGS = self._logits(x_NGD, self.gate)
        if self.combine_gate is not None:
            combine_logits_NGS = self._logits(x_NGD, self.combine_gate)
        weight_NGS = None
        if kernels.can_run_groups(x_NGD.unsqueeze(1)):
            y_NGD = self._run_mixed(x_NGD, logits_NGS, combine_logits_NGS)
        else:
            shape = (self.num_experts, self.mixtures_per_expert)
            weight_NGS = logits_NGS.softmax(1)
            dispatch_NGEC = combine_NGEC = weight_NGS.to(x_NGD.dtype).unflatten(-1, shape)
            if self.combine_gate is not None:
                combine_NGEC = combine_logits_NGS.softmax(1).to(x_NGD.dtype).unflatten(-1, shape)
            y_NGD = dense_experts(self.experts, x_NGD, DenseRouting(dispatch_NGEC, combine_NGEC))
        if self.observing:
            self.observed = observe(x_NGD, logits_NGS, combine_logits_NGS)
        if not want_stats:
            return y_NGD, None
        return y_NGD, self._stats(logits_NGS, logits_NGS.softmax(1) if weight_NGS is None else weight_NGS, real_NG)

    def _run_mixed(self, x_NGD: Tensor, logits_NGS: Tensor, combine_logits_NGS: Tensor) -> Tensor:
        """As `dense_experts`, on an accelerator that never stores the weights."""
        y_N1GD = kernels.logits_mixed_ffn(
            x_NGD.unsqueeze(1),
            logits_NGS.unsqueeze(1),
            None if self.combine_gate is None else combine_logits_NGS.unsqueeze(1),
            self.mixtures_per_expert,
            lambda z_ERD: self.experts(z_ERD, kernels.batched_ffn),
        )
        return y_N1GD.squeeze(1)

    def _warn_partial_group(self, tokens: int) -> None:
        if tokens % self.group_size:
            axis = "examples" if self.group_over == "batch" else "positions"
            warnings.warn(
                f"{tokens} {axis} are no multiple of the group size {self.group_size}: the last group has "
                f"{tokens % self.group_size} tokens, and the rest of it counts as zero tokens.",
                stacklevel=5,
            )

    def _run_apart(
        self, x_TD: Tensor, real_T: Tensor | None, want_stats: bool, rest: Neighbours
    ) -> tuple[Tensor, RoutingStats | None]:
        """Each token in a group whose other members are summed up in `rest`: sum over mixtures of m * f_e(z).

        The softmax of a group with logit l and others of mass Z is m = sigmoid(l - log Z), and z = m x + (1 - m) x_bar.
        What is spread back to the others is not looked at.
        """
        logits_TS, scale_TS, weight_TS = self._weights_apart(x_TD, rest)
        ran_TS = None
        if self.alone_top_k is None:
            y_TD = self._apart_all(x_TD, scale_TS, weight_TS, rest)
            self.choice_tap(scale_TS * weight_TS)
        else:
            gate_TS = scale_TS if weight_TS is scale_TS else scale_TS * weight_TS  # a square sorts as its root does
            gate_TK, chosen_TK = gate_TS.topk(self.alone_top_k, dim=-1)
            same = weight_TS is scale_TS
            scale_TK = gate_TK if same else scale_TS.gather(1, chosen_TK)
            weight_TK = gate_TK if same else weight_TS.gather(1, chosen_TK)
            expert_TK = chosen_TK if self.mixtures_per_expert == 1 else chosen_TK // self.mixtures_per_expert
            self.choice_tap(scale_TK * weight_TK, expert_TK)
            y_TD = self._apart_chosen(x_TD, scale_TK, weight_TK, rest, chosen_TK, expert_TK)
            if want_stats:
                ran_TS = torch.zeros_like(scale_TS).scatter(1, chosen_TK, 1.0)
            if rest.output_SD is not None:
                # A small weight leaves z close to x_bar, and f_e(x_bar) needs no token to be computed.
                rest_TS = weight_TS.scatter(1, chosen_TK, 0.0).to(y_TD.dtype)
                y_TD = y_TD + rest_TS @ rest.output_SD.to(y_TD.dtype)
        stats = None
        if want_stats:
            stats = self._apart_stats(logits_TS, scale_TS * weight_TS if ran_TS is None else ran_TS, real_T)
        return y_TD, stats

    def weights_alone(self, x_TD: Tensor) -> tuple[Tensor, Tensor]:
        """Weights (T, S) with which tokens (T, D) enter the mixtures, and get their outputs back, when run alone."""
        return self._weights_apart(x_TD, zero_neighbours(self.group_size))[1:]

    def _weights_apart(self, x_TD: Tensor, rest: Neighbours) -> tuple[Tensor, Tensor, Tensor]:
        logits_TS = self._logits(x_TD, self.gate)
        scale_TS = weight_TS = torch.sigmoid(logits_TS - rest.log_mass_S).to(x_TD.dtype)
        if self.combine_gate is not None:
            combine_logits_TS = self._logits(x_TD, self.combine_gate)
            weight_TS = torch.sigmoid(combine_logits_TS - rest.combine_log_mass_S).to(x_TD.dtype)
        return logits_TS, scale_TS, weight_TS

    def _logits(self, x: Tensor, router: nn.Module) -> Tensor:
        logits = router(x)
        return logits if self.temperature == 1 else logits / self.temperature

    def _apart_all(self, x_TD: Tensor, scale_TS: Tensor, weight_TS: Tensor, rest: Neighbours) -> Tensor:
        shape = (self.num_experts, self.mixtures_per_expert)
        scale_TEC, weight_TEC = scale_TS.unflatten(-1, shape), weight_TS.unflatten(-1, shape)
        mean_ECD = None if rest.mean_SD is None else rest.mean_SD.to(x_TD.dtype).unflatten(0, shape)
        parts = [
            self.experts(
                x_TD,
                kernels.scaled_ffn,
                scale_TEC[..., c],
                weight_TEC[..., c],
                None if mean_ECD is None else mean_ECD[:, c],
            )
            for c in range(self.mixtures_per_expert)
        ]
        return torch.stack(parts).sum(0) if len(parts) > 1 else parts[0]

    def _apart_chosen(
        self,
        x_TD: Tensor,
        scale_TK: Tensor,
        weight_TK: Tensor,
        rest: Neighbours,
        chosen_TK: Tensor,
        expert_TK: Tensor,
    ) -> Tensor:
        x_T1D = x_TD.unsqueeze(1)
        if rest.mean_SD is None:
            return chosen_experts(self.experts, x_T1D, expert_TK, weight_TK, scale_TK)
        z_TKD = torch.lerp(rest.mean_SD.to(x_TD.dtype)[chosen_TK], x_T1D, scale_TK.unsqueeze(-1))
        return chosen_experts(self.experts, z_TKD, expert_TK, weight_TK)

    def _stats(self, logits_NGS: Tensor, weight_NGS: Tensor, real_NG: Tensor | None) -> RoutingStats:
        """Statistics of a batch in groups: every expert gets the same load, up to what went to padding."""
        logits_TS, weight_TS = logits_NGS.flatten(0, 1), weight_NGS.flatten(0, 1)
        real_T = None if real_NG is None else real_NG.flatten()
        load_S = sum_of_real(weight_TS.detach().float(), real_T)
        load_E = load_S.unflatten(-1, (self.num_experts, -1)).sum(-1)
        tokens = count_real(logits_TS, real_T)
        return RoutingStats(
            tokens_per_expert_E=load_E,
            importance_E=load_E / load_E.sum(),
            router_z_loss=router_z_loss(logits_TS, real_T),
            dropped_tokens=torch.zeros_like(tokens),
            routed_rows=tokens,
            entropy=normalized_entropy(weight_NGS, 1, None if real_NG is None else real_NG.any(1)),
        )

    def _apart_stats(self, logits_TS: Tensor, used_TS: Tensor, real_T: Tensor | None) -> RoutingStats:
        """Statistics of tokens without a group: rows an expert ran with top_k, or the sum of its weights without."""
        used_TE = used_TS.detach().float().unflatten(-1, (self.num_experts, -1)).sum(-1)
        load_E = sum_of_real(used_TE, real_T)
        tokens = count_real(used_TE, real_T)
        return RoutingStats(
            tokens_per_expert_E=load_E,
            importance_E=load_E / load_E.sum().clamp_min(1e-30),
            router_z_loss=router_z_loss(logits_TS, real_T),
            dropped_tokens=torch.zeros_like(tokens),
            routed_rows=tokens,
            entropy=normalized_entropy(used_TE / used_TE.sum(-1, keepdim=True).clamp_min(1e-30), -1, real_T),
        )
