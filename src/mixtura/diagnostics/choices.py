"""Which experts every token was given, and with which weights, read from a model while it runs.

Forward hooks read and change nothing: outputs stay the same bit for bit, and the hooks are removed. Three kinds of
layers are read: those of this library, at their `ChoiceTap`; the experts of Hugging Face models, which are called with
(hidden states, expert indices, weights); and routers, modules that are named so and return (logits, weights, expert
indices).

`measure_peakedness` says whether the weights of a token in mixture-of-tokens layers lie on a few mixtures or on many.
Run alone, a token enters mixture s with weight m_s and, with ReLU experts, gets m_s^2 of its expert's output back. The
sharper these weights, the less a token takes from its neighbours in a group, and the less it loses without them.

Shapes: B batch, L length, T = B*L tokens, D hidden, E experts, K experts a token is given, S mixtures.
"""

import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mixtura.config import UserError
from mixtura.layers import ChoiceTap, FeedForward, MixtureOfTokens
from mixtura.models.modeling_mixture import MixtureDecoderLayer, MixturePreTrainedModel
from mixtura.results.run import Peakedness


class RoutedLayer(NamedTuple):
    """A place where tokens are given experts."""

    name: str
    """Of the module in the model."""
    depth: int
    """Of its decoder layer, from 0; for a model without numbered layers, its place among the routed ones."""
    num_experts: int


class Choices(NamedTuple):
    """The experts that the tokens of one forward pass were given in one layer, and with which weights."""

    expert_TK: Tensor
    """Indices, the strongest first."""
    rows_TK: Tensor
    """How much of the token went there: 1 for a routed row, 0 for none; its share where all experts take part."""


class ChoiceRecorder:
    """Holds what the routed layers of a model chose in its latest forward pass."""

    def __init__(self, layers: list[RoutedLayer]) -> None:
        """`layers` in the order of the model."""
        self.layers = layers
        self._latest: dict[str, Choices] = {}

    def take(self, *, tokens: int) -> list[Choices]:
        """The choices of every layer for all `tokens` of the latest pass, in the order of `layers`; then forgets them.

        Args:
            tokens: B*L.

        Raises:
            UserError: a layer was not run, or not on these tokens.
        """
        latest, self._latest = self._latest, {}
        return [_checked(layer, latest.get(layer.name), tokens) for layer in self.layers]

    def note(self, name: str, choices: Choices) -> None:
        """Keeps a layer's choices until they are taken."""
        self._latest[name] = choices


@contextmanager
def record_choices(model: nn.Module) -> Iterator[ChoiceRecorder]:
    """Records the choices of a model's routed layers with hooks, which are removed when the block ends."""
    spots = _find_spots(model)
    recorder = ChoiceRecorder([layer for layer, _, _ in spots])
    with ExitStack() as stack:
        for layer, module, read in spots:
            handle = module.register_forward_hook(_hook(recorder, layer, read), with_kwargs=True)
            stack.callback(handle.remove)
        yield recorder


def routed_layers(model: nn.Module) -> list[RoutedLayer]:
    """The layers of a model whose choices can be read, from the first to the last."""
    return [layer for layer, _, _ in _find_spots(model)]


def unread_layers(model: nn.Module) -> list[str]:
    """Names of mixture layers whose tokens compete with others, so that no token has experts of its own."""
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, FeedForward) and hasattr(module, "num_experts") and not hasattr(module, "choice_tap")
    ]


Keywords = dict[str, Any]
"""Keyword arguments of a module's forward."""
_Reader = Callable[[Keywords, tuple, Any, int], Choices | None]
_Spot = tuple[RoutedLayer, nn.Module, _Reader]


def _find_spots(model: nn.Module) -> list[_Spot]:
    """Layers with the module to hook and how to read it. Where experts are read, their router is not read as well."""
    found: dict[str, tuple[nn.Module, int, _Reader]] = {}
    ours = [f"{name}." if name else "" for name, module in model.named_modules() if isinstance(module, FeedForward)]
    for name, module in model.named_modules():
        num_experts = _num_experts(model, name, module)
        if num_experts is None:
            continue
        if isinstance(module, ChoiceTap):
            found[name] = module, num_experts, _read_tap
        elif any(name.startswith(prefix) for prefix in ours):
            continue
        elif name.rpartition(".")[2] == "experts" and not isinstance(module, nn.ModuleList):
            found[name] = module, num_experts, _read_experts
        elif "router" in type(module).__name__.lower():
            found[name] = module, num_experts, _read_router
    blocks = {name.rpartition(".")[0] for name, (_, _, read) in found.items() if read is _read_experts}
    kept = {
        name: spot
        for name, spot in found.items()
        if spot[2] is not _read_router or name.rpartition(".")[0] not in blocks
    }
    return [
        (RoutedLayer(name, _depth(name, place), num_experts), module, read)
        for place, (name, (module, num_experts, read)) in enumerate(kept.items())
    ]


def _num_experts(model: nn.Module, name: str, module: nn.Module) -> int | None:
    """The module's own count, or that of the block it sits in."""
    parent = name.rpartition(".")[0]
    for owner in (module, model.get_submodule(parent) if parent else model):
        count = getattr(owner, "num_experts", None)
        if isinstance(count, int):
            return count
    return None


