"""What a classifier puts on a pretrained model's hidden states: blend of layers, pooling, mixture, linear classifier.

    h_m   = norm(hidden states of layer m)                 m = 0 (embeddings) ... M - 1
    mixed = scale * sum_m softmax(a)_m h_m                  layer mix (ELMo, arXiv 1802.05365, eq. 1); else one layer
    z     = pool(mixed)                                     the real tokens' mean, the first, the last, or attention
    z     = z + f(norm(z))                                  only with a feed-forward layer
    logits = W z + b

Pooling and mixing layers are both linear, so with fixed weights they commute: mixing M pooled vectors gives the same as
pooling the mixed tokens. A frozen model therefore has to be run only once (`features.py`). Weights that depend
on the token are the exception, unless one token is all that is pooled, and so is attention, whose weights are
softmax(mixed_l . q / sqrt(D)) over the real tokens l with a learned q.

Shapes: B batch, L length, D hidden, M hidden states of the model (embeddings and layers), C classes.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm

from mixtura.config import ArmConfig, HeadConfig, ModelConfig, UserError
from mixtura.config.families import facts_of
from mixtura.layers import FeedForward, LayerMix, RoutingStats, SoftMoE
from mixtura.models import MixtureConfig
from mixtura.models.build import build_feed_forward, build_model_config
from mixtura.planning.formulas import active_layer_parameters, layer_parameters
from mixtura.planning.shapes import feed_forward_shapes

INITIALIZER_RANGE = 0.02


class ClassifierHead(nn.Module):
    """Hidden states -> logits; see the module's docstring."""

    def __init__(
        self, config: HeadConfig, *, num_states: int, hidden_size: int, num_classes: int, layer: int = -1
    ) -> None:
        """Builds the head. The classifier is drawn first, so that with one seed it is the same for every kind of head.

        Args:
            config: the head's keys in a recipe.
            num_states: M.
            hidden_size: D.
            num_classes: C.
            layer: which of the states a head without a blend reads.

        Raises:
            UserError: the head's feed-forward layer cannot work here.
        """
        super().__init__()
        self.config, self.layer = config, layer
        self.classifier = nn.Linear(hidden_size, num_classes)
        nn.init.normal_(self.classifier.weight, std=INITIALIZER_RANGE)
        nn.init.zeros_(self.classifier.bias)
        self.layer_mix = None
        if config.kind == "layer_mix":
            self.layer_mix = LayerMix(num_states, hidden_size=hidden_size if config.per_token else None)
        self.query_D = None
        if config.pooling == "attention":
            self.query_D = nn.Parameter(torch.zeros(hidden_size))  # equal weights, so it starts as the mean
        self.feed_forward = None
        if config.feed_forward is not None:
            self.feed_forward = _build_feed_forward(config.feed_forward, hidden_size)

    def forward(self, pooled_BMD: Tensor, return_stats: bool = False) -> tuple[Tensor, RoutingStats | None]:
        """Pooled vectors of every layer (B, M, D) -> logits (B, C), and the mixture's statistics when asked for."""
        if self.layer_mix is None:
            return self._classify(pooled_BMD[:, -1], return_stats)
        one_token_BD = self.layer_mix(pooled_BMD.unsqueeze(1).unbind(2)).squeeze(1)
        return self._classify(one_token_BD, return_stats)

    def forward_tokens(
        self, states: Sequence[Tensor], mask_BL: Tensor, return_stats: bool = False
    ) -> tuple[Tensor, RoutingStats | None]:
        """M hidden states (B, L, D) and a mask of the real tokens -> logits (B, C), and statistics when asked for."""
        if not blends_tokens(self.config):
            return self(pool_states(self._used(states), mask_BL, self.config), return_stats)
        normed = [normalize(state_BLD, self.config) for state_BLD in self._used(states)]
        mixed_BLD = normed[0] if self.layer_mix is None else self.layer_mix(normed)
        if self.query_D is not None:
            return self._classify(pool_by_attention(mixed_BLD, mask_BL, self.query_D), return_stats)
        return self._classify(pool(mixed_BLD, mask_BL, self.config.pooling), return_stats)

    def layer_weights(self, states: Sequence[Tensor] | None = None) -> Tensor | None:
        """The layers' weights (M,), or (B, L, M) where they depend on the token; None without a layer mix.

        Args:
            states: M hidden states (B, L, D), for weights that depend on the token; None leaves the token out.
        """
        if self.layer_mix is None:
            return None
        if states is None:
            return self.layer_mix.weights()
        return self.layer_mix.weights(torch.stack([normalize(state, self.config) for state in states], dim=-2))

    def _used(self, states: Sequence[Tensor]) -> Sequence[Tensor]:
        return states if self.layer_mix is not None else [states[self.layer]]

    def _classify(self, z_BD: Tensor, return_stats: bool) -> tuple[Tensor, RoutingStats | None]:
        stats = None
        if self.feed_forward is not None:
            # A sequence of one token: groups are formed over the examples of the batch.
            x_B1D = layer_norm(z_BD, z_BD.shape[-1:]).unsqueeze(1)
            y_B1D, stats = self.feed_forward.route_and_run(x_B1D, None, return_stats)
            z_BD = z_BD + y_B1D.squeeze(1)
        return self.classifier(z_BD), stats


