"""Machines that a run may be planned for, by name or from a TOML file, and how long a training step takes there.

The seconds are a model of a machine, not a measurement. The efficiencies below are assumptions that were held against
published runs, see docs/planning.md. A device computes, moves what it computes through its memory and exchanges with
the others. Gathering weights and averaging gradients run beside the computation and cost what they take longer than it;
an all-to-all has to be waited for.
"""

import dataclasses
import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from mixtura.config.families import facts_of
from mixtura.errors import UserError
from mixtura.planning.formulas import BACKWARD, attention_flops, head_flops, layer_flops, routing_flops
from mixtura.planning.shapes import FeedForwardShape
from mixtura.planning.step_memory import Division, ModelSizes, layer_activations


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """Equal devices in equal nodes."""

    name: str
    devices: int
    devices_per_node: int = 8
    memory_gb: float
    """Of a device, in units of 1e9 bytes."""
    bfloat16_tflops: float
    float32_tflops: float
    """Of products in float32 as torch computes them by default, without TF32."""
    memory_gb_per_s: float
    node_gb_per_s: float
    network_gb_per_s: float
    price_per_hour: float
    """US dollars for one device."""

    def link(self, group: int) -> float:
        """Bytes a second that a device sends to the others of a group of so many."""
        return 1e9 * (self.node_gb_per_s if group <= self.devices_per_node else self.network_gb_per_s)

    def peak(self, dtype: str) -> float:
        """FLOPs a second of one device."""
        return 1e12 * (self.bfloat16_tflops if dtype == "bfloat16" else self.float32_tflops)


_KEYS = ("memory_gb", "bfloat16_tflops", "float32_tflops", "memory_gb_per_s", "node_gb_per_s", "network_gb_per_s")
_KNOWN: dict[str, tuple[float, ...]] = {
    # name: the keys above, and the price
    "A100": (80, 312, 19.5, 2039, 300, 25, 1.6),
    "A100-40GB": (40, 312, 19.5, 1555, 300, 25, 1.2),
    "H100": (80, 989, 67, 3350, 450, 50, 2.5),
    "H800": (80, 989, 67, 3350, 200, 50, 2.0),
    "H200": (141, 989, 67, 4800, 450, 50, 3.2),
    "B200": (180, 2250, 75, 7700, 900, 50, 5.0),
    "L40S": (48, 362, 91.6, 864, 32, 12.5, 0.9),
    "RTX4090": (24, 165, 82.6, 1008, 32, 3, 0.4),
}


LEAST, MOST = 1e-6, 1e12
"""Of a number in a file of hardware: beyond them seconds and dollars would be no finite numbers."""


def read_hardware(spec: str) -> Hardware:
    """Hardware from "64xH200", "H100" or the path of a TOML file with the fields of `Hardware`.

    Raises:
        UserError: neither is known; names what is.
    """
    if spec.endswith(".toml"):
        return _from_file(Path(spec))
    count, _, kind = spec.rpartition("x") if "x" in spec else ("1", "", spec)
    named = {name.lower(): name for name in _KNOWN}.get(kind.lower())
    if named is None or not count.isdecimal() or int(count) < 1:
        raise UserError(
            f"--hardware is '{spec}': write a number, an x and one of {', '.join(_KNOWN)}, such as 64xH200, or the "
            "path of a .toml file with your own."
        )
    values = dict(zip(_KEYS, _KNOWN[named], strict=False))
    return Hardware(name=f"{count}x{named}", devices=int(count), price_per_hour=_KNOWN[named][-1], **values)


def _from_file(path: Path) -> Hardware:
    try:
        given = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"--hardware '{path}' cannot be read ({error.strerror}).") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"--hardware '{path}' is no TOML: {error}.") from None
    fields = {field.name: field for field in dataclasses.fields(Hardware)}
    given.setdefault("name", path.stem)
    for key, value in given.items():
        if key not in fields:
            raise UserError(f"--hardware '{path}' has '{key}': it may have {', '.join(fields)}.")
        wanted = {str: "a text", int: "a whole number"}.get(fields[key].type, "a number")  # pyright: ignore
        number = isinstance(value, int | float) and LEAST <= value <= MOST
        fits = isinstance(value, str) if wanted == "a text" else number
        if not fits or (wanted == "a whole number" and not isinstance(value, int)) or isinstance(value, bool):
            least = 1 if wanted == "a whole number" else LEAST
            bound = "" if wanted == "a text" else f", greater than zero: from {least:g} to {MOST:g}"
            raise UserError(f"--hardware '{path}' has {key} = {value!r}: it must be {wanted}{bound}.")
    missing = [name for name, field in fields.items() if name not in given and field.default is dataclasses.MISSING]
    if missing:
        raise UserError(f"--hardware '{path}' lacks {', '.join(missing)}.")
    return Hardware(**given)


