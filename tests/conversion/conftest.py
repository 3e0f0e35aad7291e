"""Tiny checkpoints: dense ones of every architecture that can be upcycled, and mixtures of ours with large weights."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from mixtura.data.tokenizer import train_tokenizer
from mixtura.models import MixtureConfig, MixtureForCausalLM

SILU = {"gated": True, "hidden_act": "silu", "norm_topk_prob": True, "mlp_layer_types": ["token_choice"] * 3}


SHAPE = {
    "vocab_size": 300,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_act": "silu",
    "initializer_range": 0.3,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
WINDOW = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}
ARCHITECTURES = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SHAPE, rope_parameters=LLAMA3_ROPE)),
    "llama, tied, biases": lambda: LlamaForCausalLM(
        LlamaConfig(**SHAPE, tie_word_embeddings=True, attention_bias=True)
    ),
    "mistral, window": lambda: MistralForCausalLM(MistralConfig(**SHAPE, sliding_window=4)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SHAPE, tie_word_embeddings=True)),
    "qwen2, window": lambda: Qwen2ForCausalLM(Qwen2Config(**SHAPE, **WINDOW)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SHAPE, head_dim=8)),
    "mixtura": lambda: MixtureForCausalLM(MixtureConfig(**SHAPE, gated=True)),
}


def build_source(name: str, seed: int = 0) -> PreTrainedModel:
    """A dense model of an architecture; norms and biases are no ones and zeros."""
    torch.manual_seed(seed)
    model = ARCHITECTURES[name]().eval()
    for parameter in model.parameters():
        if parameter.dim() == 1:
            torch.nn.init.normal_(parameter, mean=1.0, std=0.3)
    return model


@pytest.fixture(scope="session")
def tokenizer(tiny_corpus):
    return train_tokenizer(tiny_corpus, vocab_size=300)


@pytest.fixture(scope="session")
def dense(tokenizer, tmp_path_factory) -> Callable[..., tuple[PreTrainedModel, Path]]:
    """A factory: `dense("qwen3")` is the model and its folder, with a tokenizer; both are made once."""
    made: dict = {}

    def make(name: str = "llama", *, seed: int = 0, dtype: torch.dtype = torch.float32, shard: str = "1GB"):
        key = (name, seed, dtype, shard)
        if key not in made:
            folder = tmp_path_factory.mktemp("dense") / "model"
            model = build_source(name, seed).to(dtype)
            model.save_pretrained(folder, max_shard_size=shard)
            tokenizer.save_pretrained(folder)
            made[key] = (model, folder)
        return made[key]

    return make


@pytest.fixture
def edited(dense, tmp_path) -> Callable[..., Path]:
    """A factory: a copy of the Llama folder whose config.json has some values changed."""

    def make(**changes) -> Path:
        folder = tmp_path / "edited"
        folder.mkdir()
        for file in dense()[1].iterdir():
            (folder / file.name).write_bytes(file.read_bytes())
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | changes))
        return folder

    return make


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
