"""What one training step needs of memory: bytes by kind, for a model that is divided among devices.

Measured steps are held against the bytes in the tests. What autograd keeps of a layer follows from its operators. Per
token, with D hidden, A and V columns of queries and of keys, F the expert width, H = 2F when gated else F, K rows, E
experts, S mixtures, G the group:

- norms and residuals: 6D, as two norms each keep their input, the normalised and the scaled one;
- attention: 2A + 2V and a number a head, with a kernel that keeps no scores;
- a dense layer: the gate's and the up-projection's output, the activated gate, the product;
- token choice and its kin: K * H, the first projection of every row, and a few numbers an expert and choice;
- mixing: rows_per_token * (H + 2D), mixtures and their outputs beside the first projection, and S weights.

The loss needs three tensors of the size of the logits at once: log-probabilities and two gradients. Where logits are
large (`LARGE_LOGITS`), training takes head and loss some rows at a time (`mixtura.models.losses`) and holds two
tensors of these rows, and the gradients of the head and its input, which the backward pass scales into a second copy.
"""

from collections import Counter
from dataclasses import dataclass

from mixtura.config.families import facts_of
from mixtura.planning.formulas import (
    attention_parameters,
    expert_parameters,
    layer_parameters,
    model_parameters,
    muon_parameters,
)
from mixtura.planning.shapes import FeedForwardShape, ModelShape, attention_widths, feed_forward_shapes

_MOMENT_BYTES = {"adamw": 8.0, "adamw_8bit": 2.1, "adafactor": 0.1, "muon": 8.0}
"""What an optimizer keeps of one parameter; Adafactor's is a row and a column of each matrix, and Muon keeps half of
this of the matrices that it moves."""
LOGIT_COPIES = 3
LARGE_LOGITS = 64 << 20
"""Bytes of float32 logits from which training never holds them all: head and loss then take some rows at a time."""
ROWS_BYTES_ON_CPU = LARGE_LOGITS // 2
"""Bytes of the logits of these rows."""
ROWS_BYTES = 4 * LARGE_LOGITS
"""The same on an accelerator, which waits for memory where rows are few."""
_WORKSPACE = 1.3
"""What the backward pass of one layer takes, as a multiple of what its forward pass has kept."""


