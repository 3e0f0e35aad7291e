"""What is timed: our layer of every family, the layers of other libraries, and the limit, all at a dense layer's FLOPs.

The others are the blocks of transformers, and lucidrains' layers and ScatterMoE where they are installed. Each gets
experts of the width that our layer of the same family has, so FLOPs are equal; only st-moe-pytorch costs more, because
it pads every expert to an even share.

Shapes: B batch, L length, D hidden, E experts, K top-k, F expert width, N groups, G tokens of a group.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from transformers import MixtralConfig, Qwen3MoeConfig
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

from mixtura.config import Family
from mixtura.config.families import facts_of
from mixtura.layers import DenseFFN, ExpertChoiceMoE, FeedForward, MixtureOfTokens, SoftMoE, TokenChoiceMoE
from mixtura.layers.routing import from_groups, to_groups
from mixtura.planning import match_intermediate_size
from mixtura.planning.formulas import BACKWARD, layer_flops
from mixtura.planning.shapes import FeedForwardShape

SEQUENCE_LENGTH = 128
"""Tokens of a sequence where the batch has enough of them to fill the groups."""


@dataclass(frozen=True, kw_only=True)
class Size:
    """One row of the table: how many tokens meet how many experts."""

    tokens: int
    hidden: int
    experts: int
    top_k: int
    skew: float = 0.0
    """Strength of a vector added to every token: 0 is even routing, at 2 a few experts get most tokens."""
    multiple_of: int = 4
    """What expert widths are rounded to: tensor cores want 16 bytes, which is 8 numbers of 16 bits."""
    gated: bool = True
    """SiLU-gated layers, which every other library has; else plain ReLU, as in the papers on mixture of tokens."""

    @property
    def dense_width(self) -> int:
        """Width of the dense layer: 4 D, or two thirds of it when gated, which has the same parameters."""
        return 4 * self.hidden if not self.gated else round(8 * self.hidden / 3 / 8) * 8

    @property
    def activation(self) -> str:
        """The activation that goes with `gated`."""
        return "silu" if self.gated else "relu"

    @property
    def group_size(self) -> int:
        """G: as many tokens as there are experts."""
        return self.experts

    @property
    def batch(self) -> int:
        """B: a multiple of the group size where that leaves whole sequences."""
        return max(self.tokens // SEQUENCE_LENGTH, min(self.group_size, self.tokens))

    @property
    def length(self) -> int:
        """L."""
        return self.tokens // self.batch

    def expert_width(self, family: Family, *, top_k: int = 1) -> int:
        """F at which a token costs what it costs in the dense layer, routing and mixing counted."""
        layer = FeedForwardShape(
            family=family,
            hidden_size=self.hidden,
            intermediate_size=0,
            gated=self.gated,
            num_experts=self.experts,
            top_k=top_k,
            group_size=self.group_size if facts_of(family).group_over else self.length,
            mixtures_per_expert=self.num_slots if family == "soft" else 1,
        )
        return match_intermediate_size(layer, dense_intermediate_size=self.dense_width, multiple_of=self.multiple_of)

    @property
    def num_slots(self) -> int:
        """Slots of a soft expert: as many slots as tokens, at least one an expert."""
        return max(1, self.length // self.experts)

    def flops(self, *, backward: bool) -> float:
        """FLOPs of the dense layer on all tokens, which every contender is matched to."""
        shape = FeedForwardShape(
            family="dense", hidden_size=self.hidden, intermediate_size=self.dense_width, gated=self.gated
        )
        return layer_flops(shape) * self.tokens * (1 + BACKWARD if backward else 1)

    def inputs(self) -> Tensor:
        """(B, L, D): normal tokens, plus the same vector `skew` times."""
        return torch.randn(self.batch, self.length, self.hidden) + self.skew * torch.randn(self.hidden)

    def label(self) -> str:
        """For tables and plots."""
        routing = "even" if self.skew == 0 else "skewed"
        return f"{self.tokens} tokens x {self.hidden}, {self.experts} experts, top {self.top_k}, {routing}"


def own_layers(size: Size) -> dict[str, FeedForward]:
    """One layer of every family; families whose routing alone costs a dense layer are left out."""
    own: dict[str, FeedForward] = {"dense": DenseFFN(size.hidden, intermediate_size=size.dense_width, **_kind(size))}
    sizes: dict[str, Any] = {"num_experts": size.experts, **_kind(size)}
    width = size.expert_width("token_choice", top_k=size.top_k)
    own["token choice"] = TokenChoiceMoE(size.hidden, intermediate_size=width, top_k=size.top_k, **sizes)
    # As many rows a token as token choice has: experts of equal width are then compared.
    width = size.expert_width("expert_choice", top_k=size.top_k)
    own["expert choice"] = ExpertChoiceMoE(
        size.hidden, intermediate_size=width, top_k=size.top_k, group_size=size.group_size, **sizes
    )
    width = size.expert_width("mixture_of_tokens")
    own["mixture of tokens"] = MixtureOfTokens(
        size.hidden, intermediate_size=width, group_size=size.group_size, **sizes
    )
    if size.length >= size.experts:
        width = size.expert_width("soft")
        own["soft"] = SoftMoE(size.hidden, intermediate_size=width, num_slots=size.num_slots, **sizes)
    return own


def limit(size: Size, *, backward: bool) -> Callable[[], None]:
    """One large product with the dense layer's FLOPs, into memory that is there already."""
    depth = round(size.flops(backward=backward) / (2 * size.tokens * size.dense_width))
    left, right = torch.randn(size.tokens, depth), torch.randn(depth, size.dense_width)
    out = torch.empty(size.tokens, size.dense_width)

    def run() -> None:
        torch.mm(left, right, out=out)

    return run


