"""How peaked weights are: by hand where routers are zero, and as the layer itself computes them."""

import pytest
import torch
from torch.testing import assert_close

from mixtura.config import UserError
from mixtura.diagnostics import measure_peakedness
from mixtura.models import MixtureForCausalLM


@pytest.fixture
def model(tiny_config):
    torch.manual_seed(0)
    return MixtureForCausalLM(tiny_config("mixture_of_tokens", initializer_range=0.3))


def test_a_router_that_knows_nothing_gives_every_mixture_an_even_share(model):
    torch.nn.init.zeros_(model.mixture_of_tokens_layers()[0].gate.weight)
    (found,) = measure_peakedness(model, [torch.randint(64, (3, 5))])
    assert found.layer == 1
    assert found.sorted_weights == pytest.approx([1 / 4] * 4)  # sigmoid(-ln 3): a place among four
    assert found.gate_shares == pytest.approx([1 / 4, 2 / 4, 3 / 4, 1])


def test_weights_are_those_of_every_token_alone(model):
    ids_BL, seen = torch.randint(64, (3, 5)), []
    layer = model.eval().mixture_of_tokens_layers()[0]
    hook = layer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].flatten(0, 1)))
    (found,) = measure_peakedness(model, [ids_BL[:2], ids_BL[2:]])
    hook.remove()
    m_TS = layer.weights_alone(torch.cat(seen))[0].sort(-1, descending=True).values
    assert_close(torch.tensor(found.sorted_weights), m_TS.mean(0))
    share_TS = m_TS.square().cumsum(-1) / m_TS.square().sum(-1, keepdim=True)
    assert_close(torch.tensor(found.gate_shares), share_TS.mean(0))
    assert found.sorted_weights[0] > 1.2 * found.sorted_weights[-1]


def test_the_model_is_left_as_it_was(model):
    model.train()
    measure_peakedness(model, [torch.randint(64, (3, 5))])
    assert model.training and not model.mixture_of_tokens_layers()[0]._forward_pre_hooks


def test_what_cannot_be_measured_is_named(model, tiny_config):
    with pytest.raises(UserError, match="no mixture-of-tokens layer"):
        measure_peakedness(MixtureForCausalLM(tiny_config("dense")), [])
    with pytest.raises(UserError, match="no batch to measure"):
        measure_peakedness(model, [])
