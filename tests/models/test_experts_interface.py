"""Stock mixtures on Mixtura's kernels equal transformers' eager experts, output and gradients."""

from typing import Any

import pytest
import torch
from torch.testing import assert_close
from transformers import (
    AutoModelForCausalLM,
    FlexOlmoConfig,
    GptOssConfig,
    GraniteMoeConfig,
    MixtralConfig,
    NemotronHConfig,
    OlmoeConfig,
    Qwen2MoeConfig,
    Qwen3MoeConfig,
)
from transformers.models.aria.configuration_aria import AriaTextConfig
from transformers.models.aria.modeling_aria import AriaExperts

from mixtura.config import UserError
from mixtura.kernels import dispatch

SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
E8K2: dict[str, Any] = {"num_experts": 8, "num_experts_per_tok": 2}
CONFIGS = {
    "mixtral": lambda: MixtralConfig(**SIZES, num_local_experts=8, num_experts_per_tok=2),
    "mixtral_relu": lambda: MixtralConfig(**SIZES, num_local_experts=8, num_experts_per_tok=3, hidden_act="relu"),
    "olmoe": lambda: OlmoeConfig(**SIZES, **E8K2),
    "qwen2_moe": lambda: Qwen2MoeConfig(**SIZES, **E8K2, moe_intermediate_size=16, shared_expert_intermediate_size=16),
    "qwen3_moe": lambda: Qwen3MoeConfig(**SIZES, **E8K2, moe_intermediate_size=16, head_dim=16, hidden_act="gelu"),
    "flex_olmo": lambda: FlexOlmoConfig(**SIZES, **E8K2),
    "granitemoe": lambda: GraniteMoeConfig(**SIZES, num_local_experts=8, num_experts_per_tok=2),
}


def build(name: str, implementation: str) -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(CONFIGS[name](), experts_implementation=implementation)


@pytest.mark.parametrize("tokens", [2, 40], ids=["fewer_tokens_than_experts", "many_tokens"])
@pytest.mark.parametrize("name", CONFIGS)
def test_loss_and_every_gradient_equal_the_eager_experts(name: str, tokens: int) -> None:
    ids_BL = torch.randint(3, 64, (1, tokens))
    eager, ours = build(name, "eager"), build(name, "mixtura")
    outputs = []
    for model in (eager, ours):
        output = model(input_ids=ids_BL, labels=ids_BL)
        output.loss.backward()
        outputs.append(output)
    assert_close(outputs[1].logits, outputs[0].logits, rtol=1e-4, atol=1e-5)
    reached = dict(ours.named_parameters())
    for key, parameter in eager.named_parameters():
        expected = parameter.grad if parameter.grad is not None else torch.zeros_like(parameter)
        # An expert without a token has a zero gradient in one and may have none in the other.
        found = reached[key].grad if reached[key].grad is not None else torch.zeros_like(parameter)
        assert_close(found, expected, rtol=1e-3, atol=1e-5 * max(1.0, expected.abs().max().item()), msg=key)
    assert any((p.grad != 0).any() for key, p in ours.named_parameters() if "experts.down_proj" in key)


@pytest.mark.parametrize("name", CONFIGS)
def test_generation_runs_on_the_kernels_of_few_tokens_and_equals_eager(name: str, monkeypatch: Any) -> None:
    ids_BL = torch.randint(3, 64, (1, 5))
    settings: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    expected = build(name, "eager").eval().generate(ids_BL, **settings)
    calls = []
    few = dispatch.small_batch_ffn
    monkeypatch.setattr(dispatch, "small_batch_ffn", lambda *a, **k: (calls.append(1), few(*a, **k))[1])
    assert torch.equal(build(name, "mixtura").eval().generate(ids_BL, **settings), expected)
    assert calls


def test_the_name_survives_saving_and_loading(tmp_path: Any) -> None:
    build("mixtral", "eager").save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, experts_implementation="mixtura")
    assert model.get_experts_implementation()[""] == "mixtura"
    model.set_experts_implementation("eager")
    model.set_experts_implementation("mixtura")
    ids_BL = torch.randint(3, 64, (2, 9))
    assert_close(model(ids_BL).logits, build("mixtral", "eager")(ids_BL).logits, rtol=1e-4, atol=1e-5)


def stock_experts(name: str, implementation: str) -> Any:
    return build(name, implementation).model.layers[-1].mlp.experts


