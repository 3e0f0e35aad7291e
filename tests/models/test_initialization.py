"""How weights start: at the scales of an arm, and in checkpoints and recipes from before there were any, as ever."""

import hashlib
import math

import pytest
import torch

from mixtura.config import ArmConfig, ModelConfig
from mixtura.config.families import FAMILIES
from mixtura.config.initialization import derived_scales, start_scales
from mixtura.models import MixtureConfig, MixtureForCausalLM
from mixtura.models.build import build_model_config

SIZES = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "moe_intermediate_size": 8}
SIZES |= {"num_hidden_layers": 2, "num_attention_heads": 2, "num_experts": 4, "num_experts_per_tok": 2, "group_size": 4}
OWN = {"token_choice": {"num_shared_experts": 1}, "mixture_of_tokens": {"combine": "separate"}}
BEFORE = {
    ("dense", False): "4d685fab2c5da27c",
    ("dense", True): "8eec8907864ed0fc",
    ("token_choice", False): "6d4dc6a88a240936",
    ("token_choice", True): "62c3698a1aa0c3dd",
    ("expert_choice", False): "1e9284e17abc1367",
    ("expert_choice", True): "fce7cc20fd821116",
    ("soft", False): "1277aaf0471aeaeb",
    ("soft", True): "7762fda467ed9c72",
    ("mixture_of_tokens", False): "98dfde1ea86576bf",
    ("mixture_of_tokens", True): "6a1993799ece9002",
}
"""Hashes of the weights that these models had before there were scales, by family and gate; the seed is 3."""


def make_model(family, **changes):
    config = MixtureConfig(**SIZES, mlp_layer_types=["dense", family], **OWN.get(family, {}) | changes)
    torch.manual_seed(3)
    return MixtureForCausalLM(config)


def digest(model):
    found = hashlib.blake2b(digest_size=8)
    for name, tensor in sorted(model.state_dict().items()):
        found.update(name.encode())
        found.update(tensor.numpy().tobytes())
    return found.hexdigest()


@pytest.mark.parametrize(("family", "gated"), list(BEFORE))
def test_a_configuration_without_scales_draws_the_weights_it_always_drew(family, gated):
    gate = {"gated": True, "hidden_act": "silu"} if gated else {}
    assert digest(make_model(family, **gate)) == BEFORE[family, gated]


@pytest.mark.parametrize("family", ["token_choice", "mixture_of_tokens"])
def test_scales_multiply_the_same_draws(family):
    before = make_model(family).state_dict()
    scales = {
        "dense_scale": 0.5,
        "expert_scale": 0.25,
        "router_scale": 2.0,
        "feed_forward_scale": 3.0,
        "down_scale": 2.0,
    }
    after = make_model(family, **scales).state_dict()
    for name, weight in after.items():
        down = 2.0 if "down_proj" in name else 1.0
        of_router = 2.0 if "gate.weight" in name else None
        of_layer = 0.25 if ".experts." in name else 0.5 if "_proj" in name and ".mlp." in name else None
        scale = of_router or (of_layer and 3.0 * down * of_layer)
        factor = scale / math.sqrt(weight.size(-1)) / 0.02 if scale else 1.0
        torch.testing.assert_close(weight, before[name] * factor, msg=name)


def test_a_checkpoint_says_its_scales_and_is_loaded_as_it_is(tmp_path):
    model = make_model("mixture_of_tokens", dense_scale=0.5, router_scale=1.0)
    model.save_pretrained(tmp_path)
    loaded = MixtureForCausalLM.from_pretrained(tmp_path)
    assert (loaded.config.dense_scale, loaded.config.expert_scale, loaded.config.router_scale) == (0.5, None, 1.0)
    assert digest(loaded) == digest(model)


@pytest.mark.parametrize("family", FAMILIES)
def test_an_arm_that_names_no_scale_takes_its_familys(family):
    config = build_model_config(ModelConfig(), ArmConfig(family=family), vocab_size=40, max_position_embeddings=8)
    derived = derived_scales(ArmConfig(family=family), hidden_size=ModelConfig().hidden_size, gated=True)
    assert config.dense_scale == derived.dense_scale and config.expert_scale == derived.expert_scale
    assert config.router_scale == derived.router_scale and config.initializer_range == 0.02


def test_routers_of_gated_token_choice_and_of_mixing_start_decided():
    found = {of: derived_scales(ArmConfig(family=of), hidden_size=64, gated=True) for of in FAMILIES}
    scales = {family: of.router_scale for family, of in found.items()}
    assert {family for family, scale in scales.items() if scale == 1.0} == {"token_choice", "soft", "mixture_of_tokens"}
    assert derived_scales(ArmConfig(family="token_choice"), hidden_size=64, gated=False).router_scale is None


@pytest.mark.parametrize("family", ["token_choice", "mixture_of_tokens"])
def test_experts_of_wide_models_start_louder_where_nothing_but_mixtures_stands(family):
    def scale(width, **settings):
        return derived_scales(ArmConfig(family=family, **settings), hidden_size=width, gated=True).expert_scale

    base = scale(32, placement="all")
    assert scale(64, placement="all") == base == scale(512, placement="later_half")
    assert scale(128, placement="all") == pytest.approx(math.sqrt(2) * base)
    assert scale(144, placement="all") == scale(4096, placement="all") == pytest.approx(1.5 * base)
    assert scale(512, placement="all", num_shared_experts=1) == base


def update_of(layer, x):
    with torch.no_grad():
        return layer(x).square().mean().sqrt().item()


@pytest.mark.parametrize("width", [32, 128])
@pytest.mark.parametrize("family", ["dense", "token_choice", "mixture_of_tokens"])
def test_a_gated_layer_drowns_the_residual_stream_no_more_than_a_plain_one(family, width):
    """The derivation in numbers: the update's root mean square at the start, on unit tokens."""
    arm = ArmConfig(family=family, placement="all", top_k=2, normalize_top_k=True, moe_intermediate_size=64)
    added = {}
    for gated in (False, True):
        sizes = {"hidden_size": width, "num_hidden_layers": 1, "intermediate_size": 4 * width}
        recipe_model = ModelConfig(**sizes, gated=gated, activation="silu" if gated else "relu")
        torch.manual_seed(0)
        model = MixtureForCausalLM(build_model_config(recipe_model, arm, vocab_size=40, max_position_embeddings=8))
        added[gated] = update_of(model.train().model.layers[0].mlp, torch.randn(16, 64, width))
    # What is widened grows with the square of the scale, or with gates with its cube.
    assert added[True] < 1.5 * max(1.0, width / 64) ** 0.5 * added[False], added
    if family == "dense":
        assert added[False] == pytest.approx(0.5**2 / math.sqrt(2), rel=0.1)


def test_a_recipe_that_names_an_initializer_range_means_every_matrix():
    """As it did before there were scales; recipes in the folders of finished comparisons name it."""
    model = ModelConfig(initializer_range=0.02)
    assert not any(start_scales(ArmConfig(family="mixture_of_tokens"), model).values())


def test_what_an_arm_names_counts_first():
    for model in (ModelConfig(), ModelConfig(initializer_range=0.02)):
        assert start_scales(ArmConfig(family="mixture_of_tokens", expert_scale=3.0), model)["expert_scale"] == 3.0