PRODUCT_EFFICIENCY = 0.68
"""Share of the peak that large dense products reach."""
EXPERT_WIDTH = 600
"""Width of an expert at which grouped products reach half of that: narrow experts keep the units waiting."""
MEMORY_EFFICIENCY = 0.85
ACTIVATION_PASSES = 3.5
"""How often the bytes that a layer keeps pass through memory in a step outside of products."""
LINK_EFFICIENCY = 0.75
LAUNCH_SECONDS = 4e-6
KERNELS_PER_LAYER = 90
"""Kernels that a layer starts forward and backward; small layers wait for the host that starts them."""
IMBALANCE = 1.15
"""Rows of the busiest expert rank over the mean, where tokens choose; experts that choose or mix get equal rows."""


def _assumed_imbalance(ranks: int) -> float:
    return IMBALANCE if ranks > 1 else 1.0


@dataclass(frozen=True, kw_only=True)
class MixtureSpeed:
    """How fast mixtures run; the default is what the model of a machine assumes."""

    times_dense: float | None = None
    """Time of a layer over that of a dense one of equal FLOPs, routing included; None follows from the width of its
    experts."""
    imbalance: Callable[[int], float] = _assumed_imbalance
    """Rows of the busiest of so many expert ranks over the mean, for which the others wait, where tokens choose."""

    def waiting(self, layer: FeedForwardShape, division: Division) -> float:
        """How many times as long as with equal rows the experts of a layer take."""
        chosen = facts_of(layer.family).routing == "tokens choose"
        return self.imbalance(division.expert_ranks) if chosen else 1.0


_ASSUMED = MixtureSpeed()


@dataclass(frozen=True, kw_only=True)
class StepTime:
    """Seconds of a step, by what the device does."""

    computing: float
    exchanging: float
    """Gradients and weights, as far as they take longer than what is computed meanwhile."""
    routing: float
    """The all-to-all of expert parallelism."""
    updating: float

    @property
    def total(self) -> float:
        """All of them."""
        return self.computing + self.exchanging + self.routing + self.updating


def step_time(
    sizes: ModelSizes,
    division: Division,
    hardware: Hardware,
    *,
    dtype: str = "bfloat16",
    mixtures: MixtureSpeed = _ASSUMED,
) -> StepTime:
    """Seconds of a step; `dtype` is that of the products."""
    width = 2 if dtype == "bfloat16" else 4
    passes, pass_seconds = division.micro_batches, _computing(sizes, division, hardware, dtype=dtype, mixtures=mixtures)
    per_pass, per_step = _exchanged_bytes(sizes, division, width=width)
    gathering = per_pass / (hardware.link(division.shards) * LINK_EFFICIENCY)
    averaging = per_step / (hardware.link(division.devices) * LINK_EFFICIENCY)
    # The first gather and the last average have nothing to hide behind; a tenth stands for both.
    exchanging = passes * max(gathering - pass_seconds, 0.1 * gathering)
    exchanging += max(averaging - pass_seconds / 2, 0.1 * averaging)
    return StepTime(
        computing=passes * pass_seconds,
        exchanging=exchanging,
        routing=passes * _all_to_all(sizes, division, hardware, width=width, mixtures=mixtures),
        updating=28 * sizes.held(division) / (1e9 * hardware.memory_gb_per_s * MEMORY_EFFICIENCY),
    )


def communicated_bytes(sizes: ModelSizes, division: Division, *, dtype: str) -> float:
    """Bytes that one device sends in a step."""
    width = 2 if dtype == "bfloat16" else 4
    per_pass, per_step = _exchanged_bytes(sizes, division, width=width)
    return division.micro_batches * (per_pass + _rows_moved(sizes, division, width=width)) + per_step


