"""Experts that several processes hold together: rows travel to the process that has their expert, and back.

Two exchanges serve all families. Where tokens choose, a process has as many rows for another as its tokens happen to
choose, so the numbers are exchanged first and then the rows, in parts of uneven size (GShard, arXiv 2006.16668, section
3; the split of router, exchange and experts follows torchtitan's). Where mixtures are formed, every expert has as many
rows as any other on every process, and one exchange of equal parts is enough: nothing waits for the busiest expert.

All processes of a group have to call alike. They do even where a token chooses nothing: the parts are then empty.

Shapes: P processes, T tokens, K choices of a token, R rows, D hidden, E experts, e = E / P experts of one process, N
groups, G tokens of a group.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch import distributed as dist
from torch.autograd.function import once_differentiable

from mixtura.kernels.dispatch import chosen_ffn, order_by_expert, routed_ffn
from mixtura.kernels.expert_weights import ExpertWeights, at_autocast_dtype
from mixtura.kernels.mixing import batched_ffn, mix, mixed_ffn, spread
from mixtura.kernels.sparse import sparse_ffn


class _Parts(NamedTuple):
    """Numbers of rows by which an uneven exchange is cut."""

    sent: list[int]
    """To every process."""
    received: list[int]
    """From every process."""
    order_R: Tensor
    """The received rows in the order of their experts."""
    rows_e: Tensor
    """How many of them each expert of this process has."""


class ExpertExchange:
    """Runs kernels whose experts other processes of a group hold too, each a run of consecutive experts."""

    def __init__(self, group: Any, num_experts: int) -> None:
        """E is `num_experts`, of all processes of the process group together."""
        self.group, self.num_experts = group, num_experts
        self.processes = dist.get_world_size(group)
        self._kernels: dict[Any, Callable[..., Tensor]] = {
            routed_ffn: self._routed,
            sparse_ffn: self._sparse,
            chosen_ffn: self._chosen,
            mixed_ffn: self._mixed,
            batched_ffn: self._batched,
        }

    def run(self, kernel: Callable[..., Any], x: Any, *arguments: Any) -> Any:
        """What the kernel gives for these arguments, of which the last are the experts as a mesh divides them.

        Kernels that are not named above run each expert on each token, as evaluations do: they are given all weights,
        without gradient.

        Raises:
            NotImplementedError: such a kernel needs a gradient.
        """
        *routing, experts = arguments
        own = experts._replace(up=self._own(experts.up), down=self._own(experts.down))
        function = kernel.func if isinstance(kernel, partial) else kernel
        if function in self._kernels:
            return self._kernels[function](x, *routing, own)
        if torch.is_grad_enabled():
            raise NotImplementedError(f"{function.__name__} has no gradient where processes share the experts.")
        return kernel(x, *routing, own._replace(up=self._all(own.up), down=self._all(own.down)))

    def _own(self, weight: Any) -> Tensor:
        """The experts of this process. They get the gradients of the tokens of P processes, which is P times that of
        one, where all other weights get a mean over the processes: so this becomes a mean too.
        """
        own = weight.to_local()
        if own.requires_grad:
            own.register_hook(lambda gradient: gradient / self.processes)
        return own

    def _all(self, own: Tensor) -> Tensor:
        """(e, ...) -> (E, ...)."""
        parts = [torch.empty_like(own) for _ in range(self.processes)]
        dist.all_gather(parts, own.contiguous(), group=self.group)
        return torch.cat(parts)

    def _routed(self, x_TD: Tensor, expert_TK: Tensor, weight_TK: Tensor, own: ExpertWeights) -> Tensor:
        order_R, rows_E = order_by_expert(expert_TK, self.num_experts)
        return self._sparse(x_TD, order_R // expert_TK.size(1), weight_TK.flatten()[order_R], rows_E, own)

    def _chosen(
        self, x_TKD: Tensor, expert_TK: Tensor, scale_TK: Tensor | None, weight_TK: Tensor, own: ExpertWeights
    ) -> Tensor:
        choices = expert_TK.size(1)
        rows_TKD = x_TKD.expand(-1, choices, -1)
        if scale_TK is not None:
            rows_TKD = rows_TKD * scale_TK.unsqueeze(-1)
        order_R, rows_E = order_by_expert(expert_TK, self.num_experts)
        y_RD = self._away_and_back(rows_TKD.flatten(0, 1)[order_R], rows_E, own)
        return _added(y_RD, order_R // choices, weight_TK.flatten()[order_R], len(x_TKD))

    def _sparse(self, x_TD: Tensor, token_R: Tensor, weight_R: Tensor, rows_E: Tensor, own: ExpertWeights) -> Tensor:
        y_RD = self._away_and_back(x_TD.index_select(0, token_R), rows_E, own)
        return _added(y_RD, token_R, weight_R, len(x_TD))

    def _away_and_back(self, x_RD: Tensor, rows_E: Tensor, own: ExpertWeights) -> Tensor:
        """(R, D) rows sorted by expert -> (R, D): each row's expert on it, wherever that expert is."""
        (x_RD,) = at_autocast_dtype(x_RD)
        parts = self._parts(rows_E)
        here = self._sent(x_RD, parts.sent, parts.received)
        y_here = sparse_ffn(here, parts.order_R, here.new_ones(len(here)), parts.rows_e, own)
        return self._sent(y_here, parts.received, parts.sent)

    def _parts(self, rows_E: Tensor) -> _Parts:
        """The numbers of rows, which the processes tell each other; waits for the device."""
        rows_Pe = rows_E.reshape(self.processes, -1).contiguous()
        given_Pe = torch.empty_like(rows_Pe)
        dist.all_to_all_single(given_Pe, rows_Pe, group=self.group)
        sent, received = torch.stack([rows_Pe.sum(1), given_Pe.sum(1)]).tolist()
        # Rows come by process and, within one, by expert.
        expert_Pe = torch.arange(given_Pe.size(1), device=rows_E.device).expand_as(given_Pe)
        expert_R = expert_Pe.flatten().repeat_interleave(given_Pe.flatten(), output_size=sum(received))
        return _Parts(sent, received, expert_R.argsort(stable=True), given_Pe.sum(0))

    def _sent(self, x_RD: Tensor, sent: list[int], received: list[int]) -> Tensor:
        return _Exchange.apply(x_RD, sent, received, self.group)

    def _mixed(self, x_NGD: Tensor, dispatch_NGEC: Tensor, combine_NGEC: Tensor, own: ExpertWeights) -> Tensor:
        x_NGD, dispatch_NGEC, combine_NGEC = at_autocast_dtype(x_NGD.contiguous(), dispatch_NGEC, combine_NGEC)
        return spread(self._batched(mix(x_NGD, dispatch_NGEC), own), combine_NGEC)

    def _batched(self, x_ERD: Tensor, own: ExpertWeights) -> Tensor:
        """(E, R, D) -> (E, R, D): expert e on its own R rows, which are as many on every process."""
        (x_ERD,) = at_autocast_dtype(x_ERD)
        x_PeRD = self._turned(x_ERD).unflatten(0, (self.processes, -1))
        y_eRD = batched_ffn(x_PeRD.transpose(0, 1).flatten(1, 2), own)
        y_PeRD = y_eRD.unflatten(1, (self.processes, -1)).transpose(0, 1)
        return self._turned(y_PeRD.flatten(0, 1))

    def _turned(self, x_ERD: Tensor) -> Tensor:
        """Part p of the first axis goes to process p, whose part comes in its place."""
        each = [len(x_ERD) // self.processes] * self.processes
        return _Exchange.apply(x_ERD, each, each, self.group)


class _Exchange(torch.autograd.Function):
    """torch's all-to-all, whose gradient goes the way back.

    torch has had that as a function, but what is public of it warns of its end from version 2.13 on.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, sent: list[int], received: list[int], group: Any) -> Tensor:
        ctx.settings = (sent, received, group)
        return _exchange(x, sent, received, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        sent, received, group = ctx.settings
        return _exchange(grad_outputs[0], received, sent, group), None, None, None


def _exchange(x: Tensor, sent: list[int], received: list[int], group: Any) -> Tensor:
    room = x.new_empty(sum(received), *x.shape[1:])
    dist.all_to_all_single(room, x.contiguous(), received, sent, group=group)
    return room


def _added(y_RD: Tensor, token_R: Tensor, weight_R: Tensor, tokens: int) -> Tensor:
    """(R, D) -> (T, D): every token's weighted sum of its rows."""
    weighted_RD = y_RD * weight_R.to(y_RD.dtype).unsqueeze(-1)
    return y_RD.new_zeros(tokens, y_RD.size(1)).index_add(0, token_R, weighted_RD)
