"""The configuration: defaults that follow from other fields, refusals, and the way to disk and back."""

import pytest
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig

from mixtura.config.families import FAMILIES
from mixtura.models import MixtureConfig


def test_open_fields_follow_from_others():
    config = MixtureConfig(hidden_size=48, num_attention_heads=4, num_hidden_layers=3)
    assert (config.num_key_value_heads, config.head_dim) == (4, 12)
    assert config.mlp_layer_types == ["dense"] * 3


def test_every_layer_may_have_a_family_of_its_own():
    config = MixtureConfig(num_hidden_layers=len(FAMILIES), mlp_layer_types=list(FAMILIES))
    assert config.mlp_layer_types == list(FAMILIES)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"mlp_layer_types": ["dense"]}, "mlp_layer_types names 1 layers but num_hidden_layers is 4"),
        ({"mlp_layer_types": ["dense"] * 3 + ["moe"]}, "mlp_layer_types has 'moe': it must be one of dense, token_cho"),
        ({"zero_fill_unit": "token"}, "zero_fill_unit is 'token': it must be one of group, layer, step"),
        ({"num_experts": "many"}, "num_experts"),
        ({"router_temperature": "hot"}, "router_temperature"),
    ],
    ids=["too few families", "unknown family", "unknown unit", "text for a number", "text for a fraction"],
)
def test_fields_that_make_no_sense_are_named(fields, message):
    with pytest.raises(StrictDataclassError, match=message):
        MixtureConfig(**fields)


def test_number_of_experts_has_its_other_name_on_the_hub():
    assert MixtureConfig(num_local_experts=6).num_experts == 6


def test_a_saved_configuration_comes_back_equal(tiny_config, tmp_path):
    config = tiny_config(
        "mixture_of_tokens", router_temperature=0.5, alone_top_k=None, capacity_factor=2, layer_mix=True
    )
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert type(loaded) is MixtureConfig
    assert loaded.to_dict() | {"_name_or_path": ""} == config.to_dict()
