"""Stages 2 and 3: how fast are a layer and a whole training step?

Stage 2 times layers, forward and backward, against a dense layer of equal FLOPs and one large product. Layers come from
the most telling size to the least. A contender runs in alternating rounds with the dense layer and the product, and
ratios are taken within a round; times are those between CUDA events. First the device's two ceilings are measured: a
large product and a large copy.

Stage 3 times whole training steps of a model of 120 million active parameters.
A step is forward and backward under autocast to bfloat16, clipping and fused AdamW with float32 weights, as
`mixtura train` takes it. It is timed as it is, replayed from a CUDA graph, and compiled; dense beside each family.
Utilisation is the share of the rate of one large product in bfloat16.
"""

import gc
import statistics
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._C._autograd import DeviceType
from torch.utils.flop_counter import FlopCounterMode

from mixtura.benchmarks.contenders import Size, limit, own_layers, parameters, peers
from mixtura.benchmarks.gpu.journal import Journal
from mixtura.benchmarks.gpu.kernel_checks import WithoutTriton
from mixtura.benchmarks.measure import Pass, calls, interleaved, passes, ratios
from mixtura.benchmarks.speed_table import LIMIT, model_of
from mixtura.config import Family
from mixtura.models import MixtureForCausalLM
from mixtura.results.document import Plain
from mixtura.training.optimization import clip_gradients

PASSES: tuple[Pass, ...] = ("training", "forward")
SIZES = (
    Size(tokens=16384, hidden=2048, experts=64, top_k=8, multiple_of=8),
    Size(tokens=16384, hidden=2048, experts=8, top_k=2, multiple_of=8),
    Size(tokens=8192, hidden=1024, experts=32, top_k=2, multiple_of=8),
    Size(tokens=16384, hidden=2048, experts=64, top_k=8, skew=2.0, multiple_of=8),
    Size(tokens=32768, hidden=4096, experts=8, top_k=1, multiple_of=8),
    Size(tokens=32768, hidden=1024, experts=256, top_k=8, multiple_of=8),
    Size(tokens=32768, hidden=2048, experts=128, top_k=8, multiple_of=8),
)
TINY_SIZES = (Size(tokens=64, hidden=32, experts=4, top_k=2, multiple_of=8),)
PEERS = ("grouped_mm", "ScatterMoE", "plain")
"""What of the other libraries is timed: names that contain one of these."""


def run_layers(journal: Journal, device: torch.device, *, smoke: bool, rounds: int = 5) -> None:
    """The ceilings, and every contender and pass at every size."""
    torch.set_default_device(device)
    torch.set_default_dtype(torch.bfloat16 if device.type == "cuda" else torch.float32)
    journal.attempt("ceilings", "ceilings", partial(_ceilings, smoke=smoke))
    for size in TINY_SIZES if smoke else SIZES:
        _run_size(journal, size, device, rounds)


def _run_size(journal: Journal, size: Size, device: torch.device, rounds: int) -> None:
    layers = contenders(size)
    dense = built(layers.pop("dense"), device)
    x_BLD = size.inputs()
    for name, bare in layers.items():
        layer: nn.Module | None = None

        def row(name: str = name, bare: nn.Module = bare, what: Pass = "training") -> Plain:
            nonlocal layer
            if layer is None:
                layer = built(bare, device)
            runs = {each: passes(one, x_BLD, what) for each, one in {"dense": dense, name: layer}.items()}
            return _layer_row(size, name, layer, runs, what, rounds)

        for what in PASSES:
            journal.attempt("layers", f"{size.label()}: {name}, {what}", partial(row, what=what))
        layer = None
        bare.to("meta")
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()


def contenders(size: Size) -> dict[str, nn.Module]:
    """Layers without memory: our families, and of the other libraries those that `PEERS` names."""
    with torch.device("meta"):
        own: dict[str, nn.Module] = {**own_layers(size)}
        others, _ = peers(size)
        bare = {f"{name}, without Triton": WithoutTriton(own_layers(size)[name]) for name in _TRITON}
    found = {name: own.pop(name) for name in ("dense", *_TRITON)}
    found |= {name: layer for name, layer in others.items() if any(each in name for each in PEERS)}
    return found | own | bare


_TRITON = ("token choice", "mixture of tokens")


def built(layer: nn.Module, device: torch.device) -> nn.Module:
    """A layer made without memory, in the memory of the device and drawn there."""
    if not next(layer.parameters()).is_meta:
        return layer.to(device)
    layer = layer.to_empty(device=device)
    for tensor in [*layer.parameters(), *layer.buffers()]:
        nn.init.normal_(tensor, std=0.02) if tensor.dim() > 1 else nn.init.zeros_(tensor)
    return layer


