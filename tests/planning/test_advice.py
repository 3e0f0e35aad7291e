"""Advice: what measured runs and their law say of a size and a budget, and what they do not."""

import dataclasses
import json
import math

import pytest

from mixtura.errors import UserError
from mixtura.planning.advice import advise_on, expected_difference
from mixtura.planning.evidence import UNKNOWN_STEP_NOISE, Evidence, Row, Setting, load_evidence
from mixtura.planning.question import question_of

SETTING = Setting(
    layers=4,
    vocabulary=512,
    context=64,
    tokens_per_step=4096,
    experts=16,
    top_k=2,
    group_size=16,
    text="film reviews",
    machine="one thread",
    created="2026-11-28",
)
FLOORS = {"dense": 2.0, "token_choice": 1.9, "mixture_of_tokens": 1.96}
DATA = {"dense": 150.0, "token_choice": 158.0, "mixture_of_tokens": 160.0}
SECONDS = {"dense": 0.18, "token_choice": 0.27, "mixture_of_tokens": 0.18}


def evidence(*, seeds=(0, 1, 2), widths=(64,), budgets=(1_000_000, 3_000_000, 10_000_000, 30_000_000)):
    """Runs in which token choice is ahead of dense from 0.7 M tokens on, and MoT from 16 M."""
    rows = []
    for arm, floor in FLOORS.items():
        for width in widths:
            for seed in seeds:
                for tokens in budgets:
                    loss = floor + 30 / width + DATA[arm] * tokens**-0.35 + 0.004 * ((seed * 7 + len(arm)) % 3 - 1)
                    mixing = arm == "mixture_of_tokens"
                    rows.append(
                        Row(
                            arm=arm,
                            width=width,
                            tokens=tokens,
                            seed=seed,
                            loss=loss,
                            in_groups=loss - 0.1 if mixing else None,
                            alone=loss + 0.02 if mixing else None,
                            parameters=227_904,
                            seconds_per_step=SECONDS[arm],
                            processor="a processor",
                        )
                    )
    return Evidence(setting=SETTING, rows=tuple(rows))


def advise(*, given=None, **asked):
    return advise_on(question_of(**asked), given or evidence())


def test_families_are_ranked_by_their_difference_to_dense():
    advice = advise(tokens=3e6, width=64)
    assert [arm.arm for arm in advice.arms] == ["token_choice", "dense", "mixture_of_tokens"]
    best = advice.best.at_equal_flops
    assert best.mean == pytest.approx(-0.1 + 8 * 3e6**-0.35, abs=0.01) and best.high < 0 and best.ahead > 0.99
    assert advice.extrapolated == () and advice.law_error < 0.01
    assert [arm.arm for arm in advise(tokens=3e7, width=64).arms] == ["token_choice", "mixture_of_tokens", "dense"]


def test_at_equal_seconds_slow_steps_count():
    best = advise(tokens=3e6, width=64).best
    assert best.step.ratio == pytest.approx(1.5) and best.at_equal_seconds.mean > best.at_equal_flops.mean + 0.02
    assert best.pays_seconds.tokens > best.pays_flops.tokens


def test_the_share_of_tokens_that_gives_denses_loss_is_named():
    arms = {arm.arm: arm for arm in advise(tokens=1e7, width=64).arms}
    share = ((150 * 1e7**-0.35 + 0.1) / 158) ** (-1 / 0.35) / 1e7
    assert arms["token_choice"].dense_loss_at == pytest.approx(share, rel=0.1)
    assert arms["dense"].dense_loss_at is None and 0.9 < arms["mixture_of_tokens"].dense_loss_at < 1.1


