"""Laws of the loss: runs that follow one give it back, noise widens intervals, and what is held out is predicted."""

import dataclasses
import math

import numpy as np
import pytest

from mixtura.planning.laws import (
    UNKNOWN_NOISE,
    Law,
    RunEnd,
    fit_law,
    held_out_forecasts,
    law_replicates,
    noise_of,
    published_loss,
)

BUDGETS = (1e6, 3e6, 1e7, 3e7)
TRUTH = Law(
    alpha=0.3,
    betas={"dense": 0.35, "token_choice": 0.3},
    size_terms={"dense": 12.0, "token_choice": 10.0},
    floors={"dense": 1.5, "token_choice": 1.45},
    data_terms={"dense": 150.0, "token_choice": 80.0},
)


def ends(law=TRUTH, *, sizes=(5e4, 2e5, 8e5), seeds=(0, 1, 2), run_noise=0.0, end_noise=0.0):
    random = np.random.default_rng(1)
    found = []
    for arm in law.floors:
        for parameters in sizes:
            for seed in seeds:
                shift = random.normal(0, run_noise)
                found += [
                    RunEnd(
                        arm=arm,
                        parameters=parameters,
                        tokens=tokens,
                        seed=seed,
                        loss=law.loss(arm, parameters=parameters, tokens=tokens) + shift + random.normal(0, end_noise),
                    )
                    for tokens in BUDGETS
                ]
    return found


def test_a_law_is_found_again_in_runs_that_follow_it():
    found = fit_law(ends())
    assert found.alpha == pytest.approx(TRUTH.alpha, abs=0.01)
    assert found.betas == pytest.approx(TRUTH.betas, abs=0.01)
    for arm in TRUTH.floors:
        for parameters, tokens in ((2e5, 1e7), (2e6, 1e8)):
            expected = TRUTH.loss(arm, parameters=parameters, tokens=tokens)
            assert found.loss(arm, parameters=parameters, tokens=tokens) == pytest.approx(expected, abs=0.003)


def test_tokens_for_a_loss_are_those_that_give_it():
    found = fit_law(ends())
    loss = found.loss("dense", parameters=2e5, tokens=1e7)
    assert found.tokens_for("dense", loss, parameters=2e5) == pytest.approx(1e7)


def test_an_arm_of_one_width_takes_its_size_term_from_dense_where_no_mixture_has_one():
    kept = [end for end in ends() if end.arm == "dense" or end.parameters == 2e5]
    found = fit_law(kept)
    assert found.size_terms["token_choice"] == found.size_terms["dense"]
    expected = TRUTH.loss("token_choice", parameters=2e5, tokens=1e7)
    assert found.loss("token_choice", parameters=2e5, tokens=1e7) == pytest.approx(expected, abs=0.003)


def test_an_arm_of_one_width_takes_the_mean_size_term_of_the_mixtures():
    numbers = {"dense": 12.0, "token_choice": 10.0, "mixture_of_tokens": 8.0, "remoe": 9.0}
    law = dataclasses.replace(
        TRUTH,
        betas=dict.fromkeys(numbers, 0.35),
        size_terms=numbers,
        floors=dict.fromkeys(numbers, 1.5),
        data_terms=dict.fromkeys(numbers, 150.0),
    )
    found = fit_law([end for end in ends(law) if end.arm != "remoe" or end.parameters == 2e5])
    assert found.size_terms["remoe"] == pytest.approx(
        (found.size_terms["token_choice"] + found.size_terms["mixture_of_tokens"]) / 2
    )
    for parameters in (2e5, 8e5):
        expected = law.loss("remoe", parameters=parameters, tokens=1e7)
        assert found.loss("remoe", parameters=parameters, tokens=1e7) == pytest.approx(expected, abs=0.005)


def test_a_law_nearby_changes_where_the_search_begins_and_not_where_it_ends():
    runs = ends(run_noise=0.02, end_noise=0.005)
    law, other = fit_law(runs), fit_law(runs, near=TRUTH)
    assert other.alpha == pytest.approx(law.alpha, abs=0.005) and other.betas == pytest.approx(law.betas, abs=0.005)


def test_runs_of_one_width_leave_the_size_out():
    found = fit_law(ends(sizes=(2e5,)))
    assert found.alpha is None and found.size_terms == {}
    assert found.loss("dense", parameters=1.0, tokens=1e7) == found.loss("dense", parameters=1e9, tokens=1e7)