def _ceilings(*, smoke: bool) -> Plain:
    """TFLOP/s of a square product of random numbers, and GB/s of a copy, bytes read and written counted."""
    side, numbers = (256, 1 << 16) if smoke else (8192, 1 << 30)
    left, right, out = torch.randn(side, side), torch.randn(side, side), torch.empty(side, side)
    source = torch.randn(numbers)
    target = torch.empty_like(source)
    seconds = _rounds_of(
        {"dense": lambda: torch.mm(left, right, out=out), "copy": lambda: target.copy_(source)}, rounds=7
    )
    product, copy = (statistics.median(seconds[name]) for name in ("dense", "copy"))
    moved = 2 * source.numel() * source.element_size()
    return {"teraflops": 2 * side**3 / product / 1e12, "gigabytes_per_second": moved / copy / 1e9}


def _layer_row(
    size: Size, name: str, layer: nn.Module, runs: dict[str, Callable[[], None]], what: Pass, rounds: int
) -> Plain:
    runs[LIMIT] = limit(size, backward=what != "forward")
    seconds = _rounds_of(runs, rounds=rounds)
    to_dense, to_limit = ratios(seconds, baseline="dense"), ratios(seconds, baseline=LIMIT)
    median = statistics.median(seconds[name])
    flops = size.flops(backward=what != "forward")
    row = {
        "size": size.label(),
        "contender": name,
        "pass": what,
        "milliseconds": 1e3 * median,
        "dense_milliseconds": 1e3 * statistics.median(seconds["dense"]),
        "to_dense": to_dense[name][0],
        "lowest": to_dense[name][1],
        "highest": to_dense[name][2],
        "utilisation": 1 / to_limit[name][0],
        "dense_utilisation": 1 / to_limit["dense"][0],
        "teraflops": flops / median / 1e12,
        "limit_teraflops": flops / statistics.median(seconds[LIMIT]) / 1e12,
        "peak_mebibytes": peak_mebibytes(runs[name]),
        "dense_peak_mebibytes": peak_mebibytes(runs["dense"]),
        "launches": launches(runs[name]),
        "parameters": parameters(layer),
    }
    for parameter in layer.parameters():
        parameter.grad = None
    return row


def _rounds_of(runs: Mapping[str, Callable[[], object]], *, rounds: int) -> dict[str, list[float]]:
    """Seconds of every run in every round, between CUDA events; on the CPU as `mixtura bench` takes them."""
    if not torch.cuda.is_available():
        return interleaved(runs, baseline="dense", rounds=rounds)  # pyright: ignore[reportArgumentType]
    for _ in range(2):
        for run in runs.values():
            run()
    events: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            pair = (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True))
            torch.cuda.synchronize()
            pair[0].record()
            run()
            pair[1].record()
            events[name].append(pair)
    torch.cuda.synchronize()
    return {name: [start.elapsed_time(end) / 1e3 for start, end in pairs] for name, pairs in events.items()}


def launches(run: Callable[[], object]) -> int | None:
    """Kernels, copies and fills that one run starts on the GPU; operators that it calls, on the CPU."""
    if not torch.cuda.is_available():
        return calls(run)  # pyright: ignore[reportArgumentType]
    kinds = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=kinds) as profile:
        run()
        torch.cuda.synchronize()
    count = sum(event.device_type == DeviceType.CUDA for event in profile.events() or ())
    return count or None


def peak_mebibytes(run: Callable[[], object]) -> float | None:
    """Most memory that one run holds beyond what was there before; None on the CPU."""
    if not torch.cuda.is_available():
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


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
TINY_SHAPE = Shape(batch=4, length=8, hidden=32, layers=1, vocab_size=512, experts=4)


def run_steps(journal: Journal, device: torch.device, *, smoke: bool, rounds: int = 7) -> None:
    """Every family as it is, then in a graph, then compiled, for as long as there is time."""
    shape = TINY_SHAPE if smoke else FULL
    size = Size(tokens=shape.batch * shape.length, hidden=shape.hidden, experts=shape.experts, top_k=2, multiple_of=8)
    variants = VARIANTS if device.type == "cuda" else VARIANTS[:1]
    for variant in variants:
        for family in FAMILIES:
            measure = partial(_step_row, family, variant, shape, size, device, rounds)
            journal.attempt("models", f"training steps of {family}, {variant}", measure, most_seconds=80.0)
            gc.collect()
            if device.type == "cuda":
                torch.cuda.empty_cache()


def _step_row(family: Family, variant: str, shape: Shape, size: Size, device: torch.device, rounds: int) -> Plain:
    ids_BL = torch.randint(shape.vocab_size, (shape.batch, shape.length), device=device)
    model = _model(family, shape, size, device)
    run = step_of(model, ids_BL, variant)
    names = {"dense": run} if family == "dense" else {"dense": step_of(_model("dense", shape, size, device), ids_BL)}
    with torch.device(device):
        runs: dict[str, Step] = names | {family: run, LIMIT: _limit(size, device)}
    seconds = _rounds_of(runs, rounds=rounds)
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
