"""Values that are well-typed and cannot work together."""

from importlib.util import find_spec
from typing import get_args

import pytest

from mixtura.config import UserError, recipe_from_dict, recipe_to_dict
from mixtura.config.arm import SETTINGS, has_setting
from mixtura.config.families import Family

MOT = {"family": "mixture_of_tokens", "group_size": 4}
CHANGE = {"transition_to": "token_choice", "transition_fraction": 0.1}


def build(section=None, arm=None, **top):
    table = {"name": "mine", "arms": {"dense": {"family": "dense"}}, "training": {"batch_size": 8}}
    for name, values in (section or {}).items():
        table[name] = table.get(name, {}) | values
    if arm is not None:
        table["arms"]["mixture"] = arm
    return recipe_from_dict(table | top)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"baseline": "sparse"}, "'baseline' is 'sparse'"),
        ({"seeds": []}, "at least one seed"),
        ({"seeds": [3, 3]}, "each once"),
        ({"section": {"data": {"validation_fraction": 1.5}}}, "between 0 and 1"),
        ({"section": {"data": {"max_bytes": 0}}}, r"'data\.max_bytes' is 0"),
        ({"section": {"data": {"source": "hub"}}}, r"'data\.name' is missing"),
        ({"section": {"data": {"source": "local"}}}, r"'data\.path' is missing"),
        ({"section": {"data": {"vocab_size": 258}}}, "259 or more"),
        ({"section": {"model": {"hidden_size": 100, "num_attention_heads": 4}}}, "even, whole width"),
        ({"section": {"model": {"num_key_value_heads": 3}}}, "must divide the 4 attention heads"),
        ({"section": {"training": {"learning_rate": -1.0}}}, "greater than zero"),
        ({"section": {"training": {"compile": True}}, "arm": MOT | {"zero_fill": 0.5}}, "zero_fill' changes layers"),
        pytest.param(
            {"section": {"training": {"optimizer": "adamw_8bit"}}},
            "pip install torchao",
            marks=pytest.mark.skipif(find_spec("torchao") is not None, reason="torchao is installed"),
        ),
        ({"arm": {"family": "token_choice", "top_k": 17}}, "lower top_k or raise num_experts"),
        ({"arm": {"family": "remoe", "top_k": 17}}, "lower top_k or raise num_experts"),
        ({"arm": {"family": "token_choice", "expert_groups": 3}}, "expert_groups' is 3, into which 16 experts do not"),
        ({"arm": {"family": "token_choice", "groups_per_token": 2}}, "groups_per_token' is 2 of 1 groups"),
        ({"arm": {"family": "token_choice", "expert_groups": 8, "top_k": 3}}, "a token's groups have 2 experts"),
        (
            {"arm": {"family": "token_choice", "dense_router_gradient": True, "capacity_factor": 1.0}},
            r"dense_router_gradient' is true.*capacity_factor' to \"none\"",
        ),
        ({"arm": {"family": "token_choice", "capacity_factor": 0.0}}, r"capacity_factor' is 0\.0"),
        ({"arm": {"family": "token_choice", "num_experts": 0}}, "num_experts' is 0"),
        ({"arm": MOT | {"alone_top_k": 17}}, "there are only 16 mixtures"),
        ({"arm": MOT | {"temperature": 0.0}}, "temperature' is 0"),
        ({"arm": MOT | {"zero_fill_unit": "step"}}, r"zero_fill_unit' is 'step' but 'arms\.mixture\.zero_fill' is 0"),
        ({"arm": MOT | {"zero_fill": 1.5}}, r"zero_fill' is 1\.5: it is a share"),
        ({"arm": MOT | {"alone_fraction": 3.0}}, r"alone_fraction' is 3\.0: it is a share"),
        ({"arm": MOT | {"transition_fraction": 0.1}}, r"transition_to' is 'none' and .* is 0\.1: name what"),
        (
            {"arm": MOT | CHANGE | {"transition_fraction": 0.0}},
            r"transition_to' is 'token_choice' and .* is 0\.0: name",
        ),
        ({"arm": MOT | CHANGE | {"first_temperature": 4.0}}, "token choice has no temperature, so leave one"),
        ({"arm": MOT | {"first_temperature": 0.0}}, r"first_temperature' is 0\.0: it must be"),
        ({"arm": MOT | CHANGE | {"alone_fraction": 0.1}}, "both are the last steps, so set one of them to 0"),
        ({"arm": MOT | CHANGE | {"mixtures_per_expert": 2}}, "needs one mixture an expert, one router"),
        ({"arm": MOT | CHANGE | {"alone_top_k": "none"}}, "needs one mixture an expert, one router"),
        ({"arm": MOT | {"population_rate": -0.1}}, r"population_rate' is -0\.1: it is a share"),
        ({"arm": MOT | {"inference_mode": "population"}}, "population_rate' is 0, so no averages are kept"),
        ({"arm": MOT | {"group_size": 1}}, "at least 2 tokens"),
        ({"arm": MOT | {"group_size": 3}}, r"batch_size' is 8, which is no multiple .* set it to 6"),
        ({"arm": MOT | {"group_over": "all"}}, "use 'batch'"),
        ({"arm": MOT | {"family": "expert_choice", "group_over": "sequence"}}, "use 'batch'"),
        ({"arm": MOT | {"group_over": "sequence", "group_size": 5}}, "sequence_length' is 128"),
    ],
)
def test_the_message_names_the_key_the_value_and_the_fix(arguments, message):
    with pytest.raises(UserError, match=message):
        build(**arguments)


