"""The layer that a configuration asks for: every setting must reach it."""

import pytest

from mixtura.layers import DenseFFN, ExpertChoiceMoE, MixtureOfTokens, SoftMoE, TokenChoiceMoE
from mixtura.models.families import build_feed_forward


def test_the_family_is_looked_up_by_depth(tiny_config):
    families = ["token_choice", "soft", "dense", "mixture_of_tokens", "expert_choice"]
    config = tiny_config(num_hidden_layers=5, mlp_layer_types=families)
    types = [type(build_feed_forward(config, layer_idx)) for layer_idx in range(5)]
    assert types == [TokenChoiceMoE, SoftMoE, DenseFFN, MixtureOfTokens, ExpertChoiceMoE]


@pytest.mark.parametrize("family", ["token_choice", "expert_choice", "soft", "mixture_of_tokens"])
def test_experts_have_their_own_width_and_dense_layers_theirs(tiny_config, family):
    config = tiny_config(family, hidden_act="silu", gated=True)
    experts, dense = build_feed_forward(config, 1).experts, build_feed_forward(config, 0)
    assert experts.gate_up_proj.shape == (4, 2 * 16, 16) and experts.activation == "silu"
    assert dense.gate_proj.weight.shape == (32, 16) and dense.activation == "silu"


def test_token_choice_gets_its_settings(tiny_config):
    config = tiny_config(
        "token_choice",
        num_experts_per_tok=3,
        scoring_func="sigmoid",
        norm_topk_prob=True,
        routed_scaling_factor=2.5,
        capacity_factor=1.5,
        expert_bias_update_rate=0.001,
        num_shared_experts=2,
    )
    layer = build_feed_forward(config, 1)
    assert (layer.num_experts, layer.top_k, layer.score_function) == (4, 3, "sigmoid")
    assert (layer.normalize_top_k, layer.routed_scaling_factor, layer.capacity_factor) == (True, 2.5, 1.5)
    assert layer.expert_bias.shape == (4,) and layer.shared_expert.up_proj.weight.shape == (32, 16)
    assert build_feed_forward(tiny_config("token_choice"), 1).expert_bias is None


def test_expert_choice_gets_its_settings(tiny_config):
    layer = build_feed_forward(tiny_config("expert_choice", group_size=8), 1)
    assert (layer.num_experts, layer.top_k, layer.group_size, layer.group_over) == (4, 2, 8, "batch")


def test_soft_gets_its_slots(tiny_config):
    assert build_feed_forward(tiny_config("soft", mixtures_per_expert=3), 1).slots.shape == (12, 16)


def test_mixture_of_tokens_gets_its_settings(tiny_config):
    config = tiny_config(
        "mixture_of_tokens",
        group_size=8,
        mixtures_per_expert=2,
        group_over="sequence",
        temperature=0.5,
        combine="separate",
        inference_mode="group",
        alone_top_k=3,
        zero_fill=0.25,
    )
    layer = build_feed_forward(config, 1)
    assert (layer.group_size, layer.mixtures_per_expert, layer.group_over) == (8, 2, "sequence")
    assert (layer.temperature, layer.inference_mode, layer.alone_top_k) == (0.5, "group", 3)
    assert layer.zero_fill == 0.25
    assert layer.combine_gate.weight.shape == (8, 16)


def test_a_setting_the_layer_refuses_is_named(tiny_config):
    with pytest.raises(ValueError, match="alone_top_k is 9: it must lie between 1 and 4"):
        build_feed_forward(tiny_config("mixture_of_tokens", alone_top_k=9), 1)