def expert_efficiency(width: int) -> float:
    """Share of the peak that grouped products reach: half as much as dense ones with experts of `EXPERT_WIDTH`."""
    return PRODUCT_EFFICIENCY * width / (width + EXPERT_WIDTH)


def _computing(
    sizes: ModelSizes, division: Division, hardware: Hardware, *, dtype: str, mixtures: MixtureSpeed
) -> float:
    """Seconds of one micro-batch, forward and backward."""
    width, shape = 2 if dtype == "bfloat16" else 4, sizes.shape
    tokens, peak = division.micro_batch * sizes.sequence_length, hardware.peak(dtype)
    forwards = 1 + BACKWARD + (1 if division.checkpointing else 0)
    seconds = (1 + BACKWARD) * head_flops(shape) * tokens / (peak * PRODUCT_EFFICIENCY)
    moved = 4 * 4 * shape.vocab_size * tokens
    attention = attention_flops(shape, sequence_length=sizes.sequence_length) / PRODUCT_EFFICIENCY
    for layer, count in sizes.layers.items():
        feed_forward = _feed_forward_work(layer, mixtures) * mixtures.waiting(layer, division)
        seconds += count * forwards * tokens * (attention + feed_forward) / peak
        moved += count * ACTIVATION_PASSES * layer_activations(shape, layer, division, width=width) * tokens
    launching = sizes.num_layers * KERNELS_PER_LAYER * LAUNCH_SECONDS * forwards / (1 + BACKWARD)
    return max(seconds + moved / (1e9 * hardware.memory_gb_per_s * MEMORY_EFFICIENCY), launching)


def _feed_forward_work(layer: FeedForwardShape, mixtures: MixtureSpeed) -> float:
    """Forward FLOPs a token that the peak would do in the time of the layer."""
    if layer.family == "dense":
        return layer_flops(layer) / PRODUCT_EFFICIENCY
    if mixtures.times_dense is not None:
        return layer_flops(layer) / PRODUCT_EFFICIENCY * mixtures.times_dense
    own = layer_flops(layer) - routing_flops(layer)
    return routing_flops(layer) / PRODUCT_EFFICIENCY + own / expert_efficiency(layer.intermediate_size)


def _exchanged_bytes(sizes: ModelSizes, division: Division, *, width: int) -> tuple[float, float]:
    """Bytes that one device sends for weights and gradients: for each pass, and once a step."""
    shards, expert_shards, local = division.shards, division.expert_shards, sizes.experts / division.expert_ranks
    # Gathered forward and backward in the dtype of the products, scattered once as float32.
    gathered = sizes.rest * (shards - 1) / shards + local * (expert_shards - 1) / expert_shards
    copies = division.replicas
    expert_copies = max(1, division.devices // (division.expert_ranks * expert_shards))
    averaged = sizes.rest / shards * (copies - 1) / copies
    averaged += local / expert_shards * (expert_copies - 1) / expert_copies
    return (2 * width + 4) * gathered, 8 * averaged


def _rows_moved(sizes: ModelSizes, division: Division, *, width: int) -> float:
    """Bytes of the rows that a pass sends to other ranks' experts and back, forward and backward."""
    ranks, tokens = division.expert_ranks, division.micro_batch * sizes.sequence_length
    rows = sum(count * layer.rows_per_token for layer, count in sizes.layers.items() if layer.family != "dense")
    return 4 * rows * tokens * sizes.shape.hidden_size * width * (ranks - 1) / ranks


def _all_to_all(
    sizes: ModelSizes, division: Division, hardware: Hardware, *, width: int, mixtures: MixtureSpeed
) -> float:
    """Seconds of the all-to-all of one pass: what leaves the node takes the network, the rest the node's links."""
    waiting = max(mixtures.waiting(layer, division) for layer in sizes.layers)
    moved = _rows_moved(sizes, division, width=width) * waiting
    outside = max(0.0, 1 - hardware.devices_per_node / division.expert_ranks)
    within = moved * (1 - outside) / (1e9 * hardware.node_gb_per_s * LINK_EFFICIENCY)
    return max(within, moved * outside / (1e9 * hardware.network_gb_per_s * LINK_EFFICIENCY))