def test_an_arm_must_be_able_to_name_a_folder():
    with pytest.raises(UserError, match=r"'\.\./up' cannot be a folder"):
        build(arms={"dense": {"family": "dense"}, "../up": {"family": "dense"}})


@pytest.mark.parametrize("key", ["weight_decay", "warmup_fraction", "threads", "min_learning_rate_fraction"])
def test_zero_is_fine_where_it_means_off(key):
    assert getattr(build(section={"training": {key: 0}}).training, key) == 0


@pytest.mark.parametrize("arm", [MOT, MOT | {"group_over": "sequence"}, MOT | {"family": "expert_choice"}])
def test_groups_that_fill_are_fine(arm):
    assert build(arm=arm).arms["mixture"].group_size == 4


POSITIVE = {
    "data": ("max_bytes", "vocab_size", "sequence_length"),
    "model": ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "initializer_range"),
    "training": (
        *("steps", "batch_size", "gradient_accumulation_steps", "learning_rate", "max_grad_norm"),
        *("eval_every", "eval_sequences", "final_eval_sequences", "save_every"),
    ),
}


@pytest.mark.parametrize("value", [0, -1])
@pytest.mark.parametrize("key", [f"{section}.{key}" for section, keys in POSITIVE.items() for key in keys])
def test_a_number_that_must_be_positive_is_refused_at_zero_and_below(key, value):
    section, name = key.split(".")
    with pytest.raises(UserError, match=rf"'{section}\.{name}' is {value}"):
        build(section={section: {name: value}})


@pytest.mark.parametrize("key", ["num_experts", "top_k", "group_size", "mixtures_per_expert", "temperature"])
def test_an_arms_counts_are_positive(key):
    family = next(family for family in ("token_choice", "mixture_of_tokens") if has_setting(family, key))
    with pytest.raises(UserError, match=rf"'arms\.mixture\.{key}' is 0(\.0)?: it must"):
        build(arm={"family": family, key: 0})


@pytest.mark.parametrize("key", ["learning_rate", "moe_intermediate_size", "capacity_factor", "alone_top_k"])
def test_an_arms_optional_settings_are_positive_where_given(key):
    arm = MOT if key == "alone_top_k" else {"family": "token_choice"}
    with pytest.raises(UserError, match=rf"'arms\.mixture\.{key}' is -1"):
        build(arm=arm | {key: -1})
    assert getattr(build(arm=arm | {key: 1}).arms["mixture"], key) == 1
    assert getattr(build(arm=arm | {key: "none"}).arms["mixture"], key) is None


@pytest.mark.parametrize("key", ["router_aux_loss_coef", "router_z_loss_coef", "expert_bias_update_rate"])
def test_an_arms_coefficients_are_zero_or_more(key):
    with pytest.raises(UserError, match=rf"'arms\.mixture\.{key}' is -1"):
        build(arm={"family": "token_choice", key: -1})
    assert getattr(build(arm={"family": "token_choice", key: 0}).arms["mixture"], key) == 0


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"learning_rates": [0.0]}, r"learning_rates' has 0\.0"),
        ({"learning_rates": [float("nan")]}, "learning_rates' has nan"),
        ({"learning_rates": [1e-3], "steps": 0}, r"'search\.steps' is 0"),
        ({"seeds": [-1]}, r"'search\.seeds' has -1"),
    ],
)
def test_a_search_that_cannot_run_is_refused(section, message):
    with pytest.raises(UserError, match=message):
        build(section={"search": section})


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_number_is_finite(value):
    with pytest.raises(UserError, match=r"'training\.weight_decay' is"):
        build(section={"training": {"weight_decay": value}})
    with pytest.raises(UserError, match=r"'arms\.mixture\.temperature' is"):
        build(arm=MOT | {"temperature": value})


def test_a_tokenizer_that_is_not_trained_needs_no_vocabulary_size():
    assert build(section={"data": {"tokenizer": "folder", "vocab_size": 1}}).data.tokenizer == "folder"


