"""Other libraries' experts in place of Mixtura's kernels: the same numbers, or one sentence that says why not."""

import dataclasses
from functools import partial

import pytest
import torch
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, GptOssConfig, MixtralConfig

from mixtura import kernels
from mixtura.comparison.plan import check_arms
from mixtura.comparison.verbs import train
from mixtura.config import TrainingConfig, UserError
from mixtura.data.prepare import prepare_data
from mixtura.kernels import ExpertWeights, reference
from mixtura.models import MixtureForCausalLM, experts_backends
from mixtura.models.experts_backends import NAMES, backend, unavailable, use_experts_backend
from mixtura.tasks.language_modelling.experiment import Pretraining

CPU, ON_CPU = torch.device("cpu"), ("eager", "grouped_mm", "batched_mm")
use = partial(use_experts_backend, device=CPU, dtype="float32")
IDS_BL = torch.arange(3, 35).view(4, 8)


def given(dtype, *, gated):
    torch.manual_seed(0)
    up_EHD, down_EDF = torch.randn(6, 32 if gated else 16, 8) / 3, torch.randn(6, 8, 16) / 4
    x_TD, weight_TK = torch.randn(20, 8), torch.rand(20, 2)
    leaves = [each.to(dtype).requires_grad_() for each in (x_TD, weight_TK, up_EHD, down_EDF)]
    # The last expert has no token.
    return leaves, torch.rand(20, 5).topk(2).indices


def outputs(run, leaves, *choices, activation, gated):
    x_TD, weight_TK, up_EHD, down_EDF = leaves
    y_TD = run(x_TD, *choices, weight_TK, ExpertWeights(up_EHD, down_EDF, activation, gated))
    return [y_TD, *torch.autograd.grad((y_TD * torch.linspace(-1, 1, y_TD.numel()).view_as(y_TD)).sum(), leaves)]


@pytest.mark.parametrize("activation", ["relu", "gelu", "silu"])
@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("name", ON_CPU)
def test_output_and_every_gradient_are_the_references(name, gated, activation):
    leaves, choice_TK = given(torch.float64, gated=gated)

    def defined(x_TD, weight_TK, experts):
        token_R, weight_R, rows_E, _ = kernels.rows_by_expert(choice_TK, weight_TK, 6)
        return reference.sparse_ffn(x_TD, token_R, weight_R, rows_E, experts)

    expected = outputs(defined, leaves, activation=activation, gated=gated)
    dtype = torch.float32 if name == "grouped_mm" else torch.float64
    leaves, choice_TK = given(dtype, gated=gated)
    found = outputs(backend(name), leaves, choice_TK, activation=activation, gated=gated)
    tolerance = {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {}
    assert_close([each.double() for each in found], expected, **tolerance)


@pytest.mark.parametrize("settings", [{}, {"num_shared_experts": 1, "gated": True}, {"dense_router_gradient": True}])
@pytest.mark.parametrize("name", ON_CPU)
def test_a_model_has_the_same_loss_gradients_and_load(tiny_config, name, settings):
    mask_BL = torch.ones_like(IDS_BL)
    mask_BL[1, :3] = 0
    found = []
    for chosen in ("auto", name):
        torch.manual_seed(0)
        model = MixtureForCausalLM(tiny_config("token_choice", **settings)).train()
        before = torch.random.get_rng_state()
        assert use(model, chosen) == (chosen != "auto")
        assert torch.equal(before, torch.random.get_rng_state())
        out = model(IDS_BL, attention_mask=mask_BL, labels=IDS_BL, output_routing=True)
        out.loss.backward()
        gradients = {key: value.grad for key, value in model.named_parameters()}
        found.append((out.loss.detach(), gradients, out.routing[1].tokens_per_expert_E.double()))
        assert model(IDS_BL, use_cache=False).logits.isfinite().all()
    assert_close(found[1], found[0], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ON_CPU)
def test_a_stock_mixture_is_told_too(name):
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "num_local_experts": 4}
    model = AutoModelForCausalLM.from_config(MixtralConfig(**sizes, **heads))
    expected = model(IDS_BL).logits
    assert use(model, name) and model.get_experts_implementation()[""] == name
    assert_close(model(IDS_BL).logits, expected, rtol=1e-4, atol=1e-5)


def test_experts_that_only_transformers_computes_are_told_without_a_trial():
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 1, "head_dim": 16}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "num_local_experts": 4}
    model = AutoModelForCausalLM.from_config(GptOssConfig(**sizes, **heads))
    assert use(model, "eager") and model.get_experts_implementation()[""] == "eager"


def test_what_no_gpu_or_package_is_there_for_is_refused_in_a_sentence(tiny_config, monkeypatch):
    model = MixtureForCausalLM(tiny_config("token_choice"))
    monkeypatch.setattr(experts_backends, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"is 'sonicmoe', which needs the package kernels .*: set it to \"auto\"\.$"):
        use(model, "sonicmoe")
    monkeypatch.setattr(experts_backends, "find_spec", lambda name: name)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="is 'scattermoe', which runs on CUDA devices only"):
        use(model, "scattermoe")
    assert [name for name in NAMES if unavailable(name) is None] == ["auto", *ON_CPU]


def test_sizes_that_a_backend_cannot_take_are_refused_before_training(tiny_config):
    model = MixtureForCausalLM(tiny_config("token_choice", moe_intermediate_size=7))
    with pytest.raises(UserError, match=r"'grouped_mm', which cannot compute these experts \(.*\): set it"):
        use(model, "grouped_mm")


def test_a_backend_with_wrong_numbers_is_refused(tiny_config, monkeypatch):
    wrong = experts_backends._eager
    monkeypatch.setattr(experts_backends, "backend", lambda name: lambda *given: 1.01 * wrong(*given))
    with pytest.raises(UserError, match=r"'batched_mm', whose results here are off by 1\.0e-02"):
        use(MixtureForCausalLM(tiny_config("token_choice")), "batched_mm")


@pytest.mark.parametrize("settings", [{"capacity_factor": 1.0}, {"zero_experts": 1}])
def test_layers_that_need_mixturas_kernels_are_refused(tiny_config, settings):
    with pytest.raises(UserError, match=r"token choice with (a capacity|free experts) runs on Mixtura's kernels alone"):
        use(MixtureForCausalLM(tiny_config("token_choice", **settings)), "eager")


def test_a_comparison_without_experts_that_tokens_choose_is_refused(tiny_recipe):
    recipe = tiny_recipe()
    arms = Pretraining(recipe, prepare_data(recipe.data, cache_dir=None)).arms
    check_arms(arms, recipe.training)
    with pytest.raises(UserError, match=r"'training.experts_backend' is 'eager', but no arm has experts that tokens"):
        check_arms(arms, dataclasses.replace(recipe.training, experts_backend="eager"))


def test_the_setting_offers_every_backend():
    assert TrainingConfig().experts_backend == "auto" == NAMES[0]


def test_a_run_on_a_backend_learns_what_it_learns_on_the_kernels(tiny_recipe, tmp_path):
    arms = {"dense": {"family": "dense"}, "token_choice": {"family": "token_choice", "num_experts": 4}}
    losses = []
    for name in ("auto", "grouped_mm"):
        run = train(tiny_recipe(arms=arms, experts_backend=name), arm="token_choice", out=tmp_path / name)
        losses.append([measures["loss"] for measures in run.result.final.values()])
    assert_close(losses[1], losses[0], rtol=1e-4, atol=0)
