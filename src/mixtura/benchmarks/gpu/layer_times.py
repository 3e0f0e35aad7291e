"""Stage 2: how fast is a layer, forward and backward, against a dense layer of equal FLOPs and one large product?

Layers come from the most telling size to the least. A contender runs in alternating rounds with the dense layer and the
product, and ratios are taken within a round; times are those between CUDA events. First the device's two ceilings are
measured: a large product and a large copy.
"""

import gc
import statistics
from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import nn
from torch._C._autograd import DeviceType

from mixtura.benchmarks.contenders import Size, limit, own_layers, parameters, peers
from mixtura.benchmarks.gpu.journal import Journal
from mixtura.benchmarks.gpu.kernel_checks import WithoutTriton
from mixtura.benchmarks.measure import Pass, calls, interleaved, passes, ratios
from mixtura.benchmarks.speed_table import LIMIT
from mixtura.results.stored import Plain

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
TINY = (Size(tokens=64, hidden=32, experts=4, top_k=2, multiple_of=8),)
PEERS = ("grouped_mm", "ScatterMoE", "plain")
"""What of the other libraries is timed: names that contain one of these."""


def run_layers(journal: Journal, device: torch.device, *, smoke: bool, rounds: int = 5) -> None:
    """The ceilings, and every contender and pass at every size."""
    torch.set_default_device(device)
    torch.set_default_dtype(torch.bfloat16 if device.type == "cuda" else torch.float32)
    journal.attempt("ceilings", "ceilings", partial(_ceilings, smoke=smoke))
    for size in TINY if smoke else SIZES:
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
            return _row(size, name, layer, runs, what, rounds)

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
    seconds = rounds_of(
        {"dense": lambda: torch.mm(left, right, out=out), "copy": lambda: target.copy_(source)}, rounds=7
    )
    product, copy = (statistics.median(seconds[name]) for name in ("dense", "copy"))
    moved = 2 * source.numel() * source.element_size()
    return {"teraflops": 2 * side**3 / product / 1e12, "gigabytes_per_second": moved / copy / 1e9}


def _row(
    size: Size, name: str, layer: nn.Module, runs: dict[str, Callable[[], None]], what: Pass, rounds: int
) -> Plain:
    runs[LIMIT] = limit(size, backward=what != "forward")
    seconds = rounds_of(runs, rounds=rounds)
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


def rounds_of(runs: Mapping[str, Callable[[], object]], *, rounds: int) -> dict[str, list[float]]:
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
