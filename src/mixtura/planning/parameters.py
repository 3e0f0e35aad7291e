"""How many parameters a model has, in all and for one token.

The decoder is Llama's: root-mean-square norms, attention without biases, rotary positions without parameters.
"""

from mixtura.planning.shapes import FeedForwardShape, ModelShape, attention_widths, feed_forward_shapes


def expert_parameters(layer: FeedForwardShape) -> int:
    """Parameters of one expert: 2 D F, or 3 D F when gated; for a dense layer, all of it."""
    return layer.num_projections * layer.hidden_size * layer.intermediate_size


def router_parameters(layer: FeedForwardShape) -> int:
    """Parameters of a layer's routers.

    A column an expert (token choice, expert choice) or a mixture (mixture of tokens, twice with a separate combine);
    Soft MoE has a vector a slot and one scale (arXiv 2308.00951, section 2.3). A selection bias is no parameter.
    Where an example's language names its expert there is no router.
    """
    if layer.family == "dense" or not layer.learned_router:
        return 0
    if layer.family in ("token_choice", "expert_choice"):
        return layer.hidden_size * layer.num_experts
    one_router = layer.hidden_size * layer.num_experts * layer.mixtures_per_expert
    if layer.family == "soft":
        return one_router + 1
    return one_router * (2 if layer.combine == "separate" else 1)


def layer_parameters(layer: FeedForwardShape) -> int:
    """Parameters of one feed-forward layer: routed and shared experts, and routers."""
    experts = 1 if layer.family == "dense" else layer.num_experts
    return (experts + layer.shared_experts) * expert_parameters(layer) + router_parameters(layer)


def active_layer_parameters(layer: FeedForwardShape) -> int:
    """Parameters whose FLOPs one token pays for: its rows' worth of experts, shared experts and routers.

    For token choice these are the top_k experts of a token. A mixing layer runs all its experts on every group, and one
    token pays for E * C / G of them.
    """
    experts = (layer.rows_per_token + layer.shared_experts) * expert_parameters(layer)
    return round(experts) + router_parameters(layer)


def attention_parameters(shape: ModelShape) -> int:
    """Parameters of one attention layer: query, key, value and output projections."""
    query, key_value = attention_widths(shape)
    return shape.hidden_size * (2 * query + 2 * key_value)


def model_parameters(shape: ModelShape) -> int:
    """Parameters of the whole model; a table shared by embedding and head counts once."""
    layers = feed_forward_shapes(shape, sequence_length=1)
    return _without_feed_forward(shape) + sum(layer_parameters(layer) for layer in layers)


def active_parameters(shape: ModelShape, *, sequence_length: int) -> int:
    """Parameters one token passes through: the whole model with `active_layer_parameters` for its mixtures.

    Args:
        shape: Sizes of the model.
        sequence_length: Tokens of a sequence, over which Soft MoE spreads its slots; other families do not look at it.
    """
    layers = feed_forward_shapes(shape, sequence_length=sequence_length)
    return _without_feed_forward(shape) + sum(active_layer_parameters(layer) for layer in layers)


def _without_feed_forward(shape: ModelShape) -> int:
    num_layers = shape.num_hidden_layers
    tables = 1 if shape.tie_word_embeddings else 2
    norms = (2 * num_layers + 1) * shape.hidden_size
    # A weight for the embeddings and for each layer, and one scale.
    layer_mix = num_layers + 2 if shape.layer_mix else 0
    embeddings = tables * shape.vocab_size * shape.hidden_size
    return embeddings + num_layers * attention_parameters(shape) + norms + layer_mix
