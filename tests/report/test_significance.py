"""Paired statistics against hand-computed cases and against scipy's own."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from mixtura.report.significance import (
    MOT_ANCHOR,
    crossing,
    equal_cost_difference,
    first_reach,
    loss_at,
    mean_interval,
    paired_difference,
    smallest_visible,
    speed_up,
)
from mixtura.results import Interval

losses = st.floats(1.0, 8.0)


def test_interval_of_three_differences_is_students_t() -> None:
    found = paired_difference({0: 3.9, 1: 4.0, 2: 4.2}, {0: 4.0, 1: 4.0, 2: 4.0})
    assert found is not None
    # Differences -0.1, 0, 0.2: mean 1/30, standard deviation sqrt(0.07/3), t(0.975; 2) = 4.302653.
    assert found.mean == pytest.approx(1 / 30)
    assert found.high - found.mean == pytest.approx(4.302653 * math.sqrt(0.07 / 3) / math.sqrt(3), rel=1e-6)
    assert found.values == pytest.approx([-0.1, 0.0, 0.2])
    assert found.seeds == [0, 1, 2]


@given(st.lists(st.tuples(losses, losses), min_size=2, max_size=8))
def test_interval_agrees_with_the_paired_t_test(pairs: list[tuple[float, float]]) -> None:
    arm, base = (dict(enumerate(side)) for side in zip(*pairs, strict=True))
    found = paired_difference(arm, base)
    assert found is not None
    spread = max(found.values) - min(found.values)
    if spread < 1e-3:  # scipy warns of cancellation where all differences are equal
        return
    expected = stats.ttest_rel(list(arm.values()), list(base.values())).confidence_interval(0.95)
    assert found.low == pytest.approx(expected.low, abs=1e-9)
    assert found.high == pytest.approx(expected.high, abs=1e-9)


def test_one_seed_has_no_interval() -> None:
    assert mean_interval([0.25]) == Interval(0.25, None, None, 1)


def test_only_shared_seeds_are_paired() -> None:
    found = paired_difference({0: 1.0, 1: 2.0, 7: 9.0}, {1: 1.5, 0: 0.5, 3: 4.0})
    assert found is not None
    assert found.seeds == [0, 1]
    assert paired_difference({0: 1.0}, {1: 1.0}) is None


def test_reach_is_interpolated_between_evaluations() -> None:
    curve = [(100, 5.0), (200, 4.0), (300, 3.0)]
    assert first_reach(curve, 3.5) == pytest.approx(250)
    assert first_reach(curve, 5.5) == 100
    assert first_reach(curve, 2.9) is None
    assert first_reach([(100, 5.0), (200, 4.0), (300, 4.5), (400, 3.0)], 4.0) == 200


def test_loss_is_interpolated_and_never_extrapolated() -> None:
    curve = [(100, 5.0), (200, 4.0)]
    assert loss_at(curve, 150) == pytest.approx(4.5)
    assert loss_at(curve, 99) is None
    assert loss_at(curve, 201) is None


def test_speed_up_in_time_is_the_one_in_steps_over_the_price_of_a_step() -> None:
    base = {seed: [(100, 5.0), (200, 4.5), (400, 4.0)] for seed in (0, 1)}
    arm = {seed: [(100, 4.5), (200, 4.0), (400, 3.5)] for seed in (0, 1)}
    found = speed_up(arm, base, seconds_ratio=1.6)
    assert found is not None
    assert found.reached == found.n == 2
    assert found.steps == [200, 200]
    assert found.ratio_steps.mean == pytest.approx(2.0)
    assert found.ratio_seconds.mean == pytest.approx(1.25)


def test_speed_up_is_none_unless_every_seed_reaches() -> None:
    base = {0: [(100, 5.0), (200, 4.0)], 1: [(100, 5.0), (200, 4.0)]}
    arm = {0: [(100, 4.0), (200, 3.9)], 1: [(100, 5.0), (200, 4.5)]}
    found = speed_up(arm, base, seconds_ratio=1.0)
    assert found is not None
    assert (found.reached, found.ratio_steps, found.ratio_seconds) == (1, None, None)
    assert found.steps == [100, None]
    # The other way round: the baseline passes the second seed's 4.5 half-way between its evaluations.
    assert found.baseline_steps_to_arm_final == [None, pytest.approx(150)]


def test_equal_time_compares_where_the_faster_arm_ends() -> None:
    base = {0: [(100, 5.0), (200, 4.0)]}
    arm = {0: [(100, 4.8), (200, 3.8)]}
    slower = equal_cost_difference(arm, base, cost_ratio=2.0)
    assert slower is not None
    assert (slower.arm_step, slower.baseline_step) == (100, 200)
    assert slower.mean == pytest.approx(0.8)
    faster = equal_cost_difference(arm, base, cost_ratio=0.5)
    assert faster is not None
    assert (faster.arm_step, faster.baseline_step) == (200, 100)
    assert faster.mean == pytest.approx(-1.2)
    assert equal_cost_difference(arm, base, cost_ratio=3.0) is None


@pytest.mark.parametrize("ratio", [0.7, 0.9, 1.0, 1.1, 1.3])
def test_equal_time_covers_the_last_step_in_spite_of_rounding(ratio: float) -> None:
    curve = {0: [(50, 5.0), (500, 4.0)]}
    assert equal_cost_difference(curve, curve, cost_ratio=ratio) is not None


def test_a_closing_gap_names_the_budget_where_it_is_zero() -> None:
    steps = [500, 600, 700, 800, 900, 1000]
    # 0.1 * log2(2000 / step), and a hair more for each seed: zero at about 2,000 steps.
    arm = {seed: [(s, 4 + 0.1 * math.log2(2000 / s) + 0.001 * seed) for s in steps] for seed in (0, 1, 2)}
    base = {seed: [(s, 4.0) for s in steps] for seed in (0, 1, 2)}
    found = crossing(arm, base, tokens_per_step=64)
    assert found is not None
    assert found.status == "closing"
    assert found.step == pytest.approx(2000 * 2**0.01)
    assert found.tokens == pytest.approx(64 * found.step)
    assert found.step_range == pytest.approx([2000, 2000 * 2**0.02])
    assert found.slope_per_doubling.mean == pytest.approx(-0.1)


def test_a_shrinking_lead_is_a_closing_gap_too() -> None:
    steps = [500, 600, 700, 800, 900, 1000]
    arm = {seed: [(s, 4 - 0.1 * math.log2(4000 / s) + 0.001 * seed) for s in steps] for seed in (0, 1, 2)}
    base = {seed: [(s, 4.0) for s in steps] for seed in (0, 1, 2)}
    found = crossing(arm, base, tokens_per_step=1)
    assert found is not None
    assert (found.status, found.step) == ("closing", pytest.approx(4000 / 2**0.01))


@pytest.mark.parametrize(
    ("rate", "status"),
    [(0.1, "closing"), (0.01, "too_far"), (-0.05, "widening")],
)
def test_status_follows_the_slope_of_the_gap(rate: float, status: str) -> None:
    steps = [500, 600, 700, 800, 900, 1000]
    arm = {seed: [(s, 4.2 + rate * math.log2(1000 / s) + 0.001 * seed) for s in steps] for seed in (0, 1, 2)}
    base = {seed: [(s, 4.0) for s in steps] for seed in (0, 1, 2)}
    found = crossing(arm, base, tokens_per_step=1)
    assert found is not None
    assert found.status == status
    assert (found.step is None) == (status != "closing")


def test_slopes_that_differ_by_seed_are_steady() -> None:
    steps = [500, 600, 700, 800, 900, 1000]
    rates = {0: 0.1, 1: -0.1, 2: 0.02}
    arm = {seed: [(s, 4.2 + rate * math.log2(1000 / s)) for s in steps] for seed, rate in rates.items()}
    base = {seed: [(s, 4.0) for s in steps] for seed in rates}
    found = crossing(arm, base, tokens_per_step=1)
    assert found is not None
    assert (found.status, found.step) == ("steady", None)


def test_a_gap_around_zero_is_level() -> None:
    steps = [500, 600, 700, 800, 900, 1000]
    arm = {seed: [(s, 4.0 + shift) for s in steps] for seed, shift in ((0, 0.1), (1, -0.1), (2, 0.01))}
    base = {seed: [(s, 4.0) for s in steps] for seed in arm}
    found = crossing(arm, base, tokens_per_step=1)
    assert found is not None
    assert found.status == "level"


def test_one_seed_or_few_points_give_no_crossing() -> None:
    steps = [500, 750, 1000]
    one = {0: [(s, 4.0 + 100 / s) for s in steps]}
    base = {0: [(s, 4.0) for s in steps]}
    found = crossing(one, base, tokens_per_step=1)
    assert found is not None
    assert (found.status, found.step) == ("one_seed", None)
    few, base = {0: one[0][1:], 1: one[0][1:]}, {0: base[0], 1: base[0]}
    found = crossing(few, base, tokens_per_step=1)
    assert found is not None
    assert found.status == "few_points"
    assert crossing({0: one[0]}, {1: base[0]}, tokens_per_step=1) is None


def test_early_steps_do_not_enter_the_fit() -> None:
    steps = [10, 100, 500, 600, 700, 800, 900, 1000]
    late = {s: 4 + 0.1 * math.log2(2000 / s) for s in steps}
    wild = {seed: [(s, 9.0 if s < 500 else late[s] + 0.001 * seed) for s in steps] for seed in (0, 1, 2)}
    base = {seed: [(s, 4.0) for s in steps] for seed in (0, 1, 2)}
    found = crossing(wild, base, tokens_per_step=1)
    assert found is not None
    assert found.fit.first_step == 500
    assert found.step == pytest.approx(2000 * 2**0.01)


def test_the_published_anchor_agrees_with_itself() -> None:
    per_step = MOT_ANCHOR.tokens_per_step
    assert [steps * per_step for steps in MOT_ANCHOR.behind_until_steps] == MOT_ANCHOR.behind_until_tokens
    assert [steps * per_step for steps in MOT_ANCHOR.slower_until_steps] == MOT_ANCHOR.slower_until_tokens
    assert MOT_ANCHOR.end_steps * per_step == MOT_ANCHOR.end_tokens


def test_the_smallest_visible_difference_is_decided_in_four_cases_of_five():
    """Of many comparisons whose true difference is the one named, four in five have an interval without zero."""
    random, true_sd, seeds = np.random.default_rng(0), 0.02, 5
    t = stats.t.ppf([0.975, 0.8], seeds - 1)
    named = float(t.sum()) * true_sd / np.sqrt(seeds)
    drawn = random.normal(named, true_sd, (4000, seeds))
    found = [mean_interval(values.tolist()) for values in drawn[:400]]
    assert np.median([smallest_visible(each) for each in found]) == pytest.approx(named, rel=0.1)
    decided = np.abs(drawn.mean(1)) > t[0] * drawn.std(1, ddof=1) / np.sqrt(seeds)
    assert decided.mean() == pytest.approx(0.8, abs=0.05)


def test_one_seed_has_no_smallest_visible_difference():
    assert smallest_visible(mean_interval([0.1])) is None
