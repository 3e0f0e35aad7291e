"""Which experts are chosen, that only they move, and that slices and the full export are the same model."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from fixtures.bases import MIXTURE_SIZES as SIZES
from mixtura.adapters.attach import apply_adapter, describe, load_adapter, reach
from mixtura.adapters.expert_specialized import expert_shares, select_experts, stacked_weights
from mixtura.adapters.targets import count_parameters
from mixtura.config import AdapterConfig, UserError
from mixtura.models import MixtureConfig, MixtureForCausalLM

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")
Batch = dict[str, Tensor]

_QWEN: dict[str, Any] = {"moe_intermediate_size": 12, "num_experts": 4, "norm_topk_prob": True}
MIXTURES: dict[str, Callable[[], nn.Module]] = {
    "mixtral": lambda: MixtralForCausalLM(MixtralConfig(**SIZES, num_local_experts=4)),
    "qwen2_moe": lambda: Qwen2MoeForCausalLM(Qwen2MoeConfig(**SIZES, **_QWEN, shared_expert_intermediate_size=8)),
    "qwen3_moe": lambda: Qwen3MoeForCausalLM(Qwen3MoeConfig(**SIZES, **_QWEN, head_dim=8)),
    "olmoe": lambda: OlmoeForCausalLM(OlmoeConfig(**SIZES, num_experts=4)),
    "mixtura": lambda: MixtureForCausalLM(
        MixtureConfig(
            **SIZES,
            moe_intermediate_size=12,
            num_experts=4,
            mlp_layer_types=["token_choice"] * 2,
            norm_topk_prob=True,
        )
    ),
}
each_mixture = pytest.mark.parametrize("name", MIXTURES)


def _model(name: str) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(4)
        return MIXTURES[name]().eval()


def _adapted(name: str, batch: Batch, share: float = 0.5) -> Any:
    config = AdapterConfig(method="expert_specialized", expert_share=share)
    return apply_adapter(_model(name), config, sample=[batch], seed=0)


def test_the_smallest_set_that_carries_the_share_is_chosen() -> None:
    share_E = torch.tensor([0.1, 0.4, 0.2, 0.3], dtype=torch.float64)
    assert select_experts(share_E, 0.4) == [1]
    assert select_experts(share_E, 0.41) == [1, 3]
    assert select_experts(share_E, 0.7) == [1, 3]
    assert select_experts(share_E, 1.0) == [0, 1, 2, 3]
    with pytest.raises(UserError, match="expert_share"):
        select_experts(share_E, 0.0)


def test_shares_are_counted_within_a_layer_and_without_padding(batch: Batch) -> None:
    model: Any = _model("mixtral")
    chosen: list[Tensor] = []
    for layer in model.model.layers:
        layer.mlp.gate.register_forward_hook(lambda module, args, output: chosen.append(output[2]))
    shares = expert_shares(model, [batch])
    real_T = batch["attention_mask"].flatten().bool()
    assert list(shares) == ["model.layers.0.mlp", "model.layers.1.mlp"]
    for share_E, index_TK in zip(shares.values(), chosen, strict=True):
        expected_E = torch.bincount(index_TK[real_T].flatten(), minlength=4).double()
        torch.testing.assert_close(share_E, expected_E / expected_E.sum())


@each_mixture
def test_tuning_starts_at_the_model_and_moves_only_the_chosen_experts(name: str, batch: Batch) -> None:
    base = _model(name)
    adapted = _adapted(name, batch)
    torch.testing.assert_close(adapted(**batch).logits, base(**batch).logits, atol=0, rtol=0)
    experts = adapted.active_peft_config.experts
    total, trained = count_parameters(adapted)
    layers = dict(base.named_modules())
    expected = sum(
        len(chosen) * weight[0].numel()
        for key, chosen in experts.items()
        for weight in stacked_weights(layers[key].experts).values()
    )
    assert trained == expected < total
    optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=0.5)
    adapted.train()(**batch, labels=batch["input_ids"]).loss.backward()
    optimizer.step()
    merged = adapted.eval().merge_and_unload()
    for key, weight in merged.named_parameters():
        before = base.get_parameter(key)
        if ".experts." not in key or weight.dim() != 3:
            assert torch.equal(weight, before), key
            continue
        moved = [e for e in range(len(weight)) if not torch.equal(weight[e], before[e])]
        assert set(moved) <= set(experts[key.partition(".experts.")[0]]) and moved


@each_mixture
def test_slices_load_back_bit_for_bit_and_the_full_export_is_the_same_model(
    name: str, batch: Batch, tmp_path: Path
) -> None:
    adapted = _adapted(name, batch)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.3)
    expected = adapted.eval()(**batch).logits
    adapted.save_pretrained(tmp_path / "adapter")
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()
    loaded = load_adapter(_model(name), tmp_path / "adapter").eval()
    assert torch.equal(loaded(**batch).logits, expected)
    loaded.merge_and_unload().save_pretrained(tmp_path / "full")
    full = AutoModelForCausalLM.from_pretrained(tmp_path / "full").eval()
    torch.testing.assert_close(full(**batch).logits, expected, atol=1e-6, rtol=1e-5)


def test_merging_is_undone_exactly(batch: Batch) -> None:
    adapted = _adapted("qwen3_moe", batch)
    nn.init.normal_(next(p for p in adapted.parameters() if p.requires_grad))
    before = {key: value.clone() for key, value in adapted.state_dict().items()}
    expected = adapted(**batch).logits
    adapted.merge_adapter()
    torch.testing.assert_close(adapted(**batch).logits, expected, atol=0, rtol=0)
    adapted.unmerge_adapter()
    assert all(torch.equal(value, before[key]) for key, value in adapted.state_dict().items())


@each_mixture
def test_switched_off_while_merged_it_leaves_the_base(name: str, batch: Batch) -> None:
    expected = _model(name)(**batch).logits
    adapted = _adapted(name, batch)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter)
    tuned = adapted(**batch).logits
    adapted.merge_adapter()
    with adapted.disable_adapter():
        torch.testing.assert_close(adapted(**batch).logits, expected, atol=0, rtol=0)
    assert not torch.allclose(tuned, expected)
    torch.testing.assert_close(adapted(**batch).logits, tuned)


def test_experts_of_no_cost_are_not_chosen(batch: Batch) -> None:
    config = MixtureConfig(
        **SIZES, moe_intermediate_size=12, num_experts=4, zero_experts=2, mlp_layer_types=["token_choice"] * 2
    )
    model = MixtureForCausalLM(config).eval()
    shares = expert_shares(model, [batch])
    assert all(share_E.shape == (4,) and share_E.sum() == pytest.approx(1) for share_E in shares.values())
    adapted = apply_adapter(model, AdapterConfig(method="expert_specialized", expert_share=0.9), sample=[batch], seed=0)
    assert reach(adapted, batch).layers == 2


def test_shares_take_the_mask_in_any_form_that_the_model_does(batch: Batch) -> None:
    model, real_BL = _model("mixtura"), batch["attention_mask"].bool()
    length = real_BL.size(1)
    causal_LL = torch.ones(length, length, dtype=torch.bool).tril()
    packed = {**batch, "attention_mask": (causal_LL & real_BL[:, None, :] & real_BL[:, :, None])[:, None]}
    for one, other in zip(expert_shares(model, [batch]).values(), expert_shares(model, [packed]).values(), strict=True):
        torch.testing.assert_close(one, other)
    empty = {**batch, "attention_mask": torch.zeros_like(batch["attention_mask"])}
    with pytest.raises(UserError, match="at least one batch with a token in it"):
        expert_shares(model, [empty])


def test_every_layer_is_heard_and_described(batch: Batch) -> None:
    adapted = _adapted("mixtral", batch)
    assert reach(adapted, batch).layers == 2
    assert describe(adapted).startswith("expert_specialized on 2 layers: ")


def test_a_dense_model_or_no_sample_is_refused(make_base: Callable[[str], nn.Module], batch: Batch) -> None:
    config = AdapterConfig(method="expert_specialized")
    with pytest.raises(UserError, match="no layer whose tokens choose"):
        apply_adapter(make_base("llama"), config, sample=[batch], seed=0)
    with pytest.raises(UserError, match="needs a sample"):
        apply_adapter(make_base("llama"), config, seed=0)
    with pytest.raises(UserError, match="at least one batch"):
        apply_adapter(_model("mixtral"), config, sample=[], seed=0)
