"""From a recipe's arm to a model of equal cost."""

import pytest

from mixtura.config import ArmConfig, ModelConfig, TrainingConfig, UserError
from mixtura.config.families import MIXTURES
from mixtura.models.build import build_model_config, layer_families
from mixtura.planning import flops_ratio

MODEL = ModelConfig()


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
        num_experts=12,
        top_k=3,
        score_function="sigmoid",
        normalize_top_k=True,
        capacity_factor=1.25,
        router_aux_loss_coef=0.02,
        router_z_loss_coef=0.001,
        balance_over="global",
        expert_bias_update_rate=0.01,
        num_shared_experts=1,
        route_by="pair",
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
        transition_to="token_choice",
        transition_fraction=0.1,
        population_rate=0.02,
    )
    config = build(arm)
    renamed = {"top_k": "num_experts_per_tok", "score_function": "scoring_func", "normalize_top_k": "norm_topk_prob"}
    elsewhere = {"family", "init_from", "learning_rate", "placement", "moe_intermediate_size"}
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
        activation="silu",
        gated=True,
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