def test_float64_is_computed_which_grouped_mm_refuses() -> None:
    x_TD, index_TK, weight_TK = torch.randn(20, 32).double(), torch.randint(8, (20, 1)), torch.rand(20, 1).double()
    expected = stock_experts("mixtral", "eager").double()(x_TD, index_TK, weight_TK)
    assert_close(stock_experts("mixtral", "mixtura").double()(x_TD, index_TK, weight_TK), expected)


def test_bfloat16_stays_close_and_keeps_its_dtype() -> None:
    x_TD, weight_TK = torch.randn(20, 32).bfloat16(), torch.rand(20, 2)
    index_TK = torch.rand(20, 8).topk(2).indices
    expected = stock_experts("mixtral", "eager").bfloat16()(x_TD, index_TK, weight_TK)
    found = stock_experts("mixtral", "mixtura").bfloat16()(x_TD, index_TK, weight_TK)
    assert found.dtype == torch.bfloat16
    assert_close(found, expected, rtol=0.05, atol=0.02 * expected.abs().max().item())


@pytest.mark.parametrize("tokens", [4, 40])
def test_rows_of_other_ranks_add_nothing(tokens: int) -> None:
    x_TD, weight_TK = torch.randn(tokens, 32, requires_grad=True), torch.rand(tokens, 2)
    index_TK = torch.rand(tokens, 9).topk(2).indices  # 8 is nobody here
    gradients = []
    for implementation, shown_TK in (("eager", index_TK.clamp_max(7)), ("mixtura", index_TK)):
        experts = stock_experts("mixtral", implementation)
        experts._is_expert_parallel = True
        y_TD = experts(x_TD, shown_TK, weight_TK.masked_fill(index_TK == 8, 0))
        gradients.append((y_TD, *torch.autograd.grad(y_TD.square().sum(), [x_TD, experts.down_proj])))
    assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("tokens", [2, 40])
def test_transposed_weights_equal_the_eager_experts(tokens: int) -> None:
    """Aria's text model keeps weights as (E, D, 2F) and (E, F, D)."""
    config = AriaTextConfig(hidden_size=32, intermediate_size=24, moe_num_experts=8)
    experts: Any = AriaExperts(config)
    if not hasattr(experts, "is_transposed"):
        pytest.skip("Aria's experts are not in the experts interface of this version of transformers")
    for weight in experts.parameters():
        torch.nn.init.normal_(weight, std=0.3)
    x_TD, index_TK, weight_TK = torch.randn(tokens, 32), torch.rand(tokens, 8).topk(2).indices, torch.rand(tokens, 2)
    results = []
    for implementation in ("eager", "mixtura"):
        config._experts_implementation = implementation
        y_TD = experts(x_TD, index_TK, weight_TK)
        with torch.no_grad():
            few_TD = experts(x_TD, index_TK, weight_TK)
        results.append((y_TD, few_TD, *torch.autograd.grad(y_TD.square().sum(), list(experts.parameters()))))
    assert_close(results[1], results[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: GptOssConfig(**SIZES, num_local_experts=4, head_dim=16), "GptOssExperts have biases"),
        (
            lambda: NemotronHConfig(
                **{**SIZES, "num_hidden_layers": 1},
                layers_block_type=["moe"],
                n_routed_experts=4,
                moe_intermediate_size=16,
                moe_shared_expert_intermediate_size=16,
            ),
            "NemotronHExperts have the activation ReLUSquaredActivation",
        ),
        (
            lambda: MixtralConfig(**SIZES, num_local_experts=4, hidden_act="quick_gelu"),
            "MixtralExperts have the activation QuickGELUActivation",
        ),
    ],
    ids=["biases", "squared_relu", "quick_gelu"],
)
def test_what_the_kernels_do_not_compute_is_refused(make: Any, reason: str) -> None:
    model = AutoModelForCausalLM.from_config(make(), experts_implementation="mixtura")
    with pytest.raises(UserError, match=f"The experts of {reason}, which Mixtura's kernels do not compute: use "):
        model(torch.randint(3, 64, (1, 5)), use_cache=False)


def test_importing_changes_no_model_that_does_not_ask() -> None:
    model = AutoModelForCausalLM.from_config(MixtralConfig(**SIZES, num_local_experts=4))
    assert model.get_experts_implementation()[""] == "grouped_mm"
