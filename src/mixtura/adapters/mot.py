"""Mixture of tokens as a PEFT method: low-rank experts beside a frozen feed-forward layer.

Every feed-forward layer gets a small `mixtura.layers.MixtureOfTokens` (arXiv 2310.15961, section 3) that reads the same
input and adds to the frozen output, in the manner of a parallel adapter (He et al., arXiv 2110.04366):

    y = FFN(x) + alpha / rank * MoT(x)        z_e = sum_g m_ge x_g,   MoT(x)_g = sum_e m_ge B_e relu(A_e z_e)

An expert has the width `rank`. The ReLU between A and B makes it the expert of `layers/mixture_of_tokens.py`: since
relu(m z) = m relu(z), a token that is deployed alone gets each expert's output times m^2. Also, the ReLU can switch an
expert off for a token, which a linear expert cannot. B starts at zero, so an untrained adapter adds zero. Training
mixes the tokens of `group_size` examples at one position; deployed (`eval()`), a token is computed alone and depends on
no other (docs/layers.md).

Shapes: B batch, L length, D hidden.
"""

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from peft.config import PeftConfig
from peft.utils.peft_types import PeftType
from torch import Tensor, nn

from mixtura.adapters.targets import SPLIT, loose_down
from mixtura.adapters.tuner import AdapterLayer, RoutedTuner, TwoPartLayer, register_method
from mixtura.config import UserError
from mixtura.layers import MixtureOfTokens

_ATTRIBUTE = "mixture_of_tokens_layer"


@dataclass
class MotAdapterConfig(PeftConfig):
    """The content of `adapter_config.json` for a mixture-of-tokens adapter."""

    r: int = 8
    """Width of one expert."""
    alpha: float = 16.0
    """The update is scaled by alpha / r."""
    dropout: float = 0.0
    num_experts: int = 4
    group_size: int = 16
    eval_mode: Literal["group", "alone"] = "alone"
    """How eval() runs; `inference_mode` is PEFT's word for a frozen adapter."""
    alone_top_k: int | None = None
    zero_fill: float = 0.0
    """Share of the groups, drawn anew in every step, whose tokens train as they are deployed, alone."""
    target_modules: list[str] | str | None = None
    """Whole feed-forward layers; of a BERT layer, its `intermediate`."""

    def __post_init__(self) -> None:
        """Refuses settings that cannot work."""
        super().__post_init__()
        self.peft_type = PeftType("MIXTURE_OF_TOKENS")
        if self.r < 1 or self.num_experts < 1 or self.alpha <= 0 or not 0 <= self.dropout < 1:
            raise UserError(
                f"Rank {self.r}, {self.num_experts} experts, alpha {self.alpha} and dropout {self.dropout} cannot "
                "work: rank and experts must be at least 1, alpha greater than zero and dropout from 0 to below 1."
            )
        if not 0 <= self.zero_fill < 1:
            raise UserError(f"'zero_fill' is {self.zero_fill}: it is a share of the groups, from 0 to below 1.")
        if self.group_size < 2:
            raise UserError(f"'group_size' is {self.group_size}: a group needs at least 2 examples.")
        if self.alone_top_k is not None and not 1 <= self.alone_top_k <= self.num_experts:
            raise UserError(
                f"'alone_top_k' is {self.alone_top_k}: it must lie between 1 and num_experts, which is "
                f"{self.num_experts}, or be left out for all."
            )


class MotExperts(nn.Module):
    """The adapter of one layer: dropout, a small mixture of tokens, and a scale."""

    def __init__(self, hidden_size: int, config: MotAdapterConfig) -> None:
        """`hidden_size` is D."""
        super().__init__()
        self.scale = config.alpha / config.r
        self.dropout = nn.Dropout(config.dropout)
        self.mixture = MixtureOfTokens(
            hidden_size,
            intermediate_size=config.r,
            num_experts=config.num_experts,
            group_size=config.group_size,
            inference_mode=config.eval_mode,
            alone_top_k=config.alone_top_k,
            zero_fill=config.zero_fill,
        )
        nn.init.normal_(self.mixture.gate.weight, std=0.02)
        up_ERD, down_EDR = self.mixture.experts.weights
        for up_RD in up_ERD:
            nn.init.kaiming_uniform_(up_RD, a=math.sqrt(5))
        nn.init.zeros_(down_EDR)

    def forward(self, x_BLD: Tensor, mask_BL: Tensor | None, want_stats: bool) -> tuple[Tensor, Any]:
        """(B, L, D) -> (B, L, D) in the type of the input, and the statistics or None."""
        x_cast_BLD = self.dropout(x_BLD.to(self.mixture.gate.weight.dtype))
        y_BLD, stats = self.mixture.route_and_run(x_cast_BLD, mask_BL, want_stats)
        return (y_BLD * self.scale).to(x_BLD.dtype), stats


