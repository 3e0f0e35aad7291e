"""Feed-forward layers of an encoder-decoder that become mixtures of copies, in the encoder, the decoder or both.

Sparse upcycling (Komatsuzaki et al., arXiv 2212.05055) for models whose layers have biases, which `Experts` has not.
The first bias joins the matrix: tokens get a further coordinate that is always one,

    W x + b = [W, b] [x, 1],

so a mixture of tokens mixes it with the tokens. The weights of a group add up to one, and alone a token enters with
m [x, 1]: with ReLU, f(m x) is m f(x) as it is without biases. The last bias is added behind the mixture, once.

Where tokens choose, every copy gets a little noise, without which renormalised gates would give the router no gradient.
Where languages name the experts, copies are exact and so is the model. Dropout between a layer's two matrices is left
out.

Shapes: B batch, L length, T tokens, D hidden, P = D and what is joined to it, F width of the layer, E experts.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from mixtura.config import ArmConfig, UserError
from mixtura.config.arm import model_settings
from mixtura.layers import FeedForward, RoutingStats
from mixtura.layers.statistics import load_balancing_loss
from mixtura.models import MixtureConfig
from mixtura.models.batch_context import BatchContext
from mixtura.models.build import build_feed_forward
from mixtura.results import Facts
from mixtura.upcycling.request import UpcycleSettings, chosen_layers
from mixtura.upcycling.routers import LayerStart, calibrated_rows, generator_for, layer_start

Sides = Literal["encoder", "decoder", "both"]
FIELD = "mixtura_upcycled"
"""Of the model's configuration: which layers are mixtures, and of which kind."""

_NOISE = 0.01
_JOINED = 4
"""Coordinates that a layer with biases adds to its tokens, one of them for the bias: products want 16 bytes."""
_ACTIVATIONS = {
    **{"relu": "relu", "gelu": "gelu", "silu": "silu", "swish": "silu"},
    **{"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh"},
}


class DenseLayer(NamedTuple):
    """A dense feed-forward layer of an encoder-decoder."""

    name: str
    """Of what the mixture replaces: T5's whole layer, or the first of two linear layers beside the attention."""
    gate: nn.Linear | None
    up: nn.Linear
    down: nn.Linear


