"""What computes the experts that tokens choose: Mixtura's kernels, or another library's, by `training.experts_backend`.

"auto" is Mixtura's kernels, and in stock models what transformers chooses. "eager" is a loop over experts in plain
torch; "grouped_mm", "batched_mm" and "sonicmoe" (arXiv 2512.14080) are implementations of transformers' experts
interface, the last one from the Hub by the package `kernels`, as is "scattermoe" (arXiv 2403.08245). Whatever is chosen
is tried once on experts of the model's sizes, output and gradients, before anything is trained with it.

The other way round, `experts_forward` is Mixtura's kernels for the experts of stock models, by the same interface:
`from_pretrained(..., experts_implementation="mixtura")`. It is registered when `mixtura.models` is imported, and only
models that name it use it.

Shapes: T tokens, K choices of a token, R routed rows, E experts, D hidden, F expert width, H = 2F when gated else F.
"""

from collections.abc import Callable, Iterator
from functools import cache, partial
from importlib import import_module
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any, get_args, get_type_hints

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.activations import GELUActivation, SiLUActivation
from transformers.integrations import moe

from mixtura import kernels
from mixtura.config import TrainingConfig, UserError
from mixtura.kernels import ExpertWeights
from mixtura.kernels.expert_weights import activate
from mixtura.layers import TokenChoiceMoE
from mixtura.layers.routing import SparseRouting, sort_by_expert

NAME = "mixtura"
_ACTIVATIONS: dict[type, str] = {SiLUActivation: "silu", nn.SiLU: "silu", GELUActivation: "gelu", nn.ReLU: "relu"}


