"""A step of every arm, timed and weighed side by side."""

import dataclasses
import json

import pytest
import torch

from fixtures.encoder_decoders import parallel_rows  # noqa: F401 - fixture
from mixtura.comparison import timing
from mixtura.comparison.timing import LOOKED_AT, time_arms, typical_and_longest
from mixtura.config import ModelConfig, TrainingConfig, TranslationArmConfig, TranslationDataConfig, TranslationRecipe
from mixtura.data.prepare import prepare_data
from mixtura.models import MixtureForCausalLM
from mixtura.tasks.language_modelling.experiment import Pretraining
from mixtura.tasks.translation.experiment import make_translation

ARMS = {
    "dense": {"family": "dense"},
    "few": {"family": "token_choice", "num_experts": 2, "moe_intermediate_size": 32},
    "many": {"family": "token_choice", "num_experts": 32, "moe_intermediate_size": 32},
}


def test_times_are_relative_to_the_baseline_and_memory_grows_with_parameters(tiny_recipe):
    recipe = tiny_recipe(arms=ARMS, gradient_accumulation_steps=2)
    data = prepare_data(recipe.data, cache_dir=None)
    arms = Pretraining(recipe, data).arms
    times = time_arms(arms, recipe.training, "dense")
    assert times.keys() == ARMS.keys()
    assert times["dense"].seconds_ratio == 1.0
    assert all(values.seconds_per_step > 0 for values in times.values())
    few, many = (times[name].peak_memory_bytes for name in ("few", "many"))
    for name, arm in arms.items():
        # AdamW keeps two moments of each parameter, and a step count for each tensor.
        parameters = list(arm.build(0).parameters())
        moments = 2 * 4 * sum(parameter.numel() for parameter in parameters)
        assert times[name].optimizer_state_bytes == moments + 4 * len(parameters)
    # 30 more experts of two 32 x 32 matrices, each with its gradient and two moments, in float32.
    assert many - few >= 30 * 2 * 32 * 32 * 4 * 4


def test_timing_leaves_the_arms_as_they_were(tiny_recipe):
    recipe = tiny_recipe()
    data = prepare_data(recipe.data, cache_dir=None)
    arms = Pretraining(recipe, data).arms
    before = {name: arm.model_config.to_dict() for name, arm in arms.items()}
    times = time_arms(arms, recipe.training, "mixture_of_tokens")
    assert times["mixture_of_tokens"].seconds_ratio == 1.0
    assert {name: arm.model_config.to_dict() for name, arm in arms.items()} == before


def test_a_mixture_of_tokens_takes_more_memory_than_the_dense_arm_it_is_matched_to(tiny_recipe):
    recipe = tiny_recipe()
    data = prepare_data(recipe.data, cache_dir=None)
    times = time_arms(Pretraining(recipe, data).arms, recipe.training, "dense")
    assert times["mixture_of_tokens"].peak_memory_bytes > times["dense"].peak_memory_bytes


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


class Lengths:
    """An arm whose batches are as long as they are told to be."""

    def __init__(self, *lengths):
        self.task, self.lengths, self.asked = self, lengths, []

    def dataset(self, *, length, seed):
        self.asked.append(length)
        rows = [length for length in self.lengths for _ in range(2)]
        return (rows * length)[:length]

    def collate(self, items):
        return {"input_ids": torch.zeros(len(items), max(items)), "index": torch.zeros(len(items))}


def test_batches_of_different_lengths_are_timed_at_the_mean_and_weighed_at_the_longest():
    training = TrainingConfig(steps=6, batch_size=2)
    assert typical_and_longest(Lengths(10, 40, 20, 30, 90, 44), training) == (1, 4)
    # With two batches a step: the sums 50, 50, 134 and the longest batch.
    twice = dataclasses.replace(training, steps=3, gradient_accumulation_steps=2)
    assert typical_and_longest(Lengths(10, 40, 20, 30, 90, 44), twice) == (0, 2)
    windows = Lengths(16)
    assert typical_and_longest(windows, dataclasses.replace(training, steps=1_000)) == (0, 0)
    assert windows.asked == [2 * LOOKED_AT]


def test_sentences_are_timed_at_their_mean_length(parallel_rows, tmp_path):  # noqa: F811
    rows = [json.loads(line) for line in parallel_rows.read_text(encoding="utf-8").splitlines()]
    for number, row in enumerate(rows):
        row["source"] = " ".join([row["source"]] * (1 + number % 7))
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    recipe = TranslationRecipe(
        name="toy",
        data=TranslationDataConfig(
            source="local",
            path=str(path),
            pairs=("en-de", "en-fr"),
            vocab_size=300,
            max_characters=None,
            max_length=None,
        ),
        model=ModelConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64),
        training=TrainingConfig(steps=12, batch_size=4, eval_sequences=4),
        arms={"dense": TranslationArmConfig()},
    )
    experiment = make_translation(recipe, cache_dir=None, on_progress=lambda _: None)
    arm, training = experiment.arms["dense"], experiment.recipe.training
    dataset = arm.task.dataset(length=48, seed=0)
    tokens = [
        arm.task.collate([dataset[i] for i in range(start, start + 4)])["input_ids"].numel()
        for start in range(0, 48, 4)
    ]
    typical, longest = typical_and_longest(arm, training)
    assert longest == tokens.index(max(tokens)) and max(tokens) > 1.3 * tokens[typical]
    assert abs(tokens[typical] - sum(tokens) / 12) == min(abs(count - sum(tokens) / 12) for count in tokens)
    seen = []
    step_of = timing._Step.run
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            timing._Step, "run", lambda step, *a: (seen.append(step.batches[0]["input_ids"].numel()), step_of(step, *a))
        )
        time_arms(experiment.arms, training, "dense", rounds=2)
    # The optimizer's first step and the one that is weighed; then two that warm up, two that count and two in parts.
    assert seen == [tokens[longest]] * 2 + [tokens[typical]] * 6
