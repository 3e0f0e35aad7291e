"""Mixtures of LoRA as one PEFT method, whose settings are the published ones (docs/adapters.md has the table).

The routing is either one for each linear layer (`scope="linear"`: MoLoRA, LoRAMoE, HydraLoRA, AdaMoLE, MOELoRA), or one
for a whole feed-forward layer (`scope="feed_forward"`: MixLoRA, arXiv 2404.15159):

    linear          y = W x + scale * sum_e w_e B_e A_e x
    feed_forward    y = sum_e w_e FFN_e(x),    FFN_e is the frozen layer with W + scale * B_e A_e in place of each W

The second form multiplies by each frozen matrix once a token and not once an expert: by gate and up before the experts,
and by down after the experts' outputs are summed. That is exact, as down is linear and the weights sum to one.

Shapes: B batch, L length, T = B*L tokens, D hidden, F width of the frozen layer, E experts.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from peft.config import PeftConfig
from peft.utils.peft_types import PeftType
from torch import Tensor, nn

from mixtura.adapters.low_rank_experts import Gates, LowRankExperts, RouterKind, routing_statistics
from mixtura.adapters.targets import (
    KINDS,
    LOOSE,
    SPLIT,
    Kind,
    Projections,
    activation_of,
    loose_down,
    projections,
)
from mixtura.adapters.tuner import AdapterLayer, RoutedTuner, TwoPartLayer, register_method
from mixtura.config import UserError
from mixtura.models.batch_context import BatchContext

_ATTRIBUTE = "mixture_lora_experts"
PUBLISHED: dict[str, dict[str, Any]] = {
    "mixlora": {"scope": "feed_forward", "router": "top_k", "num_experts": 8, "top_k": 2, "rank": 16, "alpha": 32.0},
    "mola": {"scope": "linear", "router": "top_k", "num_experts": 8, "top_k": 2, "rank": 8},
    "molora": {"scope": "linear", "router": "dense", "num_experts": 10, "rank": 4},
    "loramoe": {"scope": "linear", "router": "dense", "num_experts": 8, "rank": 4, "alpha": 32.0},
    "hydralora": {"scope": "linear", "router": "dense", "num_experts": 4, "rank": 4, "alpha": 32.0, "share_a": True},
    "adamole": {"scope": "linear", "router": "threshold", "num_experts": 8, "rank": 32, "router_aux_loss_coef": 0.001},
    "task_routed": {"scope": "linear", "router": "task", "rank": 16},
}
"""Published methods as keys of `mixtura.config.AdapterConfig`; docs/adapters.md has the papers and what differs."""


@dataclass
class MixtureLoraConfig(PeftConfig):
    """The content of `adapter_config.json` for a mixture of LoRA."""

    r: int = 8
    """Rank of one expert."""
    lora_alpha: float = 16.0
    """The update is scaled by lora_alpha / r."""
    lora_dropout: float = 0.0
    num_experts: int = 4
    router: RouterKind = "top_k"
    top_k: int = 2
    normalize_top_k: bool = True
    threshold_max: float | None = None
    num_tasks: int | None = None
    """Task routing only: a learned softmax over the experts for each task; None makes the task id the expert."""
    scope: Literal["linear", "feed_forward"] = "linear"
    share_a: bool = False
    router_aux_loss_coef: float = 0.01
    """For the training loop; the layers do not read it."""
    target_modules: list[str] | str | None = None
    """Linear layers, or with scope "feed_forward" whole feed-forward layers."""

    def __post_init__(self) -> None:
        """Refuses settings that cannot work together."""
        super().__post_init__()
        self.peft_type = PeftType("MIXTURE_LORA")
        check_settings(self)


def check_settings(config: MixtureLoraConfig) -> None:
    """Refuses settings that cannot work together.

    Raises:
        UserError: names the setting and the fix.
    """
    if config.r < 1 or config.lora_alpha <= 0 or not 0 <= config.lora_dropout < 1:
        raise UserError(
            f"Rank {config.r}, alpha {config.lora_alpha} and dropout {config.lora_dropout} cannot work: rank must be "
            "at least 1, alpha greater than zero and dropout from 0 to below 1."
        )
    if config.num_experts < 2 and config.router != "task":
        raise UserError(f"'num_experts' is {config.num_experts}: a router needs 2 or more; one expert is plain LoRA.")
    if config.router == "top_k":
        _check_top_k(config)
    if config.router == "threshold" and config.threshold_max is not None:
        limit = 1 / config.num_experts
        if not 0 < config.threshold_max <= limit:
            raise UserError(
                f"'threshold_max' is {config.threshold_max}: it must lie above 0 and not above 1 / num_experts, which "
                f"is {limit:g}, or a token may find no expert."
            )
    if config.num_tasks is not None and config.router != "task":
        raise UserError(f"'num_tasks' is {config.num_tasks} but the router is '{config.router}': it must be 'task'.")


def _check_top_k(config: MixtureLoraConfig) -> None:
    if not 1 <= config.top_k <= config.num_experts:
        raise UserError(
            f"'top_k' is {config.top_k}: it must lie between 1 and num_experts, which is {config.num_experts}."
        )
    if config.top_k == 1 and config.normalize_top_k:
        raise UserError(
            "'top_k' is 1 and a single normalised weight is always 1, so its router would get no gradient: set top_k "
            "to 2 or more, or route by 'task'."
        )
    if config.scope == "feed_forward" and not config.normalize_top_k:
        raise UserError(
            "'normalize_top_k' is off with scope 'feed_forward': there the weights must sum to one, or the frozen "
            "layer itself would be scaled down."
        )


def build_experts(shapes: dict[str, tuple[int, int]], router_width: int, config: MixtureLoraConfig) -> LowRankExperts:
    """The experts that a configuration asks for, for linear layers of the given inputs and outputs."""
    return LowRankExperts(
        shapes,
        router_width=router_width,
        router=config.router,
        num_experts=config.num_experts,
        rank=config.r,
        alpha=config.lora_alpha,
        dropout=config.lora_dropout,
        top_k=config.top_k,
        normalize_top_k=config.normalize_top_k,
        threshold_max=config.threshold_max,
        share_a=config.share_a,
        num_tasks=config.num_tasks,
    )


class _Routed(NamedTuple):
    x_TD: Tensor
    gates: Gates


class MixtureLoraLayer(AdapterLayer):
    """The part that both scopes share: routing and its statistics."""

    adapter_layer_names = (_ATTRIBUTE,)
    unmergeable = "A routed adapter cannot be merged into its base: mixtura.adapters.conversion has the exact forms."
    mixture_lora_experts: nn.ModuleDict

    def add(self, name: str, config: MixtureLoraConfig) -> None:
        """Adds an adapter."""
        if config.router == "task":
            self.context.num_tasks = config.num_tasks or config.num_experts
        shapes, width = self.shapes()
        self.add_module_named(name, build_experts(shapes, width, config))

    def shapes(self) -> tuple[dict[str, tuple[int, int]], int]:
        """Inputs and outputs of the linear layers that get experts, by name, and the width that the router reads."""
        raise NotImplementedError

    def route(self, experts: LowRankExperts, x: Tensor) -> _Routed:
        """Flattens the tokens, routes them, and leaves the statistics in the context."""
        x_TD = x.reshape(-1, x.size(-1))
        gates = experts.gates(x_TD, self.context.task_ids_for(x) if experts.router == "task" else None)
        if self.training or self.context.observe:
            mask_BL = self.mask_for(x)
            self.context.stats[self.key] = routing_statistics(gates, None if mask_BL is None else mask_BL.flatten())
        return _Routed(x_TD, gates)


class MixtureLoraLinear(MixtureLoraLayer):
    """A frozen linear layer and routed low-rank updates of it."""

    def shapes(self) -> tuple[dict[str, tuple[int, int]], int]:
        """Those of the one layer."""
        linear: Any = self.get_base_layer()
        return {"linear": (linear.in_features, linear.out_features)}, linear.in_features

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """(..., I) -> (..., O)."""
        y = self.base_layer(x, *args, **kwargs)
        for experts in self.active_modules():
            x_TD, gates = self.route(experts, x)
            y = y + experts.update("linear", x_TD, gates.weight_TE).to(y.dtype).view(y.shape)
        return y


class MixtureLoraFeedForward(TwoPartLayer, MixtureLoraLayer):
    """A frozen feed-forward layer of which every expert has its own low-rank updates, under one routing.

    In a layer of two modules, as BERT's, the experts' output replaces the output of the second module.
    """

    def __init__(
        self,
        base_layer: nn.Module,
        *,
        key: str,
        context: BatchContext,
        kind: Kind,
        down: nn.Module | None,
        activation: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        """`kind` names the parts of the layer.

        `down` is given for a layer of two modules, and `activation` where it lies between them and in neither.
        """
        super().__init__(base_layer, key=key, context=context, down=down)
        self.kind, self._between = kind, (activation,)  # in a tuple, as it may be a module that is another's

    @property
    def is_split(self) -> bool:
        """Whether the layer is made of two modules, as BERT's."""
        return self.down is not None

    @property
    def parts(self) -> Projections:
        """The frozen layer's linear layers and activation."""
        return projections(self.get_base_layer(), self.kind, self.down, self._between[0])

    def shapes(self) -> tuple[dict[str, tuple[int, int]], int]:
        """Those of gate, up and down; the router reads what up reads."""
        named: list[tuple[str, Any]] = [(n, getattr(self.parts, n)) for n in ("gate", "up", "down")]
        shapes = {n: (linear.in_features, linear.out_features) for n, linear in named if linear is not None}
        return shapes, shapes["up"][0]

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """(B, L, D) -> (B, L, D); the first module of a split layer gives (B, L, F), which is not used."""
        active = self.active_modules()
        self.pending = None
        if not active:
            return self.base_layer(x, *args, **kwargs)
        if len(active) > 1:
            raise UserError("Only one adapter of whole feed-forward layers can be active: set_adapter to one of them.")
        x_TD, gates = self.route(active[0], x)
        y_TD, up_TF = mixture_of_feed_forwards(self.parts, active[0], x_TD, gates.weight_TE)
        y = y_TD.view(*x.shape[:-1], -1)
        if self.down is not None:
            self.pending = y
            first_TF = up_TF if self._between[0] is not None else self.parts.act(up_TF)
            return first_TF.view(*x.shape[:-1], -1)
        return (y, None) if kwargs.get("return_stats") else y

    def finish(self, output: Tensor, pending: Tensor) -> Tensor:
        """The experts' output."""
        return pending


