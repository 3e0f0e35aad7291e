"""Bytes that training keeps from one step to the next: parameters, gradients and optimizer state.

What a step allocates on the way (activations, temporaries) depends on kernels and checkpointing; it is measured by
`mixtura.diagnostics.memory`, not guessed here.
"""

from dataclasses import dataclass
from typing import Literal

from mixtura.planning.parameters import model_parameters
from mixtura.planning.shapes import ModelShape

_BYTES = {"float32": 4, "bfloat16": 2}


@dataclass(frozen=True, kw_only=True)
class StateMemory:
    """Bytes of training state by kind."""

    parameters: int
    gradients: int
    optimizer: int

    @property
    def total(self) -> int:
        """All three together."""
        return self.parameters + self.gradients + self.optimizer


def state_memory(shape: ModelShape, *, dtype: Literal["float32", "bfloat16"] = "float32") -> StateMemory:
    """Bytes of parameters, gradients and AdamW's two moments, all stored as `dtype`.

    Training under bfloat16 autocast stores float32. AdamW's step counters (4 bytes a tensor) and buffers such as rotary
    frequencies are left out.
    """
    size = model_parameters(shape) * _BYTES[dtype]
    return StateMemory(parameters=size, gradients=size, optimizer=2 * size)
