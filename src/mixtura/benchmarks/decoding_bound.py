"""The bound on decoding a batch: the bytes of weights that a step of a dense model reads over those of a mixture.

A step that waits for its weights takes as long as they take to arrive. A dense model reads the same weights for one
sequence as for many. In a mixture, B sequences that choose K of E experts each, evenly and independently, need
E (1 - (1 - K/E)^B) different ones, and no mixture that waits for weights is quicker than their bytes allow.
"""

from dataclasses import dataclass
from typing import Literal

FLOAT_BYTES = 4
VOCABULARY = 2048
"""Of the models that are timed."""


@dataclass(frozen=True)
class Form:
    """A form in which a model is served; all have the same active width, but for those that run every expert."""

    family: Literal["dense", "token_choice", "mixture_of_tokens"]
    width: int
    """Of the dense layer or of an expert, in hidden sizes."""
    top_k: int | None
    """Experts of a token; None is all."""
    population: bool = False


FORMS = {
    "dense": Form("dense", 4, 1),
    "token choice, top 1": Form("token_choice", 4, 1),
    "token choice, top 2": Form("token_choice", 2, 2),
    "MoT alone, top 1": Form("mixture_of_tokens", 4, 1),
    "MoT alone, top 2": Form("mixture_of_tokens", 2, 2),
    "MoT alone, all": Form("mixture_of_tokens", 2, None),
    "MoT population, top 2": Form("mixture_of_tokens", 2, 2, population=True),
}


def expected_experts(experts: int, top_k: int | None, batch: int) -> float:
    """How many different experts a batch is expected to run."""
    return experts * (1 - (1 - (top_k or experts) / experts) ** batch)


def layer_bytes(form: Form, *, hidden: int, experts: int, batch: int) -> float:
    """Bytes of weights that a feed-forward layer reads in a step; two matrices an expert, not gated."""
    expert = 2 * hidden * form.width * hidden
    if form.family == "dense":
        return FLOAT_BYTES * expert
    # A population's averages: the mean of a mixture's inputs, and the expert's output for it.
    averages = 2 * experts * hidden if form.population else 0
    return FLOAT_BYTES * (expert * expected_experts(experts, form.top_k, batch) + experts * hidden + averages)


def step_bytes(form: Form, *, hidden: int, experts: int, batch: int, layers: int) -> float:
    """Bytes of weights that a whole step reads: layers, attention of four square matrices, and the head."""
    layer = layer_bytes(form, hidden=hidden, experts=experts, batch=batch)
    return layers * (layer + FLOAT_BYTES * 4 * hidden**2) + FLOAT_BYTES * VOCABULARY * hidden


def bound(name: str, *, hidden: int, experts: int, batch: int, layers: int) -> float:
    """How many times as fast as dense the form of that name can be where steps wait for weights alone."""
    sizes = {"hidden": hidden, "experts": experts, "batch": batch, "layers": layers}
    return step_bytes(FORMS["dense"], **sizes) / step_bytes(FORMS[name], **sizes)
