"""What the benchmark measures, on layers whose numbers are known."""

import time

import torch
from torch import nn

from mixtura.benchmarks.measure import calls, interleaved, kept_bytes, passes, ratios


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
