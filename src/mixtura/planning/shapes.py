"""What the formulas of this package need to know about a model: nothing but sizes.

`ModelShape` is structural: the Hugging Face configuration of `mixtura.models` has these attributes, and so may any
plain dataclass. `feed_forward_shapes` turns it into one `FeedForwardShape` a layer, on which every formula stands.
`capacity` is the one formula for how many rows an expert takes.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, cast

from mixtura.config import Family
from mixtura.config.arm import has_setting
from mixtura.config.families import facts_of


class ModelShape(Protocol):
    """Sizes of a decoder, with the field names of the Hugging Face configuration."""

    @property
    def vocab_size(self) -> int:
        """V."""
        ...

    @property
    def hidden_size(self) -> int:
        """D."""
        ...

    @property
    def num_hidden_layers(self) -> int:
        """Decoder layers."""
        ...

    @property
    def num_attention_heads(self) -> int:
        """Query heads."""
        ...

    @property
    def num_key_value_heads(self) -> int | None:
        """Key and value heads; None is one for each query head."""
        ...

    @property
    def head_dim(self) -> int | None:
        """Width of one head; None is hidden_size / num_attention_heads."""
        ...

    @property
    def intermediate_size(self) -> int:
        """Width of the dense layers."""
        ...

    @property
    def moe_intermediate_size(self) -> int:
        """Width of one expert, of shared experts too."""
        ...

    @property
    def intermediate_sizes(self) -> Sequence[int] | None:
        """Width of each layer where dense layers differ; None is `intermediate_size` in all."""
        ...

    @property
    def mlp_layer_types(self) -> Sequence[str] | None:
        """Family of each layer; None is dense everywhere."""
        ...

    @property
    def gated(self) -> bool:
        """Whether feed-forward layers and experts have a gate projection."""
        ...

    @property
    def num_experts(self) -> int:
        """E."""
        ...

    @property
    def num_experts_per_tok(self) -> int:
        """Experts a token is sent to, or gets on average (expert choice)."""
        ...

    @property
    def num_shared_experts(self) -> int:
        """Experts that every token passes through (token choice)."""
        ...

    @property
    def dense_router_gradient(self) -> bool:
        """Whether all experts run in training, for the router's sake (token choice)."""
        ...

    @property
    def zero_experts(self) -> int:
        """Experts that give nothing (token choice)."""
        ...

    @property
    def copy_experts(self) -> int:
        """Experts that give back their input (token choice)."""
        ...

    @property
    def constant_experts(self) -> int:
        """Experts that mix their input with a vector (token choice)."""
        ...

    @property
    def free_expert_balance(self) -> float:
        """How much one of those counts in the load-balancing loss."""
        ...

    @property
    def latent_size(self) -> int | None:
        """Width of the space that experts share (token choice); None has none."""
        ...

    @property
    def route_by(self) -> str:
        """ "token" where token choice has a router; else what names an example's expert."""
        ...

    @property
    def segment_length(self) -> int:
        """Tokens that share a merged expert (merged experts)."""
        ...

    @property
    def group_size(self) -> int:
        """Tokens of a group (mixture of tokens, expert choice)."""
        ...

    @property
    def mixtures_per_expert(self) -> int:
        """C: mixtures or slots of an expert (mixture of tokens, soft)."""
        ...

    @property
    def combine(self) -> str:
        """Whether mixture of tokens has a second router."""
        ...

    @property
    def alone_top_k(self) -> int | None:
        """Mixtures that run for a token without a group (mixture of tokens); None is all."""
        ...

    @property
    def zero_fill(self) -> float:
        """Share of the groups that training leaves otherwise empty (mixture of tokens)."""
        ...

    @property
    def alone_fraction(self) -> float:
        """Share of the training steps, the last ones, in which all groups are left empty."""
        ...

    @property
    def transition_fraction(self) -> float:
        """Share of the training steps, the last ones, in which mixture of tokens has become token choice."""
        ...

    @property
    def layer_mix(self) -> bool:
        """Whether the last hidden state is a blend of all layers'."""
        ...

    @property
    def tie_word_embeddings(self) -> bool:
        """Whether the output head is the embedding table."""
        ...


