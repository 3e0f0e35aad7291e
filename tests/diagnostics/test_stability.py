import math
import random

import pytest

from mixtura.diagnostics import count_spikes, find_spikes, summarize_series


def noise(length: int, *, level: float = 1.0, size: float = 0.1) -> list[float]:
    draw = random.Random(0)
    return [level + size * draw.gauss(0.0, 1.0) for _ in range(length)]


def test_quiet_noise_and_a_falling_loss_have_no_spikes() -> None:
    assert count_spikes(noise(500)) == 0
    assert count_spikes([7.0 * math.exp(-step / 100) + 1 for step in range(500)]) == 0


def test_a_jump_is_found_where_it_is() -> None:
    values = noise(100)
    values[60] = 3.0
    assert find_spikes(values) == [60]


def test_neighbouring_spikes_are_one_and_separate_ones_are_two() -> None:
    values = noise(100)
    values[60:65] = [3.0] * 5
    values[80] = 3.0
    assert find_spikes(values) == [60, 80]


@pytest.mark.parametrize(("rise", "spikes"), [(0.19, 0), (0.21, 1)])
def test_a_rise_must_exceed_a_fifth_of_the_median(rise: float, spikes: int) -> None:
    assert count_spikes([1.0] * 50 + [1.0 + rise]) == spikes


@pytest.mark.parametrize(("rise", "spikes"), [(5 * 1.4826 - 0.01, 0), (5 * 1.4826 + 0.01, 1)])
def test_a_rise_must_exceed_five_scaled_deviations(rise: float, spikes: int) -> None:
    # The median of 9, 10, 11, ... is 10 and the median deviation 1.
    assert count_spikes([9.0, 10.0, 11.0, 9.0, 11.0] * 10 + [10.0 + rise]) == spikes


def test_the_first_ten_values_are_never_spikes() -> None:
    assert count_spikes([1.0] * 9 + [100.0]) == 0
    assert count_spikes([1.0] * 10 + [100.0]) == 1


def test_only_the_last_fifty_values_are_looked_at() -> None:
    # A rise to a new level: once the window has forgotten the old one, its height is normal.
    values = [1.0] * 50 + [10.0] * 60
    values += [10.5]
    assert find_spikes(values) == [50]
    assert count_spikes([10.0] * 200 + [1.0] * 50 + [5.0]) == 1


def test_values_that_are_not_finite_are_spikes_and_spoil_nothing_else() -> None:
    values = [1.0, 2.0, math.nan, 3.0]
    summary = summarize_series(values)
    assert (summary.mean, summary.maximum, summary.spikes) == (2.0, 3.0, 1)
    assert count_spikes([*([1.0] * 20), math.inf, *([1.0] * 20), 3.0]) == 2


def test_a_series_without_finite_values_has_no_mean() -> None:
    assert math.isnan(summarize_series([]).mean)
    assert math.isnan(summarize_series([math.inf]).maximum)
