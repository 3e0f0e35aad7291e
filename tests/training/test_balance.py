import pytest
import torch
from torch import nn

from mixtura.layers import RoutingStats
from mixtura.training.balance import (
    Load,
    add_totals,
    load_report,
    micro_batch_totals,
    reduce_totals,
    update_expert_bias,
    with_load,
)


def stats(load, *, dropped=0.0, entropy=0.5):
    load_E = torch.tensor(load)
    return RoutingStats(
        tokens_per_expert_E=load_E,
        importance_E=(load_E / load_E.sum()).requires_grad_(),
        router_z_loss=torch.tensor(2.0),
        dropped_tokens=torch.tensor(dropped),
        routed_rows=load_E.sum(),
        entropy=torch.tensor(entropy),
        sequence_loss=torch.tensor(0.0),
    )


def totals(load, *, share=1.0, **settings):
    layer = stats(load, **settings)
    return micro_batch_totals(torch.tensor(3.0), torch.tensor(1.5), torch.tensor(2.0), [None, layer], share=share)


def test_a_step_sums_loads_and_averages_router_losses_over_its_micro_batches():
    step = add_totals(add_totals(None, totals([3.0, 1.0], share=0.5)), totals([1.0, 3.0], share=0.5))
    assert step.tokens_per_expert_ME.tolist() == [[4.0, 4.0]]
    assert (step.aux_loss.item(), step.z_loss.item(), step.entropy_M.tolist()) == (1.5, 2.0, [0.5])
    assert step.task_loss.item() == 6.0  # its micro-batches are summands already
    assert not any(part.requires_grad for part in step)


def test_a_model_without_mixtures_has_empty_totals():
    empty = micro_batch_totals(torch.tensor(3.0), None, None, [None, None], share=1.0)
    assert empty.tokens_per_expert_ME.numel() == 0
    assert empty.aux_loss.item() == 0.0
    assert load_report(add_totals(empty, empty), steps=2, layers=[]) == {}


def test_ranks_are_summed_in_one_exchange():
    calls = []

    def twice(flat):
        calls.append(flat)
        return 2 * flat

    reduced = reduce_totals(totals([3.0, 1.0], dropped=1.0), twice)
    assert len(calls) == 1
    assert reduced.tokens_per_expert_ME.tolist() == [[6.0, 2.0]]
    assert (reduced.task_loss.item(), reduced.dropped_M.tolist()) == (6.0, [2.0])
    assert reduced.task_loss.shape == ()


def test_a_load_from_elsewhere_replaces_that_of_the_micro_batch_alone():
    layer = stats([3.0, 1.0])
    none, replaced = with_load([None, layer], Load(torch.tensor([[5.0, 5.0]]), torch.tensor([10.0])))
    assert none is None
    assert replaced.routed_rows == 10.0
    assert replaced.tokens_per_expert_E.tolist() == [5.0, 5.0]
    assert replaced.importance_E is layer.importance_E


def test_the_bias_of_an_overloaded_expert_falls_by_exactly_the_rate():
    layer = nn.Module()
    layer.register_buffer("expert_bias", torch.zeros(4))
    update_expert_bias([layer], torch.tensor([[7.0, 1.0, 4.0, 4.0]]), rate=0.125)
    assert layer.expert_bias.tolist() == [-0.125, 0.125, 0.0, 0.0]


def test_a_layer_without_a_bias_is_left_alone():
    layer = nn.Module()
    layer.register_buffer("expert_bias", None)
    update_expert_bias([layer, nn.Module()], torch.tensor([[7.0, 1.0], [1.0, 7.0]]), rate=0.1)
    assert layer.expert_bias is None


def test_the_report_has_shares_that_sum_to_one():
    both = add_totals(totals([6.0, 2.0], dropped=1.0, entropy=0.4), totals([0.0, 8.0], dropped=3.0, entropy=0.6))
    report = load_report(both, steps=2, layers=[1])
    assert report["load"] == [[0.375, 0.625]]
    assert report["layers"] == [1]
    assert report["dropped_share"] == pytest.approx(0.25)
    assert report["router_entropy"] == pytest.approx(0.5)
