import itertools

import pytest
import torch

from mixtura.config import TrainingConfig
from mixtura.training.optimization import build_optimizer, build_schedule, learning_rate_factor, warmup_steps


def test_the_rate_rises_linearly_to_the_peak_and_ends_at_the_minimum():
    factors = [learning_rate_factor(i, steps=12, warmup_steps=4, minimum=0.1) for i in range(12)]
    assert factors[:4] == pytest.approx([0.25, 0.5, 0.75, 1.0])
    assert factors[7] == pytest.approx(0.55)  # half way down
    assert factors[-1] == pytest.approx(0.1)
    assert all(a > b for a, b in itertools.pairwise(factors[3:]))


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
