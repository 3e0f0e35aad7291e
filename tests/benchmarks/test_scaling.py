"""The simulation of many GPUs: its page shows what it computes, and its loads follow from what was measured."""

import importlib.util
from pathlib import Path

import pytest

from mixtura.planning.hardware import read_hardware

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def scaling():
    spec = importlib.util.spec_from_file_location("scaling_script", ROOT / "benchmarks" / "scaling.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    return script


def test_the_page_says_what_is_computed(scaling):
    page = (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")
    found = scaling.by_count((2, 8, 4096, 8192, 16_384))
    for arm, first, counts in (("dense", 2, (16_384,)), ("token choice", 8, (4096, 8192, 16_384))):
        best = scaling.rate(found[arm][first], first)
        for count in counts:
            assert f"{scaling.rate(found[arm][count], count) / best:.0%}".replace("%", " %") in page
    costs = [scaling.rate(found[arm][8], 8) for arm in ("token choice, even load", "token choice")]
    assert f"costs {1 - costs[1] / costs[0]:.0%}".replace("%", " %") in page
    for value in (scaling.imbalance(8), scaling.imbalance(64), scaling.busiest_expert()):
        assert f"{value:.2f}" in page
    for family in ("token_choice", "mixture_of_tokens"):
        assert f"{scaling.times_dense(family):.2f} ({family.replace('_', ' ')})" in page


def test_the_busiest_of_as_many_experts_as_were_measured_has_the_measured_load(scaling, monkeypatch):
    monkeypatch.setattr(scaling, "EXPERTS", 16)
    assert scaling.imbalance(16) == pytest.approx(scaling.busiest_expert())
    assert scaling.imbalance(1) == 1 < scaling.imbalance(4) < scaling.imbalance(8)


def test_uneven_load_never_makes_a_step_quicker(scaling):
    for count in (8, 4096):
        hardware = read_hardware(f"{count}xH200")
        even, uneven = (scaling.layout_of(arm, hardware) for arm in ("token choice, even load", "token choice"))
        assert uneven.time.total > even.time.total


def test_groups_end_where_every_gpu_has_one(scaling):
    most = scaling.SEQUENCES // scaling.GROUP
    assert scaling.layout_of("mixture of tokens", read_hardware(f"{most}xH200")) is not None
    assert scaling.layout_of("mixture of tokens", read_hardware(f"{2 * most}xH200")) is None