def test_the_budget_from_which_a_family_pays_is_named_or_bounded():
    arms = {arm.arm: arm for arm in advise(tokens=3e6, width=64).arms}
    choosing, mixing = arms["token_choice"].pays_flops, arms["mixture_of_tokens"].pays_flops
    assert choosing.tokens < choosing.least == 1_000_000
    assert mixing.tokens == pytest.approx((10 / 0.04) ** (1 / 0.35), rel=0.5)
    assert mixing.least < mixing.low < mixing.tokens < mixing.high < mixing.farthest
    never = evidence(budgets=(100_000, 200_000, 400_000))
    bounded = {arm.arm: arm for arm in advise(tokens=3e5, width=64, given=never).arms}["mixture_of_tokens"].pays_flops
    assert bounded.tokens is None and bounded.high is None and bounded.farthest == 4_000_000


def test_beyond_what_was_measured_intervals_widen_and_it_says_so():
    near, far = advise(tokens=3e7, width=64), advise(tokens=3e9, width=512)
    assert [text.split()[0] for text in far.extrapolated] == ["3,000,000,000", "width"] and near.extrapolated == ()

    def span(advice):
        found = next(arm for arm in advice.arms if arm.arm == "token_choice").at_equal_flops
        return found.high - found.low

    assert span(far) > span(near)
    few = evidence(budgets=(1_000_000, 3_000_000))
    untested = advise(tokens=1e9, width=64, given=few)
    assert untested.law_error is None
    assert untested.arms[0].at_equal_flops is None or untested.arms[0].at_equal_flops.high > 0.0


def test_an_arm_with_shorter_runs_than_the_others_is_extrapolated_sooner_and_that_is_named():
    whole = evidence()
    short = tuple(row for row in whole.rows if row.arm != "token_choice" or row.tokens <= 3_000_000)
    given = Evidence(setting=SETTING, rows=short)

    def found(tokens):
        advice = advise(tokens=tokens, width=64, given=given)
        assert advice.extrapolated == ()
        return {arm.arm: arm for arm in advice.arms}

    near, far = found(3e6), found(3e7)
    assert near["token_choice"].extrapolated is None and far["mixture_of_tokens"].extrapolated is None
    assert far["token_choice"].extrapolated == (
        "token-choice MoE was trained on 1,000,000 to 3,000,000 tokens at width 64"
    )
    error = advise(tokens=3e6, width=64, given=given).law_error
    spread = (far["token_choice"].at_equal_flops.high - far["token_choice"].at_equal_flops.mean) / 1.96
    assert error > 0 and spread > error * math.log(10) / math.log(3.1)


def without(arm, *, width=None, tokens=None, seeds=()):
    """The evidence of two widths without some of an arm's runs."""
    rows = evidence(widths=(64, 128)).rows
    gone = {
        row
        for row in rows
        if row.arm == arm
        and width in (None, row.width)
        and (tokens is None or row.tokens >= tokens)
        and (not seeds or row.seed in seeds)
    }
    return Evidence(setting=SETTING, rows=tuple(row for row in rows if row not in gone))


def test_budgets_count_as_measured_only_at_the_widths_that_had_them():
    rows = evidence(widths=(64, 128)).rows
    given = Evidence(setting=SETTING, rows=tuple(row for row in rows if row.width == 64 or row.tokens < 5e6))
    inside, corner = (advise(tokens=3e7, width=width, given=given) for width in (64, 128))
    assert inside.extrapolated == () and corner.extrapolated == (
        "30,000,000 tokens lie outside the 1,000,000 to 3,000,000 measured at width 128",
    )
    spans = [arms.best.at_equal_flops.high - arms.best.at_equal_flops.low for arms in (inside, corner)]
    assert spans[1] > spans[0]


def test_a_family_that_was_not_trained_at_the_width_is_put_behind_the_best_that_was():
    """Its law has token choice ahead, but nothing at this width says so."""
    rows = without("token_choice", width=128).rows
    given = Evidence(
        setting=SETTING,
        rows=tuple(
            dataclasses.replace(row, loss=row.loss - 0.067) if row.arm == "mixture_of_tokens" else row for row in rows
        ),
    )
    near, far = (advise(tokens=3e6, width=width, given=given) for width in (64, 128))
    assert near.best.arm == "token_choice" and near.best.extrapolated is None
    choosing = next(arm for arm in far.arms if arm.arm == "token_choice")
    assert choosing.extrapolated == "token-choice MoE was trained at width 64 only"
    assert far.best.arm == "mixture_of_tokens" and far.arms[1] == choosing
    assert choosing.at_equal_flops.mean < far.best.at_equal_flops.mean < choosing.at_equal_flops.high


