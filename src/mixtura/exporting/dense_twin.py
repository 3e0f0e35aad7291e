"""A dense model with a checkpoint's attention, embeddings and norms: what an engine's own noise is measured on."""

import copy
from pathlib import Path

from torch import Tensor

from mixtura.checkpoints.tensors import PlannedTensor, StoredWeights, write_planned
from mixtura.config import UserError
from mixtura.exporting.containers import CONTAINERS, choose_container
from mixtura.exporting.traits import traits_of
from mixtura.models import MixtureConfig
from mixtura.models.loading import folder_settings, load_config

_MAX_BYTES = 5 * 10**9


def write_dense_twin(source: Path, folder: Path) -> Path | None:
    """Writes the twin to a new folder, and returns where it is.

    It has the first expert of every layer, without any factor. A source that is no mixture is its own twin.

    Args:
        source: a model folder.
        folder: made.

    Returns:
        None where no stock dense architecture has this attention, or layers differ in width.
    """
    if folder_settings(source).get("model_type") != "mixtura":
        return source
    config = load_config(MixtureConfig, source)
    families = config.mlp_layer_types or []
    if not config.gated or config.hidden_act != "silu":
        return None
    widths = {_width(config, depth, family) for depth, family in enumerate(families)}
    if len(widths) > 1:
        return None
    dense = copy.deepcopy(config)
    dense.mlp_layer_types, dense.intermediate_sizes = ["dense"] * len(families), None
    dense.intermediate_size, dense.layer_mix = widths.pop(), False
    weights = StoredWeights(source)
    traits = traits_of(dense, weights.tensors)._replace(shared=False, expert_bias=False)
    try:
        container = choose_container(dense, traits)
    except UserError:
        return None
    folder.mkdir(parents=True)
    write_planned(_plan(weights, families), folder, _MAX_BYTES)
    CONTAINERS[container].config(dense, traits).save_pretrained(folder)
    return folder


def _width(config: MixtureConfig, depth: int, family: str) -> int:
    if family != "dense":
        return config.moe_intermediate_size
    return config.intermediate_size if config.intermediate_sizes is None else config.intermediate_sizes[depth]


def _plan(weights: StoredWeights, families: list[str]) -> list[PlannedTensor]:
    kept = [f"model.layers.{depth}.mlp." for depth, family in enumerate(families) if family != "dense"]
    skipped = (*kept, "model.layer_mix.")
    planned = [weights.plan(name) for name in weights.tensors if not name.startswith(skipped)]
    for prefix in kept:
        up, down = f"{prefix}experts.gate_up_proj", f"{prefix}experts.down_proj"
        _, double_width, hidden = weights.tensors[up].shape
        for number, part in enumerate(("gate_proj", "up_proj")):

            def half(up: str = up, number: int = number) -> Tensor:
                return weights.read(up, 0).chunk(2)[number]

            shape = (double_width // 2, hidden)
            planned.append(PlannedTensor(f"{prefix}{part}.weight", shape, weights.tensors[up].dtype, half))

        def second(down: str = down) -> Tensor:
            return weights.read(down, 0)

        shape = (hidden, double_width // 2)
        planned.append(PlannedTensor(f"{prefix}down_proj.weight", shape, weights.tensors[down].dtype, second))
    return planned