@pytest.mark.parametrize("family", ["token_choice", "soft"])
def test_a_single_expert_is_fine_where_alone_top_k_has_no_meaning(family):
    assert build(arm={"family": family, "num_experts": 1}).arms["mixture"].alone_top_k == 2


def test_alone_top_k_counts_mixtures_not_experts():
    two_each = MOT | {"num_experts": 4, "mixtures_per_expert": 2}
    assert build(arm=two_each | {"alone_top_k": 8}).arms["mixture"].alone_top_k == 8
    with pytest.raises(UserError, match="is 9 but there are only 8 mixtures, 2 for each of 4 experts"):
        build(arm=two_each | {"alone_top_k": 9})


@pytest.mark.parametrize("family", get_args(Family))
def test_a_setting_that_the_family_does_not_read_is_refused_with_the_families_that_do(family):
    other = {int: 3, float: 0.5, bool: True}
    for key, setting in SETTINGS.items():
        if family in setting.families:
            continue
        types = (
            setting.hint,
            *get_args(setting.hint),
            *(arg for each in get_args(setting.hint) for arg in get_args(each)),
        )
        choices = [each for each in types if isinstance(each, str) and each != setting.default]
        value = choices[0] if choices else next(other[kind] for kind in types if kind in other)
        with pytest.raises(
            UserError, match=rf"'arms\.mixture\.{key}' is .*, which {family} does not read: "
        ) as refused:
            build(arm={"family": family, key: value})
        assert all(owner in str(refused.value).split("choose the family")[1] for owner in setting.families)


def test_every_foreign_setting_is_said_at_once():
    with pytest.raises(UserError) as refused:
        build(arm={"family": "dense", "top_k": 2, "capacity_factor": 1.5, "route_by": "pair", "normalize_top_k": True})
    said = str(refused.value)
    for part in ("top_k' is 2,", "capacity_factor' is 1.5,", "route_by' is 'pair',", "normalize_top_k' is true,"):
        assert part in said


def test_the_recipe_that_a_run_writes_names_every_setting_and_is_read_again():
    table = recipe_to_dict(build())
    assert "top_k" in table["arms"]["dense"]
    assert recipe_from_dict(table) == build()


def test_a_rate_to_search_is_given_once():
    with pytest.raises(UserError, match=r"search\.learning_rates' is \[0\.001, 0\.001\]: give each once"):
        build(section={"search": {"learning_rates": [1e-3, 1e-3]}})


@pytest.mark.parametrize("name", ["run.v2", "my recipe", "gr\u00fcn-1_b"])
def test_a_recipes_name_may_be_that_of_any_plain_file(name):
    assert build(name=name).name == name


@pytest.mark.parametrize("name", ["", ".", "..", ".hidden", "a/b", "a\\b"])
def test_a_recipes_name_must_be_able_to_name_a_folder(name):
    with pytest.raises(UserError, match="cannot be a folder: set 'name'"):
        build(name=name)


def test_all_that_is_wrong_is_said_at_once():
    table = {
        "name": "a/b",
        "baseline": "nobody",
        "seeds": [1, 1],
        "training": {"steps": 0, "batch_size": -3},
        "model": {"hidden_size": 30, "num_attention_heads": 0},
        "arms": {"dense": {"family": "dense", "top_k": -1}, "mot": {"family": "mixture_of_tokens", "group_size": 1}},
    }
    with pytest.raises(UserError) as refused:
        recipe_from_dict(table)
    said = str(refused.value).splitlines()
    for part in (
        "a/b",
        "nobody",
        "seeds",
        "training.steps",
        "training.batch_size",
        "num_attention_heads",
        "group_size",
    ):
        assert any(part in line for line in said), part
    assert len(said) == len(set(said))


def test_all_keys_and_types_that_are_wrong_are_said_at_once():
    table = {"name": "x", "training": {"stps": 1, "batch_size": "many"}, "arms": {"dense": {"famly": "dense"}, "b": 3}}
    with pytest.raises(UserError) as refused:
        recipe_from_dict(table)
    said = str(refused.value)
    assert len(said.splitlines()) == 5  # 'family' is lacking too
    assert "did you mean 'training.steps'" in said and "'training.batch_size' is 'many'" in said


@pytest.mark.parametrize(
    ("key", "suggested"), [("batchsize", "batch_size"), ("Steps", "steps"), ("lr", None), ("foo", None)]
)
def test_a_key_is_suggested_only_where_it_is_close(key, suggested):
    with pytest.raises(UserError) as refused:
        recipe_from_dict({"name": "x", "training": {key: 1}, "arms": {"dense": {"family": "dense"}}})
    found = "did you mean" in str(refused.value)
    assert found == (suggested is not None) and (suggested or "known keys") in str(refused.value)