def test_the_seeds_are_those_of_the_runs_nearest_to_the_question():
    given = without("token_choice", width=128, tokens=2e6, seeds=(1, 2))

    def nearest(**asked):
        return next(arm for arm in advise(given=given, **asked).arms if arm.arm == "token_choice").nearest

    assert vars(nearest(tokens=4e6, width=120)) == {"width": 128, "tokens": 3_000_000, "seeds": 1}
    assert vars(nearest(tokens=1e6, width=120)) == {"width": 128, "tokens": 1_000_000, "seeds": 3}
    assert nearest(tokens=4e6, width=70).seeds == 3


def test_steps_are_compared_with_dense_steps_of_the_same_run_where_there_are_any():
    rows = evidence(seeds=(0, 1)).rows
    slow = {1_000_000: 2.0, 3_000_000: 1.0, 10_000_000: 1.1, 30_000_000: 1.3}
    drifting = tuple(
        dataclasses.replace(row, seconds_per_step=row.seconds_per_step * slow[row.tokens])
        for row in rows
        if row.arm != "token_choice" or row.tokens < 5e6
    )
    step = Evidence(setting=SETTING, rows=drifting).step_ratio("token_choice", width=64)
    assert step.ratio == pytest.approx(1.5) and step.error == pytest.approx(0) and step.width == 64
    other = tuple(row for row in rows if row.arm == "dense" or (row.seed, row.tokens) == (0, 1_000_000))
    alone = Evidence(setting=SETTING, rows=tuple(row for row in other if row.arm != "dense" or row.seed == 1))
    step = alone.step_ratio("token_choice", width=64)
    assert step.ratio == pytest.approx(1.5) and step.error == UNKNOWN_STEP_NOISE


def test_doubt_about_a_steps_time_widens_what_is_expected_at_equal_seconds():
    rows = evidence().rows
    scattered = tuple(
        dataclasses.replace(row, seconds_per_step=row.seconds_per_step * (1 + 0.2 * (row.seed - 1)))
        for row in rows
        if row.arm == "token_choice"
    )
    given = Evidence(setting=SETTING, rows=(*scattered, *(row for row in rows if row.arm != "token_choice")))
    sure, doubtful = (advise(tokens=3e6, width=64, given=each).best for each in (None, given))
    assert doubtful.step.ratio == pytest.approx(sure.step.ratio) and doubtful.step.error > sure.step.error == 0
    assert doubtful.at_equal_flops.high == pytest.approx(sure.at_equal_flops.high, abs=1e-6)
    assert doubtful.at_equal_seconds.high > sure.at_equal_seconds.high + 0.005


def test_on_named_hardware_steps_are_planned_and_its_memory_is_the_limit():
    small, large = (advise(tokens=3e6, width=width, hardware="2xH100") for width in (64, 2048))
    assert small.question.memory == large.question.memory == 160e9
    arms = {arm.arm: arm for arm in large.arms}
    assert arms["dense"].step.ratio == 1 and arms["dense"].step.error == 0
    assert 1.05 < arms["token_choice"].step.ratio < 2 and arms["token_choice"].step.width is None
    # A device waits for its kernels to be started where layers are small, whatever they compute.
    assert all(1 <= arm.step.ratio < 1.02 for arm in small.arms)
    measured = advise(tokens=3e6, width=64)
    assert small.best.at_equal_flops.mean == measured.best.at_equal_flops.mean
    assert small.best.at_equal_seconds.mean < measured.best.at_equal_seconds.mean
    assert advise(tokens=3e6, width=64, hardware="H100", memory=8e6).question.memory == 8e6
    with pytest.raises(UserError, match="--hardware is 'abacus'"):
        question_of(tokens=3e6, width=64, hardware="abacus")


