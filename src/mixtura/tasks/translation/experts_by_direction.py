"""How far the experts of a translation model divide the directions among them, over the tokens of translations.

Shapes: B batch, L length.
"""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, final

from torch import Tensor, nn

from mixtura.diagnostics.choices import routed_layers
from mixtura.diagnostics.specialization import measure_specialization
from mixtura.results.run import LayerSpecialization, Specialization
from mixtura.tasks.translation.decoding import ExampleRouting
from mixtura.training.interface import Batch


def measure_directions(
    model: nn.Module, batches: Iterable[Batch], *, routing: ExampleRouting, groups: Sequence[str]
) -> Specialization:
    """Of a decoder, in the mode in which it is deployed; `groups` are the directions."""

    def observed() -> Iterator[tuple[Batch, Tensor, Tensor]]:
        for batch in batches:
            experts = routing.name_experts(model, batch["directions"])
            inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"], **experts}
            yield {**inputs, "use_cache": False}, batch["directions"], batch["labels"].ne(-100)

    return measure_specialization(model, observed(), groups=groups)


def measure_sides(
    model: Any, batches: Callable[[], Iterable[Batch]], *, routing: ExampleRouting, groups: Sequence[str]
) -> Specialization:
    """Of an encoder-decoder: the layers of the encoder and then those of the decoder.

    Args:
        model: in the mode in which it is deployed.
        batches: gives the batches anew each time, since each side is measured by itself.
        routing: how the model gets the experts of an example.
        groups: the directions.
    """
    layers: list[LayerSpecialization] = []
    depth = 0
    for name, side, mask in (
        ("encoder", model.get_encoder(), "attention_mask"),
        ("decoder", model.get_decoder(), "labels"),
    ):
        if routed_layers(side):
            found = measure_specialization(
                _SeenSide(model, name, side), _side_batches(model, batches(), routing, mask), groups=groups
            )
            layers += [dataclasses.replace(layer, layer=layer.layer + depth) for layer in found.layers]
        depth += model.config.num_hidden_layers
    return Specialization(list(groups), layers)


def _side_batches(
    model: nn.Module, batches: Iterable[Batch], routing: ExampleRouting, mask: str
) -> Iterator[tuple[Batch, Tensor, Tensor]]:
    for batch in batches:
        named = routing.name_experts(model, batch["directions"])
        inputs = {key: value for key, value in batch.items() if key not in ("labels", "directions")}
        counted = batch["labels"].ne(-100) if mask == "labels" else batch[mask].bool()
        yield {**inputs, "use_cache": False, **named}, batch["directions"], counted


@final
class _SeenSide(nn.Module):
    """A whole model when it is run, of which only one side's layers are to be seen."""

    def __init__(self, model: nn.Module, name: str, side: nn.Module) -> None:
        super().__init__()
        self.add_module(name, side)
        self._whole = (model,)

    def forward(self, **inputs: Any) -> Any:
        return self._whole[0](**inputs)
