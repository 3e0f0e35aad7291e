"""Whole training steps, and what is charged to each part of them."""

import pytest
import torch

from mixtura.benchmarks.contenders import Size
from mixtura.benchmarks.whole_steps import PARTS, PartClock, model_of, training_step, training_step_by_part
from mixtura.planning import flops_ratio

SIZE = Size(tokens=64, hidden=32, experts=4, top_k=2)
FAMILIES = ("dense", "token_choice", "mixture_of_tokens")


def model(family):
    torch.manual_seed(0)
    return model_of(family, SIZE, layers=2, heads=2, vocab_size=64)


def ids():
    return torch.randint(64, (SIZE.batch, SIZE.length), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("family", FAMILIES)
def test_models_cost_what_the_dense_one_costs(family):
    ratio = flops_ratio(model(family).config, baseline=model("dense").config, sequence_length=SIZE.length)
    assert ratio == pytest.approx(1.0, abs=0.03)


@pytest.mark.parametrize("family", FAMILIES)
def test_timing_the_parts_changes_no_number(family):
    plain, timed = model(family), model(family)
    step, step_by_part = (
        training_step(plain, ids(), max_grad_norm=1.0),
        training_step_by_part(timed, ids(), max_grad_norm=1.0),
    )
    for _ in range(3):
        step()
        step_by_part()
    for ours, theirs in zip(timed.parameters(), plain.parameters(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_part_is_entered_forward_and_backward(family, monkeypatch):
    entered = []
    enter = PartClock.enter
    monkeypatch.setattr(PartClock, "enter", lambda self, part: entered.append(part) or enter(self, part))
    seconds = training_step_by_part(model(family), ids(), max_grad_norm=1.0)()
    layer = ["attention", "rest", "feed-forward", "rest"]
    head = ["head and loss", "rest"]
    backward = ["feed-forward", "rest", "attention", "rest"]
    assert entered == ["rest", *2 * layer, *head, *2 * backward, "clipping", "optimizer", "rest"]
    assert set(seconds) == set(PARTS)


def test_time_is_charged_to_the_part_that_runs(monkeypatch):
    times = iter([0.0, 1.0, 3.0, 6.0, 10.0])
    monkeypatch.setattr("time.process_time", lambda: next(times))
    clock = PartClock()
    clock.start()
    clock.enter("attention")
    clock.enter("optimizer")
    assert clock.stop() == dict.fromkeys(PARTS, 0.0) | {"rest": 2.0, "attention": 3.0, "optimizer": 4.0}
