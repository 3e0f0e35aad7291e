"""Merged experts: the experts' weights are averaged, once a segment, and every token runs the one network that results.

Lory (arXiv 2405.03133, section 3.1) lets the segment before decide: the router looks at the mean of its hidden states.
SMEAR (arXiv 2306.03745, section 3.2) looks at the whole input, which in causal form is all segments so far. Nothing is
chosen, so the router has the gradient of the layer's output. The first segment has nothing before it and runs the plain
average; Lory lets it decide for itself and so leaks. A segment is so many real tokens, wherever padding stands.

Decoding goes on where a prefix stopped, from a `Memory`.

Shapes: B batch, L length, D hidden, E experts, S tokens of a segment, N segments, F expert width.
"""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from mixtura import kernels
from mixtura.layers.experts import Experts
from mixtura.layers.feed_forward import FeedForward
from mixtura.layers.routing import ChoiceTap, Router
from mixtura.layers.statistics import RoutingStats, merging_stats


class Memory(NamedTuple):
    """Of each example, what its tokens so far leave to the next one."""

    route_BE: Tensor
    """Weights of the experts in the open segment."""
    sum_BD: Tensor
    """Sum of the hidden states in the open segment, and in those before it where all decide."""
    place_B: Tensor
    """Real tokens in the open segment."""
    before_B: Tensor
    """Real tokens in the segments before it."""


