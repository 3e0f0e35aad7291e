"""Controls: an arm without one thing, which has everything else of the arm it belongs to."""

import pytest
import torch

from mixtura.comparison.runner import compare
from mixtura.config import UserError, recipe_from_dict, recipe_to_dict
from mixtura.layers.routing import Router
from mixtura.models import MixtureForCausalLM
from mixtura.tasks.language_modelling.experiment import make_pretraining

ARMS = {
    "dense": {"family": "dense"},
    "mot": {"family": "mixture_of_tokens", "num_experts": 4, "group_size": 4},
    "uniform": {"control": "uniform_router", "control_of": "mot"},
    "moe": {"family": "token_choice", "num_experts": 4, "top_k": 2, "num_shared_experts": 1, "learning_rate": 5e-3},
    "random": {"control": "random_routing", "control_of": "moe"},
    "shared": {"control": "shared_width", "control_of": "moe"},
}


@pytest.fixture
def with_controls(tiny_recipe):
    """A factory of a recipe with all three controls, in which keys of an arm are replaced."""

    def make(arm="dense", seeds=(0,), **changes):
        arms = {name: dict(settings) for name, settings in ARMS.items()}
        arms[arm] |= changes
        return recipe_from_dict(recipe_to_dict(tiny_recipe(seeds=seeds)) | {"arms": arms})

    return make


def routers(model):
    return [module for module in model.modules() if isinstance(module, Router)]


def test_a_control_has_what_it_does_not_name_of_its_arm(with_controls):
    recipe = with_controls("random", top_k=1)
    assert (recipe.arms["random"].family, recipe.arms["random"].num_experts) == ("token_choice", 4)
    assert (recipe.arms["random"].top_k, recipe.arms["random"].learning_rate) == (1, 5e-3)
    assert recipe.arms["uniform"].alone_top_k is None, "mixtures of one weight leave nothing to choose"
    assert recipe_from_dict(recipe_to_dict(recipe)) == recipe


def test_routers_of_a_control_stay_as_they_start_and_so_do_its_checkpoints(with_controls, tmp_path):
    arms = make_pretraining(with_controls(), cache_dir=None).arms
    for name, uniform in (("uniform", True), ("random", False)):
        built = arms[name].build(0)
        built.save_pretrained(tmp_path / name)
        for model in (built, MixtureForCausalLM.from_pretrained(tmp_path / name)):
            model.train()(torch.randint(0, 99, (4, 8)), labels=torch.randint(0, 99, (4, 8))).loss.backward()
            assert all(router.weight.grad is None for router in routers(model)) and routers(model)
            assert all(bool((router.weight == 0).all()) == uniform for router in routers(model))


def test_a_uniform_control_is_its_arm_but_for_the_routers(with_controls):
    arms = make_pretraining(with_controls(), cache_dir=None).arms
    of, control = arms["mot"].build(0).state_dict(), arms["uniform"].build(0).state_dict()
    assert {name for name, value in of.items() if not torch.equal(value, control[name])} == {
        "model.layers.1.mlp.gate.weight"
    }


def test_a_fixed_router_gives_hidden_states_no_gradient():
    router, x_TD = Router(4, 2), torch.randn(3, 4, requires_grad=True)
    router.fix()
    assert not router(x_TD).requires_grad


def test_the_control_of_shared_width_is_dense_and_as_wide_as_the_shared_experts(with_controls):
    arms = make_pretraining(with_controls(), cache_dir=None).arms
    of, control = arms["moe"], arms["shared"]
    assert control.family == "dense" and control.model_config.mlp_layer_types == ["dense", "dense"]
    assert control.model_config.intermediate_sizes == [64, of.model_config.moe_intermediate_size]
    shapes = [tuple(layer.mlp.down_proj.weight.shape) for layer in control.build(0).model.layers]
    assert shapes == [(32, 64), (32, of.model_config.moe_intermediate_size)]


def test_frozen_routers_are_no_trained_parameters(with_controls):
    arms = make_pretraining(with_controls(), cache_dir=None).arms
    for name in ("uniform", "random"):
        described, model = arms[name].describe(arms["dense"]), arms[name].build(0)
        trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        assert described.parameters_trainable == trained < described.parameters_total


def test_the_report_holds_an_arm_against_its_control(with_controls, tmp_path, monkeypatch):
    monkeypatch.setattr("mixtura.report.html.write_report", lambda results, out: None)
    results = compare(with_controls(seeds=(0, 1)), out=tmp_path)
    assert results.summary is not None
    said = {caution.arm: [] for caution in results.summary.cautions}
    for caution in results.summary.cautions:
        if caution.kind == "control":
            said[caution.arm].append(caution.text)
    assert len(said["mot"]) == 1 and len(said["moe"]) == 2
    assert said["mot"][0].startswith("Mot minus its control uniform (the same with uniform routers): ")
    assert not any(caution.kind == "flops" and caution.arm == "shared" for caution in results.summary.cautions)


@pytest.mark.parametrize(
    ("arm", "changes", "words"),
    [
        (
            "uniform",
            {"control_of": "none"},
            "'arms.uniform.control_of' is 'none': name one of the arms dense, mot, moe",
        ),
        ("uniform", {"control_of": "random"}, "name one of the arms dense, mot, moe"),
        ("uniform", {"control_of": "moe"}, "'uniform_router', which is no control of token_choice"),
        ("mot", {"control": "uniform_router"}, "say both what is taken away and of which arm"),
        ("shared", {"control_of": "mot"}, "'arms.mot' has 0 shared experts"),
        ("random", {"route_by": "pair"}, "which is no control of token_choice"),
        ("mot", {"transition_to": "token_choice", "transition_fraction": 0.5}, "a router of zeros cannot become"),
    ],
)
def test_controls_that_control_nothing_are_refused(with_controls, arm, changes, words):
    with pytest.raises(UserError, match=words):
        with_controls(arm, **changes)
