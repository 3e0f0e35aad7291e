"""The feed-forward layers of models that name their parts differently."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    DistilBertConfig,
    DistilBertModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    RobertaConfig,
    RobertaModel,
)

from mixtura.adapters.attach import apply_adapter, reach
from mixtura.adapters.targets import feed_forward_linears, find_blocks, match_linears
from mixtura.config import AdapterConfig, UserError

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")

_SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MODELS: dict[str, Callable[[], nn.Module]] = {
    "roberta": lambda: RobertaModel(RobertaConfig(**_SIZES), add_pooling_layer=False),
    "distilbert": lambda: DistilBertModel(
        DistilBertConfig(vocab_size=64, dim=16, hidden_dim=24, n_layers=2, n_heads=2)
    ),
    "phi": lambda: PhiForCausalLM(PhiConfig(**_SIZES)),
    "gpt_neox": lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**_SIZES)),
    "phi3": lambda: Phi3ForCausalLM(Phi3Config(**_SIZES)),
}
LINEARS = {
    "roberta": ["encoder.layer.0.intermediate.dense", "encoder.layer.0.output.dense"],
    "distilbert": ["transformer.layer.0.ffn.lin1", "transformer.layer.0.ffn.lin2"],
    "phi": ["model.layers.0.mlp.fc1", "model.layers.0.mlp.fc2"],
    "gpt_neox": ["gpt_neox.layers.0.mlp.dense_h_to_4h", "gpt_neox.layers.0.mlp.dense_4h_to_h"],
    "phi3": ["model.layers.0.mlp.gate_up_proj", "model.layers.0.mlp.down_proj"],
}


@pytest.mark.parametrize("name", MODELS)
def test_feed_forward_layers_are_found_whatever_their_parts_are_called(name: str) -> None:
    second = [linear.replace(".0.", ".1.") for linear in LINEARS[name]]
    assert feed_forward_linears(MODELS[name]()) == LINEARS[name] + second


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("kind", ["linear", "feed_forward", "mixture_of_tokens"])
def test_every_adapter_starts_as_nothing_there_and_is_heard(name: str, kind: str) -> None:
    method = "mixture_of_tokens" if kind == "mixture_of_tokens" else "mixture_of_lora"
    config = AdapterConfig(method=method, scope="feed_forward" if kind == "feed_forward" else "linear", rank=2)
    model = MODELS[name]().eval()
    batch = {"input_ids": torch.randint(3, 64, (4, 6)), "attention_mask": torch.ones(4, 6, dtype=torch.long)}
    expected = model(**batch)[0]
    if name == "phi3" and kind == "feed_forward":
        with pytest.raises(UserError, match="no gate, up and down of their own"):
            apply_adapter(model, config, seed=0)
        return
    adapted = apply_adapter(model, config, seed=0).eval()
    torch.testing.assert_close(adapted(**batch)[0], expected, atol=1e-6, rtol=1e-5)
    assert reach(adapted, batch).layers > 0


def test_a_mixture_is_a_layer_for_mixtures_of_tokens_and_for_nothing_else() -> None:
    model = MixtralForCausalLM(MixtralConfig(**_SIZES, num_key_value_heads=1, num_local_experts=2))
    assert find_blocks(model) == []
    assert [block.name for block in find_blocks(model, mixtures=True)] == ["model.layers.0.mlp", "model.layers.1.mlp"]
    with pytest.raises(UserError, match=r"'adapter.targets', some of q_proj, k_proj"):
        feed_forward_linears(model)


def test_targets_match_whole_last_names() -> None:
    model = MODELS["roberta"]()
    assert match_linears(model, ["attention.output.dense"])[0] == "encoder.layer.0.attention.output.dense"
    assert len(match_linears(model, ["query", "value"])) == 4
    with pytest.raises(UserError, match="'y', which is no linear layer"):
        match_linears(model, ["y"])
