"""What the benchmark measures, on layers whose numbers are known."""

import time

import pytest
import torch
from torch import nn

from mixtura.benchmarks.contenders import Size, own_layers, parameters
from mixtura.benchmarks.measure import (
    ADAMW_BYTES,
    FAMILIES,
    H200,
    Machine,
    calls,
    interleaved,
    kept_bytes,
    least_seconds,
    machine_of,
    passes,
    plot,
    ratios,
    traffic,
)


def test_ratios_are_taken_within_a_round():
    seconds = {"dense": [1.0, 10.0, 1.0], "slow": [2.0, 20.0, 3.0]}
    assert ratios(seconds, baseline="dense") == {"dense": (1.0, 1.0, 1.0), "slow": (2.0, 2.0, 3.0)}


def test_a_contender_that_is_far_too_slow_is_timed_once():
    torch.set_num_threads(1)

    def busy(seconds):
        def run():
            end = time.process_time() + seconds
            while time.process_time() < end:
                pass

        return run

    seconds = interleaved({"dense": busy(0.001), "slow": busy(0.2)}, baseline="dense", rounds=4)
    assert len(seconds["dense"]) == 4 and len(seconds["slow"]) == 1
    assert ratios(seconds, baseline="dense")["slow"][0] > 10


def test_a_linear_layer_keeps_its_input_and_nothing_else():
    x_BLD = torch.randn(2, 3, 8)
    assert kept_bytes(nn.Linear(8, 4), x_BLD) == 2 * 3 * 8 * 4


def test_calls_count_operators_of_the_forward_and_backward_pass():
    layer, x_BLD = nn.Linear(8, 4), torch.randn(2, 3, 8)
    forward, training = (calls(passes(layer, x_BLD, what)) for what in ("forward", "training"))
    assert 1 <= forward < training


def test_a_step_changes_the_weights_and_a_forward_pass_does_not():
    layer, x_BLD = nn.Linear(4, 4), torch.randn(1, 2, 4)
    before = layer.weight.detach().clone()
    passes(layer, x_BLD, "forward")()
    assert torch.equal(layer.weight, before) and layer.weight.grad is None
    passes(layer, x_BLD, "training")()
    assert torch.equal(layer.weight, before) and layer.weight.grad is not None
    passes(layer, x_BLD, "step")()
    assert not torch.equal(layer.weight, before)


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
