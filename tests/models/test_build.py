"""From a recipe's arm to a model of equal cost, and to layers that every setting must reach."""

import pytest

from mixtura.config import ArmConfig, ModelConfig, TrainingConfig, UserError
from mixtura.config.families import MIXTURES
from mixtura.layers import DenseFFN, ExpertChoiceMoE, MixtureOfTokens, SoftMoE, TokenChoiceMoE
from mixtura.models.build import build_feed_forward, build_model_config, layer_families
from mixtura.planning import flops_ratio

MODEL = ModelConfig(intermediate_size=512, activation="relu", gated=False)


def build(arm, model=MODEL, **more):
    return build_model_config(model, arm, vocab_size=256, max_position_embeddings=64, **more)


@pytest.mark.parametrize("placement", ["all", "later_half"])
@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("family", MIXTURES)
def test_an_arm_costs_what_the_dense_arm_costs(family, gated, placement):
    model = ModelConfig(gated=gated)
    arm = build(ArmConfig(family=family, placement=placement), model)
    dense = build(ArmConfig(family="dense"), model)
    assert abs(flops_ratio(arm, baseline=dense, sequence_length=64) - 1) < 0.01
    assert arm.moe_intermediate_size % 4 == 0


@pytest.mark.parametrize("family", MIXTURES)
def test_experts_of_16_bit_numbers_have_rows_of_16_bytes(family):
    assert (TrainingConfig().width_multiple, TrainingConfig(dtype="bfloat16").width_multiple) == (4, 8)
    model = ModelConfig(hidden_size=96, intermediate_size=380)
    arm, dense = (build(ArmConfig(family=each), model, width_multiple=8) for each in (family, "dense"))
    assert arm.moe_intermediate_size % 8 == 0
    assert abs(flops_ratio(arm, baseline=dense, sequence_length=64) - 1) < 0.03


def test_a_width_that_is_named_is_kept():
    assert build(ArmConfig(family="token_choice", moe_intermediate_size=52)).moe_intermediate_size == 52


def test_placement_says_which_layers_are_mixtures():
    later, everywhere = (ArmConfig(family="soft", placement=placement) for placement in ("later_half", "all"))
    assert layer_families(4, later) == ["dense", "dense", "soft", "soft"]
    assert layer_families(5, later) == ["dense", "dense", "soft", "soft", "soft"]
    assert layer_families(1, later) == ["soft"]
    assert layer_families(3, everywhere) == ["soft"] * 3
    assert build(later).mlp_layer_types == ["dense", "dense", "soft", "soft"]


def test_an_arm_without_a_router_spends_what_it_saves_on_its_experts():
    named = ArmConfig(family="token_choice", route_by="target", num_experts=2, num_shared_experts=1)
    config = build(named, expert_names=["de", "fr"])
    assert config.moe_intermediate_size == MODEL.intermediate_size // 2
    assert (config.route_by, config.expert_names) == ("target", ["de", "fr"])
    assert flops_ratio(config, baseline=build(ArmConfig(family="dense")), sequence_length=64) == 1.0


def test_every_setting_of_an_arm_reaches_the_model():
    arm = ArmConfig(
        family="mixture_of_tokens",
        feed_forward_scale=2.0,
        down_scale=0.5,
        dense_scale=0.3,
        expert_scale=0.4,
        router_scale=0.6,
        control="uniform_router",
        num_experts=12,
        top_k=3,
        score_function="sigmoid",
        normalize_top_k=True,
        capacity_factor=1.25,
        expert_groups=4,
        groups_per_token=2,
        dense_router_gradient=True,
        router_aux_loss_coef=0.02,
        router_z_loss_coef=0.001,
        balance_over="global",
        expert_bias_update_rate=0.01,
        num_shared_experts=1,
        threshold_rate=0.5,
        threshold_warmup=0.3,
        l1_coef_start=1e-6,
        l1_coef_growth=0.1,
        route_by="pair",
        zero_experts=1,
        copy_experts=2,
        constant_experts=3,
        free_expert_balance=0.5,
        latent_size=24,
        segment_length=8,
        merge_by="prefix",
        group_size=8,
        group_over="sequence",
        mixtures_per_expert=2,
        temperature=0.5,
        combine="separate",
        inference_mode="group",
        alone_top_k=5,
        zero_fill=0.25,
        zero_fill_unit="step",
        alone_fraction=0.05,
        first_temperature=3.0,
        transition_to="token_choice",
        transition_fraction=0.1,
        population_rate=0.02,
    )
    config = build(arm)
    renamed = {"expert_groups": "n_group", "groups_per_token": "topk_group", "temperature": "router_temperature"} | {
        "top_k": "num_experts_per_tok",
        "score_function": "scoring_func",
        "normalize_top_k": "norm_topk_prob",
    }
    elsewhere = {"family", "init_from", "learning_rate", "placement", "moe_intermediate_size", "control_of"}
    for name in set(ArmConfig.__dataclass_fields__) - elsewhere:
        assert getattr(arm, name) != ArmConfig.__dataclass_fields__[name].default, f"{name} is not tried here"
        assert getattr(config, renamed.get(name, name)) == getattr(arm, name), name


def test_every_setting_of_the_decoder_reaches_the_model():
    model = ModelConfig(
        hidden_size=96,
        num_hidden_layers=6,
        num_attention_heads=6,
        num_key_value_heads=2,
        intermediate_size=200,
        activation="gelu",
        gated=False,
        tie_word_embeddings=False,
        initializer_range=0.05,
    )
    config = build(ArmConfig(family="dense"), model, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    for name in ModelConfig.__dataclass_fields__:
        assert getattr(model, name) != ModelConfig.__dataclass_fields__[name].default, f"{name} is not tried here"
        assert getattr(config, {"activation": "hidden_act"}.get(name, name)) == getattr(model, name), name
    assert (config.vocab_size, config.max_position_embeddings) == (256, 64)
    assert (config.pad_token_id, config.bos_token_id, config.eos_token_id) == (0, 1, 2)


def test_routing_that_costs_more_than_the_dense_layer_is_refused():
    arm = ArmConfig(family="mixture_of_tokens", num_experts=512)
    with pytest.raises(UserError, match=r"with 512 experts cost .* but a dense layer of width 64 costs only"):
        build(arm, ModelConfig(intermediate_size=64))


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
        router_temperature=0.5,
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
