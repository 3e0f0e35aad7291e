"""What an adapter reaches in stock mixtures and in Mixtura's, and the ones that do nothing."""

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.testing import assert_close
from transformers import (
    AutoModelForCausalLM,
    MixtralConfig,
    OlmoeConfig,
    Qwen3MoeConfig,
)

from fixtures.bases import MIXTURE_SIZES as SIZES
from mixtura.adapters.reach import check_adapter
from mixtura.config import UserError
from mixtura.models import MixtureConfig, MixtureForCausalLM

EXPERTS_AND_ROUTER = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj", "mlp.gate.weight"]


def mixtura(family: str, **changes: Any) -> MixtureForCausalLM:
    settings = {"moe_intermediate_size": 12, "num_experts": 4, "group_size": 4, "gated": True, "hidden_act": "silu"}
    return MixtureForCausalLM(MixtureConfig(**{**SIZES, **settings, "mlp_layer_types": [family] * 2, **changes}))


MODELS = {
    "mixtral": lambda: AutoModelForCausalLM.from_config(MixtralConfig(**SIZES, num_local_experts=4)),
    "mixtral_on_mixturas_kernels": lambda: AutoModelForCausalLM.from_config(
        MixtralConfig(**SIZES, num_local_experts=4), experts_implementation="mixtura"
    ),
    "olmoe": lambda: AutoModelForCausalLM.from_config(OlmoeConfig(**SIZES, num_experts=4)),
    "qwen3_moe": lambda: AutoModelForCausalLM.from_config(
        Qwen3MoeConfig(**SIZES, num_experts=4, moe_intermediate_size=12, head_dim=8)
    ),
    "token_choice": lambda: mixtura("token_choice"),
    "expert_choice": lambda: mixtura("expert_choice"),
    "mixture_of_tokens": lambda: mixtura("mixture_of_tokens"),
    "mixture_of_tokens_in_groups": lambda: mixtura("mixture_of_tokens", inference_mode="group", group_size=2),
    "mixture_of_tokens_all": lambda: mixtura("mixture_of_tokens", alone_top_k=None),
}


def adapt(model: Any, **settings: Any) -> Any:
    return get_peft_model(model, LoraConfig(r=2, lora_alpha=4, task_type="CAUSAL_LM", **settings))


@pytest.mark.parametrize("name", MODELS)
def test_lora_on_experts_and_routers_is_counted_and_heard(name: str) -> None:
    model = adapt(MODELS[name](), target_modules=[], target_parameters=EXPERTS_AND_ROUTER)
    found = check_adapter(model)
    # A layer: gate_up (24, 16) and down (16, 12) with rank 2 for each of 4 experts, and a router (4, 16) with rank 2.
    assert found.trained == 2 * (4 * 2 * (24 + 16) + 4 * 2 * (16 + 12) + 2 * (4 + 16))
    assert sorted(target.name.partition("layers.")[2] for target in found.targets) == sorted(
        f"{layer}.{name}" for layer in (0, 1) for name in EXPERTS_AND_ROUTER
    )
    assert found.expert_parameters == found.adapted_expert_parameters == 2 * 4 * 3 * 16 * 12
    assert found.unmatched == () and all(target.output_change > 0 for target in found.targets)
    assert "changes 4,608 of the 4,608 parameters of experts." in str(found)


@pytest.mark.parametrize("name", ["mixtral", "token_choice", "mixture_of_tokens"])
def test_a_router_adapted_or_saved_as_a_module_is_heard(name: str) -> None:
    assert len(check_adapter(adapt(MODELS[name](), target_parameters=["mlp.gate.weight"])).targets) == 2
    whole = check_adapter(adapt(MODELS[name](), target_modules=["q_proj"], modules_to_save=["gate"]))
    assert sum(target.adapted for target in whole.targets if "gate" in target.name) == 2 * 4 * 16


@pytest.mark.parametrize("family", ["token_choice", "mixture_of_tokens"])
def test_a_router_of_mixtura_is_a_linear_layer_to_adapters(family: str) -> None:
    found = check_adapter(adapt(mixtura(family), target_modules=["gate"]))
    assert [target.parameters for target in found.targets] == [2 * (4 + 16)] * 2


@pytest.mark.parametrize("shape", [(3, 7), (1, 2)], ids=["many_tokens", "few_tokens"])
@pytest.mark.parametrize("family", ["token_choice", "mixture_of_tokens"])
@torch.no_grad()
def test_merging_an_adapter_on_experts_and_routers_changes_no_output(family: str, shape: tuple[int, int]) -> None:
    model = adapt(mixtura(family), target_modules=[], target_parameters=EXPERTS_AND_ROUTER).eval()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    ids_BL = torch.randint(64, shape)
    expected = model(ids_BL).logits
    with model.disable_adapter():
        assert not torch.allclose(model(ids_BL).logits, expected, atol=1e-3)
    assert_close(model.merge_and_unload()(ids_BL).logits, expected, rtol=1e-4, atol=1e-4)


def test_checking_leaves_the_model_as_it_was() -> None:
    model = adapt(mixtura("token_choice"), target_modules=["q_proj"], target_parameters=EXPERTS_AND_ROUTER).train()
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    check_adapter(model)
    assert model.training
    assert all(torch.equal(before[name], p) and p.grad is None for name, p in model.named_parameters())


def test_a_target_that_matches_nothing_is_named() -> None:
    """PEFT is content when one of several targets exists: experts that are no linear layers are then not trained."""
    targets = {"target_modules": ["q_proj", "w1"], "target_parameters": ["mlp.gate.weight", "w2"]}
    found = check_adapter(adapt(mixtura("token_choice"), **targets))
    assert found.unmatched == ("w1", "w2")
    assert found.adapted_expert_parameters == 0 and found.expert_parameters > 0
    assert str(found).endswith("changes 0 of the 4,608 parameters of experts. Nothing is called w1 or w2.")


class _ReadsPast(nn.Module):
    """A head whose weight is read past whatever stands around it."""

    def __init__(self, head: nn.Linear) -> None:
        super().__init__()
        self.inner = head

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.inner.weight)


def test_an_adapter_that_is_read_past_is_refused() -> None:
    model: Any = mixtura("token_choice", tie_word_embeddings=False)
    model.lm_head = _ReadsPast(model.lm_head)
    with pytest.raises(UserError, match=r"does nothing in 1 of 3 places \(lm_head.inner\): adapt other weights"):
        check_adapter(adapt(model, target_modules=["inner", "q_proj"]))


def test_a_router_without_a_gradient_is_refused() -> None:
    """One weight divided by itself is 1 whatever the router says: other experts, but nothing to learn from."""
    model = mixtura("token_choice", num_experts_per_tok=1, norm_topk_prob=True)
    with pytest.raises(UserError, match=r"gets no gradient in 2 of 4 places \(model.layers.0.mlp.gate"):
        check_adapter(adapt(model, target_modules=["gate", "q_proj"]))


def test_a_model_without_an_adapter_is_refused() -> None:
    with pytest.raises(UserError, match="MixtureForCausalLM carries no adapter"):
        check_adapter(mixtura("token_choice"))  # pyright: ignore[reportArgumentType]
