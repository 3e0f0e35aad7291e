import math

import numpy as np
import pytest
import torch

from mixtura.config import UserError
from mixtura.data import PackedTokens
from mixtura.evaluation import check_evaluation, evaluate_loss, evaluation_modes, loss_measures
from mixtura.models import MixtureForCausalLM
from mixtura.models.calibration import calibrate


@pytest.fixture
def packed():
    ids_NL = np.random.default_rng(0).integers(0, 64, (12, 10)).astype(np.int32)
    return PackedTokens(ids_NL, bytes_per_token=2.5)


@pytest.fixture
def tiny_model(tiny_config):
    def make(family, **changes):
        torch.manual_seed(0)
        # Weights larger than at a usual start, so that the modes differ visibly.
        return MixtureForCausalLM(tiny_config(family, initializer_range=0.3, **changes))

    return make


def test_loss_is_the_models_own_language_loss(tiny_model, packed):
    model = tiny_model("token_choice").eval()
    ids_BL = torch.from_numpy(packed.sequences_NL[:8].astype(np.int64))
    expected = model(input_ids=ids_BL, labels=ids_BL).language_loss.item()
    measured = evaluate_loss(model, packed, num_sequences=8, batch_size=4)
    assert list(measured) == ["causal"]
    assert measured["causal"]["loss"] == pytest.approx(expected, abs=1e-5)


def test_measures_are_nats_bits_and_perplexity():
    measures = loss_measures(2 * math.log(2), bytes_per_token=4.0)
    assert measures == pytest.approx({"loss": 2 * math.log(2), "bits_per_byte": 0.5, "perplexity": 4.0})


def test_a_huge_loss_has_infinite_perplexity():
    assert loss_measures(1e4, bytes_per_token=1.0)["perplexity"] == math.inf


@pytest.mark.parametrize("batch_size", [1, 5, 12])
def test_loss_does_not_depend_on_the_batch_size_without_groups(tiny_model, packed, batch_size):
    model = tiny_model("dense")
    whole = evaluate_loss(model, packed, num_sequences=12, batch_size=12)["causal"]["loss"]
    parts = evaluate_loss(model, packed, num_sequences=12, batch_size=batch_size)["causal"]["loss"]
    assert parts == pytest.approx(whole, abs=1e-6)


@pytest.mark.parametrize(
    ("family", "modes"),
    [
        ("dense", ("causal",)),
        ("token_choice", ("causal",)),
        ("expert_choice", ("group",)),
        ("soft", ("group",)),
        ("mixture_of_tokens", ("group", "alone", "alone_all")),
    ],
)
def test_every_family_has_its_modes(tiny_config, family, modes):
    assert evaluation_modes(tiny_config(family)) == modes


def test_each_mode_is_the_model_in_that_mode(tiny_model, packed):
    model = tiny_model("mixture_of_tokens", alone_top_k=1).eval()
    measured = evaluate_loss(model, packed, num_sequences=4, batch_size=4)
    ids_BL = torch.from_numpy(packed.sequences_NL[:4].astype(np.int64))
    for mode, settings in {"group": ("group", None), "alone": ("alone", 1), "alone_all": ("alone", None)}.items():
        model.set_inference_mode(settings[0], top_k=settings[1])
        expected = model(input_ids=ids_BL, labels=ids_BL).language_loss.item()
        assert measured[mode]["loss"] == pytest.approx(expected, abs=1e-5), mode
    assert len({measures["loss"] for measures in measured.values()}) == 3


def test_population_is_measured_where_the_model_keeps_averages(tiny_model, packed):
    model = tiny_model("mixture_of_tokens", population=True).eval()
    calibrate(model, [torch.from_numpy(packed.sequences_NL[:8].astype(np.int64))])
    measured = evaluate_loss(model, packed, num_sequences=4, batch_size=4)
    assert list(measured) == ["group", "alone", "alone_all", "population"]
    assert measured["population"]["loss"] != measured["alone"]["loss"]
    assert model.config.inference_mode == "alone"


def test_all_experts_are_not_run_twice_when_alone_already_runs_all(tiny_model, packed, monkeypatch):
    model = tiny_model("mixture_of_tokens", alone_top_k=None)
    modes = []
    set_mode = model.set_inference_mode
    monkeypatch.setattr(
        model, "set_inference_mode", lambda mode, top_k: (modes.append(mode), set_mode(mode, top_k=top_k))
    )
    measured = evaluate_loss(model, packed, num_sequences=4, batch_size=4)
    assert measured["alone"] == measured["alone_all"]
    assert modes == ["group", "alone", "alone"]  # the last one restores


@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_left_as_it_was(tiny_model, packed, training):
    model = tiny_model("mixture_of_tokens", inference_mode="group", alone_top_k=3).train(training)
    evaluate_loss(model, packed, num_sequences=4, batch_size=4)
    assert model.training is training
    assert (model.config.inference_mode, model.config.alone_top_k) == ("group", 3)
    assert model.mixture_layers()[0].inference_mode == "group"
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_model_is_restored_when_evaluation_fails(tiny_model, packed, monkeypatch):
    model = tiny_model("mixture_of_tokens").train()
    monkeypatch.setattr(model.lm_head, "forward", lambda x: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        evaluate_loss(model, packed, num_sequences=4, batch_size=4)
    assert model.training
    assert model.config.inference_mode == "alone"


@pytest.mark.parametrize(("num_sequences", "batch_size"), [(6, 4), (8, 3), (4, 1)])
@pytest.mark.parametrize("family", ["mixture_of_tokens", "expert_choice"])
def test_groups_that_are_not_full_are_refused(tiny_config, packed, family, num_sequences, batch_size):
    with pytest.raises(UserError, match="multiple of the group size"):
        check_evaluation(tiny_config(family), packed, num_sequences=num_sequences, batch_size=batch_size)


def test_groups_over_the_sequence_ask_for_full_sequences(tiny_config, packed):
    config = tiny_config("mixture_of_tokens", group_over="sequence")
    with pytest.raises(UserError, match="10 tokens of a sequence do not fill groups of 4"):
        check_evaluation(config, packed, num_sequences=8, batch_size=4)


def test_alone_takes_any_batch(tiny_model, packed):
    measured = evaluate_loss(tiny_model("mixture_of_tokens"), packed, num_sequences=5, batch_size=3, modes=["alone"])
    assert list(measured) == ["alone"]


def test_more_sequences_than_held_out_are_refused(tiny_config, packed):
    with pytest.raises(UserError, match=r"asks for 13 held-out sequences but there are 12.*validation_fraction"):
        check_evaluation(tiny_config("dense"), packed, num_sequences=13, batch_size=1)


def test_an_unknown_mode_is_refused_with_those_there_are(tiny_config, packed):
    with pytest.raises(UserError, match="no evaluation mode 'alone' for this model: use causal"):
        check_evaluation(tiny_config("dense"), packed, num_sequences=1, batch_size=1, modes=["alone"])


def test_an_empty_evaluation_is_refused(tiny_config, packed):
    with pytest.raises(UserError, match="give 1 or more"):
        check_evaluation(tiny_config("dense"), packed, num_sequences=0, batch_size=1)
