"""Formulas against real modules: parameters exactly, FLOPs as torch counts them, optimizer state as AdamW keeps it."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from mixtura.adapters.attach import apply_adapter
from mixtura.adapters.mot import set_inference_mode
from mixtura.adapters.targets import (
    RankCost,
    count_parameters,
    lora_cost,
    lora_flops,
    measured_flops_per_token,
    mixture_lora_cost,
    mixture_lora_flops,
    mot_adapter_cost,
    mot_adapter_flops,
    optimizer_state_bytes,
)
from mixtura.config import AdapterConfig
from mixtura.models.batch_context import set_task_ids

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")
MakeBase = Callable[[str], nn.Module]

D, F, LAYERS = 16, 24, 2
LINEARS = [(D, F), (D, F), (F, D)]
MIXTURES: dict[str, dict[str, Any]] = {
    "top_k": {},
    "share_a": {"router": "dense", "share_a": True},
    "threshold": {"router": "threshold"},
    "task": {"router": "task"},
    "feed_forward_top_k": {"scope": "feed_forward"},
    "feed_forward_share_a": {"scope": "feed_forward", "router": "dense", "share_a": True},
    "feed_forward_task": {"scope": "feed_forward", "router": "task"},
}


def _layers(config: AdapterConfig) -> list[list[tuple[int, int]]]:
    return [LINEARS] * LAYERS if config.scope == "feed_forward" else [[shape] for shape in LINEARS] * LAYERS


def _forward_flops(model: nn.Module) -> float:
    """FLOPs a token; the batch of four is one group."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(input_ids=torch.full((4, 6), 5))
    return counter.get_total_flops() / 24


def test_the_largest_rank_never_passes_the_limit() -> None:
    cost = RankCost(per_rank=10, fixed=5)
    assert [cost.largest_rank(limit) for limit in (14, 15, 24, 25, 100)] == [0, 1, 1, 2, 9]
    assert cost.parameters(9) == 95


def test_lora_costs_what_it_says(make_base: MakeBase) -> None:
    before = _forward_flops(make_base("llama"))
    adapted = apply_adapter(make_base("llama"), AdapterConfig(rank=3), seed=0)
    assert count_parameters(adapted)[1] == lora_cost(LINEARS * LAYERS).parameters(3)
    assert _forward_flops(adapted) - before == pytest.approx(lora_flops(LINEARS * LAYERS, rank=3))


@pytest.mark.parametrize("name", MIXTURES)
def test_mixtures_of_lora_cost_what_they_say(make_base: MakeBase, name: str) -> None:
    config = AdapterConfig(method="mixture_of_lora", rank=3, num_experts=4, **MIXTURES[name])
    before = _forward_flops(make_base("llama"))
    adapted = apply_adapter(make_base("llama"), config, num_tasks=4, seed=0).eval()
    set_task_ids(adapted, torch.arange(4))
    assert count_parameters(adapted)[1] == mixture_lora_cost(_layers(config), config, num_experts=4).parameters(3)
    expected = mixture_lora_flops(_layers(config), config, num_experts=4, rank=3)
    assert _forward_flops(adapted) - before == pytest.approx(expected)


def test_mixtures_of_tokens_cost_what_they_say(make_base: MakeBase) -> None:
    config = AdapterConfig(method="mixture_of_tokens", rank=3, num_experts=4, group_size=4)
    before = _forward_flops(make_base("llama"))
    adapted = apply_adapter(make_base("llama"), config, seed=0)
    widths = [D] * LAYERS
    assert count_parameters(adapted)[1] == mot_adapter_cost(widths, num_experts=4).parameters(3)
    for training, top_k, group_size in ((True, None, 4), (False, None, None), (False, 2, None)):
        set_inference_mode(adapted, "alone", top_k=top_k)
        expected = mot_adapter_flops(widths, num_experts=4, rank=3, group_size=group_size, alone_top_k=top_k)
        assert _forward_flops(adapted.train(training)) - before == pytest.approx(expected)


def test_flops_of_a_step_count_forward_and_backward() -> None:
    model = nn.Sequential(nn.Linear(4, 8, bias=False), nn.Linear(8, 4, bias=False))
    x = torch.randn(10, 4)
    # Forward 2 products; backward the weight gradient of both and the input gradient of the second.
    assert measured_flops_per_token(model, lambda: model(x).sum(), 10) == 5 * 2 * 4 * 8
    model[0].requires_grad_(False)
    assert measured_flops_per_token(model, lambda: model(x).sum(), 10) == 3 * 2 * 4 * 8
    assert all(parameter.grad is None for parameter in model.parameters())


def test_optimizer_state_is_what_adamw_keeps(make_base: MakeBase) -> None:
    adapted = apply_adapter(make_base("llama"), AdapterConfig(rank=2), seed=0).train()
    trained = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained)
    adapted(input_ids=torch.full((2, 3), 5))[0].sum().backward()
    optimizer.step()
    kept = [value for state in optimizer.state.values() for key, value in state.items() if key != "step"]
    assert optimizer_state_bytes(adapted) == sum(value.numel() * value.element_size() for value in kept)


def test_shared_parameters_count_once() -> None:
    model = nn.ModuleList([nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)])
    model[1].weight = model[0].weight
    assert count_parameters(model) == (9, 9)
