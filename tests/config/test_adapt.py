"""Recipes that fit the data they are given, and stay as they are where the data can hold them."""

import dataclasses

import pytest

from mixtura.config import (
    AdapterConfig,
    ArmConfig,
    ClassificationArmConfig,
    ClassificationDataConfig,
    ClassificationRecipe,
    HeadConfig,
    Recipe,
    TrainingConfig,
    TranslationArmConfig,
    TranslationDataConfig,
    TranslationRecipe,
    load_recipe,
    preset_path,
)
from mixtura.config.requests import (
    Amounts,
    changes,
    common_length,
    held_out_examples,
    held_out_sources,
    with_batches_for,
    with_experts_of,
)

MOT = ArmConfig(family="mixture_of_tokens", group_size=16)


def recipe(*, batch_size=32, eval_sequences=128, **arms):
    training = TrainingConfig(batch_size=batch_size, eval_sequences=eval_sequences)
    return Recipe(name="mine", training=training, arms={"dense": ArmConfig(family="dense"), **arms})


@pytest.mark.parametrize(
    ("available", "expected"),
    [(5, (1, 1)), (20, (2, 4)), (600, (60, 120)), (5_000, (500, 1_000)), (10**6, (500, 1_000))],
)
def test_a_tenth_and_a_fifth_are_held_out_up_to_what_is_enough(available, expected):
    data = held_out_examples(ClassificationDataConfig(), available)
    assert (data.validation_examples, data.test_examples) == expected
    assert held_out_examples(data, available) == data


def test_what_a_recipe_holds_out_itself_counts():
    data = TranslationDataConfig(validation_sources=7)
    assert held_out_sources(data, 100) == dataclasses.replace(data, test_sources=20)


def test_a_common_length_holds_nearly_all():
    assert common_length([3] * 95 + [500] * 4, most=100) == 8
    assert common_length([90] * 99 + [500], most=100) == 96
    assert common_length([900], most=100) == 100


def test_data_that_fills_everything_changes_nothing():
    given = recipe(mot=MOT)
    assert with_batches_for(given, Amounts(1_000, 200, 200)) == given
    assert changes(given, given) == []


def test_without_groups_only_training_bounds_a_batch():
    fitted = with_batches_for(recipe(), Amounts(20, 3, 3))
    assert (fitted.training.batch_size, fitted.training.eval_sequences) == (20, 3)


@pytest.mark.parametrize(
    ("amounts", "batch", "evaluated", "group"),
    [
        ((100, 40, 40), 32, 32, 16),
        ((100, 20, 40), 16, 16, 16),
        ((100, 9, 9), 8, 8, 8),
        ((5, 3, 3), 2, 2, 2),
        ((100, 1, 9), 32, 128, 16),  # for the task to refuse
    ],
)
def test_with_groups_batches_are_whole_on_every_side(amounts, batch, evaluated, group):
    fitted = with_batches_for(recipe(mot=MOT), Amounts(*amounts))
    sizes = (fitted.training.batch_size, fitted.training.eval_sequences, fitted.arms["mot"].group_size)
    assert sizes == (batch, evaluated, group)


def test_groups_that_share_no_batch_become_equal():
    arms = {"a": dataclasses.replace(MOT, group_size=6), "b": dataclasses.replace(MOT, group_size=16)}
    fitted = with_batches_for(recipe(batch_size=48, **arms), Amounts(100, 20, 20))
    assert [fitted.arms[name].group_size for name in arms] == [16, 16]


def test_the_groups_of_checkpoints_stay():
    fitted = with_batches_for(recipe(batch_size=8, eval_sequences=8), Amounts(900, 50, 50), group_sizes=(32,))
    assert (fitted.training.batch_size, fitted.training.eval_sequences) == (32, 32)
    assert fitted.arms["dense"].group_size == 16


def test_groups_of_heads_and_adapters_are_fitted_too():
    adapter = AdapterConfig(method="mixture_of_tokens", rank=2)
    arms = {
        "head": ClassificationArmConfig(head=HeadConfig(feed_forward=MOT)),
        "adapter": ClassificationArmConfig(tune="adapter", adapter=adapter),
    }
    training = TrainingConfig(batch_size=32, eval_sequences=32)
    given = ClassificationRecipe(name="mine", baseline="head", training=training, arms=arms)
    fitted = with_batches_for(given, Amounts(14, 4, 4))
    assert changes(given, fitted) == [
        "training.batch_size = 4 (not 32)",
        "training.eval_sequences = 4 (not 32)",
        "arms.head.head.feed_forward.group_size = 4 (not 16)",
        "arms.adapter.adapter.group_size = 4 (not 16)",
    ]


@pytest.mark.parametrize(("route_by", "number"), [("pair", 3), ("source", 2), ("target", 2)])
def test_there_is_an_expert_for_each_language_or_pair(route_by, number):
    layer = ArmConfig(family="token_choice", route_by=route_by)
    given = TranslationRecipe(name="mine", arms={"dense": TranslationArmConfig(feed_forward=layer)})
    fitted = with_experts_of(given, ["en-de", "en-fr", "de-en"] if route_by == "pair" else ["en-de", "en-fr", "de-fr"])
    assert fitted.arms["dense"].feed_forward.num_experts == number


def test_own_data_leaves_open_what_a_preset_sizes_for_its_own():
    path = preset_path("classification-quick")
    assert load_recipe(path).data.test_examples == 1_000
    data = load_recipe(path, ['data.source="local"', 'data.path="mine.csv"', "data.test_examples=50"]).data
    assert (data.validation_examples, data.test_examples, data.max_length) == (None, 50, None)


def test_own_data_leaves_the_users_own_recipe_alone(tmp_path):
    mine = tmp_path / "mine.toml"
    mine.write_text(preset_path("classification-quick").read_text(encoding="utf-8"), encoding="utf-8")
    assert load_recipe(mine, ['data.source="local"', 'data.path="mine.csv"']).data.test_examples == 1_000
