"""Which layers run without groups at which step."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mixtura.models import MixtureConfig, MixtureForCausalLM
from mixtura.models.inference import shares_alone, step_kinds


def schedule(share, unit, *, steps=32, layers=3, last_fraction=0.0):
    config = MixtureConfig(zero_fill=share, zero_fill_unit=unit, alone_fraction=last_fraction)
    return [shares_alone(config, step, steps=steps, layers=layers) for step in range(steps)]


def test_groups_leave_at_every_step_and_layer():
    assert schedule(0.25, "group") == [[0.25] * 3] * 32


def test_steps_alone_are_whole_and_evenly_spread():
    assert schedule(0.25, "step", steps=8, layers=2) == [[0.0] * 2] * 3 + [[1.0] * 2] + [[0.0] * 2] * 3 + [[1.0] * 2]
    assert [at for at, (first, *_) in enumerate(schedule(0.4, "step", steps=10)) if first] == [2, 4, 7, 9]


@given(share=st.floats(0, 1), steps=st.integers(1, 300))
def test_any_stretch_of_steps_has_its_part_up_to_one(share, steps):
    taken = 0
    for step, (value,) in enumerate(schedule(share, "step", steps=steps, layers=1), 1):
        taken += value
        assert abs(taken - share * step) < 1 + 1e-9


def test_layers_are_drawn_apart_at_the_share_asked_for():
    drawn = torch.tensor(schedule(0.25, "layer", steps=4000))
    assert set(drawn.unique().tolist()) == {0.0, 1.0}
    assert ((drawn.mean(0) - 0.25).abs() < 3 * (0.25 * 0.75 / 4000) ** 0.5).all()  # three standard errors
    both = (drawn[:, 0] * drawn[:, 1]).mean()
    assert abs(both - 0.0625) < 3 * (0.0625 * 0.9375 / 4000) ** 0.5


@pytest.mark.parametrize("unit", ["group", "layer", "step"])
def test_all_and_nothing_are_what_they_say(unit):
    assert schedule(1.0, unit) == [[1.0] * 3] * 32
    assert schedule(0.0, unit) == [[0.0] * 3] * 32
    assert schedule(0.0, unit, last_fraction=0.25) == [[0.0] * 3] * 24 + [[1.0] * 3] * 8


def test_steps_beyond_the_last_one_are_in_groups_where_none_was_to_be_alone():
    config = MixtureConfig(zero_fill=0.25)
    assert shares_alone(config, 40, steps=32, layers=3) == [0.25] * 3
    last = MixtureConfig(zero_fill=0.25, alone_fraction=0.25)
    assert shares_alone(last, 40, steps=32, layers=3) == [1.0] * 3


def test_a_temperature_falls_in_equal_ratios_and_ends_at_that_of_the_finished_model():
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 16, "moe_intermediate_size": 12, "num_experts": 4, "group_size": 4}
    shape = {"num_hidden_layers": 2, "num_attention_heads": 2, "mlp_layer_types": ["mixture_of_tokens"] * 2}
    model = MixtureForCausalLM(MixtureConfig(**sizes, **shape, first_temperature=8.0, router_temperature=0.5))
    layers, seen = model.mixture_of_tokens_layers(), []
    assert [layer.temperature for layer in layers] == [0.5, 0.5]  # whoever loads it has the finished model
    for step in range(5):
        model.prepare_step(step, steps=4)
        seen.append([layer.temperature for layer in layers])
    assert seen == [[value] * 2 for value in (8.0, 4.0, 2.0, 1.0, 0.5)]
    model.prepare_step(9, steps=4)
    assert layers[0].temperature == 0.5


def build(unit, *, share=0.5):
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 16, "moe_intermediate_size": 12, "num_experts": 4, "group_size": 4}
    shape = {"num_hidden_layers": 3, "num_attention_heads": 2, "mlp_layer_types": ["mixture_of_tokens"] * 3}
    config = MixtureConfig(**sizes, **shape, initializer_range=0.3, zero_fill=share, zero_fill_unit=unit)
    return MixtureForCausalLM(config)


def test_a_step_alone_equals_the_deployed_model_and_the_others_the_groups():
    model, ids_BL = build("step"), torch.randint(64, (4, 6))
    expected = {}
    for mode in ("group", "alone"):
        model.eval().set_inference_mode(mode, top_k=2)
        expected[mode] = model(ids_BL).logits
    for step, mode in enumerate(["group", "alone"] * 2):
        model.train().prepare_step(step, steps=10)
        assert torch.equal(model(ids_BL).logits, expected[mode])


def test_a_layer_that_was_drawn_runs_wholly_alone_and_the_others_in_groups():
    model, x_BLD = build("layer"), torch.randn(4, 6, 16)
    seen = set()
    for step in range(12):
        model.train().prepare_step(step, steps=12)
        shares = shares_alone(model.config, step, steps=12, layers=3)
        for layer, share in zip(model.mixture_of_tokens_layers(), shares, strict=True):
            y_BLD = layer.train()(x_BLD)
            layer.eval().set_inference_mode("alone" if share else "group", top_k=2)
            assert torch.equal(layer(x_BLD), y_BLD)
        seen.add(tuple(shares))
    assert len(seen) > 3


@pytest.mark.parametrize("unit", ["layer", "step"])
def test_nothing_is_drawn_from_torchs_random_state(unit):
    model, state = build(unit), torch.get_rng_state()
    for step in range(4):
        model.train().prepare_step(step, steps=4)
        model(torch.zeros(4, 6, dtype=torch.long))
    assert torch.equal(torch.get_rng_state(), state)


def test_a_trainer_that_prepares_no_step_leaves_a_share_of_the_groups_empty():
    assert [layer.zero_fill for layer in build("step", share=0.25).mixture_of_tokens_layers()] == [0.25] * 3


@pytest.mark.parametrize(
    ("settings", "kinds"),
    [
        ({}, [(1.0, 0.0)]),
        ({"zero_fill": 0.25}, [(1.0, 0.25)]),
        ({"zero_fill": 0.25, "zero_fill_unit": "step"}, [(0.75, 0.0), (0.25, 1.0)]),
        ({"zero_fill": 0.25, "alone_fraction": 0.1}, [(0.9, 0.25), (0.1, 1.0)]),
        ({"transition_to": "token_choice", "transition_fraction": 0.2}, [(0.8, 0.0), (0.2, 1.0)]),
    ],
    ids=["in groups", "empty groups", "empty steps", "the last steps alone", "the last steps token choice"],
)
def test_a_run_is_made_of_kinds_of_steps(settings, kinds):
    assert step_kinds(MixtureConfig(**settings), steps=20) == kinds
