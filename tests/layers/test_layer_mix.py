"""The blend of layers: how it starts, what its weights are, and what it refuses."""

import pytest
import torch
from torch.testing import assert_close

from mixtura.layers import LayerMix


def random_states(num_layers=3, dtype=torch.float32):
    return [torch.randn(2, 5, 4, dtype=dtype) for _ in range(num_layers)]


@pytest.mark.parametrize("hidden_size", [None, 4], ids=["fixed", "by token"])
def test_the_blend_starts_as_the_mean(hidden_size):
    states = random_states()
    assert_close(LayerMix(3, hidden_size=hidden_size)(states), torch.stack(states).mean(0))


def test_fixed_weights_by_hand():
    mix = LayerMix(2)
    with torch.no_grad():
        mix.logits.copy_(torch.tensor([3.0, 1.0]).log())
        mix.scale.fill_(2)
    first, second = random_states(2)
    assert_close(mix.weights(), torch.tensor([0.75, 0.25]))
    assert_close(mix([first, second]), 1.5 * first + 0.5 * second)


def test_weights_by_token_by_hand():
    mix = LayerMix(2, hidden_size=1, learned_scale=False)
    with torch.no_grad():
        mix.gate.copy_(torch.tensor([[1.0], [0.0]]))
    first, second = torch.tensor([[[0.0], [3.0]]]), torch.tensor([[[5.0], [4.0]]])
    share = torch.sigmoid(torch.tensor([0.0, 3.0]))
    expected_L = share * torch.tensor([0.0, 3.0]) + (1 - share) * torch.tensor([5.0, 4.0])
    assert_close(mix([first, second]), expected_L.view(1, 2, 1))


@pytest.mark.parametrize("hidden_size", [None, 4], ids=["fixed", "by token"])
def test_weights_sum_to_one_and_the_blend_follows_them(hidden_size):
    mix = LayerMix(3, hidden_size=hidden_size).double()
    for parameter in mix.parameters():
        torch.nn.init.normal_(parameter)
    states = random_states(dtype=torch.float64)
    weights = mix.weights(torch.stack(states, dim=-2)).expand(2, 5, 3)
    assert_close(weights.sum(-1), torch.ones(2, 5, dtype=torch.float64), rtol=0, atol=1e-12)
    expected_BLD = mix.scale * sum(weights[..., m, None] * state for m, state in enumerate(states))
    assert_close(mix(states), expected_BLD, rtol=0, atol=1e-12)


def test_an_extreme_logit_picks_one_layer():
    mix = LayerMix(3)
    with torch.no_grad():
        mix.logits[1] = 100
    states = random_states()
    assert torch.equal(mix(states), states[1])


@pytest.mark.parametrize("hidden_size", [None, 4], ids=["fixed", "by token"])
def test_gradients_are_right(hidden_size):
    mix = LayerMix(3, hidden_size=hidden_size).double()
    for parameter in mix.parameters():
        torch.nn.init.normal_(parameter)
    states = [state.requires_grad_() for state in random_states(dtype=torch.float64)]
    assert torch.autograd.gradcheck(lambda *inputs: mix(inputs[:3]), (*states, *mix.parameters()))


def test_without_a_learned_scale_the_logits_are_all_there_is():
    assert [name for name, _ in LayerMix(3, learned_scale=False).named_parameters()] == ["logits"]


def test_the_number_of_layers_must_match():
    with pytest.raises(ValueError, match="LayerMix of 3 layers was given 2 hidden states"):
        LayerMix(3)(random_states(2))
    with pytest.raises(ValueError, match="num_layers is 0: it must be at least 1"):
        LayerMix(0)
