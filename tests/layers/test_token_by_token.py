"""The short way through a decoding step gives what the long one gives, and is left where it does not suit."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from mixtura.kernels import native
from mixtura.layers import MixtureOfTokens


def random_layer(**changes):
    torch.manual_seed(0)
    sizes = {"intermediate_size": 5, "num_experts": 4, "group_size": 4, "alone_top_k": 2}
    layer = MixtureOfTokens(6, **(sizes | changes)).double().eval()
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter)
    return layer


def the_long_way(layer, x_BLD):
    """A layer that somebody watches shows its choices, and only the long way can."""
    hook = layer.choice_tap.register_forward_hook(lambda *_: None)
    with torch.no_grad():
        y_BLD = layer(x_BLD)
    hook.remove()
    return y_BLD


@pytest.fixture
def no_long_way(monkeypatch):
    monkeypatch.setattr(MixtureOfTokens, "_run_tokens", lambda *_: pytest.fail("it went the long way"))


@given(
    batch=st.integers(1, 3),
    length=st.integers(1, 2),
    experts=st.integers(2, 5),
    group=st.integers(2, 40),
    mixtures=st.integers(1, 2),
    top_k=st.integers(1, 2),
    temperature=st.sampled_from([1.0, 0.3]),
    activation=st.sampled_from(["relu", "gelu", "silu"]),
    gated=st.booleans(),
)
def test_both_ways_give_the_same(batch, length, experts, group, mixtures, top_k, temperature, activation, gated):
    shape = {"num_experts": experts, "group_size": group, "mixtures_per_expert": mixtures, "alone_top_k": top_k}
    layer = random_layer(**shape, temperature=temperature, activation=activation, gated=gated)
    x_BLD = torch.randn(batch, length, 6, dtype=torch.float64)
    with torch.no_grad():
        assert_close(layer(x_BLD), the_long_way(layer, x_BLD), rtol=0, atol=1e-10)


@given(
    batch=st.integers(1, 40),
    experts=st.integers(2, 5),
    group=st.integers(2, 40),
    mixtures=st.integers(1, 2),
    top_k=st.integers(1, 3),
    temperature=st.sampled_from([1.0, 0.3]),
    activation=st.sampled_from(["relu", "silu"]),
    gated=st.booleans(),
    mode=st.sampled_from(["alone", "population"]),
)
def test_both_ways_give_the_same_in_c(batch, experts, group, mixtures, top_k, temperature, activation, gated, mode):
    shape = {
        "num_experts": experts,
        "group_size": group,
        "mixtures_per_expert": mixtures,
        "alone_top_k": min(top_k, experts),
    }
    settings = {"temperature": temperature, "activation": activation, "gated": gated, "population": True}
    layer = random_layer(**shape, **settings, inference_mode=mode)
    for name, buffer in layer.population.named_buffers():
        if name != "updates":
            torch.nn.init.normal_(buffer)
    x_BLD = torch.randn(batch, 1, 6, dtype=torch.float64)
    with torch.no_grad():
        expected_BLD = the_long_way(layer, x_BLD)
        y_BLD = layer.float()(x_BLD.float())
    assert_close(y_BLD.double(), expected_BLD, rtol=0, atol=5e-6 * max(1.0, expected_BLD.abs().max().item()))


@pytest.mark.skipif(not native.can_run("relu"), reason="no C compiler, or torch's library has no sgemm to call")
@pytest.mark.parametrize("mode", ["alone", "population"])
def test_in_c_a_larger_step_of_either_mode_goes_the_short_way(no_long_way, mode):
    layer = random_layer(population=True, inference_mode=mode).float()
    with torch.no_grad():
        layer(torch.randn(64, 1, 6))


def test_a_decoding_step_goes_the_short_way(no_long_way):
    layer = random_layer()
    with torch.no_grad():
        layer(torch.randn(8, 1, 6, dtype=torch.float64))
        with pytest.raises(pytest.fail.Exception, match="the long way"):
            layer(torch.randn(9, 1, 6, dtype=torch.float64))
    with pytest.raises(pytest.fail.Exception, match="the long way"):
        layer(torch.randn(1, 1, 6, dtype=torch.float64))  # gradients are wanted


def test_two_routers_go_the_long_way(no_long_way):
    with torch.no_grad(), pytest.raises(pytest.fail.Exception, match="the long way"):
        random_layer(combine="separate")(torch.randn(1, 1, 6, dtype=torch.float64))


def test_all_mixtures_go_the_short_way_in_decoding_steps_alone(no_long_way):
    layer = random_layer(alone_top_k=None)
    with torch.no_grad():
        layer(torch.randn(1, 1, 6, dtype=torch.float64))
        with pytest.raises(pytest.fail.Exception, match="the long way"):
            layer(torch.randn(1, 2, 6, dtype=torch.float64))


def test_a_logit_beyond_all_bounds_weighs_nothing_or_all():
    layer, x_BLD = random_layer(), torch.ones(1, 1, 6, dtype=torch.float64)
    torch.nn.init.constant_(layer.gate.weight, -1e6)
    with torch.no_grad():
        assert_close(layer(x_BLD), torch.zeros_like(x_BLD))
        layer.gate.weight.neg_()
        assert_close(layer(x_BLD), the_long_way(layer, x_BLD))