def blends_tokens(config: HeadConfig) -> bool:
    """Whether the head needs the states of all tokens: the pooled vectors of each layer do not determine its answer."""
    return config.pooling == "attention" or (weighs_tokens(config) and config.pooling == "mean")


def weighs_tokens(config: HeadConfig) -> bool:
    """Whether the weights of a blend depend on the token."""
    return config.kind == "layer_mix" and config.per_token


def normalize(state_BLD: Tensor, config: HeadConfig) -> Tensor:
    """A token's state with mean 0 and variance 1, or as it is."""
    return layer_norm(state_BLD, state_BLD.shape[-1:]) if config.normalization == "layer_norm" else state_BLD


def pool_states(states: Sequence[Tensor], mask_BL: Tensor, config: HeadConfig) -> Tensor:
    """M hidden states (B, L, D) -> the normalised and pooled vector of each (B, M, D)."""
    return torch.stack([pool(normalize(state, config), mask_BL, config.pooling) for state in states], dim=1)


def pool(x_BLD: Tensor, mask_BL: Tensor, pooling: str) -> Tensor:
    """(B, L, D) -> (B, D): the mean of the real tokens, the first of them or the last."""
    if pooling == "mean":
        real_BL1 = mask_BL.unsqueeze(-1).to(x_BLD.dtype)
        return (x_BLD * real_BL1).sum(1) / real_BL1.sum(1)
    real_BL = mask_BL.bool().int()
    position_B = real_BL.argmax(1) if pooling == "first" else real_BL.size(1) - 1 - real_BL.flip(1).argmax(1)
    return x_BLD[torch.arange(len(x_BLD), device=x_BLD.device), position_B]


def pool_by_attention(x_BLD: Tensor, mask_BL: Tensor, query_D: Tensor) -> Tensor:
    """(B, L, D) -> (B, D): the mean of the real tokens, each weighed by a softmax over its product with a query."""
    score_BL = x_BLD @ query_D / math.sqrt(len(query_D))
    weight_BL = score_BL.masked_fill(~mask_BL.bool(), -math.inf).softmax(-1)
    return (weight_BL.unsqueeze(1) @ x_BLD).squeeze(1)


def mixture_config(arm: ArmConfig, hidden_size: int) -> MixtureConfig:
    """Sizes of a head's feed-forward layer; one without a width costs what a dense layer of width D does."""
    sizes = ModelConfig(
        hidden_size=hidden_size,
        intermediate_size=hidden_size,
        num_hidden_layers=1,
        activation="relu",
        gated=False,
    )
    return build_model_config(sizes, arm, vocab_size=1, max_position_embeddings=1)


def _build_feed_forward(arm: ArmConfig, hidden_size: int) -> FeedForward:
    facts = facts_of(arm.family)
    if facts.group_over and facts.serving == "never":
        raise UserError(
            f"'head.feed_forward.family' is '{arm.family}', whose answer to one text depends on the other texts at "
            "hand: use token_choice, soft or mixture_of_tokens."
        )
    if facts.follows_load:
        raise UserError(
            f"'head.feed_forward.family' is '{arm.family}', whose router follows the load of a language model in "
            "training, and a head's is not followed: use token_choice, soft or mixture_of_tokens."
        )
    if facts.group_over and arm.group_over != "batch":
        raise UserError(
            f"'head.feed_forward.group_over' is '{arm.group_over}': a head sees one vector of each text, so groups "
            "are formed over 'batch'."
        )
    try:
        layer = build_feed_forward(mixture_config(arm, hidden_size), 0)
    except ValueError as error:
        raise UserError(f"'head.feed_forward' cannot be built: {error}") from error
    _initialize(layer)
    return layer


def _initialize(layer: FeedForward) -> None:
    """The models' rule: every matrix normal with `INITIALIZER_RANGE`, routers too."""
    for module in layer.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=INITIALIZER_RANGE)
        elif isinstance(module, SoftMoE):
            nn.init.normal_(module.slots, std=INITIALIZER_RANGE)


def inactive_parameters(config: HeadConfig, hidden_size: int) -> int:
    """Parameters of a head's mixture that one text does not pay for."""
    if config.feed_forward is None:
        return 0
    (shape,) = feed_forward_shapes(mixture_config(config.feed_forward, hidden_size), sequence_length=1)
    return max(0, layer_parameters(shape) - active_layer_parameters(shape, deployed=True))


def head_settings(config: HeadConfig) -> dict[str, object]:
    """What distinguishes a head in a table, short."""
    settings: dict[str, object] = {"pooling": config.pooling, "normalization": config.normalization}
    if config.kind == "layer_mix":
        settings["weights"] = "by token" if config.per_token else "fixed"
    if config.feed_forward is not None:
        settings["feed_forward"] = config.feed_forward.family
        settings["num_experts"] = config.feed_forward.num_experts
    return settings
