"""What is asked of advice, and the form of its answer."""

import math
from dataclasses import dataclass

from mixtura.config import Family, UserError
from mixtura.planning.evidence import HIDDEN_MULTIPLE, StepRatio, body_parameters
from mixtura.planning.hardware import Hardware, read_hardware

LEAST_TOKENS = 100_000
"""Fewer are no budget to train at: laws of the loss have not begun there."""
LEAST_WIDTH, MOST_LAYERS, MOST_WIDTH, MOST_PARAMETERS = 8, 10_000, 10**9, 1e24
"""Beyond the last two, numbers of parameters and FLOPs would be too large to compute with."""
MOST_SHARE = 10.0
"""Beyond as many times dense's tokens it is no longer named where an arm has dense's loss."""


@dataclass(frozen=True, kw_only=True)
class Question:
    """What a user wants to train."""

    tokens: float
    width: int = 64
    """D of the dense model, whose FLOPs all families match."""
    layers: int = 4
    vocabulary: int = 1024
    memory: float | None = None
    """Bytes for weights, gradients and AdamW's moments in float32; None is no limit."""
    hardware: Hardware | None = None
    """On which steps are planned; None takes the times that were measured."""
    text_tokens: int | None = None
    """Tokens of the text that is trained on; None where it is not known."""
    token_by_token: bool = True
    """Whether the model answers one request at a time; False lets mixtures of tokens run in groups as they train."""


@dataclass(frozen=True, kw_only=True)
class Expected:
    """A difference to dense in held-out nats a token: below zero is better."""

    mean: float
    low: float
    high: float
    """95 % interval."""
    ahead: float
    """Probability that the difference is below zero."""

    @property
    def decided(self) -> bool:
        """Whether the interval leaves zero out."""
        return self.low > 0 or self.high < 0


@dataclass(frozen=True, kw_only=True)
class Payoff:
    """From which budget on an arm is ahead of dense."""

    tokens: float | None
    """None: nowhere up to `farthest`, as in the interval's ends."""
    low: float | None
    high: float | None
    """95 % interval."""
    least: float
    """The smallest budget measured, at the width nearest to the question."""
    farthest: float
    """The largest budget that was asked about."""


@dataclass(frozen=True, kw_only=True)
class Nearest:
    """The runs of an arm nearest to the question, first in size, then in budget."""

    width: int
    tokens: int
    seeds: int


@dataclass(frozen=True, kw_only=True)
class ArmAdvice:
    """What the evidence says of one arm."""

    arm: Family
    label: str
    parameters: int
    training_bytes: int
    refused: str | None
    """Why it cannot be had; None if it can."""
    at_equal_flops: Expected | None
    """None of dense."""
    at_equal_seconds: Expected | None
    """None of dense, and where dense has runs of one budget, which say nothing of others; likewise what pays."""
    step: StepRatio
    """Time of a step over dense's."""
    dense_loss_at: float | None
    """The share of dense's tokens at which it has dense's loss; more than `MOST_SHARE` is None, as it is of dense."""
    pays_flops: Payoff | None
    pays_seconds: Payoff | None
    runs: int
    """How many run ends it stands on."""
    budgets: tuple[int, int]
    """The least and the most tokens among them."""
    widths: tuple[int, ...]
    nearest: Nearest
    extrapolated: str | None
    """What lies beyond its own runs, where these are fewer than all; None within them."""


@dataclass(frozen=True, kw_only=True)
class Advice:
    """The answer: arms from the best to the worst, those that cannot be had last."""

    question: Question
    arms: tuple[ArmAdvice, ...]
    extrapolated: tuple[str, ...]
    """What lies beyond the measured runs of all arms; empty within them."""
    law_error: float | None
    """Root mean square of the held-out errors in the difference to dense; None where nothing could be held out."""

    @property
    def best(self) -> ArmAdvice:
        """The first."""
        return self.arms[0]


def question_of(
    *,
    tokens: float,
    width: int | None = None,
    parameters: float | None = None,
    layers: int = 4,
    vocabulary: int = 1024,
    memory: float | None = None,
    hardware: str | None = None,
    token_by_token: bool = True,
) -> Question:
    """A question whose values make sense: parameters without embeddings become the nearest width, and without a limit
    the memory is that of the hardware, as `mixtura.planning.hardware.read_hardware` knows it.

    Raises:
        UserError: a value is out of range, width and parameters are both given or both missing, or the hardware is
            not known.
    """
    machine = None if hardware is None else read_hardware(hardware)
    if (width is None) == (parameters is None):
        raise UserError("Give either the width of the dense model or its parameters without embeddings.")
    for name, value, least, most in (
        ("tokens", tokens, LEAST_TOKENS, math.inf),
        ("layers", layers, 1, MOST_LAYERS),
        ("width", width, LEAST_WIDTH, MOST_WIDTH),
        ("parameters", parameters, body_parameters(LEAST_WIDTH, layers=max(1, layers)), MOST_PARAMETERS),
        ("vocabulary", vocabulary, 2, MOST_WIDTH),
        ("memory", memory, 1, math.inf),
    ):
        if value is None or (least <= value <= most and value < math.inf):
            continue
        bound = f"{least:,.0f} to {most:,.6g}" if value > most else f"{least:,.0f} or more"
        raise UserError(f"{name} is {value:,.6g}: give {bound}{', a finite number' if value == math.inf else ''}.")
    if width is None:
        width = 8 * max(1, round(math.sqrt((parameters or 0) / (HIDDEN_MULTIPLE * layers)) / 8))
    return Question(
        tokens=tokens,
        width=width,
        layers=layers,
        vocabulary=vocabulary,
        memory=1e9 * machine.memory_gb * machine.devices if memory is None and machine else memory,
        hardware=machine,
        token_by_token=token_by_token,
    )
