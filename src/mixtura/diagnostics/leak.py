"""Does a token's output depend on what it must not see: later positions, or other examples of the batch?

The answer is found by experiment. Each probe draws a batch, replaces one example from one position on, and compares
outputs. If they changed earlier in that example, the future leaked; if they changed in another example, the batch
leaked. Many strong probes are needed: where experts choose among all tokens, a small change of one token rarely changes
which tokens are chosen. Probes run in float64, so that rounding is not taken for a change.

A leak that is found is proven. If none is found in `probes` tries, there is very unlikely to be one.

Shapes: B batch, L length, D hidden, V vocabulary.
"""

import copy
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from mixtura.config import UserError

STRENGTHS = (1.0, 10.0, 100.0)
"""Sizes of the vectors that replace hidden states of size 1, used in turn: each size changes other choices."""

TOLERANCE = 1e-6
"""Change that counts as a leak, as a share of the largest output.

Reordered float64 sums differ by 1e-15, which parts that compute in float32 (Llama's norm) can turn into 1e-7.
"""


class LeakReport(NamedTuple):
    """The changes that the probes found, as shares of the largest output."""

    future: bool
    batch: bool
    probes: int
    largest_future_change: float
    largest_batch_change: float


def probe_layer(
    layer: Callable[[Tensor], Tensor],
    *,
    hidden_size: int,
    batch: int,
    length: int,
    num_probes: int = 60,
    seed: int = 0,
    tolerance: float = TOLERANCE,
) -> LeakReport:
    """Probes a layer (B, L, D) -> (B, L, D), a module as it stands (train() or eval()) or any function.

    A module is copied to float64 and stays untouched itself. Layers that form groups need a `batch` or `length` that
    fills them.

    Raises:
        UserError: fewer than two examples or positions, or outputs that are all zero or not finite.
    """
    function, device = _in_float64(layer)
    generator = torch.Generator().manual_seed(seed)

    def draw(strength: float) -> Tensor:
        x_BLD = torch.randn(batch, length, hidden_size, generator=generator, dtype=torch.float64)
        return (strength * x_BLD).to(device)

    return _probe(function, draw, num_probes=num_probes, generator=generator, tolerance=tolerance)


def probe_causal_lm(
    model: nn.Module,
    *,
    vocab_size: int,
    batch: int,
    length: int,
    num_probes: int = 30,
    seed: int = 0,
    tolerance: float = TOLERANCE,
) -> LeakReport:
    """Probes a language model, token ids (B, L) -> `.logits` (B, L, V), in the mode it is in.

    Call it in train() for what leaks while training, and in eval() for what leaks when deployed. The model is copied to
    float64 and stays untouched itself.

    Raises:
        UserError: fewer than two examples or positions, or logits that are all zero or not finite.
    """
    function, device = _in_float64(model)
    generator = torch.Generator().manual_seed(seed)

    def draw(_strength: float) -> Tensor:
        return torch.randint(vocab_size, (batch, length), generator=generator).to(device)

    return _probe(
        lambda ids_BL: function(ids_BL).logits, draw, num_probes=num_probes, generator=generator, tolerance=tolerance
    )


def _in_float64(function: Callable) -> tuple[Callable, torch.device]:
    """The function itself, or a float64 copy of the module; and the device where its inputs belong."""
    if not isinstance(function, nn.Module):
        return function, torch.device("cpu")
    parameter = next(function.parameters(), torch.empty(0))
    function = copy.deepcopy(function).double()
    for part in function.modules():
        # Hugging Face's grouped matrix products do not take float64, its loop over experts does. The model may stand
        # inside others: an adapter, a classifier.
        if isinstance(part, PreTrainedModel):
            part.set_experts_implementation("eager")
    return function, parameter.device


@torch.no_grad()
def _probe(
    function: Callable[[Tensor], Tensor],
    draw: Callable[[float], Tensor],
    *,
    num_probes: int,
    generator: torch.Generator,
    tolerance: float,
) -> LeakReport:
    """Runs the probes: `draw(strength)` gives a batch of inputs, (B, L) or (B, L, D)."""
    if min(draw(1.0).shape[:2]) < 2:
        raise UserError("A leak shows between tokens and between examples: probe with at least 2 of each.")
    future = batch = 0.0
    for probe in range(num_probes):
        base = draw(1.0)
        example = int(torch.randint(base.size(0), (), generator=generator))
        position = int(torch.randint(1, base.size(1), (), generator=generator))
        probed = base.clone()
        intruder = draw(STRENGTHS[probe % len(STRENGTHS)])
        probed[example, position:] = intruder[example, position:]
        expected = function(base)
        scale = expected.abs().max().item()
        if not 0 < scale < float("inf"):
            raise UserError(f"The largest output is {scale}, so no leak would show: probe a model that works.")
        change = (function(probed) - expected).abs() / scale
        others = torch.arange(base.size(0), device=change.device) != example
        future = max(future, change[example, :position].max().item())
        batch = max(batch, change[others].max().item())
    return LeakReport(future > tolerance, batch > tolerance, num_probes, future, batch)