@dataclass(frozen=True, kw_only=True)
class FeedForwardShape:
    """Sizes of one feed-forward layer."""

    family: Family
    hidden_size: int
    intermediate_size: int
    """Width of the layer (dense) or of one expert."""
    gated: bool = False
    num_experts: int = 1
    top_k: int = 1
    num_shared_experts: int = 0
    all_train: bool = False
    """Token choice: whether all experts run for every token in training."""
    free_experts: int = 0
    """Token choice: zero, copy and constant experts, to which tokens go besides the others."""
    constant_experts: int = 0
    """Of these, how many have a vector and a router of their own."""
    free_expert_balance: float = 1.0
    """How much a free expert counts in the load-balancing loss."""
    latent_size: int | None = None
    """Width of what experts take and give; None is that of the hidden states."""
    learned_router: bool = True
    """Token choice: False where an example's language names its expert."""
    segment_length: int = 1
    """Merged experts: tokens that share one."""
    group_size: int = 1
    """Tokens that are mixed or compete: the group (mixture of tokens, expert choice), the sequence (all others)."""
    mixtures_per_expert: int = 1
    combine: Literal["same", "separate"] = "same"
    alone_top_k: int | None = None
    """Mixtures that run for a token without a group; None is all."""
    alone_share: float = 0.0
    """Mixture of tokens: share of the training tokens that run without a group, alone or as token choice."""

    @property
    def num_projections(self) -> int:
        """Matrices of one expert: up and down, and the gate if there is one."""
        return 3 if self.gated else 2

    @property
    def shared_experts(self) -> int:
        """Experts that every token passes through, where the family has them."""
        return self.num_shared_experts if has_setting(self.family, "num_shared_experts") else 0

    @property
    def router_columns(self) -> int:
        """Logits that a router computes for a token: one an expert, or one a mixture."""
        mixes = facts_of(self.family).routing == "mixing"
        return self.num_experts * (self.mixtures_per_expert if mixes else 1) + self.free_experts

    @property
    def routers(self) -> int:
        """Routers of the layer: two with a separate combine, none where an example's language names its expert."""
        if facts_of(self.family).routing == "none" or not self.learned_router:
            return 0
        return 2 if has_setting(self.family, "combine") and self.combine == "separate" else 1

    @property
    def rows_per_token(self) -> float:
        """Routed expert rows one token pays for: each row is one pass through one expert.

        Mixture of tokens runs in groups here; `alone_rows_per_token` has what it costs without them. An average where
        experts choose or mix. Token choice counts rows that a capacity drops as if they were kept, and of those that go
        to free experts as many as the load-balancing loss aims at: an expert gets as much less as it counts more.
        """
        match facts_of(self.family).routing:
            case "none":
                return 1.0
            case "merging":  # a last segment that is not full costs what a full one does
                return self.segments_per_token * self.segment_length
            case "tokens choose":
                counted = self.free_expert_balance * self.num_experts
                return self.top_k * counted / (counted + self.free_experts) if self.free_experts else float(self.top_k)
            case "experts choose":
                return self.num_experts * capacity(self.group_size, self.top_k, self.num_experts) / self.group_size
            case "mixing":
                return self.num_experts * self.mixtures_per_expert / self.group_size

    @property
    def segments_per_token(self) -> float:
        """Merged experts: segments of a sequence, the last one whole or not, over its tokens."""
        return math.ceil(self.group_size / self.segment_length) / self.group_size

    @property
    def trained_rows_per_token(self) -> float:
        """As `rows_per_token`, in training."""
        return float(self.num_experts) if self.all_train else self.rows_per_token

    @property
    def alone_rows_per_token(self) -> int:
        """Expert rows of a mixture-of-tokens layer for a token without a group: a row for each mixture that runs."""
        return self.num_experts * self.mixtures_per_expert if self.alone_top_k is None else self.alone_top_k