class MergedExperts(FeedForward):
    """Mixture of experts that mixes weights, not tokens."""

    def __init__(
        self,
        hidden_size: int,
        *,
        intermediate_size: int,
        num_experts: int,
        segment_length: int = 16,
        merge_by: Literal["segment", "prefix"] = "segment",
        activation: str = "relu",
        gated: bool = False,
        num_shared_experts: int = 0,
    ) -> None:
        """Builds the layer.

        Args:
            hidden_size, num_experts: D and E.
            intermediate_size: F, of one expert and of the merged one.
            segment_length: S, tokens that share a merged expert.
            merge_by: whose mean the router looks at: the segment before, or all before.
            activation, gated: "relu", "gelu" or "silu", in gated experts or plain ones.
            num_shared_experts: experts that every token passes through.

        Raises:
            ValueError: segment_length is less than 1, or merge_by unknown.
        """
        super().__init__()
        if segment_length < 1:
            raise ValueError(f"segment_length is {segment_length}: it must be at least 1.")
        if merge_by not in ("segment", "prefix"):
            raise ValueError(f"merge_by is {merge_by!r}: it must be segment or prefix.")
        self.num_experts, self.segment_length, self.merge_by = num_experts, segment_length, merge_by
        self.gate = Router(hidden_size, num_experts)
        self.choice_tap = ChoiceTap()
        sizes = {"intermediate_size": intermediate_size, "activation": activation, "gated": gated}
        self.experts = Experts(hidden_size, num_experts=num_experts, **sizes)
        self.add_shared_expert(hidden_size, num_shared_experts, **sizes)

    def route_and_run(
        self, x_BLD: Tensor, mask_BL: Tensor | None, want_stats: bool, expert_B: Tensor | None = None
    ) -> tuple[Tensor, RoutingStats | None]:
        """(B, L, D) -> (B, L, D) of sequences from their first token on."""
        y_BLD, stats, _ = self._run(x_BLD, mask_BL, want_stats, None)
        return y_BLD, stats

    def go_on(
        self, x_BLD: Tensor, mask_BL: Tensor | None, want_stats: bool, memory: Memory | None
    ) -> tuple[Tensor, RoutingStats | None, Memory | None]:
        """As `forward`, of tokens (B, L, D) that follow those of the memory; and the memory after them."""
        if memory is None:
            zero_B = torch.zeros(len(x_BLD), dtype=torch.long, device=x_BLD.device)
            sum_BD = x_BLD.new_zeros(len(x_BLD), x_BLD.size(-1))
            memory = Memory(self.gate(sum_BD).softmax(-1), sum_BD, zero_B, zero_B)
        y_BLD, stats, memory = self._run(x_BLD, mask_BL, want_stats, memory)
        return y_BLD if self.shared_expert is None else y_BLD + self.shared_expert(x_BLD), stats, memory

    def _run(
        self, x_BLD: Tensor, mask_BL: Tensor | None, want_stats: bool, memory: Memory | None
    ) -> tuple[Tensor, RoutingStats | None, Memory | None]:
        batch, length, hidden = x_BLD.shape
        size = self.segment_length if memory is not None else max(1, min(self.segment_length, length))
        real_BL = x_BLD.new_ones(batch, length, dtype=torch.bool) if mask_BL is None else mask_BL.bool()
        rank_BL = real_BL.cumsum(1) - 1
        count = -(-length // size)
        if memory is not None:
            rank_BL, count = rank_BL + memory.place_B.unsqueeze(1), -(-(length + size - 1) // size)
        # Padding goes to a place of its own behind all segments.
        place_BL = torch.where(real_BL, rank_BL, count * size)
        index_BLD = place_BL.unsqueeze(-1).expand_as(x_BLD)
        slots = x_BLD.new_zeros(batch, count * size + 1, hidden).scatter(1, index_BLD, x_BLD)
        x_BNSD = slots[:, :-1].unflatten(1, (count, size))
        used_BNS = torch.zeros_like(slots[..., 0]).scatter(1, place_BL, real_BL.to(x_BLD.dtype))[:, :-1]
        number_BN = used_BNS.unflatten(1, (count, size)).sum(-1).long()
        sum_BND = x_BNSD.sum(2)
        if memory is not None:
            sum_BND = torch.cat([sum_BND[:, :1] + memory.sum_BD.unsqueeze(1), sum_BND[:, 1:]], 1)
            first_B = memory.place_B + (memory.before_B if self.merge_by == "prefix" else 0)
            number_BN = torch.cat([number_BN[:, :1] + first_B.unsqueeze(1), number_BN[:, 1:]], 1)
        if self.merge_by == "prefix":
            sum_BND, number_BN = sum_BND.cumsum(1), number_BN.cumsum(1)
        mean_BND = sum_BND / number_BN.clamp_min(1).unsqueeze(-1)
        ahead = mean_BND if memory is not None else mean_BND[:, :-1]
        logits_BNE = self.gate(torch.cat([torch.zeros_like(mean_BND[:, :1]), ahead], 1))
        route_BNE = logits_BNE.softmax(-1)
        if memory is not None:
            route_BNE = torch.cat([memory.route_BE.unsqueeze(1), route_BNE[:, 1:]], 1)
        merged = self.experts(route_BNE[:, :count].flatten(0, 1).to(x_BLD.dtype), kernels.merged_experts)
        y_slots = kernels.batched_ffn(x_BNSD.flatten(0, 1), merged).view(batch, count * size, hidden)  # pyright: ignore
        y_BLD = y_slots.gather(1, index_BLD.clamp_max(count * size - 1)).to(x_BLD.dtype)
        segment_BL = (place_BL // size).clamp_max(count - 1)
        self.choice_tap(_of_tokens(route_BNE, segment_BL).flatten(0, 1))
        stats = None
        if want_stats:
            logits_TE, route_TE = (_of_tokens(each, segment_BL).flatten(0, 1) for each in (logits_BNE, route_BNE))
            stats = merging_stats(logits_TE, route_TE, None if mask_BL is None else real_BL.flatten())
        if memory is not None:
            memory = self._remember(memory, rank_BL[:, -1] + 1, route_BNE, sum_BND)
        return y_BLD, stats, memory

    def _remember(self, memory: Memory, reached_B: Tensor, route_BNE: Tensor, sum_BND: Tensor) -> Memory:
        """The memory after tokens up to place `reached_B` of the old open segment."""
        open_B, place_B = reached_B // self.segment_length, reached_B % self.segment_length
        pick = (torch.arange(len(open_B), device=open_B.device), open_B)
        kept_BD = torch.cat([sum_BND, torch.zeros_like(sum_BND[:, :1])], 1)[pick]
        if self.merge_by == "prefix":
            kept_BD = sum_BND[pick[0], open_B.clamp_max(sum_BND.size(1) - 1)]
        return Memory(route_BNE[pick], kept_BD, place_B, memory.before_B + open_B * self.segment_length)


def _of_tokens(x_BNE: Tensor, segment_BL: Tensor) -> Tensor:
    return x_BNE.gather(1, segment_BL.unsqueeze(-1).expand(-1, -1, x_BNE.size(-1)))
