import itertools
from importlib.util import find_spec

import pytest
import torch

from mixtura.config import TrainingConfig
from mixtura.diagnostics.health import live_bytes
from mixtura.training.optimization import (
    Muon,
    build_optimizer,
    build_schedule,
    clip_gradients,
    learning_rate_factor,
    orthogonalize,
    warmup_steps,
)


def test_the_rate_rises_linearly_to_the_peak_and_ends_at_the_minimum():
    factors = [learning_rate_factor(i, steps=12, warmup_steps=4, minimum=0.1) for i in range(12)]
    assert factors[:4] == pytest.approx([0.25, 0.5, 0.75, 1.0])
    assert factors[7] == pytest.approx(0.55)  # half way down
    assert factors[-1] == pytest.approx(0.1)
    assert all(a > b for a, b in itertools.pairwise(factors[3:]))


def test_wsd_holds_the_peak_and_then_falls_linearly():
    factors = [learning_rate_factor(i, steps=10, warmup_steps=2, minimum=0.1, decay_fraction=0.3) for i in range(10)]
    assert factors == pytest.approx([0.5, 1, 1, 1, 1, 1, 1, 0.7, 0.4, 0.1])
    assert learning_rate_factor(9, steps=10, warmup_steps=2, minimum=0.1, decay_fraction=0.0) == pytest.approx(0.1)