def mixture_of_feed_forwards(
    parts: Projections, experts: LowRankExperts, x_TD: Tensor, weight_TE: Tensor
) -> tuple[Tensor, Tensor]:
    """(T, D) -> (T, D): sum_e w_e FFN_e(x) where the weights of a token sum to one; also the frozen up projection.

    An expert runs on the tokens that chose it. MixLoRA (arXiv 2404.15159) shares the frozen gate and up
    projections in this way; sharing down too follows from sum_e w_e (W h_e + b) = W sum_e w_e h_e + b.
    """
    gate_TF = None if parts.gate is None else parts.gate(x_TD)
    up_TF = parts.up(x_TD)
    # Under autocast the frozen layers return a narrower dtype than x has; a sum has the dtype of its summands.
    mixed_TF, low_rank_TD = torch.zeros_like(up_TF), torch.zeros_like(x_TD)
    for expert in range(experts.num_experts):
        row_R = weight_TE[:, expert].nonzero().squeeze(-1)
        x_RD, weight_R1 = x_TD[row_R], weight_TE[row_R, expert].to(x_TD.dtype).unsqueeze(-1)
        h_RF = up_TF[row_R] + experts.expert_update("up", expert, x_RD)
        if gate_TF is None:
            h_RF = parts.act(h_RF)
        else:
            h_RF = parts.act(gate_TF[row_R] + experts.expert_update("gate", expert, x_RD)) * h_RF
        mixed_TF.index_add_(0, row_R, (weight_R1 * h_RF).to(mixed_TF.dtype))
        update_RD = weight_R1 * experts.expert_update("down", expert, h_RF)
        low_rank_TD.index_add_(0, row_R, update_RD.to(low_rank_TD.dtype))
    y_TD = parts.down(mixed_TF)
    return y_TD + low_rank_TD.to(y_TD.dtype), up_TF


