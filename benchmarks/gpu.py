"""Times every layer family on a GPU, forward and backward, against a dense layer of equal FLOPs and one large product.

First every kernel is checked against its definition, then come layers from the most telling size to the least, with
whole training steps of a small model after the third. A contender runs in alternating rounds with the dense layer and
the product, and ratios are taken within a round; times are those between CUDA events. When the time is used up, what is
left is named and not run. bfloat16 on a GPU; without one, only `--smoke` makes sense: float32 on the CPU and tiny, to
see that the script runs to its end.

Run `python benchmarks/gpu.py`; it needs a checkout, `PYTHONPATH=src` where Mixtura is not installed, and 8 minutes. The
table is printed and stored under benchmarks/results/ with versions and hardware.
"""

import argparse
import gc
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from mixtura import kernels
from mixtura.benchmarks.contenders import Size, limit, own_layers, parameters, peers
from mixtura.benchmarks.measure import Pass, calls, interleaved, passes, ratios, store_record
from mixtura.benchmarks.speed_table import LIMIT, model_of, training_step
from mixtura.config import Family
from mixtura.kernels import accelerator, reference

RESULTS = Path(__file__).parent / "results"
PASSES: tuple[Pass, ...] = ("forward", "training")
SIZES = (
    Size(tokens=16384, hidden=2048, experts=64, top_k=8, multiple_of=8),
    Size(tokens=16384, hidden=2048, experts=8, top_k=2, multiple_of=8),
    Size(tokens=16384, hidden=2048, experts=64, top_k=8, skew=2.0, multiple_of=8),
    Size(tokens=8192, hidden=1024, experts=32, top_k=2, multiple_of=8),
    Size(tokens=32768, hidden=1024, experts=256, top_k=8, multiple_of=8),
    Size(tokens=32768, hidden=4096, experts=8, top_k=1, multiple_of=8),
    Size(tokens=32768, hidden=2048, experts=128, top_k=8, multiple_of=8),
    Size(tokens=8192, hidden=4096, experts=16, top_k=2, multiple_of=8),
    Size(tokens=8192, hidden=1024, experts=256, top_k=8, skew=2.0, multiple_of=8),
)
TINY = (Size(tokens=64, hidden=32, experts=4, top_k=2),)
PEERS = ("grouped_mm", "plain", "ScatterMoE")
"""What of the other libraries is timed: names that contain one of these."""
FAMILIES: tuple[Family, ...] = ("token_choice", "expert_choice", "mixture_of_tokens")


class Budget:
    """Seconds that are left, and what was left out for want of them or of memory."""

    def __init__(self, seconds: float) -> None:
        """Starts to count."""
        self.end = time.monotonic() + seconds
        self.left_out: dict[str, str] = {}

    def allows(self, what: str) -> bool:
        """Whether there is time; if not, it is noted that `what` was left out."""
        if time.monotonic() < self.end:
            return True
        self.left_out[what] = "the time was used up"
        return False


class WithoutTriton(nn.Module):
    """A layer on torch's own operators: what Triton's kernels are worth."""

    def __init__(self, layer: nn.Module) -> None:
        """Wraps a layer of ours."""
        super().__init__()
        self.layer = layer

    def forward(self, x_BLD: Tensor) -> Tensor:
        """What is chosen in the forward pass decides about the backward pass too."""
        installed, accelerator.TRITON = accelerator.TRITON, False
        try:
            return self.layer(x_BLD)
        finally:
            accelerator.TRITON = installed


def rounds_of(runs: dict[str, Callable[[], None]], rounds: int) -> dict[str, list[float]]:
    """Seconds of every run in every round, between CUDA events; on the CPU as `mixtura bench` takes them."""
    if not torch.cuda.is_available():
        return interleaved(runs, baseline="dense", rounds=rounds)
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


def launches(run: Callable[[], None]) -> int | None:
    """Kernels, copies and fills that one run starts on the GPU; operators that it calls, on the CPU."""
    if not torch.cuda.is_available():
        return calls(run)
    kinds = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=kinds) as profile:
        run()
        torch.cuda.synchronize()
    count = sum(event.device_type == torch.autograd.DeviceType.CUDA for event in profile.events())
    return count or None


def peak_bytes(run: Callable[[], None]) -> int | None:
    """Most memory that one run holds beyond what was there before."""
    if not torch.cuda.is_available():
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def built(layer: nn.Module, device: torch.device) -> nn.Module:
    """A layer made without memory, in the memory of the device and drawn there."""
    layer = layer.to_empty(device=device)
    for tensor in [*layer.parameters(), *layer.buffers()]:
        nn.init.normal_(tensor, std=0.02) if tensor.dim() > 1 else nn.init.zeros_(tensor)
    return layer


def contenders(size: Size) -> dict[str, nn.Module]:
    """Layers without memory: our families, and of the other libraries those that `PEERS` names."""
    with torch.device("meta"):
        found: dict[str, nn.Module] = {**own_layers(size)}
        for name in ("token choice", "mixture of tokens"):
            found[f"{name}, without Triton"] = WithoutTriton(own_layers(size)[name])
        others, _ = peers(size)
    found |= {name: layer for name, layer in others.items() if any(each in name for each in PEERS)}
    return found


