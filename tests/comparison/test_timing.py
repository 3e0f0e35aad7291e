"""A step of every arm, timed and weighed side by side."""

import dataclasses

from mixtura.comparison.timing import time_arms
from mixtura.data.prepare import prepare_data
from mixtura.models import MixtureForCausalLM
from mixtura.tasks.language_modelling.experiment import Pretraining

ARMS = {
    "dense": {"family": "dense"},
    "few": {"family": "token_choice", "num_experts": 2, "moe_intermediate_size": 32},
    "many": {"family": "token_choice", "num_experts": 32, "moe_intermediate_size": 32},
}


def test_times_are_relative_to_the_baseline_and_memory_grows_with_parameters(tiny_recipe):
    recipe = tiny_recipe(arms=ARMS, gradient_accumulation_steps=2)
    data = prepare_data(recipe.data, cache_dir=None)
    arms = Pretraining(recipe, data).arms
    timing = time_arms(arms, recipe.training, "dense")
    assert timing.keys() == ARMS.keys()
    assert timing["dense"].seconds_ratio == 1.0
    assert all(values.seconds_per_step > 0 for values in timing.values())
    few, many = (timing[name].peak_memory_bytes for name in ("few", "many"))
    for name, arm in arms.items():
        # AdamW keeps two moments of each parameter, and a step count for each tensor.
        parameters = list(arm.build(0).parameters())
        moments = 2 * 4 * sum(parameter.numel() for parameter in parameters)
        assert timing[name].optimizer_state_bytes == moments + 4 * len(parameters)
    # 30 more experts of two 32 x 32 matrices, each with its gradient and two moments, in float32.
    assert many - few >= 30 * 2 * 32 * 32 * 4 * 4


def test_timing_leaves_the_arms_as_they_were(tiny_recipe):
    recipe = tiny_recipe()
    data = prepare_data(recipe.data, cache_dir=None)
    arms = Pretraining(recipe, data).arms
    before = {name: arm.model_config.to_dict() for name, arm in arms.items()}
    timing = time_arms(arms, recipe.training, "mixture_of_tokens")
    assert timing["mixture_of_tokens"].seconds_ratio == 1.0
    assert {name: arm.model_config.to_dict() for name, arm in arms.items()} == before


def test_a_mixture_of_tokens_takes_more_memory_than_the_dense_arm_it_is_matched_to(tiny_recipe):
    recipe = tiny_recipe()
    data = prepare_data(recipe.data, cache_dir=None)
    timing = time_arms(Pretraining(recipe, data).arms, recipe.training, "dense")
    assert timing["mixture_of_tokens"].peak_memory_bytes > timing["dense"].peak_memory_bytes


def test_a_text_smaller_than_a_batch_is_timed_with_whole_batches(tiny_recipe, monkeypatch):
    recipe = tiny_recipe()
    data = prepare_data(recipe.data, cache_dir=None)
    few = dataclasses.replace(data.train, sequences_NL=data.train.sequences_NL[:3])
    small = dataclasses.replace(data, train=few)
    shapes, forward = set(), MixtureForCausalLM.forward

    def watch(self, **options):
        shapes.add(tuple(options["input_ids"].shape))
        return forward(self, **options)

    monkeypatch.setattr(MixtureForCausalLM, "forward", watch)
    time_arms(Pretraining(recipe, small).arms, recipe.training, "dense")
    assert shapes == {(4, 16)}


def test_activation_checkpointing_shows_in_the_memory(tiny_recipe):
    peaks = []
    for checkpointing in (False, True):
        recipe = tiny_recipe(arms={"dense": {"family": "dense"}}, activation_checkpointing=checkpointing)
        recipe = dataclasses.replace(recipe, model=dataclasses.replace(recipe.model, num_hidden_layers=6))
        data = prepare_data(recipe.data, cache_dir=None)
        peaks.append(time_arms(Pretraining(recipe, data).arms, recipe.training, "dense")["dense"].peak_memory_bytes)
    assert peaks[1] < 0.9 * peaks[0]


def test_the_parts_of_a_step_are_shares_of_it(tiny_recipe):
    recipe = tiny_recipe(gradient_accumulation_steps=2)
    data = prepare_data(recipe.data, cache_dir=None)
    for timed in time_arms(Pretraining(recipe, data).arms, recipe.training, "dense").values():
        shares = (timed.step_parts.forward, timed.step_parts.backward, timed.step_parts.optimizer)
        assert min(shares) > 0
        assert abs(sum(shares) - 1) < 1e-9