def test_muon_moves_the_matrices_of_layers_and_no_router(tiny_model):
    model = tiny_model("token_choice", num_shared_experts=1, gated=True)
    optimizer = build_optimizer(model, TrainingConfig(optimizer="muon"), learning_rate=1e-3)
    matrices = {id(p): group["matrices"] for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        inside = not any(word in name for word in ("embed", "lm_head", "norm", "mlp.gate.weight"))
        assert matrices[id(parameter)] == (0 if not inside else 2 if "gate_up_proj" in name else 1), name


def test_muon_is_torchs_for_one_matrix_and_treats_every_expert_as_one():
    """torch multiplies in bfloat16; every matrix of a stack, gate and up apart, moves as it would alone."""
    start, grads = torch.randn(3, 8, 6), [torch.randn(3, 8, 6) for _ in range(3)]
    stacked = torch.nn.Parameter(start.clone())
    single = [torch.nn.Parameter(half.clone()) for expert in start for half in expert.chunk(2)]
    ours = Muon([{"params": [stacked], "matrices": 2, "weight_decay": 0.1}], lr=0.01, betas=(0.9, 0.95))
    theirs = torch.optim.Muon(single, lr=0.01, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    for grad in grads:
        stacked.grad = grad.clone()
        for parameter, part in zip(single, (half for expert in grad for half in expert.chunk(2)), strict=True):
            parameter.grad = part.clone()
        ours.step()
        theirs.step()
    moved = torch.stack([torch.cat(single[i : i + 2]) for i in range(0, 6, 2)]) - start
    assert (stacked - start - moved).norm() < 0.02 * moved.norm()


@pytest.mark.parametrize("shape", [(3, 4, 9), (2, 9, 4)], ids=["wide", "tall"])
def test_newton_and_schulz_bring_singular_values_to_about_one_in_every_matrix(shape):
    values = torch.linalg.svdvals(orthogonalize(torch.randn(shape, dtype=torch.float64)))
    assert values.min() > 0.5 and values.max() < 1.3


def test_what_muon_does_not_move_moves_as_by_adamw(tiny_model):
    moved = []
    for name in ("adamw", "muon"):
        model, _, before = step_with(tiny_model, name)
        moved.append(model.model.embed_tokens.weight - before[0])
    torch.testing.assert_close(moved[0], moved[1], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("warmup", [0, 3])
def test_a_schedule_of_few_steps_stays_within_the_peak(warmup):
    factors = [learning_rate_factor(i, steps=3, warmup_steps=warmup, minimum=0.0) for i in range(4)]
    assert all(0 <= factor <= 1 for factor in factors)


def test_warmup_never_exceeds_the_run():
    assert warmup_steps(TrainingConfig(steps=10, warmup_fraction=3.0)) == 10


def test_only_matrices_decay(tiny_model):
    model = tiny_model("token_choice")
    optimizer = build_optimizer(model, TrainingConfig(weight_decay=0.3, adam_beta2=0.9), learning_rate=1.0)
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        assert decay[id(parameter)] == (0.0 if "norm" in name else 0.3), name
    assert optimizer.param_groups[0]["betas"] == (0.9, 0.9)


def step_with(tiny_model, name):
    torch.manual_seed(0)
    model = tiny_model("mixture_of_tokens", hidden_size=64, moe_intermediate_size=128)
    optimizer = build_optimizer(model, TrainingConfig(optimizer=name), learning_rate=1e-3)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    return model, optimizer, before


@pytest.mark.parametrize(
    ("name", "most_bytes_a_parameter"),
    [
        pytest.param("adamw", 8.1, id="adamw"),
        pytest.param(
            "adamw_8bit",
            3.0,
            id="adamw_8bit",
            marks=pytest.mark.skipif(find_spec("torchao") is None, reason="torchao is not installed"),
        ),
        pytest.param("adafactor", 0.2, id="adafactor"),
        pytest.param("muon", 4.7, id="muon"),
    ],
)
def test_every_optimizer_moves_all_parameters_and_keeps_no_more_than_it_says(tiny_model, name, most_bytes_a_parameter):
    model, optimizer, before = step_with(tiny_model, name)
    assert all((new != old).any() for new, old in zip(model.parameters(), before, strict=True))
    kept = live_bytes(model, optimizer) - live_bytes(model)
    assert 0 < kept <= most_bytes_a_parameter * sum(parameter.numel() for parameter in model.parameters())


def test_adafactor_factors_every_expert_by_itself(tiny_model):
    model, optimizer, _ = step_with(tiny_model, "adafactor")
    experts = model.mixture_layers()[0].experts.down_proj
    state = optimizer.state[experts]
    assert state["row_var"].shape == (*experts.shape[:2], 1) and state["col_var"].shape[0] == len(experts)


def test_the_schedule_scales_the_optimizers_rate(tiny_model):
    config = TrainingConfig(steps=10, warmup_fraction=0.2)
    optimizer = build_optimizer(tiny_model(), config, learning_rate=2.0)
    schedule = build_schedule(optimizer, config)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(1.0)
    optimizer.step()
    schedule.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(2.0)


def test_the_schedules_state_is_loadable_without_pickle(tiny_model, tmp_path):
    config = TrainingConfig(steps=10)
    schedule = build_schedule(build_optimizer(tiny_model(), config, learning_rate=1.0), config)
    torch.save(schedule.state_dict(), tmp_path / "scheduler.pt")
    assert torch.load(tmp_path / "scheduler.pt", weights_only=True)["last_epoch"] == 0


@pytest.mark.parametrize("size", [0.0, 0.05, 0.5, 2.0, float("nan"), float("inf")])
def test_clipping_is_torchs_to_the_bit(size):
    torch.manual_seed(0)
    gradients = [size * torch.randn(3, 4), size * torch.randn(5)]

    def clipped(clip):
        parameters = [torch.nn.Parameter(torch.zeros_like(gradient)) for gradient in gradients]
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient.clone()
        norm = clip([*parameters, torch.nn.Parameter(torch.zeros(2))], 1.0)
        return [norm, *(parameter.grad for parameter in parameters)]

    for ours, theirs in zip(clipped(clip_gradients), clipped(torch.nn.utils.clip_grad_norm_), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)


def test_gradients_within_the_bound_are_not_touched():
    parameter = torch.nn.Parameter(torch.zeros(3))
    parameter.grad = torch.full((3,), 0.1)
    before = parameter.grad._version
    clip_gradients([parameter], 1.0)
    assert parameter.grad._version == before
    clip_gradients([parameter], 0.1)
    assert parameter.grad._version > before
    assert parameter.grad.norm() == pytest.approx(0.1, rel=1e-4)
