"""The rule, the sentences and the warnings, on made-up results."""

import dataclasses
import json
from collections.abc import Callable
from typing import Any

import pytest

from fixtures.results import as_results, summary_of
from mixtura import advise
from mixtura.report.summary import summarize
from mixtura.report.verdict import judge_difference
from mixtura.report.wording import signed
from mixtura.results import Interval, Summary
from mixtura.results.json_form import from_plain, to_plain

Results = dict[str, Any]
MakeResults = Callable[..., Results]


def kinds(summary: Summary) -> set[tuple[str, str | None]]:
    return {(caution.kind, caution.arm) for caution in summary.cautions}


@pytest.mark.parametrize(
    ("low", "high", "outcome"),
    [
        (-0.2, -0.1, "beats"),
        (0.1, 0.2, "loses"),
        (-0.1, 0.1, "draw"),
        (-0.1, 0.0, "draw"),
        (0.0, 0.1, "draw"),
        (None, None, "one_seed"),
    ],
)
def test_rule_looks_only_at_the_interval(low: float | None, high: float | None, outcome: str) -> None:
    assert judge_difference(Interval(0.0, low, high, 3)) == outcome


def test_no_difference_is_no_verdict() -> None:
    assert judge_difference(None) == "excluded"


def test_losing_mot_is_named_first_with_its_number(make_results: MakeResults) -> None:
    summary = summary_of(make_results())
    arms, verdict = summary.arms, summary.verdict
    amount = arms["mixture_of_tokens"].difference.deployed.mean
    assert amount > 0
    assert verdict.finding.startswith(f"MoT loses to dense by {amount:.3f} nats a token")
    assert "token-choice MoE beats dense" in verdict.finding
    assert "3\N{NO-BREAK SPACE}seeds" in verdict.finding
    assert "open for longer training" in verdict.finding
    assert verdict.best == "token_choice"
    assert arms["dense"].outcome == "baseline"


def test_winning_mot_is_the_answer_with_its_price(make_results: MakeResults) -> None:
    verdict = summary_of(make_results(offsets=(0.05, -0.1))).verdict
    assert verdict.best == "mixture_of_tokens"
    assert "the answer is MoT" in verdict.answer
    assert "2.91\N{NO-BREAK SPACE}M parameters in memory instead of 919\N{NO-BREAK SPACE}k" in verdict.answer
    assert "1.08 times the time a step" in verdict.answer


def test_dense_is_the_answer_when_nothing_beats_it(make_results: MakeResults) -> None:
    verdict = summary_of(make_results(offsets=(0.05, 0.1))).verdict
    assert verdict.best == "dense"
    assert "the answer is dense" in verdict.answer


def test_draws_are_called_draws(make_results: MakeResults) -> None:
    summary = summary_of(make_results(offsets=(-0.002, 0.003), noise=0.02))
    assert {arm.outcome for arm in summary.arms.values()} == {"baseline", "draw"}
    assert summary.verdict.finding.startswith("No winner")
    assert "95\N{NO-BREAK SPACE}% interval" in summary.verdict.finding
    assert summary.verdict.best is None
    assert len(summary.verdict.tied) == 2
    assert "no single best arm" in summary.verdict.answer


def test_one_seed_gives_no_verdict_and_says_so(make_results: MakeResults) -> None:
    summary = summary_of(make_results(seeds=(0,)))
    verdict = summary.verdict
    assert verdict.finding.startswith("One seed cannot decide")
    assert verdict.answer is None
    assert summary.arms["mixture_of_tokens"].outcome == "one_seed"
    assert summary.arms["mixture_of_tokens"].difference.deployed.low is None
    assert ("one_seed", None) in kinds(summary)
    assert any("One seed gives no estimate" in sentence for sentence in verdict.longer)


def test_verdict_uses_the_deployed_loss_not_the_group_loss(make_results: MakeResults) -> None:
    results = make_results(offsets=(-0.05, 0.1))
    for run in results["arms"]["mixture_of_tokens"]["runs"]:
        run["final"]["group"]["loss"] = 1.0
    summary = summary_of(results)
    assert summary.arms["mixture_of_tokens"].outcome == "loses"
    assert summary.arms["mixture_of_tokens"].difference.trained.mean < -2
    assert summary.arms["mixture_of_tokens"].mode_gap.mean > 2


def test_arm_without_deployed_mode_takes_no_part(make_results: MakeResults) -> None:
    results = make_results(offsets=(0.05, -0.5))
    results["arms"]["mixture_of_tokens"]["deployed_mode"] = None
    summary = summary_of(results)
    arm = summary.arms["mixture_of_tokens"]
    assert (arm.outcome, arm.excluded) == ("excluded", "not_deployable")
    assert arm.difference.deployed is None
    assert arm.difference.trained.mean < 0
    assert summary.verdict.best == "dense"
    assert ("not_deployable", "mixture_of_tokens") in kinds(summary)
    assert summary.cautions[0].level == "serious"