class MotAdapterLayer(TwoPartLayer):
    """A frozen feed-forward layer and mixtures of tokens beside it.

    In a layer of two modules, as BERT's, the update is added to the output of the second, before dropout, residual and
    norm.
    """

    adapter_layer_names = (_ATTRIBUTE,)
    unmergeable = "A mixture-of-tokens adapter cannot be merged into its base: keep it as an adapter."
    mixture_of_tokens_layer: nn.ModuleDict

    def add(self, name: str, config: MotAdapterConfig) -> None:
        """Adds an adapter."""
        self.add_module_named(name, MotExperts(input_width(self.get_base_layer()), config))

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """(B, L, D) -> the frozen layer's output, with the update added."""
        output = self.base_layer(x, *args, **kwargs)
        self.pending = None
        active = self.active_modules()
        if not active:
            return output
        if x.dim() != 3:
            raise UserError(
                f"'{self.key}' was given a tensor of shape {tuple(x.shape)}: mixture of tokens needs (batch, length, "
                "hidden_size); use another adapter for this model."
            )
        update = torch.stack([self._update(experts, x) for experts in active]).sum(0)
        if self.down is not None:
            self.pending = update
            return output
        if isinstance(output, tuple):
            return (output[0] + update.to(output[0].dtype), *output[1:])
        return output + update.to(output.dtype)

    def _update(self, experts: MotExperts, x_BLD: Tensor) -> Tensor:
        want_stats = self.training or self.context.observe
        y_BLD, stats = experts(x_BLD, self.mask_for(x_BLD), want_stats)
        if want_stats:
            self.context.stats[self.key] = stats
        return y_BLD

    def finish(self, output: Tensor, pending: Tensor) -> Tensor:
        """The frozen layer's output and the update."""
        return output + pending.to(output.dtype)


class MotAdapterModel(RoutedTuner):
    """PEFT's tuner for `MotAdapterConfig`."""

    prefix = "mixture_of_tokens_"
    tuner_layer_cls = MotAdapterLayer
    attribute = _ATTRIBUTE

    def new_layer(self, config: Any, target: nn.Module, name: str, parent: nn.Module, key: str) -> AdapterLayer:
        """A whole feed-forward layer's."""
        split = name == "intermediate" and isinstance(getattr(target, "dense", None), nn.Linear)
        down = parent.get_submodule(SPLIT.down) if split else loose_down(parent, name)
        return MotAdapterLayer(target, key=key, context=self.context, down=down)


def input_width(block: nn.Module) -> int:
    """D of a feed-forward layer, dense or a mixture: the width of its router's input or of its first linear layer."""
    gate = getattr(getattr(block, "gate", None), "weight", None)
    if isinstance(gate, Tensor) and gate.dim() == 2:
        return gate.size(1)
    for module in block.modules():
        if isinstance(module, nn.Linear):
            return module.in_features
    raise UserError(f"{type(block).__name__} has no linear layer and no router: name other target_modules.")


def set_inference_mode(model: nn.Module, mode: Literal["group", "alone"], *, top_k: int | None = None) -> None:
    """Sets how the mixture-of-tokens adapters of a model run in eval(), here and in the configuration that is saved.

    Raises:
        UserError: the model has none.
    """
    layers = [module for module in model.modules() if isinstance(module, MotAdapterLayer)]
    if not layers:
        raise UserError("The model has no mixture-of-tokens adapter, so there is no inference mode to set.")
    for layer in layers:
        for experts in layer.mixture_of_tokens_layer.values():
            assert isinstance(experts, MotExperts)
            experts.mixture.set_inference_mode(mode, top_k=top_k)
    for config in getattr(model, "peft_config", {}).values():
        if isinstance(config, MotAdapterConfig):
            config.eval_mode, config.alone_top_k = mode, top_k


register_method("mixture_of_tokens", MotAdapterConfig, MotAdapterModel)
