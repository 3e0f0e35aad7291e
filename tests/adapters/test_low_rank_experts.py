"""Gates by hand, updates and whole adapters against token-by-token references in float64, output and gradients."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mixtura.adapters.attach import apply_adapter, router_losses
from mixtura.adapters.low_rank_experts import (
    Gates,
    LowRankExperts,
    low_rank_update,
    routing_statistics,
    threshold_weights,
    top_k_weights,
)
from mixtura.adapters.mixture_lora import MixtureLoraFeedForward, MixtureLoraLinear
from mixtura.adapters.mot import MotAdapterLayer, set_inference_mode
from mixtura.config import AdapterConfig
from mixtura.diagnostics.choices import record_choices
from mixtura.models.batch_context import set_task_ids

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")
MakeBase = Callable[[str], nn.Module]


def test_top_k_weights_keep_the_best_and_sum_to_one() -> None:
    probs_TE = torch.tensor([[0.5, 0.1, 0.3, 0.1]])
    torch.testing.assert_close(top_k_weights(probs_TE, 2, normalize=True), torch.tensor([[0.625, 0, 0.375, 0]]))
    torch.testing.assert_close(top_k_weights(probs_TE, 2, normalize=False), torch.tensor([[0.5, 0, 0.3, 0]]))


def test_threshold_weights_share_what_exceeds_the_threshold() -> None:
    probs_TE = torch.tensor([[0.5, 0.1, 0.3, 0.1]])
    weight_TE = threshold_weights(probs_TE, torch.tensor([[0.2]]))
    torch.testing.assert_close(weight_TE, torch.tensor([[0.75, 0, 0.25, 0]]))


def test_an_update_is_the_weighted_sum_of_the_experts_products() -> None:
    x_TI = torch.tensor([[1.0, 2.0]])
    a_ERI = torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]]])  # the first expert reads 1, the second 2
    b_EOR = torch.tensor([[[1.0], [0.0]], [[0.0], [10.0]]])
    y_TO = low_rank_update(x_TI, a_ERI, b_EOR, torch.tensor([[0.5, 0.25]]))
    torch.testing.assert_close(y_TO, torch.tensor([[0.5, 5.0]]))
    shared_TO = low_rank_update(x_TI, a_ERI[:1], b_EOR, torch.tensor([[0.5, 0.25]]))
    torch.testing.assert_close(shared_TO, torch.tensor([[0.5, 2.5]]))


def test_statistics_leave_padding_out() -> None:
    probs_TE = torch.tensor([[0.75, 0.25], [0.25, 0.75], [0.5, 0.5]])
    gates = Gates(torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]]), probs_TE, probs_TE.log())
    stats = routing_statistics(gates, torch.tensor([True, True, False]))
    assert stats.tokens_per_expert_E.tolist() == [1.0, 1.0]
    torch.testing.assert_close(stats.importance_E, torch.tensor([0.5, 0.5]))
    assert stats.routed_rows == 2 and stats.router_z_loss < 1e-10


def test_padding_does_not_say_whether_a_router_chooses() -> None:
    weight_TE = torch.tensor([[0.75, 0.25], [0.5, 0.5], [1.0, 0.0]])
    stats = routing_statistics(Gates(weight_TE, weight_TE, None), torch.tensor([True, True, False]))
    assert stats.tokens_per_expert_E.tolist() == [1.25, 0.75]


@pytest.mark.parametrize("num_tasks", [None, 3])
def test_a_task_is_its_expert_or_has_learned_weights(num_tasks: int | None) -> None:
    experts = LowRankExperts(
        {"linear": (4, 4)}, router_width=4, router="task", num_experts=2, rank=1, alpha=1.0, num_tasks=num_tasks
    )
    weight_TE = experts.gates(torch.zeros(3, 4), torch.tensor([0, 1, 1])).weight_TE
    expected_TE = torch.tensor([[1.0, 0], [0, 1], [0, 1]])
    if num_tasks is not None:
        expected_TE = experts.task_logits.softmax(-1)[[0, 1, 1]]
    torch.testing.assert_close(weight_TE, expected_TE)


def _token_weights(experts: LowRankExperts, x_D: Tensor, task: int) -> list[Tensor]:
    """The weights of the experts for one token, in the words of the papers."""
    if experts.router == "task":
        return [torch.tensor(float(expert == task), dtype=x_D.dtype) for expert in range(experts.num_experts)]
    scores = [(row_D * x_D).sum() for row_D in experts.gate.weight]
    total = sum(score.exp() for score in scores)
    probs = [score.exp() / total for score in scores]
    if experts.router == "dense":
        return probs
    if experts.router == "top_k":
        best = sorted(range(len(probs)), key=lambda e: -float(probs[e].detach()))[: experts.top_k]
        return [probs[e] / sum(probs[b] for b in best) if e in best else torch.zeros_like(probs[e]) for e in range(4)]
    value = (experts.threshold.weight[0] * x_D).sum() + experts.threshold.bias[0]
    threshold = torch.sigmoid(value) / len(probs)
    margins = [torch.relu(prob - threshold) for prob in probs]
    return [margin / sum(margins) for margin in margins]


def _delta(experts: LowRankExperts, name: str, expert: int) -> Tensor:
    a_RI = experts.A[name][expert if len(experts.A[name]) > 1 else 0]
    return experts.scale * experts.B[name][expert] @ a_RI


def _linear_reference(layer: MixtureLoraLinear, x_BLD: Tensor, tasks: Tensor) -> Tensor:
    base: Any = layer.base_layer
    experts: Any = layer.mixture_lora_experts["default"]
    rows = []
    for x_LD, task in zip(x_BLD, tasks.tolist(), strict=True):
        for x_D in x_LD:
            weights = _token_weights(experts, x_D, task)
            total = sum(weight * _delta(experts, "linear", e) for e, weight in enumerate(weights))
            rows.append(F.linear(x_D, base.weight + total, base.bias))
    return torch.stack(rows).view(*x_BLD.shape[:2], -1)


def _feed_forward_reference(layer: MixtureLoraFeedForward, x_BLD: Tensor, tasks: Tensor) -> Tensor:
    parts: Any = layer.parts
    experts: Any = layer.mixture_lora_experts["default"]

    def changed(name: str, expert: int, x_D: Tensor) -> Tensor:
        linear = getattr(parts, name)
        return F.linear(x_D, linear.weight + _delta(experts, name, expert), linear.bias)

    rows = []
    for x_LD, task in zip(x_BLD, tasks.tolist(), strict=True):
        for x_D in x_LD:
            total = torch.zeros_like(x_D)
            for expert, weight in enumerate(_token_weights(experts, x_D, task)):
                h_F = changed("up", expert, x_D)
                h_F = parts.act(h_F) if parts.gate is None else parts.act(changed("gate", expert, x_D)) * h_F
                total = total + weight * changed("down", expert, h_F)
            rows.append(total)
    return torch.stack(rows).view_as(x_BLD)


def _group_reference(layer: MotAdapterLayer, x_BLD: Tensor, mask_BL: Tensor) -> Tensor:
    """The frozen output and, for each position, the mixture of its tokens; padding is a zero token."""
    experts: Any = layer.mixture_of_tokens_layer["default"]
    mixture = experts.mixture
    y_BLD = layer.base_layer(x_BLD).clone()
    for position in range(x_BLD.size(1)):
        tokens = [x_BLD[g, position] * mask_BL[g, position] for g in range(len(x_BLD))]
        for e in range(mixture.num_experts):
            scores = [(mixture.gate.weight[e] * token).sum().exp() for token in tokens]
            weights = [score / sum(scores) for score in scores]
            z_D = sum(weight * token for weight, token in zip(weights, tokens, strict=True))
            out_D = mixture.experts.down_proj[e] @ torch.relu(mixture.experts.up_proj[e] @ z_D)
            update_BD = torch.stack([weight * out_D for weight in weights])
            y_BLD[:, position] = y_BLD[:, position] + experts.scale * update_BD
    return y_BLD


def _adapted(make_base: MakeBase, base: str, **settings: Any) -> nn.Module:
    config = AdapterConfig(**({"rank": 2, "num_experts": 4, "group_size": 4} | settings))
    adapted = apply_adapter(make_base(base).double(), config, num_tasks=4, seed=0)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.4)
    return adapted


def _layer(model: nn.Module, kind: type) -> Any:
    return next(module for module in model.modules() if isinstance(module, kind))


def _assert_same_output_and_gradients(layer: nn.Module, actual: Tensor, expected: Tensor, x_BLD: Tensor) -> None:
    torch.testing.assert_close(actual, expected, atol=1e-10, rtol=1e-9)
    direction = torch.randn_like(actual)
    inputs = [x_BLD, *(p for p in layer.parameters() if p.requires_grad)]
    found = torch.autograd.grad((actual * direction).sum(), inputs)
    wanted = torch.autograd.grad((expected * direction).sum(), inputs)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, atol=1e-10, rtol=1e-8)
        assert one.abs().sum() > 0


ROUTERS: dict[str, dict[str, Any]] = {
    "top_k": {"router": "top_k"},
    "dense": {"router": "dense"},
    "share_a": {"router": "dense", "share_a": True},
    "threshold": {"router": "threshold"},
    "task": {"router": "task"},
}
TASKS = torch.tensor([0, 1, 2, 3])


@pytest.mark.parametrize("base", ["llama", "bert", "mixtura"])
@pytest.mark.parametrize("router", ROUTERS)
def test_a_linear_layer_equals_its_definition_token_by_token(make_base: MakeBase, base: str, router: str) -> None:
    model = _adapted(make_base, base, method="mixture_of_lora", **ROUTERS[router])
    set_task_ids(model, TASKS)
    layer = _layer(model, MixtureLoraLinear)
    x_BLD = torch.randn(4, 3, layer.base_layer.in_features, dtype=torch.float64, requires_grad=True)
    _assert_same_output_and_gradients(layer, layer(x_BLD), _linear_reference(layer, x_BLD, TASKS), x_BLD)


@pytest.mark.parametrize("base", ["llama", "bert", "mixtura"])
@pytest.mark.parametrize("router", ROUTERS)
def test_a_feed_forward_layer_equals_its_definition_token_by_token(make_base: MakeBase, base: str, router: str) -> None:
    model = _adapted(make_base, base, method="mixture_of_lora", scope="feed_forward", **ROUTERS[router])
    set_task_ids(model, TASKS)
    layer = _layer(model, MixtureLoraFeedForward)
    x_BLD = torch.randn(4, 3, 16, dtype=torch.float64, requires_grad=True)
    actual = layer(x_BLD)
    if base == "bert":
        actual = layer.down(actual)
    _assert_same_output_and_gradients(layer, actual, _feed_forward_reference(layer, x_BLD, TASKS), x_BLD)


@pytest.mark.parametrize("base", ["llama", "mixtura"])
def test_a_mixture_of_tokens_equals_its_definition_group_by_group(make_base: MakeBase, base: str) -> None:
    model = _adapted(make_base, base, method="mixture_of_tokens")
    layer = _layer(model.train(), MotAdapterLayer)
    mask_BL = torch.ones(4, 3)
    mask_BL[3, 0] = 0
    layer.context.mask_BL = mask_BL
    x_BLD = torch.randn(4, 3, 16, dtype=torch.float64, requires_grad=True)
    _assert_same_output_and_gradients(layer, layer(x_BLD), _group_reference(layer, x_BLD, mask_BL), x_BLD)


@pytest.mark.parametrize("base", ["llama", "bert", "mixtura"])
def test_a_token_alone_equals_its_group_filled_with_zeros(make_base: MakeBase, base: str) -> None:
    model = _adapted(make_base, base, method="mixture_of_tokens")
    layer = _layer(model.eval(), MotAdapterLayer)
    x_BLD = torch.randn(1, 3, 16, dtype=torch.float64)
    filled_BLD = torch.cat([x_BLD, torch.zeros(3, 3, 16, dtype=torch.float64)])
    end = layer.down or nn.Identity()
    alone = end(layer(x_BLD))
    set_inference_mode(model, "group")
    torch.testing.assert_close(end(layer(filled_BLD))[:1], alone, atol=1e-12, rtol=1e-10)
    weight = torch.sigmoid(x_BLD[0] @ layer.mixture_of_tokens_layer["default"].mixture.gate.weight.T - math.log(3))
    assert (weight > 0).all() and (weight < 1).all()


def test_padding_enters_no_mixture_of_a_whole_model(make_base: MakeBase, batch: dict[str, Tensor]) -> None:
    for base in ("llama", "bert", "mixtura"):
        model = _adapted(make_base, base, method="mixture_of_tokens").train()
        mask_BL = batch["attention_mask"].bool()
        changed = batch["input_ids"].clone()
        changed[3, :2] = 60
        before, after = (model(**(batch | {"input_ids": ids}))[0][mask_BL] for ids in (batch["input_ids"], changed))
        torch.testing.assert_close(after, before, atol=1e-10, rtol=1e-8)


def test_router_losses_are_means_over_layers_of_what_each_would_have(
    make_base: MakeBase, batch: dict[str, Tensor]
) -> None:
    model = _adapted(make_base, "llama", method="mixture_of_lora", scope="feed_forward").train()
    seen: list[Tensor] = []
    for module in model.modules():
        if isinstance(module, MixtureLoraFeedForward):
            module.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach()))
    model(**batch)
    losses = router_losses(model)
    assert losses is not None
    layers = [module for module in model.modules() if isinstance(module, MixtureLoraFeedForward)]
    expected = []
    for layer, x_BLD in zip(layers, seen, strict=True):
        experts: Any = layer.mixture_lora_experts["default"]
        probs_TE = (x_BLD[batch["attention_mask"].bool()] @ experts.gate.weight.T).softmax(-1)
        share_E = F.one_hot(probs_TE.topk(2).indices, 4).sum((0, 1)) / (2 * len(probs_TE))
        expected.append(4 * (share_E * probs_TE.mean(0)).sum())
    torch.testing.assert_close(losses[0].double(), torch.stack(expected).mean(), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("scope", ["linear", "feed_forward"])
def test_what_an_adapters_router_chose_can_be_read(make_base, batch, scope):
    config = AdapterConfig(method="mixture_of_lora", num_experts=4, top_k=2, rank=2, scope=scope)
    model = apply_adapter(make_base("llama"), config, seed=0).eval()
    with torch.no_grad(), record_choices(model) as recorder:
        model(**batch)
        choices = recorder.take(tokens=batch["input_ids"].numel())
    assert {layer.num_experts for layer in recorder.layers} == {4}
    assert all((layer.rows_TK.sum(-1) == 2).all() for layer in choices)
