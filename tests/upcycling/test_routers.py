"""Where routers start: on the model's real inputs, spread as asked, balanced, never saturated."""

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from mixtura.checkpoints.source import open_source
from mixtura.config import UserError
from mixtura.upcycling.mixture_folder import upcycle
from mixtura.upcycling.routers import (
    GatedWeights,
    calibrated_rows,
    feed_forward_inputs,
    generator_for,
    redraw_channels,
    uncalibrated_rows,
)


@pytest.mark.parametrize("name", ["llama", "mistral, window", "qwen3"])
def test_the_streamed_inputs_are_those_of_the_model(dense, name):
    model, folder = dense(name)
    ids_NL = torch.randint(3, 300, (10, 9))
    seen = []
    for layer in model.model.layers:
        layer.mlp.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].flatten(0, 1)))
    with torch.no_grad():
        model(ids_NL)
    for layer in model.model.layers:
        layer.mlp._forward_pre_hooks.clear()
    source = open_source(str(folder))
    for depth, x_TD, _ in feed_forward_inputs(source.config, source.weights.read, ids_NL):
        assert_close(x_TD, seen[depth], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["random", "clusters"])
def test_logits_have_the_spread_that_was_asked_for_and_no_common_part(kind):
    x_TD = torch.randn(500, 16) + 3.0
    start = calibrated_rows([x_TD], kind=kind, copies=4, spread=0.7, generator=generator_for(0))
    logits_TC = x_TD @ start.rows_CD.T
    assert_close(logits_TC.std(1, correction=0).mean(), torch.tensor(0.7), rtol=1e-3, atol=1e-3)
    assert start.spread == pytest.approx(0.7, rel=1e-3)
    assert_close(logits_TC.mean(0), torch.zeros(4), rtol=0, atol=1e-3)
    assert min(start.load_C) > 0.1, "every expert is some tokens' first choice"


def test_clusters_go_to_experts_of_their_own():
    centres = 5 * torch.eye(16)[:4]
    x_TD = (centres.repeat(50, 1) + 0.1 * torch.randn(200, 16)) + 2.0
    start = calibrated_rows([x_TD], kind="clusters", copies=4, spread=1.0, generator=generator_for(0))
    choice_T = (x_TD @ start.rows_CD.T).argmax(1).view(50, 4)
    assert (choice_T == choice_T[0]).all() and sorted(choice_T[0].tolist()) == [0, 1, 2, 3]


def test_each_text_goes_to_the_expert_of_its_number():
    texts = [torch.randn(50, 16) + 3 * torch.eye(16)[number] for number in range(3)]
    start = calibrated_rows(texts, kind="texts", copies=3, spread=1.0, generator=generator_for(0))
    for number, x_TD in enumerate(texts):
        choices = (x_TD @ start.rows_CD.T).argmax(1)
        assert (choices == number).float().mean() > 0.9


def test_outliers_make_the_router_smaller_rather_than_saturated():
    x_TD = torch.randn(1000, 16)
    x_TD[:20] *= 1000
    start = calibrated_rows([x_TD], kind="random", copies=4, spread=1.0, generator=generator_for(0))
    logits_TC = x_TD @ start.rows_CD.T
    centred = (logits_TC - logits_TC.mean(1, keepdim=True)).abs().flatten()
    assert start.spread < 1.0 and centred.kthvalue(round(0.999 * 4000)).values <= 8.001


def test_without_a_text_the_norm_says_how_large_inputs_are():
    norm_D = torch.rand(256) + 0.5
    start = uncalibrated_rows(norm_D, copies=64, spread=0.5, generator=generator_for(0))
    x_TD = torch.nn.functional.rms_norm(torch.randn(300, 256), (256,), norm_D)
    assert_close((x_TD @ start.rows_CD.T).std(1).mean(), torch.tensor(0.5), rtol=0.1, atol=0)


@pytest.mark.parametrize("family", ["token_choice", "mixture_of_tokens"])
def test_a_text_shapes_the_routers_of_a_checkpoint(dense, tiny_text, tmp_path, family):
    settings = {"family": family, "num_experts": 6, "top_k": 2, "split": 2, "router": "clusters", "texts": [tiny_text]}
    result = upcycle(dense()[1], tmp_path / "out", **settings, max_text_tokens=1024)
    receipt = json.loads((result.folder / "upcycle.json").read_text())
    assert receipt["texts"][0]["name"] == tiny_text.name
    for start in receipt["starts"].values():
        assert 0 < start["router_spread"] <= 0.5 and sum(start["first_choices"]) == pytest.approx(1, abs=1e-3)


def test_texts_need_one_for_each_copy(dense, tiny_text, tmp_path):
    with pytest.raises(UserError, match="There are 1 texts for 4 copies"):
        upcycle(dense()[1], tmp_path / "out", num_experts=4, router="texts", texts=[tiny_text])


@given(share=st.floats(0, 1), width=st.integers(1, 12), seed=st.integers(0, 5))
def test_as_many_channels_are_redrawn_as_asked_the_same_in_all_matrices(share, width, seed):
    weights = GatedWeights(torch.randn(width, 3), torch.randn(width, 3), torch.randn(3, width))
    drawn = redraw_channels(weights, share, generator_for(seed))
    changed = [
        (drawn.gate_FD != weights.gate_FD).any(1),
        (drawn.up_FD != weights.up_FD).any(1),
        (drawn.down_DF != weights.down_DF).any(0),
    ]
    assert torch.equal(changed[0], changed[1]) and torch.equal(changed[0], changed[2])
    assert int(changed[0].sum()) == int(share * width)


@given(parts=st.sampled_from([1, 2, 3, 4, 6]), seed=st.integers(0, 5))
def test_the_parts_of_a_layer_add_up_to_it(parts, seed):
    generator = torch.Generator().manual_seed(seed)
    gate, up, x = (torch.randn(12, 5, generator=generator, dtype=torch.float64) for _ in range(3))
    whole = GatedWeights(gate, up, torch.randn(5, 12, generator=generator, dtype=torch.float64))

    def run(weights):
        return torch.nn.functional.silu(x @ weights.gate_FD.T) * (x @ weights.up_FD.T) @ weights.down_DF.T

    order_PF = torch.randperm(12, generator=generator).view(parts, -1)
    assert_close(sum(run(whole.channels(index)) for index in order_PF), run(whole))
