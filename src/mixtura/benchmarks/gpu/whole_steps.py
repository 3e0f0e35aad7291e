"""Stage 3: how fast are whole training steps of a model of 120 million active parameters?

A step is forward and backward under autocast to bfloat16, clipping and fused AdamW with float32 weights, as
`mixtura train` takes it. It is timed as it is, replayed from a CUDA graph, and compiled; dense beside each family.
Utilisation is the share of the rate of one large product in bfloat16.
"""

import gc
import statistics
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from mixtura.benchmarks.contenders import Size, limit, parameters
from mixtura.benchmarks.gpu.journal import Journal
from mixtura.benchmarks.gpu.layer_times import launches, peak_mebibytes, rounds_of
from mixtura.benchmarks.speed_table import LIMIT, model_of
from mixtura.config import Family
from mixtura.models import MixtureForCausalLM
from mixtura.results.stored import Plain
from mixtura.training.optimization import clip_gradients

FAMILIES: tuple[Family, ...] = ("dense", "token_choice", "mixture_of_tokens", "expert_choice")
VARIANTS = ("as it is", "CUDA graph", "torch.compile")
Step = Callable[[], object]


class Shape(NamedTuple):
    """Sizes of the model and its batch."""

    batch: int
    length: int
    hidden: int
    layers: int
    vocab_size: int
    experts: int


FULL = Shape(batch=32, length=512, hidden=768, layers=12, vocab_size=32768, experts=16)
TINY = Shape(batch=4, length=8, hidden=32, layers=1, vocab_size=512, experts=4)


def run_steps(journal: Journal, device: torch.device, *, smoke: bool, rounds: int = 7) -> None:
    """Every family as it is, then in a graph, then compiled, for as long as there is time."""
    shape = TINY if smoke else FULL
    size = Size(tokens=shape.batch * shape.length, hidden=shape.hidden, experts=shape.experts, top_k=2, multiple_of=8)
    variants = VARIANTS if device.type == "cuda" else VARIANTS[:1]
    for variant in variants:
        for family in FAMILIES:
            measure = partial(_row, family, variant, shape, size, device, rounds)
            journal.attempt("models", f"training steps of {family}, {variant}", measure, most_seconds=80.0)
            gc.collect()
            if device.type == "cuda":
                torch.cuda.empty_cache()


def _row(family: Family, variant: str, shape: Shape, size: Size, device: torch.device, rounds: int) -> Plain:
    ids_BL = torch.randint(shape.vocab_size, (shape.batch, shape.length), device=device)
    model = _model(family, shape, size, device)
    run = step_of(model, ids_BL, variant)
    names = {"dense": run} if family == "dense" else {"dense": step_of(_model("dense", shape, size, device), ids_BL)}
    with torch.device(device):
        runs: dict[str, Step] = names | {family: run, LIMIT: _limit(size, device)}
    seconds = rounds_of(runs, rounds=rounds)
    flops = _flops(shape, size, device)
    median, dense = statistics.median(seconds[family]), statistics.median(seconds["dense"])
    rate = size.flops(backward=True) / statistics.median(seconds[LIMIT])
    row: Plain = {"family": family, "variant": variant, "milliseconds": 1e3 * median, "to_dense": median / dense}
    row |= {"tokens_per_second": size.tokens / median, "utilisation": flops / median / rate}
    row |= {"dense_milliseconds": 1e3 * dense, "dense_tokens_per_second": size.tokens / dense}
    row |= {"dense_utilisation": flops / dense / rate, "step_teraflop": flops / 1e12, "parameters": parameters(model)}
    # What a replay holds lies in the graph's own memory.
    row["peak_mebibytes"] = None if variant == "CUDA graph" else peak_mebibytes(run)
    row["launches"] = launches(run) if variant == "as it is" else None
    return row


def _model(family: Family, shape: Shape, size: Size, device: torch.device) -> MixtureForCausalLM:
    torch.manual_seed(0)
    heads = max(1, shape.hidden // 64)
    with torch.device(device):  # a billion numbers are drawn faster there
        return model_of(family, size, layers=shape.layers, heads=heads, vocab_size=shape.vocab_size)


def _limit(size: Size, device: torch.device) -> Step:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16 if device.type == "cuda" else torch.float32)
    try:
        return limit(size, backward=True)
    finally:
        torch.set_default_dtype(before)


def _flops(shape: Shape, size: Size, device: torch.device) -> int:
    """Of the dense model's forward and backward pass, without memory; every family is matched to it."""
    with torch.device("meta"):
        heads = max(1, shape.hidden // 64)
        model = model_of("dense", size, layers=shape.layers, heads=heads, vocab_size=shape.vocab_size)
        ids_BL = torch.zeros(shape.batch, shape.length, dtype=torch.int64)
        with FlopCounterMode(display=False) as counter:
            model(input_ids=ids_BL, labels=ids_BL).loss.backward()
    return counter.get_total_flops()


def step_of(model: MixtureForCausalLM, ids_BL: Tensor, variant: str = "as it is") -> Step:
    """A function that takes one step.

    Args:
        model: in training.
        ids_BL: (B, L) the batch, which every step sees.
        variant: one of `VARIANTS`.
    """
    device = ids_BL.device
    graphed = variant == "CUDA graph"
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True, capturable=graphed)
    forward: Any = torch.compile(model) if variant == "torch.compile" else model

    def step() -> None:
        optimizer.zero_grad()
        # A cast that is kept from one pass to the next would not be in the graph.
        with torch.autocast(
            device.type, dtype=torch.bfloat16, enabled=device.type == "cuda", cache_enabled=not graphed
        ):
            loss = forward(input_ids=ids_BL, labels=ids_BL).loss
        loss.backward()
        clip_gradients(model.parameters(), 1.0)
        optimizer.step()

    return _captured(step) if graphed else step


def _captured(step: Step) -> Step:
    """The step's launches, recorded once and replayed by one call."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay
