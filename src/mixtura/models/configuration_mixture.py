"""The configuration of a decoder whose feed-forward layers may be mixtures, a family for each layer."""

import math
from typing import Literal

from huggingface_hub.dataclasses import strict
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_rope_utils import RopeParameters

from mixtura.config.model_settings import CHOICES, FAMILY_NAMES, ModelSettings

ATTENTIONS = ("llama", "mistral", "qwen2", "qwen3")


@strict
class MixtureConfig(ModelSettings, PreTrainedConfig):
    """Llama's decoder with `mlp_layer_types` naming the family of every feed-forward layer.

    Fields carry Hugging Face's names where it has one. Those of mixtures come from the table of settings in
    `mixtura.config.ArmConfig`, which describes them. `intermediate_sizes` has the width of every layer where dense
    layers differ, and `expert_names` the language or pair of every expert where `route_by` is not "token".

    `attention` names the model whose attention the layers have: "qwen2" has biases on queries, keys and values,
    "qwen3" norms on queries and keys. All may look at the last `sliding_window` tokens only: in every layer, or in
    those that `layer_types` calls "sliding_attention". Llama's attention with a window is Mistral's and is renamed so,
    unless it has biases (`attention_bias`).

    Models whose mixtures are all token choice have `output_router_logits` as Mixtral's configuration has it.
    """

    model_type = "mixtura"
    # Outputs that the Trainer leaves out of its predictions, as for Mixtral: what remains are the logits.
    keys_to_ignore_at_inference = ["past_key_values", "language_loss", "z_loss", "routing"]
    attribute_map = {"num_local_experts": "num_experts"}
    default_theta = 10000.0

    vocab_size: int = 1024
    hidden_size: int = 128
    intermediate_size: int = 512
    intermediate_sizes: list[int] | None = None
    moe_intermediate_size: int = 512
    num_hidden_layers: int = 4
    num_attention_heads: int = 4
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    hidden_act: str = "relu"
    gated: bool = False
    max_position_embeddings: int = 2048
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-5
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    tie_word_embeddings: bool = True
    rope_parameters: RopeParameters | dict | None = None
    attention_bias: bool = False
    attention_dropout: float | int = 0.0
    attention: str = "llama"
    sliding_window: int | None = None
    mlp_layer_types: list[str] | None = None
    routed_scaling_factor: float | int = 1.0
    expert_names: list[str] | None = None
    population: bool = False
    layer_mix: bool = False

    def __post_init__(self, **kwargs):
        """Fills in what follows from other fields, such as the width of a head, which scaled rotary embeddings need."""
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.head_dim is None:
            self.head_dim = self.hidden_size // self.num_attention_heads
        if self.mlp_layer_types is None:
            self.mlp_layer_types = ["dense"] * self.num_hidden_layers
        if self.attention == "llama" and self.sliding_window is not None and not self.attention_bias:
            self.attention = "mistral"
        # Set only here, as no field: trainers balance the experts of any model whose configuration has this attribute.
        if self.has_balanced_layers:
            kwargs.setdefault("output_router_logits", False)
        # Set only here, as no field: transformers asks whether the attribute exists, and None would count as existing.
        if self.attention in ("qwen2", "qwen3") and kwargs.get("layer_types") is None:
            kwargs["layer_types"] = self.attention_kinds()
        # The name in older folders, which transformers takes for the temperature of sampling.
        if "temperature" in kwargs:
            self.router_temperature = kwargs.pop("temperature")
        super().__post_init__(**kwargs)

    def validate_mlp_layer_types(self) -> None:
        """Raises ValueError unless there is one known family for each layer."""
        if self.mlp_layer_types is None:
            return
        if len(self.mlp_layer_types) != self.num_hidden_layers:
            raise ValueError(
                f"mlp_layer_types names {len(self.mlp_layer_types)} layers but num_hidden_layers is "
                f"{self.num_hidden_layers}: name a family for each."
            )
        for family in self.mlp_layer_types:
            if family not in FAMILY_NAMES:
                raise ValueError(f"mlp_layer_types has {family!r}: it must be one of {', '.join(FAMILY_NAMES)}.")

    @property
    def has_balanced_layers(self) -> bool:
        """Whether every mixture is one of token choice with a router, whose load a loss must balance."""
        mixtures = set(self.mlp_layer_types or []) - {"dense"}
        return mixtures == {"token_choice"} and self.route_by == "token"

    def start_deviation(
        self, fan_in: int, *, of: Literal["dense_scale", "expert_scale", "router_scale"], down: bool = False
    ) -> float:
        """Standard deviation at the start of a feed-forward matrix or a router.

        A scale is a multiple of 1 / sqrt(fan-in); None is `initializer_range`, as in all checkpoints before there were
        scales.

        Args:
            fan_in: inputs of the matrix.
            of: the field with its scale.
            down: whether it is a down-projection.
        """
        scale = getattr(self, of)
        std = self.initializer_range if scale is None else scale / math.sqrt(fan_in)
        if of == "router_scale":
            return 0.0 if self.control == "uniform_router" else std
        return std * self.feed_forward_scale * (self.down_scale if down else 1.0)

    def attention_kinds(self) -> list[str]:
        """What each layer looks at: "full_attention", or "sliding_attention" for the last `sliding_window` tokens."""
        kind = "full_attention" if self.sliding_window is None else "sliding_attention"
        return getattr(self, "layer_types", None) or [kind] * self.num_hidden_layers

    def validate_layer_type(self) -> None:
        """Raises ValueError for an unknown kind of attention layer; transformers' own check knows no families."""
        kinds = getattr(self, "layer_types", None)
        if kinds is None:
            return
        if len(kinds) != self.num_hidden_layers or set(kinds) - {"full_attention", "sliding_attention"}:
            raise ValueError(
                f"layer_types is {kinds}: it must name full_attention or sliding_attention for each of the "
                f"{self.num_hidden_layers} layers."
            )

    def validate_attention(self) -> None:
        """Raises ValueError for an unknown attention."""
        if self.attention not in ATTENTIONS:
            raise ValueError(f"attention is {self.attention!r}: it must be one of {', '.join(ATTENTIONS)}.")

    def validate_intermediate_sizes(self) -> None:
        """Raises ValueError unless there is a width for each layer."""
        if self.intermediate_sizes is not None and len(self.intermediate_sizes) != self.num_hidden_layers:
            raise ValueError(
                f"intermediate_sizes has {len(self.intermediate_sizes)} widths but num_hidden_layers is "
                f"{self.num_hidden_layers}: give a width for each."
            )

    def validate_choices(self) -> None:
        """Raises ValueError for a word that a setting does not have."""
        for name, known in CHOICES.items():
            value = getattr(self, name)
            if value is not None and value not in known:
                raise ValueError(f"{name} is {value!r}: it must be one of {', '.join(known)}.")

    def validate_expert_names(self) -> None:
        """Raises ValueError for names that do not fit the experts."""
        if self.expert_names is None:
            return
        if self.route_by == "token" or len(self.expert_names) != self.num_experts:
            raise ValueError(
                f"expert_names has {len(self.expert_names)} names for {self.num_experts} experts routed by "
                f"{self.route_by}: leave it out where tokens choose, or name each expert."
            )