def test_arm_that_sees_the_future_takes_no_part(make_results: MakeResults) -> None:
    results = make_results(offsets=(-3.0, 0.1))
    results["arms"]["token_choice"]["leaks"]["future"] = True
    summary = summary_of(results)
    assert summary.arms["token_choice"].outcome == "excluded"
    assert ("leaks_future", "token_choice") in kinds(summary)
    assert "token-choice" not in summary.verdict.finding


def test_diverged_seed_is_not_dropped_from_the_mean(make_results: MakeResults) -> None:
    results = make_results()
    results["arms"]["token_choice"]["runs"][1]["final"]["causal"]["loss"] = None
    summary = summary_of(results)
    arm = summary.arms["token_choice"]
    assert (arm.excluded, arm.diverged, arm.outcome) == ("diverged", 1, "excluded")
    assert ("diverged", "token_choice") in kinds(summary)


def test_excluded_baseline_gives_no_verdict(make_results: MakeResults) -> None:
    results = make_results()
    results["arms"]["dense"]["runs"][0]["final"]["causal"]["loss"] = None
    verdict = summary_of(results).verdict
    assert verdict.finding.startswith("No verdict: the baseline, dense")
    assert verdict.answer is None


def test_single_arm_gives_no_verdict(make_results: MakeResults) -> None:
    results = make_results()
    results["arms"] = {"dense": results["arms"]["dense"]}
    verdict = summary_of(results).verdict
    assert "the only arm" in verdict.finding
    assert verdict.longer == []


def test_clean_comparison_warns_only_of_what_is_true_of_it(make_results: MakeResults) -> None:
    results = make_results()
    results["arms"]["mixture_of_tokens"]["learning_rate_search"]["at_edge"] = False
    results["arms"]["token_choice"].update(seconds_ratio=1.2, seconds_per_step=1.2 * 0.151)
    summary = summary_of(results)
    assert kinds(summary) == {("leaks_batch", "mixture_of_tokens"), ("resolution", None)}
    assert "at these learning rates" not in summary.verdict.finding


@pytest.mark.parametrize(
    ("change", "kind"),
    [
        ({"seconds_ratio": 1.26}, "slow_step"),
        ({"seconds_per_step": 0.5}, "noisy_timing"),
        ({"flops_ratio": 1.02}, "flops"),
        ({"flops_ratio": 0.98}, "flops"),
        ({"learning_rate": 7e-4}, "rate_not_best"),
        ({"learning_rate_search": None}, "not_searched"),
        ({"leaks": {"future": False, "batch": True, "batch_deployed": True}}, "leaks_batch_deployed"),
    ],
)
def test_each_unfairness_is_warned_of(make_results: MakeResults, change: dict[str, Any], kind: str) -> None:
    results = make_results()
    results["arms"]["token_choice"].update(seconds_ratio=1.0, seconds_per_step=0.151)
    assert kind not in {found for found, _ in kinds(summary_of(results))}
    results["arms"]["token_choice"].update(change)
    assert kind in {found for found, _ in kinds(summary_of(results))}


def test_rate_at_the_edge_is_warned_of_and_weakens_the_headline(make_results: MakeResults) -> None:
    summary = summary_of(make_results())
    caution = next(caution for caution in summary.cautions if caution.kind == "rate_at_edge")
    assert caution.arm == "mixture_of_tokens"
    assert "the highest of those tried" in caution.text
    assert "at these learning rates" in summary.verdict.finding


def test_search_of_one_rate_is_no_search(make_results: MakeResults) -> None:
    results = make_results()
    search = results["arms"]["dense"]["learning_rate_search"]
    search["trials"] = search["trials"][1:2]
    assert "dense" in next(c.text for c in summary_of(results).cautions if c.kind == "not_searched")


def test_report_names_the_budget_of_the_crossing(make_results: MakeResults) -> None:
    summary = summary_of(make_results())
    found = summary.arms["mixture_of_tokens"].crossing
    assert found.status == "closing"
    # The example's curves meet at three times the run's 1.024 million tokens.
    assert found.tokens == pytest.approx(3 * 1_024_000, rel=0.2)
    assert any("the two cross at about" in sentence for sentence in summary.verdict.longer)
    assert any("a guess, not a measurement" in sentence for sentence in summary.verdict.longer)