def measured_rows(size: Size, device: torch.device, budget: Budget, rounds: int) -> Iterator[dict[str, Any]]:
    """A row for every contender and pass at one size."""
    layers = contenders(size)
    dense = built(layers.pop("dense"), device)
    x_BLD = size.inputs()
    for name, bare in layers.items():
        for what in PASSES:
            label = f"{size.label()}: {name}, {what}"
            if not budget.allows(label):
                continue
            try:
                layer = built(bare, device) if next(bare.parameters()).is_meta else bare
                yield _row(size, name, {"dense": dense, name: layer}, x_BLD, what, rounds)
            except RuntimeError as error:  # out of memory among others: the rest of the table goes on
                budget.left_out[label] = _reason(error)
        bare.to("meta")
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"


def _row(size: Size, name: str, layers: dict[str, nn.Module], x_BLD: Tensor, what: Pass, rounds: int) -> dict[str, Any]:
    runs = {each: passes(layer, x_BLD, what) for each, layer in layers.items()}
    runs[LIMIT] = limit(size, backward=what != "forward")
    seconds = rounds_of(runs, rounds)
    to_dense, to_limit = ratios(seconds, baseline="dense"), ratios(seconds, baseline=LIMIT)
    median = statistics.median(seconds[name])
    for parameter in layers[name].parameters():
        parameter.grad = None
    return {
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
        "teraflops": size.flops(backward=what != "forward") / median / 1e12,
        "peak_mebibytes": None if (peak := peak_bytes(runs[name])) is None else peak / 2**20,
        "launches": launches(runs[name]),
        "parameters": parameters(layers[name]),
    }


def checks(device: torch.device) -> dict[str, str]:
    """The largest error of every kernel in bfloat16, relative to the largest number of its definition in float64."""
    if device.type != "cuda" or not kernels.can_run_groups(torch.empty(1, 1, 2, 8)):
        return {"all": "not run: the kernels need a GPU and Triton (tests/kernels/test_triton.py checks them without)"}
    found = {}
    for name, check in (("sorted choices", _check_sort), ("groups", _check_groups), ("rows", _check_rows)):
        try:
            found[name] = f"{check():.1e}"
        except Exception as error:  # the table is worth having without this kernel, and says so
            found[name] = f"FAILED: {_reason(error)}"
    for name, capture in (("CUDA graph", _captured), ("torch.compile, fullgraph", _compiled)):
        try:
            found[name] = f"{capture():.1e}"
        except Exception as error:
            found[name] = f"FAILED: {_reason(error)}"
    return found


def _worst(actual: list[Tensor], expected: list[Tensor]) -> float:
    """The largest difference of any pair, relative to the largest number expected."""
    pairs = zip(actual, expected, strict=True)
    return max(((a.double() - b.double()).abs().max() / b.double().abs().max()).item() for a, b in pairs)


def _check_sort() -> float:
    expert_TK = torch.randint(200, (5000, 8))
    order_R, row_TK, rows_E = kernels.sort_choices(expert_TK, 200)
    expected_R = expert_TK.flatten().argsort(stable=True)
    same = torch.equal(order_R, expected_R) and torch.equal(row_TK.flatten(), expected_R.argsort())
    assert same and torch.equal(rows_E, expert_TK.flatten().bincount(minlength=200)), "the order is another"
    return 0.0


def _check_groups() -> float:
    worst = 0.0
    for group, experts, slots, hidden in ((32, 32, 1, 256), (24, 10, 2, 72), (200, 200, 1, 128)):
        x_NGD, logits_NGS = torch.randn(3, group, hidden), torch.randn(3, group, experts * slots, dtype=torch.float32)
        leaves = [x_NGD.requires_grad_(), logits_NGS.requires_grad_()]
        exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
        y_NGD = kernels.logits_mixed_ffn(leaves[0][:, None], leaves[1][:, None], None, slots, lambda z: z).squeeze(1)
        weight_NGEC = exact[1].softmax(1).unflatten(-1, (experts, slots))
        expected_NGD = reference.spread(reference.mix(exact[0], weight_NGEC), weight_NGEC)
        grad_NGD = torch.randn_like(y_NGD)
        grads = torch.autograd.grad(y_NGD, leaves, grad_NGD)
        worst = max(
            worst,
            _worst([y_NGD, *grads], [expected_NGD, *torch.autograd.grad(expected_NGD, exact, grad_NGD.double())]),
        )
    return worst


