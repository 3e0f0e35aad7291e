"""What is lost without a group, beside the weights: drawn where both were measured, and nowhere else."""

import copy

import pytest

from fixtures.results import as_results, summary_of
from mixtura.report.pictures import draw_deployment, write_pictures


@pytest.fixture
def results(make_results):
    found = copy.deepcopy(make_results())
    for seed, run in enumerate(found["arms"]["mixture_of_tokens"]["runs"]):
        layer = {"layer": 2, "sorted_weights": [0.5 + 0.1 * seed, 0.25], "gate_shares": [0.8, 1.0]}
        run["details"] = {"kind": "pretraining", "peakedness": [layer]}
    return found


def test_weights_are_means_over_seeds_and_bars_are_gaps_to_the_group(results):
    summary = summary_of(results)
    left, right = draw_deployment(as_results(results), summary).axes
    seeds = len(results["arms"]["mixture_of_tokens"]["runs"])
    mean = 0.5 + 0.1 * (seeds - 1) / 2
    assert list(left.lines[0].get_ydata()) == pytest.approx([mean, 0.25])
    modes = summary.arms["mixture_of_tokens"].modes
    gap = modes["alone"]["loss"].mean - modes["group"]["loss"].mean
    assert right.patches[0].get_height() == pytest.approx(gap)


def test_a_picture_is_written_only_where_weights_were_measured(results, make_results, tmp_path):
    written = write_pictures(as_results(results), summary_of(results), tmp_path)
    assert tmp_path / "deployment.png" in written
    assert (tmp_path / "deployment.png").read_bytes().startswith(b"\x89PNG")
    bare = make_results()
    assert tmp_path / "none" / "deployment.png" not in write_pictures(
        as_results(bare), summary_of(bare), tmp_path / "none"
    )