def test_published_anchor_stands_beside_this_budget(make_results: MakeResults) -> None:
    summary = summary_of(make_results())
    said = " ".join(summary.verdict.longer).replace("\N{NO-BREAK SPACE}", " ")
    assert "between 5,000 and 10,000 steps of 65,536 tokens (0.33 to 0.66 billion tokens)" in said
    assert "This budget is 0.31 % of 0.33 billion tokens" in said
    results = make_results()
    del results["arms"]["mixture_of_tokens"]
    assert summary_of(results).anchor is None
    assert "published" not in " ".join(summary_of(results).verdict.longer)


def test_what_measured_runs_expect_stands_beside_longer_training(make_results: MakeResults) -> None:
    results = make_results()
    results["recipe"]["model"] = {"hidden_size": 64, "num_hidden_layers": 4}
    advice = advise(tokens=results["data"]["tokens_per_run"], width=64)
    expected = {arm.arm: arm.at_equal_flops for arm in advice.arms}["token_choice"]
    assert expected is not None
    said = summary_of(results).verdict.longer[-1].replace("\N{NO-BREAK SPACE}", " ")
    assert said.startswith("The runs behind mixtura advise, with other text")
    assert f"token-choice MoE {signed(expected.mean)} (" in said and "ReMoE" not in said
    results["recipe"]["model"]["hidden_size"] = 1024
    assert "Extrapolated: " in summary_of(results).verdict.longer[-1]
    results["task"] = "translation"
    assert "mixtura" not in " ".join(summary_of(results).verdict.longer)


def test_arms_of_one_family_get_different_labels(make_results: MakeResults) -> None:
    results = make_results()
    results["arms"]["second"] = results["arms"]["token_choice"]
    labels = {name: arm.label for name, arm in summary_of(results).arms.items()}
    assert labels["token_choice"] == "token-choice MoE (token_choice)"
    assert labels["second"] == "token-choice MoE (second)"


@pytest.mark.parametrize("seeds", [(0,), (0, 1), (0, 1, 2)], ids=["one", "two", "three"])
def test_summary_is_plain_json_and_does_not_change_the_results(
    make_results: MakeResults, seeds: tuple[int, ...]
) -> None:
    results = as_results(make_results(seeds=seeds))
    before = to_plain(results)
    summary = summarize(results)
    assert from_plain(Summary, json.loads(json.dumps(to_plain(summary), allow_nan=False))) == summary
    assert to_plain(results) == before
    assert summarize(dataclasses.replace(results, summary=summary)) == summary


def test_fewer_steps_that_take_longer_are_called_so(make_results: MakeResults) -> None:
    results = make_results()
    results["arms"]["token_choice"]["seconds_ratio"] = 3.0
    sentence = next(text for text in summary_of(results).verdict.speed if "oken-choice" in text)
    assert "times fewer steps, but in" in sentence
    assert "times more time" in sentence


def test_an_answer_at_unequal_flops_has_their_price_and_the_difference_at_equal_ones(make_results: MakeResults) -> None:
    results = make_results()
    results["arms"]["token_choice"]["flops_ratio"] = 1.6
    summary = summary_of(results)
    assert summary.verdict.finding.startswith(
        "Equal steps, not equal FLOPs: a token of token-choice MoE costs 1.60 times one of dense. MoT loses"
    )
    assert "1.60 times the FLOPs a token" in summary.verdict.answer
    assert ". At equal training FLOPs it " in summary.verdict.answer
    arm = summary.arms["token_choice"]
    assert arm.equal_flops.mean > arm.difference.deployed.mean
    assert summary.arms["mixture_of_tokens"].equal_flops is None


def test_curves_from_scratch_say_nothing_of_checkpoints_trained_on(make_results: MakeResults) -> None:
    results = make_results()
    results["recipe"]["arms"] = {name: {"init_from": "somewhere"} for name in results["arms"]}
    summary = summary_of(results)
    assert summary.anchor is None
    assert not any("its authors' own" in sentence for sentence in summary.verdict.longer)


def test_a_held_out_side_far_from_the_share_that_was_asked_for_is_told(make_results: MakeResults) -> None:
    results = make_results()
    results["recipe"]["data"] = {"validation_fraction": 0.05}
    assert ("held_out_share", None) not in kinds(summary_of(results))
    results["data"]["facts"] |= {"bytes_train": 1_000, "bytes_validation": 250}
    (found,) = [caution for caution in summary_of(results).cautions if caution.kind == "held_out_share"]
    assert found.level == "warning"
    assert found.text.startswith("20.0\N{NO-BREAK SPACE}% of the text is held out, not about 5.0\N{NO-BREAK SPACE}%")