def _check_rows() -> float:
    tokens, experts, hidden, width = 96, 12, 128, 72
    expert_TK = torch.rand(tokens, experts - 2).topk(3).indices  # two experts are without rows
    order_R = expert_TK.flatten().argsort(stable=True)
    counts_E = expert_TK.flatten().bincount(minlength=experts)
    leaves = [
        torch.randn(tokens, hidden),
        torch.rand(3 * tokens) + 0.1,
        torch.randn(experts, 2 * width, hidden) / hidden**0.5,
        torch.randn(experts, hidden, width) / width**0.5,
    ]
    results = []
    for dtype, run in ((torch.bfloat16, kernels.sparse_ffn), (torch.float64, reference.sparse_ffn)):
        x_TD, weight_R, up, down = own = [leaf.detach().to(dtype).requires_grad_() for leaf in leaves]
        y_TD = run(x_TD, order_R // 3, weight_R, counts_E, kernels.ExpertWeights(up, down, "silu", True))
        results.append([y_TD, *torch.autograd.grad(y_TD.double().square().sum(), own)])
    return _worst(*results)


def _token_choice() -> tuple[nn.Module, Tensor]:
    size = Size(tokens=2048, hidden=512, experts=16, top_k=2)
    return own_layers(size)["token choice"], size.inputs()


def _captured() -> float:
    layer, x_BLD = _token_choice()
    with torch.no_grad():
        expected = layer(x_BLD)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            layer(x_BLD)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y_BLD = layer(x_BLD)
        graph.replay()
    return _worst([y_BLD], [expected])


def _compiled() -> float:
    layer, x_BLD = _token_choice()
    return _worst([torch.compile(layer, fullgraph=True)(x_BLD)], [layer(x_BLD)])


def model_rows(options: argparse.Namespace, device: torch.device, budget: Budget) -> Iterator[dict[str, Any]]:
    """Whole training steps, AdamW included, of a small model of each family beside the dense one."""
    batch, length, hidden, layers = (4, 8, 32, 1) if options.smoke else (32, 512, 1024, 8)
    experts = 4 if options.smoke else 32
    size = Size(tokens=batch * length, hidden=hidden, experts=experts, top_k=2, multiple_of=8)
    ids_BL = torch.randint(512, (batch, length))

    def step(family: Family) -> Callable[[], None]:
        heads, vocab_size = (hidden // 32, 512) if options.smoke else (hidden // 64, 32768)
        model = model_of(family, size, layers=layers, heads=heads, vocab_size=vocab_size)
        return training_step(model.to(device, torch.get_default_dtype()), ids_BL)

    dense = step("dense")
    with FlopCounterMode(display=False) as counter:
        dense()
    for family in FAMILIES:
        if not budget.allows(f"training steps of {family}"):
            continue
        try:
            runs = {"dense": dense, family: step(family), LIMIT: limit(size, backward=True)}
            seconds = rounds_of(runs, options.rounds)
        except RuntimeError as error:
            budget.left_out[f"training steps of {family}"] = _reason(error)
            continue
        speed = size.flops(backward=True) / statistics.median(seconds[LIMIT])
        row = {"family": family, "to_dense": ratios(seconds, baseline="dense")[family][0]}
        for name in ("dense", family):
            own, median = "dense_" if name == "dense" else "", statistics.median(seconds[name])
            row |= {f"{own}milliseconds": 1e3 * median, f"{own}tokens_per_second": size.tokens / median}
            row |= {f"{own}utilisation": counter.get_total_flops() / median / speed}
        yield row


def show(title: str, rows: list[dict[str, Any]]) -> None:
    """Prints rows of equal keys as a table."""
    table = Table(title=title)
    for column in rows[0] if rows else ():
        table.add_column(column.replace("_", " "))
    for row in rows:
        table.add_row(*(f"{value:.3g}" if isinstance(value, float) else str(value) for value in row.values()))
    Console(width=220).print(table)


def main() -> None:
    """Checks, measures, prints and stores."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="one tiny size, for a machine without a GPU")
    parser.add_argument("--budget", type=float, default=480.0, help="seconds after which nothing new is begun")
    parser.add_argument("--rounds", type=int, default=7, help="rounds that count")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the record")
    options = parser.parse_args()
    if not (options.smoke or torch.cuda.is_available()):
        parser.error("there is no GPU here: pass --smoke to see that the script runs")
    budget = Budget(options.budget)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_default_dtype(torch.bfloat16 if device.type == "cuda" else torch.float32)
    torch.set_default_device(device)
    torch.manual_seed(0)
    checked = checks(device)
    for name, result in checked.items():
        print(f"Checked: {name}: {result}")
    # Not last: the sizes that follow may use up the time.
    sizes = TINY if options.smoke else SIZES
    rows: list[dict[str, Any]] = []
    models: list[dict[str, Any]] = []
    for number, size in enumerate(sizes, start=1):
        rows += measured_rows(size, device, budget, options.rounds)
        if number == min(3, len(sizes)):
            models += model_rows(options, device, budget)
    show("Layers", rows)
    show("Training steps of a small model", models)
    for what, why in budget.left_out.items():
        print(f"Left out: {what}: {why}.")
    settings = {"budget": options.budget, "rounds": options.rounds, "smoke": options.smoke}
    settings |= {"dtype": str(torch.get_default_dtype()), "sizes": [asdict(size) for size in sizes]}
    measured = {"checks": checked, "layers": rows, "models": models, "left_out": budget.left_out}
    path = store_record(options.out, "gpu", settings=settings, suffix="-smoke" * options.smoke, **measured)
    print(f"Stored in {path}")


if __name__ == "__main__":
    main()