def test_an_arm_of_two_budgets_takes_its_exponent_from_dense():
    kept = [end for end in ends() if end.arm == "dense" or end.tokens < 5e6]
    found = fit_law(kept)
    assert found.betas["token_choice"] == found.betas["dense"] == pytest.approx(TRUTH.betas["dense"], abs=0.01)
    assert found.data_terms["token_choice"] != found.data_terms["dense"]
    expected = TRUTH.loss("token_choice", parameters=2e5, tokens=3e6)
    assert found.loss("token_choice", parameters=2e5, tokens=3e6) == pytest.approx(expected, abs=0.003)


def test_an_arm_of_one_budget_keeps_its_difference():
    kept = [end for end in ends(sizes=(2e5,)) if end.arm == "dense" or end.tokens == 1e6]
    found = fit_law(kept)
    gaps = [
        found.loss("token_choice", parameters=2e5, tokens=tokens) - found.loss("dense", parameters=2e5, tokens=tokens)
        for tokens in (1e6, 1e8)
    ]
    truth = TRUTH.loss("token_choice", parameters=2e5, tokens=1e6) - TRUTH.loss("dense", parameters=2e5, tokens=1e6)
    assert gaps == pytest.approx([truth, truth], abs=0.003)


def test_dense_of_one_budget_leaves_the_tokens_out():
    found = fit_law([end for end in ends(sizes=(2e5,)) if end.tokens == 1e6])
    assert found.betas == {} and found.data_terms == {}
    assert found.tokens_for("dense", 3.0, parameters=2e5) == math.inf
    expected = TRUTH.loss("token_choice", parameters=2e5, tokens=1e6)
    assert found.loss("token_choice", parameters=2e5, tokens=1e9) == pytest.approx(expected)


def test_without_a_second_seed_noise_is_taken_from_elsewhere():
    single = ends(sizes=(2e5,), seeds=(0,))
    assert noise_of(single, fit_law(single)).of_run == UNKNOWN_NOISE


def test_the_noise_of_runs_and_of_ends_is_told_apart():
    noisy = ends(seeds=tuple(range(12)), run_noise=0.02, end_noise=0.005)
    noise = noise_of(noisy, fit_law(noisy))
    assert noise.of_run == pytest.approx(0.02, rel=0.3) and noise.of_end == pytest.approx(0.005, rel=0.3)


def test_replicates_spread_as_far_as_laws_of_other_seeds():
    """The spread of the difference at one budget agrees with the noise that was put in."""
    noisy = ends(sizes=(2e5,), run_noise=0.02)
    laws = law_replicates(noisy, fit_law(noisy), replicates=100)

    def gap(law):
        return law.loss("token_choice", parameters=2e5, tokens=1e7) - law.loss("dense", parameters=2e5, tokens=1e7)

    expected = noise_of(noisy, fit_law(noisy)).of_run * math.sqrt(2 / 3)
    assert np.std([gap(law) for law in laws]) == pytest.approx(expected, rel=0.35)


def test_the_longest_runs_are_predicted_from_the_shorter_ones():
    forecasts = held_out_forecasts(ends())
    assert {(each.arm, each.tokens) for each in forecasts} == {("dense", 3e7), ("token_choice", 3e7)}
    assert all(each.predicted == pytest.approx(each.measured, abs=0.005) for each in forecasts)
    assert all(each.farther == pytest.approx(3) for each in forecasts)
    bent = [dataclasses.replace(end, loss=end.loss - (end.tokens == 3e7) * 0.1) for end in ends()]
    assert all(each.predicted - each.measured > 0.09 for each in held_out_forecasts(bent))
    assert held_out_forecasts([end for end in ends() if end.tokens < 5e6]) == []


@pytest.mark.parametrize(("active", "low", "high"), [(1e6, 20e6, 40e6), (1e8, 330e6, 390e6), (1e9, 0.89e9, 0.94e9)])
def test_the_published_law_crosses_where_it_is_known_to(active, low, high):
    def ahead(tokens):
        return published_loss(active_parameters=active, tokens=tokens, experts=8) < published_loss(
            active_parameters=active, tokens=tokens, experts=1
        )

    assert not ahead(low) and ahead(high)
