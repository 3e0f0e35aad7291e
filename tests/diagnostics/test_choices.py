"""Choices are read as they were made, outputs stay bit for bit, and hooks go away again."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    GptOssConfig,
    MixtralConfig,
    OlmoeConfig,
    Qwen2MoeConfig,
    Qwen3MoeConfig,
)

from mixtura.config import UserError
from mixtura.diagnostics.choices import record_choices, routed_layers, unread_layers
from mixtura.layers import ChoiceTap, MixtureOfTokens, TokenChoiceMoE
from mixtura.models import MixtureConfig, MixtureForCausalLM

SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "intermediate_size": 16,
    "max_position_embeddings": 64,
}
HUGGING_FACE = [
    pytest.param(MixtralConfig(**SIZES, num_local_experts=4), 4, 2, id="Mixtral"),
    pytest.param(
        Qwen2MoeConfig(**SIZES, num_experts=6, num_experts_per_tok=3, moe_intermediate_size=8), 6, 3, id="Qwen2-MoE"
    ),
    pytest.param(
        Qwen3MoeConfig(**SIZES, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=8, head_dim=8),
        4,
        2,
        id="Qwen3-MoE",
    ),
    pytest.param(OlmoeConfig(**SIZES, num_experts=8, num_experts_per_tok=2), 8, 2, id="OLMoE"),
    pytest.param(GptOssConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2, head_dim=8), 4, 2, id="GPT-OSS"),
    pytest.param(
        DeepseekV3Config(
            **SIZES | {"num_key_value_heads": 2},
            n_routed_experts=8,
            num_experts_per_tok=2,
            n_group=2,
            topk_group=1,
            first_k_dense_replace=0,
            moe_intermediate_size=8,
            q_lora_rank=8,
            kv_lora_rank=8,
            qk_rope_head_dim=4,
            qk_nope_head_dim=4,
            v_head_dim=8,
        ),
        8,
        2,
        id="DeepSeek-V3",
    ),
]


def ids(batch: int = 3, length: int = 5) -> Tensor:
    return torch.randint(64, (batch, length))


@pytest.mark.parametrize(("config", "num_experts", "top_k"), HUGGING_FACE)
def test_hugging_face_models_are_read(config: Any, num_experts: int, top_k: int) -> None:
    model = AutoModelForCausalLM.from_config(config).eval()
    ids_BL = ids()
    with torch.no_grad():
        before = model(ids_BL).logits
        with record_choices(model) as recorder:
            during = model(ids_BL).logits
            chosen = recorder.take(tokens=15)
        after = model(ids_BL).logits
    assert torch.equal(before, during)
    assert torch.equal(before, after)
    assert [layer.depth for layer in recorder.layers] == [0, 1]
    assert {layer.num_experts for layer in recorder.layers} == {num_experts}
    for choices in chosen:
        assert choices.expert_TK.shape == choices.rows_TK.shape == (15, top_k)
        assert choices.rows_TK.eq(1).all()
        assert all(len(set(row)) == top_k for row in choices.expert_TK.tolist())
        assert 0 <= choices.expert_TK.min() <= choices.expert_TK.max() < num_experts
    assert not any(module._forward_hooks for module in model.modules())


def test_mixtral_choices_are_the_routers_own() -> None:
    model = AutoModelForCausalLM.from_config(MixtralConfig(**SIZES, num_local_experts=4)).eval()
    logits: list[Tensor] = []
    model.get_submodule("model.layers.1.mlp.gate").register_forward_hook(
        lambda _module, _args, output: logits.append(output[0])
    )
    with torch.no_grad(), record_choices(model) as recorder:
        model(ids())
        chosen = recorder.take(tokens=15)[1]
    assert torch.equal(chosen.expert_TK, logits[0].topk(2, dim=-1).indices)


def test_token_choice_is_read_strongest_first() -> None:
    layer = TokenChoiceMoE(4, intermediate_size=4, num_experts=4, top_k=2).eval()
    nn.init.eye_(layer.gate.weight)
    x_BLD = torch.tensor([[[4.0, 1.0, 0.0, 2.0], [0.0, 1.0, 3.0, 0.0]]])
    with record_choices(layer) as recorder:
        assert torch.equal(layer(x_BLD), layer(x_BLD))
        (chosen,) = recorder.take(tokens=2)
    assert chosen.expert_TK.tolist() == [[0, 3], [2, 1]]
    assert [(layer.name, layer.num_experts) for layer in recorder.layers] == [("choice_tap", 4)]


def test_tokens_keep_their_places_where_there_is_padding() -> None:
    layer = TokenChoiceMoE(4, intermediate_size=4, num_experts=4, top_k=1, capacity_factor=4.0).eval()
    nn.init.eye_(layer.gate.weight)
    x_BLD, mask_BL = torch.eye(4)[None], torch.tensor([[1, 0, 1, 1]])
    with record_choices(layer) as recorder:
        layer(x_BLD, mask_BL)
        (chosen,) = recorder.take(tokens=4)
    assert chosen.expert_TK.flatten().tolist() == [0, 1, 2, 3]
    assert chosen.rows_TK.flatten().tolist() == [1, 1, 1, 1]


def test_mixture_of_tokens_alone_gives_shares_or_its_top_k() -> None:
    layer = MixtureOfTokens(2, intermediate_size=4, num_experts=2, group_size=2, mixtures_per_expert=2).eval()
    # Columns 0 and 1 are expert 0's, 2 and 3 expert 1's. With one other token in the group the weights are sigmoids.
    layer.gate.weight.data = torch.tensor([[0.0, 0.0], [0.0, 0.0], [2.0, 0.0], [0.0, 0.0]])
    x_BLD = torch.tensor([[[1.0, 0.0]]])
    strong = torch.sigmoid(torch.tensor(2.0)).item() ** 2
    with record_choices(layer) as recorder:
        layer(x_BLD)
        (every,) = recorder.take(tokens=1)
        layer.set_inference_mode("alone", top_k=1)
        layer(x_BLD)
        (first,) = recorder.take(tokens=1)
    assert every.expert_TK.tolist() == [[1, 0]]
    assert every.rows_TK[0].tolist() == pytest.approx([(strong + 0.25) / (strong + 0.75), 0.5 / (strong + 0.75)])
    assert (first.expert_TK.tolist(), first.rows_TK.tolist()) == ([[1]], [[1.0]])


def test_zero_weights_are_experts_that_were_not_chosen() -> None:
    model = nn.Sequential(ChoiceTap())
    model.num_experts = 3
    with record_choices(model) as recorder:
        model(torch.tensor([[0.0, 0.3, 0.7], [1.0, 0.0, 0.0]]))
        (chosen,) = recorder.take(tokens=2)
    assert chosen.expert_TK.tolist() == [[2, 1, 0], [0, 1, 2]]
    assert chosen.rows_TK.tolist() == [[1, 1, 0], [1, 0, 0]]


def test_layers_that_show_nothing_are_refused() -> None:
    layer = MixtureOfTokens(4, intermediate_size=4, num_experts=2, group_size=2)
    with record_choices(layer) as recorder:
        layer(torch.randn(2, 3, 4))
        with pytest.raises(UserError, match="alone and not in groups"):
            recorder.take(tokens=6)
        layer.eval()(torch.randn(2, 3, 4))
        with pytest.raises(UserError, match="routed 6 tokens where 7 went in"):
            recorder.take(tokens=7)


class AnyRouter(nn.Module):
    """Whatever is called a router and returns logits, weights and indices."""

    def __init__(self) -> None:
        super().__init__()
        self.num_experts = 3
        self.linear = nn.Linear(4, 3)

    def forward(self, x_BLD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits = self.linear(x_BLD)
        return logits, *logits.softmax(-1).topk(2)


def test_any_router_of_the_convention_is_read() -> None:
    model = nn.Sequential(nn.Identity(), nn.ModuleDict({"lora_router": AnyRouter()})["lora_router"])
    with record_choices(model) as recorder:
        logits, _, index = model(torch.randn(2, 3, 4))
        (chosen,) = recorder.take(tokens=6)
    assert torch.equal(chosen.expert_TK, index.flatten(0, 1))
    assert torch.equal(chosen.expert_TK[:, 0], logits.argmax(-1).flatten())


@pytest.mark.parametrize(
    ("family", "read", "unread"),
    [
        ("dense", 0, []),
        ("token_choice", 1, []),
        ("mixture_of_tokens", 1, []),
        ("expert_choice", 0, ["model.layers.1.mlp"]),
        ("soft", 0, ["model.layers.1.mlp"]),
    ],
)
def test_families_are_read_or_named_as_unread(
    tiny_config: Callable[..., MixtureConfig], family: str, read: int, unread: list[str]
) -> None:
    model = MixtureForCausalLM(tiny_config(family))
    assert [layer.depth for layer in routed_layers(model)] == [1] * read
    assert unread_layers(model) == unread
    assert "choice_tap" not in " ".join(model.state_dict())


def test_hooks_go_away_after_an_error() -> None:
    layer = TokenChoiceMoE(4, intermediate_size=4, num_experts=4)
    with pytest.raises(RuntimeError, match="on purpose"), record_choices(layer):
        raise RuntimeError("on purpose")
    assert not layer.choice_tap._forward_hooks
