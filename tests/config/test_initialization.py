"""Arms that start from checkpoints: their family is read, and what the checkpoint decides is refused beside it."""

import json

import pytest

from mixtura.config import UserError, recipe_from_dict, recipe_to_dict, starts_from_checkpoints


@pytest.fixture
def folder(tmp_path):
    """A factory: a folder whose config.json is that of our model with these families, or of a stock model."""

    def make(name, *families):
        path = tmp_path / name
        path.mkdir()
        own = {"model_type": "mixtura", "mlp_layer_types": list(families)}
        (path / "config.json").write_text(json.dumps(own if families else {"model_type": "llama"}))
        return str(path)

    return make


def build(arms, **sections):
    return recipe_from_dict({"name": "on", "baseline": next(iter(arms)), "arms": arms, **sections})


def test_the_family_is_the_checkpoints(folder):
    mixed = folder("mixed", "dense", "mixture_of_tokens")
    recipe = build({"a": {"init_from": folder("stock")}, "b": {"init_from": mixed}, "c": {"init_from": "smollm2"}})
    assert {name: arm.family for name, arm in recipe.arms.items()} == {
        "a": "dense",
        "b": "mixture_of_tokens",
        "c": "dense",
    }
    assert starts_from_checkpoints(recipe)
    assert recipe_from_dict(recipe_to_dict(recipe)) == recipe


def test_a_folder_that_is_made_later_may_be_named_with_its_family():
    recipe = build({"a": {"init_from": "runs/not-yet", "family": "token_choice"}})
    assert recipe.arms["a"].family == "token_choice"


def test_arms_without_a_checkpoint_start_from_none():
    assert not starts_from_checkpoints(build({"dense": {"family": "dense"}}))


@pytest.mark.parametrize(
    ("arm", "sections", "message"),
    [
        ({"family": "dense"}, {}, r"'arms\.a\.family' is 'dense', but the checkpoint .* is token_choice"),
        ({"top_k": 3}, {}, r"'arms\.a\.top_k' is 3, but the checkpoint decides it"),
        ({"inference_mode": "group"}, {}, r"'arms\.a\.inference_mode' is 'group'"),
        ({}, {"model": {"hidden_size": 64}}, r"'model\.hidden_size' is 64, but the arms start from checkpoints"),
        ({}, {"data": {"tokenizer": "gpt2"}}, r"'data\.tokenizer' is 'gpt2'"),
        ({}, {"data": {"vocab_size": 300}}, r"'data\.vocab_size' is 300"),
    ],
)
def test_what_the_checkpoint_decides_is_refused(folder, arm, sections, message):
    with pytest.raises(UserError, match=message):
        build({"a": {"init_from": folder("mixture", "token_choice"), **arm}}, **sections)


def test_all_arms_start_from_checkpoints_or_none_does(folder):
    with pytest.raises(UserError, match=r"'arms\.b' starts from random weights while others have 'init_from'"):
        build({"a": {"init_from": folder("stock")}, "b": {"family": "dense"}})


def test_a_folder_of_several_families_or_of_no_model_is_refused(folder, tmp_path):
    with pytest.raises(UserError, match="mixes soft and token_choice"):
        build({"a": {"init_from": folder("both", "soft", "token_choice")}})
    with pytest.raises(UserError, match=r"config\.json cannot be read"):
        build({"a": {"init_from": str(tmp_path)}})


def test_training_goes_on_as_the_checkpoint_says_where_the_recipe_is_silent(tmp_path):
    settings = {"model_type": "mixtura", "mlp_layer_types": ["mixture_of_tokens"], "zero_fill": 1.0}
    (tmp_path / "config.json").write_text(json.dumps(settings | {"router_z_loss_coef": 0.25, "transition_to": None}))
    arm = {"init_from": str(tmp_path), "router_z_loss_coef": 0.0}
    recipe = build({"a": arm}, training={"batch_size": 16})
    assert (recipe.arms["a"].zero_fill, recipe.arms["a"].router_z_loss_coef) == (1.0, 0.0)
    assert recipe_from_dict(recipe_to_dict(recipe)) == recipe
