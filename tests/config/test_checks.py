"""Values that are well-typed and cannot work together."""

import pytest

from mixtura.config import UserError, recipe_from_dict

MOT = {"family": "mixture_of_tokens", "group_size": 4}


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
        ({"arm": {"family": "token_choice", "top_k": 17}}, "lower top_k or raise num_experts"),
        ({"arm": {"family": "token_choice", "capacity_factor": 0.0}}, r"capacity_factor' is 0\.0"),
        ({"arm": {"family": "token_choice", "num_experts": 0}}, "num_experts' is 0"),
        ({"arm": MOT | {"alone_top_k": 17}}, "there are only 16"),
        ({"arm": MOT | {"temperature": 0.0}}, "temperature' is 0"),
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