def experts_forward(experts: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """(T, D), indices and weights (T, K) -> (T, D): what the `forward` of a stock module of experts computes.

    Raises:
        UserError: the experts have biases, a norm, a gate or an activation that the kernels do not compute.
    """
    activation = kernel_activation(experts)
    up_EHD, down_EDF = experts.gate_up_proj if experts.has_gate else experts.up_proj, experts.down_proj
    if experts.is_transposed:
        up_EHD, down_EDF = up_EHD.transpose(1, 2), down_EDF.transpose(1, 2)
    weights = kernels.ExpertWeights(up_EHD, down_EDF, activation, experts.has_gate)
    exchange: kernels.ExpertExchange | None = getattr(experts, "exchange", None)  # as of `mixtura.layers.Experts`
    if exchange is not None:
        y_TD = exchange.run(kernels.routed_ffn, hidden_states, top_k_index, top_k_weights, weights)
    elif _has_rows_of_other_ranks(experts, top_k_index):
        routing = _rows_of_this_rank(top_k_index, top_k_weights, experts.num_experts)
        y_TD = kernels.sparse_ffn(hidden_states, *routing[:3], weights, row_TK=routing.row_TK)
    else:
        y_TD = kernels.routed_ffn(hidden_states, top_k_index, top_k_weights, weights)
    return y_TD.to(hidden_states.dtype)


def _has_rows_of_other_ranks(experts: Any, top_k_index: Tensor) -> bool:
    """Whether indices may stand for experts on other ranks; older versions of transformers do not say, so they may."""
    if hasattr(experts, "_is_expert_parallel"):
        return experts._is_expert_parallel
    return bool((top_k_index >= experts.num_experts).any())


def _rows_of_this_rank(top_k_index: Tensor, top_k_weights: Tensor, num_experts: int) -> SparseRouting:
    """The routing without the rows that expert parallelism computes on other ranks, whose index is `num_experts`."""
    token_R, weight_R, rows_E, _ = sort_by_expert(top_k_index, top_k_weights, num_experts + 1)
    own = int(rows_E[:-1].sum())
    return SparseRouting(token_R[:own], weight_R[:own], rows_E[:-1])


def kernel_activation(experts: Any) -> str:
    """The kernels' name of the activation of a stock module of experts.

    Raises:
        UserError: the kernels cannot compute these experts; the message says why.
    """
    act_fn = getattr(experts, "act_fn", None)
    reasons = {
        "have biases": experts.has_bias,
        "are normalised one by one": getattr(experts, "has_post_expert_norm", False),
        "interleave gate and up": not experts.is_concatenated,
        "have a gate of their own": experts.has_gate and type(experts)._apply_gate is not moe._default_apply_gate,
        f"have the activation {type(act_fn).__name__}": type(act_fn) not in _ACTIVATIONS,
    }
    for reason, holds in reasons.items():
        if holds:
            raise UserError(
                f"The experts of {type(experts).__name__} {reason}, which Mixtura's kernels do not compute: use "
                'experts_implementation="grouped_mm".'
            )
    return _ACTIVATIONS[type(act_fn)]


def register() -> None:
    """Makes the name known to transformers, for the whole process; it changes no model that does not ask for it."""
    moe.ALL_EXPERTS_FUNCTIONS.register(NAME, experts_forward)


RoutedExperts = Callable[[Tensor, Tensor, Tensor, ExpertWeights], Tensor]
"""(T, D), indices and weights (T, K) each -> (T, D), the weighted sum of each token's experts."""
NAMES: tuple[str, ...] = get_args(get_type_hints(TrainingConfig)["experts_backend"])
_ON_CUDA = ("sonicmoe", "scattermoe")
_TRIED_TOKENS = 16
_SCATTERMOE = "kernels-community/scattermoe"


def backend(name: str) -> RoutedExperts:
    """The function of that name, any but "auto".

    Raises:
        UserError: what it needs is not installed, or this device is not one of its.
    """
    if (missing := unavailable(name)) is not None:
        raise UserError(f"'training.experts_backend' is '{name}', which {missing}: set it to \"auto\".")
    if name == "eager":
        return _eager
    return _scattermoe if name == "scattermoe" else partial(_as_stock, name)


def unavailable(name: str) -> str | None:
    """Why a backend cannot run here, to follow its name in a sentence; None if it can, as far as is known unloaded."""
    if name in _ON_CUDA and find_spec("kernels") is None:
        return "needs the package kernels (pip install kernels)"
    if name in _ON_CUDA and not torch.cuda.is_available():
        return "runs on CUDA devices only"
    if name not in ("auto", "eager", "scattermoe") and name not in moe.ALL_EXPERTS_FUNCTIONS:
        return "this version of transformers does not have"
    return None


def backends() -> list[str]:
    """What `mixtura doctor` says: which values of `training.experts_backend` run here, which to choose, and why not the
    others."""
    here = [name for name in NAMES if unavailable(name) is None]
    choice = "time the others" if torch.cuda.is_available() else "choose it on a CPU"
    missing = [f"{name} {unavailable(name)}" for name in NAMES if name not in here]
    return [f"training.experts_backend may be {', '.join(here)}", f"auto is Mixtura's kernels: {choice}", *missing]


def use_experts_backend(model: nn.Module, name: str, *, device: torch.device, dtype: str) -> bool:
    """Makes the backend compute a model's experts; whether it has any for it.

    Those are the experts of token choice, and those of stock mixtures. Other families have one way each.

    Args:
        model: whose layers are told.
        name: one of `NAMES`; "auto" leaves the model as it is.
        device: where it will run.
        dtype: "float32" or "bfloat16", of the products.

    Raises:
        UserError: the backend cannot run here, cannot compute these experts, or does so wrongly.
    """
    if name == "auto":
        return False
    run, tried = backend(name), set[tuple[Any, ...]]()
    layers = [layer for layer in model.modules() if isinstance(layer, TokenChoiceMoE)]
    stock = list(stock_experts(model))
    kinds = [(each.experts.weights, (each.experts.activation, each.experts.gated)) for each in layers]
    # Experts of other kinds, such as those with biases, transformers alone computes, by code of its own.
    kinds += [_weights_of_stock(each) for each in stock if name == "scattermoe" or _has_our_kind(each)]
    for (up_EHD, down_EDF), kind in kinds:
        if (up_EHD.shape, down_EDF.shape, kind) not in tried:
            _try_out(name, run, up_EHD.shape, down_EDF.shape, kind, device=device, dtype=dtype)
        tried.add((up_EHD.shape, down_EDF.shape, kind))
    for layer in layers:
        _check_layer(name, layer)
        layer.experts.backend = run
    if stock:
        if name == "scattermoe":
            moe.ALL_EXPERTS_FUNCTIONS.register(name, _scattermoe_of_stock)
        model.set_experts_implementation(name)  # pyright: ignore[reportCallIssue]
    return bool(layers or stock)


def _check_layer(name: str, layer: TokenChoiceMoE) -> None:
    reasons = {"a capacity": layer.capacity_factor is not None, "free experts": layer.free_experts is not None}
    for reason, holds in reasons.items():
        if holds:
            raise UserError(
                f"'training.experts_backend' is '{name}', but token choice with {reason} runs on Mixtura's kernels "
                'alone: set it to "auto".'
            )


def stock_experts(model: nn.Module) -> Iterator[Any]:
    """The modules of experts that transformers' interface reaches."""
    known = getattr(model, "_can_set_experts_implementation", None)
    if known is not None and known():
        yield from (each for each in model.modules() if hasattr(each, "has_gate") and hasattr(each, "down_proj"))


def _has_our_kind(experts: Any) -> bool:
    try:
        kernel_activation(experts)
    except UserError:
        return False
    return True


def _weights_of_stock(experts: Any) -> tuple[tuple[Tensor, Tensor], tuple[str, bool]]:
    up, down = experts.gate_up_proj if experts.has_gate else experts.up_proj, experts.down_proj
    if experts.is_transposed:
        up, down = up.transpose(1, 2), down.transpose(1, 2)
    return (up, down), (kernel_activation(experts), experts.has_gate)


def _try_out(
    name: str,
    run: RoutedExperts,
    up_shape: torch.Size,
    down_shape: torch.Size,
    kind: tuple[str, bool],
    *,
    device: torch.device,
    dtype: str,
) -> None:
    """Refuses a backend that fails on random experts of those shapes, or is farther from eager than rounding.

    The random numbers are a generator's own, so that a run draws what it would draw without this.
    """
    draw = torch.Generator().manual_seed(0)
    width = getattr(torch, dtype)
    up_EHD = (torch.randn(up_shape, generator=draw) / up_shape[-1] ** 0.5).to(device, width)
    down_EDF = (torch.randn(down_shape, generator=draw) / down_shape[-1] ** 0.5).to(device, width)
    x_TD = torch.randn(_TRIED_TOKENS, up_shape[-1], generator=draw).to(device, width)
    choice_TK = torch.rand(_TRIED_TOKENS, len(up_EHD), generator=draw).topk(min(2, len(up_EHD))).indices.to(device)
    weight_TK = torch.rand(choice_TK.shape, generator=draw).to(device)
    given = (x_TD, weight_TK, up_EHD, down_EDF)
    try:
        found = _with_gradients(run, choice_TK, given, kind)
    except Exception as error:
        said = next(iter(str(error).splitlines()), type(error).__name__).rstrip(".")
        raise UserError(
            f"'training.experts_backend' is '{name}', which cannot compute these experts ({said}): set it to \"auto\"."
        ) from error
    expected = _with_gradients(_eager, choice_TK, tuple(each.double() for each in given), kind)
    allowed = 1e-4 if width == torch.float32 else 0.05
    for value, right in zip(found, expected, strict=True):
        error = ((value - right).abs().max() / right.abs().max().clamp_min(1e-30)).item()
        if not error <= allowed:
            raise UserError(
                f"'training.experts_backend' is '{name}', whose results here are off by {error:.1e} of the largest: "
                'set it to "auto".'
            )


def _with_gradients(
    run: RoutedExperts, choice_TK: Tensor, given: tuple[Tensor, ...], kind: tuple[str, bool]
) -> list[Tensor]:
    """The output, and its gradients for tokens, weights and both projections."""
    with torch.enable_grad(), torch.autocast(choice_TK.device.type, enabled=False):
        leaves = [each.detach().requires_grad_() for each in given]
        x_TD, weight_TK, up_EHD, down_EDF = leaves
        y_TD = run(x_TD, choice_TK, weight_TK, ExpertWeights(up_EHD, down_EDF, *kind))
        return [y_TD.detach(), *torch.autograd.grad((y_TD * x_TD.detach()).sum(), leaves)]


def _eager(x_TD: Tensor, expert_TK: Tensor, weight_TK: Tensor, experts: ExpertWeights) -> Tensor:
    """One expert after another on its tokens."""
    experts = experts.at_autocast_dtype(x_TD.device.type)
    up_EHD, down_EDF, activation, gated = experts
    y_TD = torch.zeros_like(x_TD)
    for expert, (up_HD, down_DF) in enumerate(zip(up_EHD.unbind(), down_EDF.unbind(), strict=True)):
        token_R, place_R = (expert_TK == expert).nonzero(as_tuple=True)
        h_RF = activate(F.linear(x_TD[token_R].to(up_HD.dtype), up_HD), activation, gated)
        y_RD = F.linear(h_RF, down_DF) * weight_TK[token_R, place_R].unsqueeze(-1)
        y_TD = y_TD.index_add(0, token_R, y_RD.to(y_TD.dtype))
    return y_TD


def _as_stock(name: str, x_TD: Tensor, expert_TK: Tensor, weight_TK: Tensor, experts: ExpertWeights) -> Tensor:
    """An implementation of transformers' interface, which reads what it needs from a module of experts."""
    up_EHD, down_EDF, activation, gated = experts.at_autocast_dtype(x_TD.device.type)
    module = SimpleNamespace(
        num_experts=len(up_EHD),
        gate_up_proj=up_EHD,
        up_proj=up_EHD,
        down_proj=down_EDF,
        has_gate=gated,
        has_bias=False,
        has_post_expert_norm=False,
        is_transposed=False,
        is_concatenated=True,
        act_fn=partial(activate, activation=activation, gated=False),
        config=SimpleNamespace(hidden_act=activation),
        _apply_gate=partial(activate, activation=activation, gated=True),
        _is_expert_parallel=False,
    )
    run: Any = moe.ALL_EXPERTS_FUNCTIONS[name]
    return run(module, x_TD.to(up_EHD.dtype), expert_TK, weight_TK).to(x_TD.dtype)


@cache
def _scattermoe_kernels() -> Any:
    """The module of the Hub's kernel, loaded once."""
    return import_module("kernels").get_kernel(_SCATTERMOE)


def _scattermoe(x_TD: Tensor, expert_TK: Tensor, weight_TK: Tensor, experts: ExpertWeights) -> Tensor:
    """ScatterMoE's two products: rows sorted by expert after the first, tokens in order after the second."""
    up_EHD, down_EDF, activation, gated = experts.at_autocast_dtype(x_TD.device.type)
    library = _scattermoe_kernels()
    order = library.flatten_sort_count(expert_TK, len(up_EHD))
    rows_TD = x_TD.to(up_EHD.dtype)
    u_RH = library.parallel_linear(rows_TD, up_EHD.transpose(1, 2), expert_TK.size(1), *order, grouped_out=True)
    h_RF = activate(u_RH, activation, gated)
    gates = weight_TK.to(h_RF.dtype)
    return library.parallel_linear(h_RF, down_EDF.transpose(1, 2), 1, *order, gates=gates, grouped_in=True).to(
        x_TD.dtype
    )


def _scattermoe_of_stock(experts: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """ScatterMoE for a stock module of experts, as transformers' interface calls it."""
    weights, kind = _weights_of_stock(experts)
    return _scattermoe(hidden_states, top_k_index, top_k_weights, ExpertWeights(*weights, *kind))
