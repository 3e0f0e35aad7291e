"""Tiny checkpoints of ours, with large weights so that every difference shows, and a tokenizer."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mixtura.data.tokenizer import train_tokenizer
from mixtura.models import MixtureConfig, MixtureForCausalLM

SILU = {"gated": True, "hidden_act": "silu", "norm_topk_prob": True, "mlp_layer_types": ["token_choice"] * 3}


@pytest.fixture
def saved(tmp_path: Path) -> Callable[..., Path]:
    """A factory: a folder with three layers; by default gated mixtures of four experts, two a token, summing to one."""

    def make(name: str = "source", *, dtype: torch.dtype = torch.float32, **changes: Any) -> Path:
        torch.manual_seed(1)
        settings: dict[str, Any] = {
            "vocab_size": 64,
            "hidden_size": 32,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "intermediate_size": 48,
            "moe_intermediate_size": 32,
            "max_position_embeddings": 128,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "group_size": 4,
            "initializer_range": 0.3,
        }
        model = MixtureForCausalLM(MixtureConfig(**(settings | SILU | changes))).to(dtype).eval()
        with torch.no_grad():
            for parameter_name, parameter in model.named_parameters():
                if parameter_name.endswith("bias") or "norm" in parameter_name:
                    parameter.add_(torch.randn_like(parameter) * 0.3)
            for buffer_name, buffer in model.named_buffers():
                if buffer_name.endswith("expert_bias"):
                    buffer.copy_(torch.randn_like(buffer) * 0.3)
        model.save_pretrained(tmp_path / name)
        return tmp_path / name

    return make


@pytest.fixture
def with_tokenizer(tiny_corpus: list[str]) -> Callable[[Path], Path]:
    """Puts a tokenizer into a folder."""

    def put(folder: Path) -> Path:
        train_tokenizer(tiny_corpus, vocab_size=300).save_pretrained(folder)
        return folder

    return put
