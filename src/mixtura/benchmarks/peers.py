"""What others have: the blocks of transformers, and lucidrains' layers and ScatterMoE where they are installed.

Everybody gets experts of the width that our layer of the same family has, so FLOPs are equal, but for the capacity of
st-moe-pytorch, which pads every expert to an even share.

Shapes: N groups, G tokens of a group, D hidden, E experts, F expert width.
"""

import os
from importlib import import_module
from importlib.util import find_spec

import torch
from torch import Tensor, nn
from transformers import MixtralConfig, Qwen3MoeConfig
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

from mixtura.benchmarks.contenders import Size
from mixtura.layers.routing import from_groups, to_groups

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