class UpcycledFeedForward(nn.Module):
    """A mixture in the place of a feed-forward layer."""

    def __init__(
        self, mixture: FeedForward, *, width: int, biased: bool, key: str, context: BatchContext, in_decoder: bool
    ) -> None:
        """`width` is D, `key` the name under which the layer leaves its statistics."""
        super().__init__()
        self.mixture, self.width, self.key, self.context, self.in_decoder = mixture, width, key, context, in_decoder
        self.bias = nn.Parameter(torch.zeros(width)) if biased else None

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(B, L, D) -> (B, L, D)."""
        x_BLP = joined(hidden_states) if self.bias is not None else hidden_states
        mask_BL = self.context.mask_for(hidden_states, in_decoder=self.in_decoder)
        named = {"expert_B": self.context.example_tasks(x_BLP)} if self.mixture.routes_by_example else {}
        if self.training or self.context.observe:
            y_BLP, stats = self.mixture(x_BLP, mask_BL, return_stats=True, **named)
            self.context.stats[self.key] = stats
        else:
            y_BLP = self.mixture(x_BLP, mask_BL, **named)
        return y_BLP if self.bias is None else y_BLP[..., : self.width] + self.bias


def joined(x: Tensor) -> Tensor:
    """(..., D) -> (..., P): a one and zeros behind every token."""
    more = torch.zeros(_JOINED, dtype=x.dtype, device=x.device)
    more[0] = 1
    return torch.cat([x, more.expand(*x.shape[:-1], _JOINED)], dim=-1)


def upcycle_sides(
    model: Any,
    arm: ArmConfig,
    *,
    sides: Sides,
    batches: Iterable[Mapping[str, Any]],
    expert_names: Sequence[str] | None = None,
    seed: int,
) -> None:
    """Makes mixtures of copies of a model's feed-forward layers, in place.

    Args:
        model: an encoder-decoder.
        arm: family, experts and router; `placement` says which layers of a side.
        sides: which side's layers.
        batches: keyword arguments of the model's forward, by which routers are calibrated.
        expert_names: languages or pairs that have an expert each, where those choose the expert.
        seed: of routers and noise.

    Raises:
        UserError: the layers are of a kind that has no copies here, or the settings cannot work.
    """
    chosen = _chosen_layers(model, sides, arm.placement)
    inputs = _layer_inputs(model, [layer.name for layer in chosen], batches)
    layer = _layer_config(model, arm, chosen[0], expert_names)
    placed = place_mixtures(model, {"sides": sides, "placement": arm.placement, "layer": layer.to_diff_dict()})
    settings = _settings(arm, seed)
    for dense in chosen:
        mixture = placed[dense.name]
        start = _start(settings, mixture, inputs[dense.name], seed=seed, name=dense.name)
        _fill(mixture, dense, start, generator=generator_for(seed, dense.name, "copies"))


def place_mixtures(model: Any, settings: Facts) -> dict[str, UpcycledFeedForward]:
    """Puts mixtures with random weights in the place of layers, as a stored configuration says; returns them by name.

    The model's configuration keeps `settings`, so that `place_mixtures` finds them when the model is loaded.

    Raises:
        UserError: the model has no such layers.
    """
    stored: Any = settings
    config = MixtureConfig.from_dict(dict(stored["layer"]))
    context = BatchContext()
    decoders = context.watch(model)
    context.num_tasks = config.num_experts if config.expert_names else None
    placed: dict[str, UpcycledFeedForward] = {}
    for dense in _chosen_layers(model, stored["sides"], stored["placement"]):
        biased = dense.up.bias is not None
        mixture = UpcycledFeedForward(
            build_feed_forward(config, 0),
            width=dense.up.in_features,
            biased=biased,
            key=dense.name,
            context=context,
            in_decoder=dense.name.startswith(decoders),
        )
        placed[dense.name] = mixture.to(dense.up.weight)
        _replace(model, dense.name, mixture)
    setattr(model.config, FIELD, settings)
    return placed


def mixture_losses(model: nn.Module) -> tuple[Tensor | None, Tensor | None, tuple[RoutingStats, ...] | None]:
    """Load-balancing loss and z-loss of the last forward, means over the layers, and the layers' statistics.

    The losses are None where nothing has to be balanced: with experts that languages name, and in mixtures of tokens.
    """
    layers = [module for module in model.modules() if isinstance(module, UpcycledFeedForward)]
    if not layers:
        return None, None, None
    stats = [layers[0].context.stats[layer.key] for layer in layers if layer.key in layers[0].context.stats]
    routed = not layers[0].mixture.routes_by_example and hasattr(layers[0].mixture, "top_k")
    if not routed or not stats:
        return None, None, tuple(stats) or None
    aux_losses = [load_balancing_loss(layer.tokens_per_expert_E, layer.importance_E) for layer in stats]
    z_losses = [layer.router_z_loss for layer in stats]
    return torch.stack(aux_losses).mean(), torch.stack(z_losses).mean(), tuple(stats)


def inactive_parameters(model: nn.Module) -> int:
    """Parameters of experts that a token does not run, in layers where tokens or languages choose."""
    idle = 0
    for module in model.modules():
        if isinstance(module, UpcycledFeedForward) and hasattr(module.mixture, "top_k"):
            mixture: Any = module.mixture
            size = sum(weight.numel() for weight in mixture.experts.weights)
            idle += size * (mixture.num_experts - mixture.top_k) // mixture.num_experts
    return idle


def _chosen_layers(model: Any, sides: Sides, placement: str) -> list[DenseLayer]:
    found: list[DenseLayer] = []
    names = {id(module): name for name, module in model.named_modules()}
    for side in ("encoder", "decoder") if sides == "both" else (sides,):
        stack = model.get_encoder() if side == "encoder" else model.get_decoder()
        layers = getattr(stack, "layers", None) or getattr(stack, "block", None)
        if layers is None:
            raise UserError(f"{type(model).__name__} has no layers under a name known here: name another base.")
        for depth in chosen_layers(placement, len(layers)):
            found.append(_dense_layer(layers[depth], names))
    return found


def _dense_layer(layer: nn.Module, names: Mapping[int, str]) -> DenseLayer:
    """The feed-forward part of one layer."""
    for name, module in layer.named_modules():
        parts = {key: part for key, part in module.named_children() if isinstance(part, nn.Linear)}
        if name == "" and parts.keys() == {"fc1", "fc2"}:
            return DenseLayer(names[id(module.fc1)], None, parts["fc1"], parts["fc2"])
        if parts.keys() in ({"wi", "wo"}, {"wi_0", "wi_1", "wo"}) and len(parts) == len(list(module.parameters())):
            gated = "wi_0" in parts
            up = parts["wi_1" if gated else "wi"]
            return DenseLayer(names[id(module)], parts["wi_0"] if gated else None, up, parts["wo"])
    raise UserError(
        f"'{names[id(layer)]}' has no dense feed-forward layer of a kind that can be upcycled: name a Marian, M2M100, "
        "NLLB, T5, mT5 or MADLAD base."
    )


def _replace(model: nn.Module, name: str, mixture: nn.Module) -> None:
    """Puts a mixture in place; beside the attention what else belonged to the layer does nothing any more."""
    parent_name, _, child = name.rpartition(".")
    parent: Any = model.get_submodule(parent_name)
    setattr(parent, child, mixture)
    if child == "fc1":
        parent.activation_fn, parent.activation_dropout, parent.fc2 = nn.Identity(), 0.0, nn.Identity()


def _layer_inputs(model: nn.Module, names: Sequence[str], batches: Iterable[Mapping[str, Any]]) -> dict[str, Tensor]:
    """What the layers read over some batches, padding among it, (T, D) by name."""
    seen: dict[str, list[Tensor]] = {name: [] for name in names}
    training = model.training
    model.eval()
    with ExitStack() as stack, torch.no_grad():
        stack.callback(model.train, training)
        for name in names:
            note = _noting(seen[name])
            stack.callback(model.get_submodule(name).register_forward_pre_hook(note).remove)
        for batch in batches:
            model(**batch)
    return {name: torch.cat(parts) for name, parts in seen.items()}


def _noting(seen: list[Tensor]) -> Any:
    def note(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
        seen.append(args[0].flatten(0, -2))

    return note


def _layer_config(model: Any, arm: ArmConfig, dense: DenseLayer, expert_names: Sequence[str] | None) -> MixtureConfig:
    """The settings of one mixture, as a decoder of one layer has them."""
    known: Any = model.config
    activation = getattr(known, "activation_function", None) or getattr(known, "dense_act_fn", None)
    if activation not in _ACTIVATIONS:
        raise UserError(f"The base model's activation is {activation!r}, and experts have {', '.join(_ACTIVATIONS)}.")
    own = {field: getattr(arm, setting.name) for setting, field in model_settings()}
    return MixtureConfig(
        **own
        | {
            "hidden_size": dense.up.in_features + (0 if dense.up.bias is None else _JOINED),
            "intermediate_size": dense.up.out_features,
            "moe_intermediate_size": dense.up.out_features,
            "num_hidden_layers": 1,
            "num_attention_heads": 1,
            "hidden_act": _ACTIVATIONS[activation],
            "gated": dense.gate is not None,
            "mlp_layer_types": [arm.family],
            "expert_names": None if expert_names is None else list(expert_names),
        }
    )


def _settings(arm: ArmConfig, seed: int) -> UpcycleSettings:
    mixes = arm.family == "mixture_of_tokens"
    return UpcycleSettings(
        family="mixture_of_tokens" if mixes else "token_choice",
        num_experts=arm.num_experts,
        top_k=(arm.alone_top_k or arm.num_experts) if mixes else arm.top_k,
        layers=arm.placement,
        split=1,
        shared=0,
        drop=0.0,
        noise=_NOISE,
        normalize_top_k=arm.normalize_top_k,
        score_function=arm.score_function,
        router="random",
        spread=None,
        group_size=arm.group_size if mixes else None,
        seed=seed,
    )


def _start(
    settings: UpcycleSettings, layer: UpcycledFeedForward, x_TD: Tensor, *, seed: int, name: str
) -> LayerStart | None:
    """Rows of a router and factors of the experts; None where languages name the experts."""
    if layer.mixture.routes_by_example:
        return None
    x_TP = joined(x_TD) if layer.bias is not None else x_TD
    router = calibrated_rows(
        [x_TP],
        kind="random",
        copies=settings.copies,
        spread=settings.router_spread,
        generator=generator_for(seed, name, "router"),
    )
    return layer_start(settings, router, x_TP)


@torch.no_grad()
def _fill(layer: UpcycledFeedForward, dense: DenseLayer, start: LayerStart | None, *, generator: Any) -> None:
    """Gives every expert a copy of the dense layer, and the router its rows."""
    mixture: Any = layer.mixture
    up_EHP, down_EPF = mixture.experts.weights
    noise = _NOISE if start is not None and hasattr(mixture, "top_k") else 0.0
    first, second = (1.0, 1.0) if start is None else (start.first_factor, start.second_factor)
    for up_HP, down_PF in zip(up_EHP, down_EPF, strict=True):
        rows = [_rows(linear, noise, generator) for linear in (dense.gate, dense.up) if linear is not None]
        up_HP.copy_(torch.cat(rows) * first)
        down_PF.zero_()
        down_PF[: layer.width] = _noisy(dense.down.weight, noise, generator) * second
    if layer.bias is not None:
        layer.bias.copy_(dense.down.bias)
    if start is not None:
        mixture.gate.weight.copy_(start.router.rows_CD)


def _rows(linear: nn.Linear, noise: float, generator: torch.Generator) -> Tensor:
    """(F, D) or, with its bias as a further column, (F, P)."""
    weight_FD = _noisy(linear.weight, noise, generator)
    if linear.bias is None:
        return weight_FD
    more = torch.zeros(linear.out_features, _JOINED, dtype=weight_FD.dtype, device=weight_FD.device)
    more[:, 0] = linear.bias
    return torch.cat([weight_FD, more], dim=1)


def _noisy(weight: Tensor, relative_std: float, generator: torch.Generator) -> Tensor:
    if not relative_std:
        return weight
    drawn = torch.randn(weight.shape, generator=generator).to(weight)
    return weight + drawn * (relative_std * weight.std(correction=0))


def upcycled_layers(model: nn.Module) -> Iterator[UpcycledFeedForward]:
    """The mixtures that were put into a model."""
    return (module for module in model.modules() if isinstance(module, UpcycledFeedForward))