def test_what_does_not_fit_the_memory_comes_last_with_its_reason():
    advice = advise(tokens=3e6, width=64, memory=8e6)
    assert [(arm.arm, arm.refused) for arm in advice.arms] == [
        ("dense", None),
        ("token_choice", "needs more memory"),
        ("mixture_of_tokens", "needs more memory"),
    ]
    assert advice.best.training_bytes == 16 * advice.best.parameters


def test_served_in_groups_mixtures_of_tokens_count_as_they_train():
    mixing = {arm.arm: arm for arm in advise(tokens=3e6, width=64, token_by_token=False).arms}["mixture_of_tokens"]
    assert mixing.at_equal_flops.mean < -0.05


def test_parameters_become_the_nearest_width():
    assert question_of(tokens=1e6, parameters=196_608).width == 64
    assert question_of(tokens=1e6, parameters=85e6, layers=12).width == 768


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"tokens": 1e6}, "either the width"),
        ({"tokens": 1e6, "width": 64, "parameters": 1e6}, "either the width"),
        ({"tokens": 0, "width": 64}, "tokens is 0: give 100,000 or more"),
        ({"tokens": 99_999, "width": 64}, "tokens is 99,999: give 100,000 or more"),
        ({"tokens": float("nan"), "width": 64}, "tokens is nan: give 100,000 or more"),
        ({"tokens": 1e6, "width": 64, "layers": 100_000}, "layers is 100,000: give 1 to 10,000"),
        ({"tokens": 1e6, "width": 4}, "width is 4: give 8 or more"),
        ({"tokens": float("inf"), "width": 64}, "tokens is inf: give 100,000 or more, a finite number"),
        ({"tokens": 1e6, "parameters": 5}, "parameters is 5: give 3,072 or more"),
        ({"tokens": 1e6, "parameters": 9000, "layers": 12}, "parameters is 9,000: give 9,216 or more"),
        ({"tokens": 1e6, "width": 10**200}, r"width is 1e\+200: give 8 to 1e\+09"),
        ({"tokens": 1e6, "parameters": 1e300}, r"parameters is 1e\+300: give 3,072 to 1e\+24"),
        ({"tokens": 1e6, "width": 64, "vocabulary": 10**30}, r"vocabulary is 1e\+30: give 2 to 1e\+09"),
        ({"tokens": 1e6, "width": 64, "memory": 0}, "memory is 0"),
    ],
)
def test_questions_without_sense_are_refused(asked, message):
    with pytest.raises(UserError, match=message):
        question_of(**asked)


def test_a_single_difference_is_that_of_the_whole_answer():
    question = question_of(tokens=3e6, width=64)
    given = evidence()
    whole = {arm.arm: arm.at_equal_flops for arm in advise_on(question, given).arms}["token_choice"]
    assert expected_difference(question, "token_choice", evidence=given) == whole


def test_runs_of_one_budget_and_seed_say_little_and_not_nothing():
    thin = evidence(budgets=(1_000_000,), seeds=(0,))
    near, far = (
        {arm.arm: arm for arm in advise(tokens=tokens, width=64, given=thin).arms}["token_choice"]
        for tokens in (1e6, 1e8)
    )
    assert near.at_equal_flops.mean == pytest.approx(far.at_equal_flops.mean)
    half = near.at_equal_flops.high - near.at_equal_flops.mean
    assert half == pytest.approx(1.96 * 0.02 * 2**0.5, rel=0.2) and not far.at_equal_flops.decided
    assert near.at_equal_seconds is None and near.pays_flops is None
    assert near.dense_loss_at is None and near.budgets == (1_000_000, 1_000_000)


def test_evidence_is_read_as_it_was_written(tmp_path):
    path = tmp_path / "evidence.json"
    columns = list(vars(evidence().rows[0]))
    rows = [list(vars(row).values()) for row in evidence().rows]
    path.write_text(json.dumps({"setting": vars(SETTING), "columns": columns, "rows": rows}), encoding="utf-8")
    assert load_evidence(path) == evidence()