def feed_forward_shapes(shape: ModelShape, *, sequence_length: int) -> list[FeedForwardShape]:
    """The feed-forward layers of a model, from first to last, on sequences of `sequence_length` tokens."""
    widths = shape.intermediate_sizes or [shape.intermediate_size] * shape.num_hidden_layers
    families = shape.mlp_layer_types or ["dense"] * shape.num_hidden_layers
    return [
        FeedForwardShape(
            family=cast(Family, family),
            hidden_size=shape.hidden_size,
            intermediate_size=width if family == "dense" else shape.moe_intermediate_size,
            gated=shape.gated,
            num_experts=shape.num_experts,
            top_k=shape.num_experts_per_tok,
            num_shared_experts=shape.num_shared_experts,
            all_train=shape.dense_router_gradient and has_setting(family, "dense_router_gradient"),
            **_free_and_latent(shape, family),
            learned_router=shape.route_by == "token",
            segment_length=min(shape.segment_length, sequence_length),
            group_size=shape.group_size if has_setting(family, "group_size") else sequence_length,
            mixtures_per_expert=shape.mixtures_per_expert,
            combine=cast(Literal["same", "separate"], shape.combine),
            alone_top_k=shape.alone_top_k,
            alone_share=_alone_share(shape) if has_setting(family, "zero_fill") else 0.0,
        )
        for family, width in zip(families, widths, strict=True)
    ]


def _free_and_latent(shape: ModelShape, family: str) -> Any:
    if not has_setting(family, "latent_size"):
        return {}
    return {
        "free_experts": shape.zero_experts + shape.copy_experts + shape.constant_experts,
        "constant_experts": shape.constant_experts,
        "free_expert_balance": shape.free_expert_balance,
        "latent_size": shape.latent_size,
    }


def _alone_share(shape: ModelShape) -> float:
    """Of all training tokens: those of the last steps, and a share of those before.

    Token choice of as many experts as there are mixtures for a token alone costs what the token costs alone.
    """
    last = max(shape.alone_fraction, shape.transition_fraction)
    return last + (1 - last) * shape.zero_fill


def attention_widths(shape: ModelShape) -> tuple[int, int]:
    """Columns of the query projection, and of the key projection: heads times the width of one."""
    head_dim = shape.head_dim or shape.hidden_size // shape.num_attention_heads
    key_value_heads = shape.num_key_value_heads or shape.num_attention_heads
    return shape.num_attention_heads * head_dim, key_value_heads * head_dim


def capacity(tokens: int, top_k: int, num_experts: int, capacity_factor: float = 1.0) -> int:
    """Rows one expert takes: ceil(capacity_factor * tokens * top_k / num_experts), at least 1 and at most `tokens`.

    GShard (Lepikhin et al., 2020, section 2.2) and Switch Transformer (Fedus et al., 2021, section 2.2) have it for
    token choice; Expert Choice (Zhou et al., 2022, section 3.2) uses the same number as the rows an expert picks.

    Rounded up, where several codebases truncate with int(): with factor 1.0 and tokens that the experts do not divide,
    truncation drops tokens even under perfect balance, and with few tokens it leaves experts no row at all. The upper
    bound holds because an expert has a token at most once.

    Args:
        tokens: Tokens routed together.
        top_k: Experts a token has on average.
        num_experts: Experts that share the rows.
        capacity_factor: Rows as a multiple of an even share.
    """
    rows = math.ceil(even_rows(tokens, top_k, num_experts, capacity_factor))
    return max(1, min(rows, tokens))


def even_rows(tokens: Any, top_k: int, num_experts: int, capacity_factor: float) -> Any:
    """As `capacity`, before it is rounded up and bounded: of a number, or of a tensor of float64."""
    even_share = capacity_factor * tokens * top_k / num_experts
    # 1.1 * 10 is 11.000000000000002 in binary: without the guard that would be a capacity of 12.
    return even_share - 1e-9 * even_share
