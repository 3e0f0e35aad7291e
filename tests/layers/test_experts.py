"""The stacked experts: layout, initialisation and refusals."""

import pytest
import torch
from torch.testing import assert_close

from mixtura import kernels
from mixtura.layers import Experts


@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
def test_weights_have_hugging_faces_layout(gated):
    experts = Experts(4, intermediate_size=6, num_experts=3, gated=gated)
    shapes = {name: tuple(p.shape) for name, p in experts.named_parameters()}
    first = {"gate_up_proj": (3, 12, 4)} if gated else {"up_proj": (3, 6, 4)}
    assert shapes == first | {"down_proj": (3, 4, 6)}


def test_gate_comes_before_up_in_the_stacked_weight():
    experts = Experts(1, intermediate_size=1, num_experts=1, gated=True)
    with torch.no_grad():
        experts.gate_up_proj.copy_(torch.tensor([[[1.0], [-3.0]]]))  # relu(x) * -3 x, not relu(-3 x) * x
        experts.down_proj.fill_(1)
    assert_close(experts(torch.tensor([[[2.0], [-2.0]]]), kernels.batched_ffn), torch.tensor([[[-12.0], [0.0]]]))


def test_all_experts_on_each_token_scale_the_input_and_weigh_the_output():
    experts = Experts(1, intermediate_size=1, num_experts=2, activation="relu")
    with torch.no_grad():
        experts.up_proj.copy_(torch.tensor([[[1.0]], [[-1.0]]]))
        experts.down_proj.copy_(torch.tensor([[[1.0]], [[10.0]]]))
    scale_TE, weight_TE = torch.tensor([[3.0, -4.0]]), torch.tensor([[0.5, 0.25]])
    # Expert 0 gets 3 * 2 and gives 6 / 2; expert 1 gets -4 * 2 and gives 80 / 4.
    y_TD = experts(torch.tensor([[2.0]]), kernels.scaled_ffn, scale_TE, weight_TE, None)
    assert_close(y_TD, torch.tensor([[23.0]]))


def test_weights_start_normal_with_the_given_spread():
    experts = Experts(64, intermediate_size=64, num_experts=8)
    for std in (0.02, 0.1):
        for weight in experts.weights:
            assert abs(weight.std() / std - 1) < 0.02 and abs(weight.mean()) < std / 50
        experts.reset_parameters(std=0.1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_experts": 0}, "num_experts is 0: it must be at least 1"),
        ({"intermediate_size": 0}, "intermediate_size is 0: it must be at least 1"),
        ({"activation": "swiglu"}, "activation is 'swiglu': it must be one of relu, gelu, gelu_tanh, silu"),
    ],
)
def test_a_setting_that_makes_no_sense_is_named(settings, message):
    with pytest.raises(ValueError, match=message):
        Experts(4, **({"intermediate_size": 4, "num_experts": 2} | settings))


def test_printing_shows_the_sizes():
    text = repr(Experts(4, intermediate_size=6, num_experts=3, activation="silu", gated=True))
    assert text == "Experts(num_experts=3, hidden_size=4, intermediate_size=6, activation=silu, gated=True)"