def _depth(name: str, place: int) -> int:
    number = re.search(r"(?:^|\.)(\d+)\.", name)
    return int(number.group(1)) if number else place


def _hook(recorder: ChoiceRecorder, layer: RoutedLayer, read: _Reader) -> Callable:
    def look(_module: nn.Module, args: tuple, kwargs: Keywords, output: Any) -> None:
        choices = read(kwargs, args, output, layer.num_experts)
        if choices is not None:
            recorder.note(layer.name, choices)

    return look


def _read_tap(_kwargs: Keywords, args: tuple, _output: Any, num_experts: int) -> Choices:
    if len(args) == 2:
        return _strongest_first(*args)
    weight_TE = args[0].detach().unflatten(-1, (num_experts, -1)).sum(-1).float()
    weight_TE, expert_TE = weight_TE.sort(dim=-1, descending=True, stable=True)
    if (weight_TE == 0).any():
        return Choices(expert_TE, (weight_TE > 0).float())
    return Choices(expert_TE, weight_TE / weight_TE.sum(-1, keepdim=True))


def _read_experts(kwargs: Keywords, args: tuple, _output: Any, _num_experts: int) -> Choices | None:
    tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
    return _strongest_first(tensors[2], tensors[1]) if len(tensors) == 3 and _are_indices(tensors[1]) else None


def _read_router(_kwargs: Keywords, _args: tuple, output: Any, _num_experts: int) -> Choices | None:
    if not isinstance(output, tuple) or len(output) != 3 or not _are_indices(output[2]):
        return None
    return _strongest_first(output[1], output[2])


def _are_indices(value: Any) -> bool:
    return isinstance(value, Tensor) and not value.is_floating_point() and value.dtype != torch.bool


def _strongest_first(weight_TK: Tensor, expert_TK: Tensor) -> Choices:
    weight_TK, expert_TK = weight_TK.detach().flatten(0, -2).float(), expert_TK.detach().flatten(0, -2)
    if weight_TK.shape != expert_TK.shape:  # weights of all experts, as some routers give them
        weight_TK = weight_TK.gather(-1, expert_TK)
    order_TK = weight_TK.argsort(dim=-1, descending=True, stable=True)
    return Choices(expert_TK.gather(-1, order_TK), torch.ones_like(weight_TK))


def _checked(layer: RoutedLayer, choices: Choices | None, tokens: int) -> Choices:
    if choices is None:
        raise UserError(
            f"'{layer.name}' showed no choices of experts: run the model in eval() mode and, if it is a mixture of "
            "tokens, alone and not in groups."
        )
    found = len(choices.expert_TK)
    if found != tokens:
        raise UserError(f"'{layer.name}' routed {found} tokens where {tokens} went in, so they cannot be matched.")
    return choices


@torch.no_grad()
def measure_peakedness(model: MixturePreTrainedModel, batches: Iterable[Tensor]) -> list[Peakedness]:
    """The weights that tokens have alone, layer by layer, while the model runs in its own inference mode.

    Args:
        model: unchanged afterwards.
        batches: token ids (B, L).

    Raises:
        UserError: no layer is a mixture of tokens, or there is no batch.
    """
    decoder = [module for module in model.modules() if isinstance(module, MixtureDecoderLayer)]
    layers = {depth: block.mlp for depth, block in enumerate(decoder) if isinstance(block.mlp, MixtureOfTokens)}
    if not layers:
        raise UserError("The model has no mixture-of-tokens layer, so no weight of one can be measured.")
    sums = {depth: _Sums() for depth in layers}
    hooks = [layer.register_forward_pre_hook(sums[depth]) for depth, layer in layers.items()]
    was_training, tokens = model.training, 0
    model.eval()
    try:
        for ids_BL in batches:
            model.base_model(input_ids=ids_BL.to(model.device), use_cache=False)
            tokens += ids_BL.numel()
    finally:
        model.train(was_training)
        for hook in hooks:
            hook.remove()
    if not tokens:
        raise UserError("There is no batch to measure the weights on: give text that fills at least one.")
    return [
        Peakedness(
            layer=depth,
            sorted_weights=(total.weights_S / tokens).tolist(),
            gate_shares=(total.shares_S / tokens).tolist(),
        )
        for depth, total in sums.items()
    ]


class _Sums:
    """Adds up the weights of a layer's tokens; called as a hook before each of its forward passes."""

    def __init__(self) -> None:
        """Nothing so far."""
        self.weights_S: Any = 0.0
        self.shares_S: Any = 0.0

    def __call__(self, layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        """`inputs` are the layer's, the hidden states (B, L, D) first."""
        assert isinstance(layer, MixtureOfTokens)
        scale_TS, weight_TS = layer.weights_alone(inputs[0].flatten(0, 1))
        gate_TS = (scale_TS * weight_TS).double().sort(-1, descending=True).values
        self.weights_S = self.weights_S + scale_TS.double().sort(-1, descending=True).values.sum(0)
        self.shares_S = self.shares_S + (gate_TS.cumsum(-1) / gate_TS.sum(-1, keepdim=True)).sum(0)
