"""The least time that a machine allows."""

import pytest

from mixtura.benchmarks.contenders import Size, own_layers, parameters
from mixtura.benchmarks.roofline import ADAMW_BYTES, FAMILIES, H200, Machine, least_seconds, machine_of, plot, traffic

SIZE = Size(tokens=4096, hidden=64, experts=8, top_k=2)
FAST = Machine(name="memory without limit", flops=1e12, bandwidth=1e30, element=4)
SLOW = Machine(name="arithmetic without limit", flops=1e30, bandwidth=1e9, element=4)


@pytest.mark.parametrize("family", FAMILIES)
def test_with_fast_memory_arithmetic_is_the_bound_and_equal_for_all(family):
    assert least_seconds(SIZE, family, FAST, what="training") == SIZE.flops(backward=True) / 1e12


@pytest.mark.parametrize("family", FAMILIES)
def test_with_slow_memory_traffic_is_the_bound(family):
    layer = own_layers(SIZE)[family.replace("_", " ")]
    weights, tokens = 4 * parameters(layer), 4 * SIZE.tokens * SIZE.hidden
    assert traffic(SIZE, family, what="forward", element=4) == pytest.approx(weights + 2 * tokens)
    assert traffic(SIZE, family, what="training", element=4) > 3 * weights + 5 * tokens
    step = least_seconds(SIZE, family, SLOW, what="step") - least_seconds(SIZE, family, SLOW, what="training")
    assert step == pytest.approx(ADAMW_BYTES / 4 * weights / 1e9)


def test_the_first_projection_counts_for_every_row():
    """Written once and read once: T K rows of two projections (gated), which is what the layer keeps."""
    layer = own_layers(SIZE)["token choice"]
    kept = 2 * 4 * SIZE.tokens * SIZE.top_k * layer.experts.gate_up_proj.size(1)
    rest = 3 * 4 * parameters(layer) + 5 * 4 * SIZE.tokens * SIZE.hidden
    assert traffic(SIZE, "token_choice", what="training", element=4) == pytest.approx(rest + kept)


def test_the_plot_has_a_point_for_every_family_and_size():
    rows = [
        {"contender": name, "what": "training", "gigaflops": 50.0 + number}
        for number, name in enumerate(
            ("dense", "token choice", "expert choice", "mixture of tokens", "one large product")
        )
    ]
    record = {"sizes": [{"size": vars(SIZE), "rows": rows}]}
    cpu = machine_of(record, bandwidth=2e10)
    assert cpu.flops == 54e9
    assert cpu.ridge == pytest.approx(2.7)
    left, right = plot(record, cpu, H200, [SIZE, SIZE]).axes
    drawn = [sum(len(line.get_xdata()) == 1 for line in axes.lines) for axes in (left, right)]
    assert drawn == [4, 8]
    heights = [line.get_ydata()[0] for line in left.lines if len(line.get_xdata()) == 1]
    assert heights == [50e9, 51e9, 52e9, 53e9]


def test_nothing_is_drawn_above_the_roof_of_the_device():
    for axes in plot({"sizes": []}, H200, H200, [SIZE]).axes[1:]:
        roof = next(line for line in axes.lines if len(line.get_xdata()) == 3)
        for line in axes.lines:
            if len(line.get_xdata()) == 1:
                x, y = line.get_xdata()[0], line.get_ydata()[0]
                assert y <= 1.0001 * min(roof.get_ydata()[1], x * H200.bandwidth)
    assert H200.ridge == pytest.approx(206, abs=1)
