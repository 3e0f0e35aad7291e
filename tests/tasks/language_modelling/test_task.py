"""The sample that a run keeps of what its model writes: short, greedy, and without a trace in the run's numbers."""

import time

import pytest
import torch

from fixtures.arms import arm_of
from mixtura.config.families import FAMILIES
from mixtura.data.prepare import prepare_data
from mixtura.tasks.language_modelling.experiment import Pretraining
from mixtura.tasks.language_modelling.task import NEW_TOKENS, continue_held_out


@pytest.fixture
def arms_and_data(tiny_recipe):
    mixtures = {family: arm_of(family, num_experts=4, group_size=4) for family in FAMILIES if family != "dense"}
    recipe = tiny_recipe(arms={"dense": {"family": "dense"}} | mixtures)
    data = prepare_data(recipe.data, cache_dir=None)
    return Pretraining(recipe, data).arms, data


def test_each_arm_that_can_be_served_continues_two_held_out_texts(arms_and_data):
    arms, data = arms_and_data
    for name, arm in arms.items():
        written = continue_held_out(arm.build(0), data.validation, data.tokenizer)
        if name in ("expert_choice", "soft"):
            assert written == []
            continue
        first, second = written
        assert first.prompt != second.prompt
        text = data.tokenizer.decode(data.validation.sequences_NL[0], skip_special_tokens=True)
        assert text == first.prompt + first.reference
        assert first.output
        assert len(data.tokenizer(first.output)["input_ids"]) <= NEW_TOKENS


def test_a_sample_changes_neither_the_model_nor_the_random_state_and_takes_no_time(arms_and_data):
    arms, data = arms_and_data
    model = arms["mixture_of_tokens"].build(0).train()
    weights, mode = {name: value.clone() for name, value in model.state_dict().items()}, model.config.inference_mode
    state, started = torch.random.get_rng_state(), time.perf_counter()
    first = continue_held_out(model, data.validation, data.tokenizer)
    assert time.perf_counter() - started < 10
    assert torch.equal(torch.random.get_rng_state(), state)
    assert model.training
    assert model.config.inference_mode == mode
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert continue_held_out(model, data.validation, data.tokenizer) == first


def test_details_of_a_run_hold_the_sample(arms_and_data, tmp_path):
    arms, _ = arms_and_data
    dense, mixed = (
        arms[name].task.details(arms[name].build(0), out=tmp_path) for name in ("dense", "mixture_of_tokens")
    )
    assert dense.peakedness == []
    assert len(mixed.peakedness) == 1
    assert len(dense.continuations) == len(mixed.continuations) == 2
    assert dense.continuations[0].prompt == mixed.continuations[0].prompt


def test_a_model_that_is_served_in_groups_writes_alone(arms_and_data):
    arms, data = arms_and_data
    model = arms["mixture_of_tokens"].build(0)
    alone = continue_held_out(model, data.validation, data.tokenizer)
    model.set_inference_mode("group", top_k=model.config.alone_top_k)
    assert continue_held_out(model, data.validation, data.tokenizer) == alone
    assert model.config.inference_mode == "group"