@dataclass(frozen=True, kw_only=True)
class Division:
    """How a model and a step are divided among devices."""

    replicas: int = 1
    """DP: copies of the model, whose gradients are averaged."""
    shards: int = 1
    """FSDP: devices that hold one copy together; each gathers a layer's weights just before it needs them."""
    expert_ranks: int = 1
    """EP: devices among those of one or several copies that hold the experts of one copy together."""
    micro_batch: int = 1
    """Sequences of a pass on one device."""
    micro_batches: int = 1
    """Passes of a step on one device."""
    checkpointing: bool = False
    """Whether layers keep their input only and are computed again in the backward pass."""

    @property
    def devices(self) -> int:
        """All of them."""
        return self.replicas * self.shards

    @property
    def expert_shards(self) -> int:
        """Devices that hold one rank's experts together."""
        return max(1, self.shards // self.expert_ranks)


@dataclass(frozen=True, kw_only=True)
class StepMemory:
    """Bytes on one device."""

    weights: float
    gradients: float
    optimizer: float
    gathered: float
    """Copies of weights in the dtype of the products, buckets of gradients, and layers gathered from shards."""
    activations: float
    logits: float
    exchanged: float
    """Buffers of the all-to-all: rows sent and rows received."""

    @property
    def total(self) -> float:
        """The most at once: gradients are whole only when the activations are gone, but for earlier micro-batches."""
        return self.weights + self.gradients + self.optimizer + self.gathered + self.passing

    @property
    def passing(self) -> float:
        """What lives within a pass."""
        return self.activations + self.logits + self.exchanged


class ModelSizes:
    """What planning asks of a model again and again, found once."""

    def __init__(self, shape: ModelShape, *, sequence_length: int) -> None:
        """`sequence_length` is the tokens of a sequence."""
        layers = feed_forward_shapes(shape, sequence_length=sequence_length)
        self.shape, self.sequence_length = shape, sequence_length
        self.layers = Counter(layers)
        """How many layers there are of each kind."""
        self.num_layers = len(layers)
        self.parameters = model_parameters(shape)
        self.experts = sum(_routed_parameters(layer) for layer in layers)
        """Parameters of all routed experts, which expert parallelism divides."""
        self.rest = self.parameters - self.experts
        self.share_of_muon = muon_parameters(shape) / self.parameters
        """How much of it Muon moves, the rest being AdamW's."""

    def held(self, division: Division) -> float:
        """Parameters that one device keeps and updates."""
        return self.experts / (division.expert_ranks * division.expert_shards) + self.rest / division.shards


def _routed_parameters(layer: FeedForwardShape) -> int:
    return 0 if layer.family == "dense" else layer.num_experts * expert_parameters(layer)


def step_memory(
    sizes: ModelSizes,
    division: Division,
    *,
    dtype: str = "float32",
    optimizer: str = "adamw",
    on_cpu: bool = False,
) -> StepMemory:
    """Bytes of a step under autocast: weights, gradients and moments stay float32, products are in `dtype`.

    Args:
        sizes: of the model.
        division: among devices.
        dtype: "float32" or "bfloat16", of the products.
        optimizer: "adamw", "adamw_8bit", "adafactor" or "muon".
        on_cpu: whether the device is a processor, where fewer rows of large logits are taken at a time.
    """
    width, shape = 4 if dtype == "float32" else 2, sizes.shape
    held, local = sizes.held(division), sizes.experts / division.expert_ranks + sizes.rest
    tokens = division.micro_batch * sizes.sequence_length
    each = {layer: layer_activations(shape, layer, division, width=width) * tokens for layer in sizes.layers}
    inputs = 4 * shape.hidden_size * tokens * sizes.num_layers if division.checkpointing else 0.0
    workspace = _WORKSPACE * max(each.values())
    kept = inputs or sum(count * each[layer] for layer, count in sizes.layers.items())
    head = (12 + width) * shape.hidden_size * tokens
    logits = _logits(shape, tokens, width=width, rows_bytes=ROWS_BYTES_ON_CPU if on_cpu else ROWS_BYTES)
    gradients, gathered = 4 * held, 0.0
    if division.shards > 1:
        gathered = 2 * (width + 4) * _largest_layer(sizes, division)
    elif width < 4:
        gathered = width * local  # autocast keeps a copy of every weight for the length of a pass
    if division.replicas > 1 and division.shards == 1:
        gathered += 4 * local  # buckets in which gradients are averaged
    # With one micro-batch no gradient exists while all activations do: they are made as activations go. A layer that is
    # computed again in the backward pass finds the logits gone.
    first = kept + head + logits
    passing = max(first, inputs + workspace)
    if division.micro_batches == 1:
        passing = max(passing - gradients, inputs / sizes.num_layers + workspace)
    share = passing / max(first, 1.0)
    return StepMemory(
        weights=4 * held,
        gradients=gradients,
        optimizer=(_MOMENT_BYTES[optimizer] - (4 * sizes.share_of_muon if optimizer == "muon" else 0)) * held,
        gathered=gathered,
        activations=(kept + head) * share,
        logits=logits * share,
        exchanged=_exchanged(sizes, division, tokens, width),
    )


def _logits(shape: ModelShape, tokens: int, *, width: int, rows_bytes: int) -> float:
    """Bytes that head and loss hold at once, of all rows or, where these are large, of some and of the gradients."""
    columns, copy = shape.vocab_size, width if width < 4 else 0
    if 4 * tokens * columns <= LARGE_LOGITS:
        return (LOGIT_COPIES * 4 + copy) * columns * tokens
    gradients = width * shape.hidden_size * tokens + 4 * columns * shape.hidden_size
    rows = min(tokens, max(1, rows_bytes // (4 * columns)))
    at_a_time = (width + 4) * rows * columns + copy * columns * shape.hidden_size
    return gradients + max(at_a_time, gradients)


def layer_activations(shape: ModelShape, layer: FeedForwardShape, division: Division, *, width: int) -> float:
    """Bytes that one decoder layer keeps of a token for the backward pass; `width` is that of a product's numbers."""
    hidden = shape.hidden_size
    query, key = attention_widths(shape)
    # Norms run in float32 and give their output a second time in the dtype of the products.
    norms = 4 * (6 * hidden + 2) + (2 * width * hidden if width < 4 else 0)
    attention = width * (2 * query + 2 * key) + 4 * shape.num_attention_heads
    kept = _feed_forward_numbers(shape, layer, division)
    shared = layer.shared_experts * layer.intermediate_size * _dense_copies(shape)
    return norms + attention + width * (kept + shared) + 4 * _routing_numbers(layer)


def _dense_copies(shape: ModelShape) -> int:
    """Tensors as wide as a dense layer that it keeps: relu keeps its output alone, others their input too."""
    copies = 1 if getattr(shape, "hidden_act", "relu") == "relu" else 2
    return copies + (2 if shape.gated else 0)


def _feed_forward_numbers(shape: ModelShape, layer: FeedForwardShape, division: Division) -> float:
    if layer.family == "dense":
        return layer.intermediate_size * _dense_copies(shape)
    projected = layer.intermediate_size * (2 if layer.gated else 1)
    rows = layer.trained_rows_per_token
    if layer.family == "remoe":  # half of the gates are open at the start
        rows = max(rows, layer.num_experts / 2)
    if facts_of(layer.family).routing != "mixing":
        return rows * projected
    whole = 1.0 if layer.family == "soft" or division.micro_batch == layer.group_size else 0.0
    grouped = rows * (projected + 2 * layer.hidden_size) + whole * layer.hidden_size
    alone = layer.alone_rows_per_token * (projected + 3 * layer.hidden_size) if layer.alone_share else 0.0
    return (1 - layer.alone_share) * grouped + layer.alone_share * alone


def _routing_numbers(layer: FeedForwardShape) -> float:
    if layer.family == "dense":
        return 0.0
    columns = layer.router_columns
    mixes = facts_of(layer.family).routing == "mixing"
    return layer.routers * columns if mixes else 2 * columns + 7 * layer.rows_per_token + 1


def _largest_layer(sizes: ModelSizes, division: Division) -> float:
    """Parameters of the largest layer as one device gathers it."""
    attention = attention_parameters(sizes.shape)
    each = [
        attention + layer_parameters(layer) - _routed_parameters(layer) * (1 - 1 / division.expert_ranks)
        for layer in sizes.layers
    ]
    return max(*each, sizes.shape.vocab_size * sizes.shape.hidden_size)


def _exchanged(sizes: ModelSizes, division: Division, tokens: int, width: int) -> float:
    if division.expert_ranks == 1:
        return 0.0
    rows = max((layer.rows_per_token for layer in sizes.layers if layer.family != "dense"), default=0.0)
    return 2 * rows * tokens * sizes.shape.hidden_size * width
