"""From mixture of tokens to token choice and to `alone`: what stays the same, and how outputs are scaled."""

import copy

import pytest
import torch
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

from mixtura.config import UserError
from mixtura.data.tokenizer import train_tokenizer
from mixtura.layers import TokenChoiceMoE
from mixtura.models import MixtureForCausalLM
from mixtura.models.transition import to_token_choice, transition


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


@pytest.mark.parametrize(("mixtures_per_expert", "combine"), [(1, "same"), (3, "same"), (1, "separate")])
def test_a_router_that_knows_nothing_converts_exactly(build, mixtures_per_expert, combine):
    # m = 1/G and p = 1/S for all S mixtures: with all of them the factor is S / G^2 and nothing else differs.
    model, ids = build(mixtures_per_expert=mixtures_per_expert, combine=combine), tokens()
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
    model = build(temperature=0.5)
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


def test_a_folder_is_converted_and_loads_as_any_other(build, tiny_corpus, tmp_path):
    tokenizer = train_tokenizer(tiny_corpus, vocab_size=300)
    model = build(vocab_size=len(tokenizer), mixtures_per_expert=2, population=True)
    model.save_pretrained(tmp_path / "before")
    tokenizer.save_pretrained(tmp_path / "before")
    ids = tokens()
    converted = transition(tmp_path / "before", tmp_path / "after", to="token_choice", batches=ids)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "after")
    assert loaded.config.mlp_layer_types == ["dense", "token_choice"] and loaded.config.num_experts == 8
    assert loaded.config.num_experts_per_tok == 2  # as many as it got alone
    assert_close(loaded(ids[0]).logits, converted(ids[0]).logits)
    with pytest.raises(UserError, match="is not empty: name a new folder"):
        transition(tmp_path / "before", tmp_path / "after", to="alone")
    transition(tmp_path / "before", tmp_path / "alone", to="alone")
    alone = AutoModelForCausalLM.from_pretrained(tmp_path / "alone").train()
    model.set_inference_mode("alone", top_k=2)
    with torch.no_grad():
        assert_close(alone(ids[0]).logits, model.eval()(ids[0]).logits)
    assert (alone.config.zero_fill, alone.config.inference_mode) == (1.0, "alone")


def test_what_cannot_be_converted_is_named(build, tiny_corpus, tmp_path):
    with pytest.raises(UserError, match="cannot get 5 experts of the 4 there are"):
        to_token_choice(build(), tokens(), top_k=5)
    with pytest.raises(UserError, match="no batch to compare outputs on"):
        to_token_choice(build(), [], top_k=2)
    with pytest.raises(UserError, match="has token-choice layers already"):
        to_token_choice(build(mlp_layer_types=["token_choice", "mixture_of_tokens"]), tokens(), top_k=2)
    tokenizer = train_tokenizer(tiny_corpus, vocab_size=300)
    build("dense", vocab_size=len(tokenizer)).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="has no mixture-of-tokens layer: there is nothing to convert"):
        transition(tmp_path, tmp_path / "out", to="token_choice", batches=tokens())