def parameters(module: nn.Module) -> int:
    """How many numbers a module learns."""
    return sum(parameter.numel() for parameter in module.parameters())


def _kind(size: Size) -> dict[str, Any]:
    return {"activation": size.activation, "gated": size.gated}


IMPLEMENTATIONS = ("eager", "grouped_mm", "batched_mm")
"""How transformers runs experts on any machine; its others need an accelerator."""
MOST_COPIED_BYTES = 2 << 30
"""batched_mm copies the weights of an expert for every row; above this a peer is not run."""


def peers(size: Size) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """Layers of other libraries by name, and why others are left out."""
    found: dict[str, nn.Module] = {"mixture of tokens, plain": PlainMixtureOfTokens(size)}
    left_out: dict[str, str] = {}
    if not size.gated:
        return found, {"transformers and lucidrains": "their experts are gated"}
    width = size.expert_width("token_choice", top_k=size.top_k)
    copied = 4 * size.tokens * size.top_k * 3 * width * size.hidden
    for name in IMPLEMENTATIONS:
        if name == "batched_mm" and copied > MOST_COPIED_BYTES:
            left_out["transformers Mixtral, batched_mm"] = f"it would copy {copied / 2**30:.0f} GiB of weights"
            continue
        found[f"transformers Mixtral, {name}"] = _mixtral(size, width, name)
    found["transformers Qwen3-MoE, grouped_mm"] = _qwen3(size, width, "grouped_mm")
    for name, build in (("st_moe_pytorch", _st_moe), ("soft_moe_pytorch", _soft_moe)):
        if find_spec(name) is None:
            left_out[name.replace("_", "-")] = "not installed"
        elif name == "soft_moe_pytorch" and size.length < size.experts:
            left_out["soft-moe-pytorch"] = "a sequence has fewer tokens than there are experts"
        else:
            found[name.replace("_", "-")] = build(size)
    if find_spec("scattermoe") is None:
        left_out["ScatterMoE"] = "not installed"
    elif not (torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1"):
        left_out["ScatterMoE"] = "it needs a GPU"
    else:
        found["ScatterMoE"] = ScatterMoE(size)
    for module in found.values():
        _draw(module)
    return found, left_out


class PlainMixtureOfTokens(nn.Module):
    """Mixture of tokens as a reader of arXiv 2310.15961 would write it: softmax, einsum, two batched products."""

    def __init__(self, size: Size) -> None:
        """Takes its sizes from the row of the table."""
        super().__init__()
        width = size.expert_width("mixture_of_tokens")
        self.group_size, self.gated = size.group_size, size.gated
        self.router = nn.Parameter(torch.empty(size.hidden, size.experts))
        self.up = nn.Parameter(torch.empty(size.experts, size.hidden, width * (2 if size.gated else 1)))
        self.down = nn.Parameter(torch.empty(size.experts, width, size.hidden))

    def forward(self, x_BLD: Tensor) -> Tensor:
        """(B, L, D) -> (B, L, D), groups over the batch."""
        x_NGD = to_groups(x_BLD, self.group_size, "batch")
        weight_NGE = torch.softmax(x_NGD @ self.router, dim=1)
        z_END = torch.einsum("nge,ngd->end", weight_NGE, x_NGD)
        u_ENF = torch.bmm(z_END, self.up)
        if self.gated:
            gate_ENF, up_ENF = u_ENF.chunk(2, dim=-1)
            h_ENF = torch.nn.functional.silu(gate_ENF) * up_ENF
        else:
            h_ENF = torch.relu(u_ENF)
        y_END = torch.bmm(h_ENF, self.down)
        y_NGD = torch.einsum("nge,end->ngd", weight_NGE, y_END)
        return from_groups(y_NGD, x_BLD.size(0), x_BLD.size(1), "batch")


class ScatterMoE(nn.Module):
    """Token choice on the Triton kernels of github.com/shawntan/scattermoe (arXiv 2403.08245), gated with SiLU."""

    def __init__(self, size: Size) -> None:
        """Takes its sizes from the row of the table."""
        super().__init__()
        width = size.expert_width("token_choice", top_k=size.top_k)
        self.top_k = size.top_k
        self.router = nn.Linear(size.hidden, size.experts, bias=False)
        self.experts = import_module("scattermoe.mlp").GLUMLP(size.hidden, width, size.experts, size.top_k)

    def forward(self, x_BLD: Tensor) -> Tensor:
        """(B, L, D) -> (B, L, D), with the weights of the chosen experts scaled to a sum of 1."""
        x_TD = x_BLD.flatten(0, 1)
        weight_TK, expert_TK = self.router(x_TD).float().softmax(-1).topk(self.top_k, dim=-1)
        weight_TK = (weight_TK / weight_TK.sum(-1, keepdim=True)).to(x_TD.dtype)
        return self.experts(x_TD, weight_TK, expert_TK).view(x_BLD.shape)


def _mixtral(size: Size, width: int, implementation: str) -> nn.Module:
    config = MixtralConfig(
        hidden_size=size.hidden,
        intermediate_size=width,
        num_local_experts=size.experts,
        num_experts_per_tok=size.top_k,
    )
    config._experts_implementation = implementation
    return MixtralSparseMoeBlock(config)


def _qwen3(size: Size, width: int, implementation: str) -> nn.Module:
    config = Qwen3MoeConfig(
        hidden_size=size.hidden,
        moe_intermediate_size=width,
        num_experts=size.experts,
        num_experts_per_tok=size.top_k,
    )
    config._experts_implementation = implementation
    return Qwen3MoeSparseMoeBlock(config)


def _st_moe(size: Size) -> nn.Module:
    width = size.expert_width("token_choice", top_k=size.top_k)
    layer = import_module("st_moe_pytorch").MoE(
        size.hidden,
        num_experts=size.experts,
        expert_hidden_mult=(width + 0.5) * 1.5 / size.hidden,
        gating_top_n=max(2, size.top_k),
        threshold_train=0.0,
        capacity_factor_train=float(size.top_k),  # its capacity is a share of the tokens, not of the rows
    )
    return _First(layer)


def _soft_moe(size: Size) -> nn.Module:
    width = size.expert_width("soft")
    return import_module("soft_moe_pytorch").SoftMoE(
        size.hidden,
        num_experts=size.experts,
        num_slots=size.num_slots,
        expert_mult=(width + 0.5) * 1.5 / size.hidden,
        geglu=True,
        offload_unused_experts_to_cpu=False,
    )


class _First(nn.Module):
    """The first of what a layer returns: its output."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x_BLD: Tensor) -> Tensor:
        return self.layer(x_BLD)[0]


def _draw(module: nn.Module) -> None:
    """Every matrix as ours are drawn: transformers leaves them uninitialised until a model is built around them."""
    for parameter in module.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.02)
