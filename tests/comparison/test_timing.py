"""A step of every arm, timed and weighed side by side."""

from mixtura.comparison.arms import make_arms
from mixtura.comparison.timing import time_arms
from mixtura.data.prepare import prepare_data

ARMS = {
    "dense": {"family": "dense"},
    "few": {"family": "token_choice", "num_experts": 2, "moe_intermediate_size": 32},
    "many": {"family": "token_choice", "num_experts": 32, "moe_intermediate_size": 32},
}


def test_times_are_relative_to_the_baseline_and_memory_grows_with_parameters(tiny_recipe):
    recipe = tiny_recipe(arms=ARMS, gradient_accumulation_steps=2)
    data = prepare_data(recipe.data, cache_dir=None)
    arms = make_arms(recipe, data)
    timing = time_arms(arms, recipe, data, "dense")
    assert timing["dense"]["seconds_ratio"] == 1.0
    assert all(values["seconds_per_step"] > 0 for values in timing.values())
    few, many = (timing[name]["peak_memory_bytes"] for name in ("few", "many"))
    # 30 more experts of two 32 x 32 matrices, each with its gradient and two moments, in float32.
    assert many - few >= 30 * 2 * 32 * 32 * 4 * 4
