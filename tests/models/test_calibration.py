"""Averages over a population: what calibration finds, what training keeps, and what a checkpoint brings back."""

import copy

import pytest
import torch
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

from mixtura.config import UserError
from mixtura.models import MixtureForCausalLM
from mixtura.models.calibration import calibrate, collect_population, observe_population, update_population


@pytest.fixture
def build(tiny_config):
    def make(family="mixture_of_tokens", **changes):
        torch.manual_seed(0)
        return MixtureForCausalLM(tiny_config(family, initializer_range=0.3, **changes))

    return make


def tokens(count=3, batch=8, length=6):
    return [torch.randint(64, (batch, length)) for _ in range(count)]


def averages(model):
    return [
        {name: value.clone() for name, value in layer.population.state_dict().items()}
        for layer in model.mixture_of_tokens_layers()
    ]


def test_calibrating_averages_over_the_groups_of_all_batches(build):
    model, batches = build().eval(), tokens()
    assert calibrate(model, batches) == 3
    by_batch = averages(model)[0]
    assert calibrate(model, [torch.cat(batches)]) == 1
    at_once = averages(model)[0]
    assert by_batch.pop("updates") == 3 and at_once.pop("updates") == 1
    assert_close(by_batch, at_once)
    assert (at_once["output"] != 0).any() and not torch.allclose(at_once["log_mass"], at_once["log_mass"].mean())


def test_many_batches_count_in_a_model_of_16_bits_too(build):
    model, batches = build().eval(), tokens(count=300, length=2)
    half = copy.deepcopy(model).bfloat16()
    calibrate(model, batches)
    calibrate(half, batches)
    exact, found = averages(model)[0], averages(half)[0]
    assert all(value.dtype == torch.bfloat16 for value in found.values())
    assert found["updates"] == 300
    # What 16 bits round in a batch goes out in the mean; half of the last digit stays.
    assert (found["log_mass"].float() - exact["log_mass"]).abs().max() < 0.01
    assert (found["mean"].float() - exact["mean"]).norm() < 0.01 * exact["mean"].norm()


@pytest.mark.parametrize("training", [True, False])
def test_calibrating_leaves_the_model_as_it_was(build, training):
    model = build(alone_top_k=3).train(training)
    weights = {name: value.clone() for name, value in model.named_parameters()}
    calibrate(model, tokens())
    assert model.training is training
    assert (model.config.inference_mode, model.config.alone_top_k, model.config.population) == ("alone", 3, True)
    layer = model.mixture_of_tokens_layers()[0]
    assert (layer.inference_mode, layer.alone_top_k, layer.observing, layer.observed) == ("alone", 3, False, None)
    assert all(torch.equal(value, weights[name]) for name, value in model.named_parameters())


def test_a_checkpoint_brings_mode_and_averages_back(build, tmp_path):
    model, ids_BL = build(mixtures_per_expert=2, group_size=4).eval(), tokens(1)[0]
    calibrate(model, tokens())
    model.set_inference_mode("population", top_k=3)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert (loaded.config.inference_mode, loaded.config.alone_top_k, loaded.config.group_size) == ("population", 3, 4)
    assert_close(averages(loaded), averages(model), rtol=0, atol=0)
    assert torch.equal(loaded(ids_BL).logits, model(ids_BL).logits)
    model.set_inference_mode("alone", top_k=3)
    assert not torch.allclose(loaded(ids_BL).logits, model(ids_BL).logits)


def test_training_keeps_moving_averages_and_counts_a_recomputed_batch_once(build):
    plain, recomputed, ids_BL = build(population=True), build(population=True), tokens(1)[0]
    # transformers renamed it within version 5.
    getattr(recomputed, "activation_checkpointing_enable", recomputed.gradient_checkpointing_enable)()
    for model in (plain, recomputed):
        observe_population(model, True)
        model.train()(ids_BL, labels=ids_BL).loss.backward()
        update_population(model, rate=0.1)
        update_population(model, rate=0.1)  # nothing was seen in between
    assert averages(plain)[0]["updates"] == 1
    assert_close(averages(plain), averages(recomputed))


def test_the_averages_are_those_of_all_ranks(build):
    model, ids_BL = build(population=True), tokens(1)[0]
    observe_population(model, True)
    model.train()(ids_BL)
    here = model.mixture_of_tokens_layers()[0].observed
    update_population(model, rate=0.1, average=lambda value: (value + 3.0) / 2)
    assert_close(averages(model)[0]["log_mass"], (here.log_mass_S + 3.0) / 2)


def test_a_mode_without_averages_is_refused(build):
    with pytest.raises(ValueError, match="keeps no population's averages: calibrate it"):
        build().set_inference_mode("population")


def test_what_cannot_be_calibrated_is_named(build):
    with pytest.raises(UserError, match="no mixture-of-tokens layer"):
        calibrate(build("token_choice"), tokens())
    with pytest.raises(UserError, match="no batch to calibrate with"):
        calibrate(build(), [])
    with pytest.raises(UserError, match="6 sequences of a batch do not fill groups of 4"):
        calibrate(build(), tokens(batch=6))
    with pytest.raises(UserError, match="6 tokens of a sequence do not fill groups of 4"):
        calibrate(build(group_over="sequence"), tokens(batch=3))


def test_a_step_of_several_micro_batches_counts_them_all(build):
    model, (first_BL, second_BL) = build(population=True), tokens(2)
    observe_population(model, True)
    seen, step = [], []
    for ids_BL in (first_BL, second_BL):
        model.train()(ids_BL)
        seen.append(model.mixture_of_tokens_layers()[0].observed)
        step = collect_population(model, step, share=0.5)
    update_population(model, rate=0.1, step=step)
    assert_close(averages(model)[0]["log_mass"], (seen[0].log_mass_S + seen[1].log_mass_S) / 2)
