"""From mixture of tokens to token choice and to `alone`: what stays the same, and how outputs are scaled."""

import copy

import pytest
import torch
from torch.testing import assert_close

from mixtura.config import UserError
from mixtura.layers import TokenChoiceMoE
from mixtura.models import MixtureForCausalLM
from mixtura.models.transition import (
    change_to_token_choice,
    follow_transition,
    to_alone,
    to_token_choice,
    transition_due,
)


@pytest.fixture
def build(tiny_config):
    def make(family="mixture_of_tokens", **changes):
        torch.manual_seed(0)
        return MixtureForCausalLM(tiny_config(family, initializer_range=0.3, **changes)).eval()

    return make


def tokens(count=2):
    return [torch.randint(64, (4, 6)) for _ in range(count)]


def outputs(model, ids_BL):
    """What the converted layer adds, for its own model's hidden states."""
    seen = []
    hook = model.model.layers[1].mlp.register_forward_hook(lambda _, inputs, output: seen.append((inputs[0], output)))
    with torch.no_grad():
        model(ids_BL)
    hook.remove()
    return seen[0]


@pytest.mark.parametrize("shared", [0, 1], ids=["", "beside a shared expert"])
@pytest.mark.parametrize(("mixtures_per_expert", "combine"), [(1, "same"), (3, "same"), (1, "separate")])
def test_a_router_that_knows_nothing_converts_exactly(build, mixtures_per_expert, combine, shared):
    # m = 1/G and p = 1/S for all S mixtures: with all of them the factor is S / G^2 and nothing else differs.
    settings = {"mixtures_per_expert": mixtures_per_expert, "combine": combine, "num_shared_experts": shared}
    model, ids = build(**settings), tokens()
    layer = model.mixture_of_tokens_layers()[0]
    for gate in [layer.gate] + ([layer.combine_gate] if combine == "separate" else []):
        torch.nn.init.zeros_(gate.weight)
    mixtures = 4 * mixtures_per_expert
    converted = to_token_choice(model, ids, top_k=mixtures)
    after = converted.mixture_layers()[0]
    assert isinstance(after, TokenChoiceMoE) and (after.num_experts, after.top_k) == (mixtures, mixtures)
    expected = layer.experts.down_proj.repeat_interleave(mixtures_per_expert, 0) * mixtures / 4**2
    assert_close(after.experts.down_proj, expected)
    assert_close(converted(ids[0]).logits, model(ids[0]).logits)


def test_all_parameters_are_shared_but_for_the_scale_of_the_outputs(build):
    model = build(router_temperature=0.5)
    before = copy.deepcopy(model.state_dict())
    after = to_token_choice(model, tokens(), top_k=2).state_dict()
    assert set(after) == set(before)
    for name, value in before.items():
        if name.endswith("mlp.gate.weight"):
            assert_close(after[name], 2 * value)
        elif name.endswith("layers.1.mlp.experts.down_proj"):
            factor = after[name].norm() / value.norm()
            assert_close(after[name], factor * value)
            assert 0 < factor < 1
        else:
            assert torch.equal(after[name], value), name
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("activation", ["relu", "silu"])
def test_no_other_scale_brings_outputs_closer(build, activation):
    model, ids = build(hidden_act=activation), tokens()
    converted = to_token_choice(model, ids, top_k=2)
    x_BLD, y_BLD = outputs(model, torch.cat(ids))
    layer = converted.mixture_layers()[0]

    def distance(factor):
        return (factor * layer(x_BLD) - y_BLD).square().sum().item()

    assert distance(1.0) < min(distance(0.95), distance(1.05))
    assert distance(1.0) < y_BLD.square().sum()


def test_a_model_that_goes_over_to_alone_trains_as_it_answers(build):
    model, ids_BL = build(zero_fill=0.25, zero_fill_unit="step", inference_mode="group"), tokens(1)[0]
    to_alone(model, top_k=3)
    assert (model.config.zero_fill, model.config.inference_mode, model.config.alone_top_k) == (1.0, "alone", 3)
    assert torch.equal(model.train()(ids_BL).logits, model.eval()(ids_BL).logits)


# What saving adds to a configuration.
SAVED = {"architectures": None, "dtype": None}
PLAN = {"transition_to": "token_choice", "transition_fraction": 0.25, "alone_top_k": 2}


def test_the_last_share_of_the_steps_is_due_for_a_change(build):
    model = build(**PLAN)
    assert [transition_due(model, step, steps=8) for step in range(8)] == [False] * 6 + [True] * 2
    assert not transition_due(build(), 8, steps=8)


def test_a_change_where_it_stands_is_the_conversion_with_the_tensors_of_before(build):
    model, ids = build(router_temperature=0.5, **PLAN), tokens()
    before, expected = dict(model.named_parameters()), to_token_choice(model, ids, top_k=2)
    state = torch.get_rng_state()
    change_to_token_choice(model.train(), ids)
    assert torch.equal(torch.get_rng_state(), state)
    assert list(dict(model.named_parameters())) == list(before)
    assert all(value is before[name] for name, value in model.named_parameters())
    assert_close(model(ids[0]).logits, expected(ids[0]).logits, rtol=0, atol=0)
    # What is left of the two configurations is the same but for where they came from.
    assert model.config.to_dict() == expected.config.to_dict()
    assert (model.config.transition_to, model.config.num_experts_per_tok) == (None, 2)


def test_products_of_all_ranks_make_one_factor(build):
    ids = tokens()
    together = to_token_choice(build(), ids, top_k=2)
    seen = []
    to_token_choice(build(), ids[1:], top_k=2, add_up=lambda products: seen.append(products) or products)
    apart = to_token_choice(build(), ids[:1], top_k=2, add_up=lambda products: products + seen[0])
    for name, value in together.state_dict().items():
        assert_close(apart.state_dict()[name], value, rtol=1e-5, atol=1e-6)


def test_a_model_takes_the_layers_of_what_was_saved_after_its_change(build, tmp_path):
    model, again, ids = build(**PLAN), build(**PLAN), tokens()
    follow_transition(again, tmp_path)  # nothing is there
    model.save_pretrained(tmp_path)
    follow_transition(again, tmp_path)
    assert again.mixture_of_tokens_layers()
    change_to_token_choice(model, ids)
    model.save_pretrained(tmp_path)
    follow_transition(again, tmp_path)
    again.load_state_dict(model.state_dict())
    assert_close(again(ids[0]).logits, model.eval()(ids[0]).logits)
    assert again.config.to_diff_dict() | SAVED == model.config.to_diff_dict() | SAVED


def test_what_cannot_be_converted_is_named(build):
    with pytest.raises(UserError, match="cannot get 5 experts of the 4 there are"):
        to_token_choice(build(), tokens(), top_k=5)
    with pytest.raises(UserError, match="no batch to compare outputs on"):
        to_token_choice(build(), [], top_k=2)
    with pytest.raises(UserError, match="has token-choice layers already"):
        to_token_choice(build(mlp_layer_types=["token_choice", "mixture_of_tokens"]), tokens(), top_k=2)