class MixtureLoraModel(RoutedTuner):
    """PEFT's tuner for `MixtureLoraConfig`."""

    prefix = "mixture_lora_"
    tuner_layer_cls = MixtureLoraLayer
    attribute = _ATTRIBUTE

    def new_layer(self, config: Any, target: nn.Module, name: str, parent: nn.Module, key: str) -> AdapterLayer:
        """A linear layer's or a whole feed-forward layer's, as the scope says."""
        if config.scope == "linear":
            _require_linear(target, key)
            return MixtureLoraLinear(target, key=key, context=self.context)
        if (down := loose_down(parent, name)) is not None:
            act = activation_of(parent)
            layer = MixtureLoraFeedForward(target, key=key, context=self.context, kind=LOOSE, down=down, activation=act)
            return layer
        kind, down = find_kind(target, name, parent, key)
        return MixtureLoraFeedForward(target, key=key, context=self.context, kind=kind, down=down)


def find_kind(target: nn.Module, target_name: str, parent: nn.Module, key: str) -> tuple[Kind, nn.Module | None]:
    """The kind of a feed-forward layer and, when it is split, the linear layer that ends it.

    Raises:
        UserError: the module is no feed-forward layer with linear layers of its own.
    """
    if target_name == "intermediate" and isinstance(getattr(target, "dense", None), nn.Linear):
        return SPLIT, parent.get_submodule(SPLIT.down)
    for kind in KINDS:
        if all(name is None or isinstance(getattr(target, name, None), nn.Linear) for name in kind):
            return kind, None
    raise UserError(
        f"'{key}' ({type(target).__name__}) has no gate, up and down of their own: set 'adapter.scope' to \"linear\"."
    )


def _require_linear(target: nn.Module, key: str) -> None:
    if not isinstance(target, nn.Linear):
        raise UserError(f"'{key}' is a {type(target).__name__}: an adapter of scope 'linear' needs a linear layer.")


register_method("mixture_lora", MixtureLoraConfig, MixtureLoraModel)
