"""The arms of pretraining: what each costs and shows before it runs, and that building one changes nothing."""

import pytest
import torch

from fixtures.arms import arm_of
from mixtura.comparison.plan import leak_warning
from mixtura.config.families import FAMILIES
from mixtura.data.prepare import prepare_data
from mixtura.planning import active_parameters, flops_per_token, model_parameters
from mixtura.results import Leaks
from mixtura.tasks.language_modelling.experiment import Pretraining


@pytest.fixture
def build(tiny_recipe):
    """Makes the arms of a recipe with a dense baseline and one arm of each family asked for."""

    def build(*families, **settings):
        mixtures = {family: arm_of(family, num_experts=4, group_size=4, **settings) for family in families}
        recipe = tiny_recipe(arms={"dense": {"family": "dense"}} | mixtures)
        return Pretraining(recipe, prepare_data(recipe.data, cache_dir=None)).arms

    return build


def test_arms_differ_in_their_feed_forward_layers_alone(build):
    arms = build(*FAMILIES)
    shared = [key for key in arms["dense"].model_config.to_dict() if key.startswith(("hidden", "vocab", "num_att"))]
    for arm in arms.values():
        assert {key: getattr(arm.model_config, key) for key in shared} == {
            key: getattr(arms["dense"].model_config, key) for key in shared
        }
    assert arms["soft"].model_config.mlp_layer_types == ["dense", "soft"]


def test_an_arm_is_described_by_what_planning_counts(build):
    arms = build(*FAMILIES)
    for name, arm in arms.items():
        described = arm.describe(arms["dense"])
        assert arm.family == arm.label == name
        assert described.flops_per_token == flops_per_token(arm.model_config, sequence_length=16)
        assert described.parameters_total == model_parameters(arm.model_config)
        assert described.parameters_total == sum(p.numel() for p in arm.build(0).parameters())
        assert described.parameters_trainable == described.parameters_total
        deployed = {"sequence_length": 16, "deployed": arm.deployed_mode is not None}
        assert described.parameters_active == active_parameters(arm.model_config, **deployed)
        assert described.flops_ratio == pytest.approx(
            described.flops_per_token / flops_per_token(arms["dense"].model_config, sequence_length=16)
        )


def test_an_experts_width_is_the_multiple_of_four_nearest_to_the_dense_arms_flops(build):
    arms = build("token_choice", "mixture_of_tokens")
    dense = flops_per_token(arms["dense"].model_config, sequence_length=16)
    for name in ("token_choice", "mixture_of_tokens"):
        for change in (-4, 4):
            other = arms[name].model_config.__class__.from_dict(arms[name].model_config.to_dict())
            other.moe_intermediate_size += change
            own = flops_per_token(arms[name].model_config, sequence_length=16)
            assert abs(own - dense) <= abs(flops_per_token(other, sequence_length=16) - dense)


def test_an_arm_shows_its_familys_settings_and_no_others(build):
    arms = build("token_choice", "mixture_of_tokens", alone_top_k="none", capacity_factor=1.5)
    shown = {name: arm.describe(arms["dense"]).settings for name, arm in arms.items()}
    assert shown["dense"] == {}
    assert shown["token_choice"]["capacity_factor"] == 1.5 and "group_size" not in shown["token_choice"]
    assert shown["mixture_of_tokens"]["group_size"] == 4 and "capacity_factor" not in shown["mixture_of_tokens"]
    assert shown["mixture_of_tokens"]["expert_width"] == arms["mixture_of_tokens"].model_config.moe_intermediate_size


def test_an_arm_with_a_name_of_its_own_is_labelled_with_it(tiny_recipe):
    recipe = tiny_recipe(arms={"dense": {"family": "dense"}, "wide": {"family": "soft", "num_experts": 4}})
    assert Pretraining(recipe, prepare_data(recipe.data, cache_dir=None)).arms["wide"].label == "wide"


def test_the_seed_decides_the_weights(build):
    arm = build("mixture_of_tokens")["mixture_of_tokens"]
    one, same, other = (arm.build(seed).state_dict() for seed in (3, 3, 4))
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not all(torch.equal(one[name], other[name]) for name in one)


def test_a_models_inference_mode_never_reaches_its_arm(build):
    arm = build("mixture_of_tokens")["mixture_of_tokens"]
    model = arm.build(0)
    model.set_inference_mode("group", top_k=None)
    assert model.config.inference_mode == "group"
    assert (arm.model_config.inference_mode, arm.model_config.alone_top_k) == ("alone", 2)
    assert arm.build(0).config.inference_mode == "alone"


@pytest.mark.parametrize(
    ("group_over", "family"),
    [
        ("batch", "mixture_of_tokens"),
        ("sequence", "mixture_of_tokens"),
        ("batch", "expert_choice"),
        ("all", "expert_choice"),
    ],
)
def test_a_group_leaks_where_it_is_formed(build, group_over, family):
    leaks = build(family, group_over=group_over)[family].leaks()
    assert leaks.future == (group_over != "batch")
    assert leaks.batch == (group_over != "sequence")


def test_an_arm_takes_its_own_rate_before_the_recipes(tiny_recipe):
    arms = {"dense": {"family": "dense"}, "own": {"family": "dense", "learning_rate": 5e-3}}
    recipe = tiny_recipe(arms=arms, learning_rate=2e-3)
    made = Pretraining(recipe, prepare_data(recipe.data, cache_dir=None)).arms
    assert made["dense"].learning_rate == 2e-3 and made["own"].learning_rate == 5e-3


@pytest.mark.parametrize(
    ("leaks", "words"),
    [
        (Leaks(True, True, True), "sees the future of a sequence"),
        (Leaks(False, True, True), "also when deployed"),
        (Leaks(False, True), "also when deployed"),
        (Leaks(False, True, False), "deployed in mode 'alone' it does not"),
    ],
)
def test_a_leak_is_told_in_a_sentence_that_names_the_arm(build, leaks, words):
    said = leak_warning(build("mixture_of_tokens")["mixture_of_tokens"], leaks, "pretraining")
    assert said is not None and said.startswith("'mixture_of_tokens' ")
    assert words in said and said.endswith(".")


def test_a_leak_of_an_arm_with_its_own_name_names_the_family_too(tiny_recipe):
    arms = {"dense": {"family": "dense"}, "sharp": arm_of("mixture_of_tokens", num_experts=4, group_size=4)}
    recipe = tiny_recipe(arms=arms)
    made = Pretraining(recipe, prepare_data(recipe.data, cache_dir=None)).arms
    said = leak_warning(made["sharp"], Leaks(False, True, False), "pretraining")
    assert said is not None and said.startswith("'sharp' (mixture_of_tokens) ")


def test_an_arm_without_leaks_is_passed_over_in_silence(build):
    arm = build()["dense"]
    assert leak_warning(arm, Leaks(False, False, False), "pretraining") is None


def test_a_classifier_may_read_its_whole_text(build):
    leaks = Leaks(True, False, False)
    assert leak_warning(build()["dense"], leaks, "classification") is None
    assert leak_warning(build()["dense"], leaks, "translation") is not None
