"""Whole training steps of small models with one family in every layer.

Shapes: B batch, L length.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from mixtura.benchmarks.contenders import Size
from mixtura.config import Family
from mixtura.models import MixtureConfig, MixtureForCausalLM


def model_of(family: Family, size: Size, *, layers: int, heads: int, vocab_size: int) -> MixtureForCausalLM:
    """A model in training with that family in every layer, at the FLOPs of the dense one."""
    width = size.dense_width if family == "dense" else size.expert_width(family, top_k=size.top_k)
    config = MixtureConfig(
        vocab_size=vocab_size,
        hidden_size=size.hidden,
        intermediate_size=size.dense_width,
        moe_intermediate_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        mlp_layer_types=[family] * layers,
        num_experts=size.experts,
        num_experts_per_tok=size.top_k,
        group_size=size.group_size,
        hidden_act=size.activation,
        gated=size.gated,
    )
    return MixtureForCausalLM(config).train()


def training_step(
    model: MixtureForCausalLM, ids_BL: Tensor, *, max_grad_norm: float | None = None
) -> Callable[[], None]:
    """A function that takes one step: forward, backward, clipping where a norm is given, and fused AdamW."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step() -> None:
        optimizer.zero_grad()
        model(input_ids=ids_BL, labels=ids_BL).loss.backward()
        if max_grad_norm is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm)
        optimizer.step()

    return step
