"""Times every layer family, forward and backward, against a dense layer of the same FLOPs a token.

Steps alternate between the layers and ratios are taken within a round, so that a slow spell of the machine hits all of
them alike. Run with `make bench`, or `python benchmarks/layers.py --help`; the table is printed and stored under
benchmarks/results/ with versions and hardware.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from mixtura.comparison.folder import environment, now
from mixtura.layers import DenseFFN, ExpertChoiceMoE, FeedForward, MixtureOfTokens, TokenChoiceMoE
from mixtura.planning import match_intermediate_size

RESULTS = Path(__file__).parent / "results"


def expert_width(family: str, hidden: int, experts: int, top_k: int) -> int:
    """The expert width of equal FLOPs a token; groups are as large as there are experts."""
    return match_intermediate_size(
        family,
        hidden_size=hidden,
        dense_intermediate_size=4 * hidden,
        gated=False,
        num_experts=experts,
        top_k=top_k,
        num_shared_experts=0,
        group_size=experts,
        mixtures_per_expert=1,
        combine="same",
        sequence_length=128,
    )


def layers(hidden: int, experts: int, top_k: int) -> dict[str, FeedForward]:
    """One layer of every family that a causal model can train with, all of equal FLOPs."""

    def sizes(family: str, k: int) -> dict[str, int]:
        return {"intermediate_size": expert_width(family, hidden, experts, k), "num_experts": experts}

    return {
        "dense": DenseFFN(hidden, intermediate_size=4 * hidden),
        "token choice, top 1": TokenChoiceMoE(hidden, **sizes("token_choice", 1), top_k=1),
        f"token choice, top {top_k}": TokenChoiceMoE(hidden, **sizes("token_choice", top_k), top_k=top_k),
        "expert choice": ExpertChoiceMoE(hidden, **sizes("expert_choice", 1), group_size=experts),
        "mixture of tokens": MixtureOfTokens(hidden, **sizes("mixture_of_tokens", 1), group_size=experts),
    }


def step(layer: FeedForward, x_BLD: torch.Tensor) -> Callable[[], None]:
    """One forward and backward pass, input gradient included."""

    def run() -> None:
        for parameter in layer.parameters():
            parameter.grad = None
        layer(x_BLD.detach().requires_grad_()).square().mean().backward()

    return run


def gemm(tokens: int, hidden: int) -> Callable[[], None]:
    """One large product with the FLOPs of the dense layer's forward and backward: the limit."""
    width = 3 * 2 * 4 * hidden
    a, b = torch.randn(tokens, hidden), torch.randn(hidden, width)

    def run() -> None:
        torch.mm(a, b)

    return run


def measure(runs: dict[str, Callable[[], None]], rounds: int) -> dict[str, list[float]]:
    """Seconds of every run in alternating rounds, after two rounds of warm-up."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for round_number in range(rounds + 2):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            if round_number >= 2:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def main() -> None:
    """Measures, prints and stores the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=8192, help="tokens of a step, in sequences of 128")
    parser.add_argument("--hidden", type=int, default=256, help="hidden size")
    parser.add_argument("--experts", type=int, nargs="+", default=[8, 16, 32], help="experts, and tokens of a group")
    parser.add_argument("--top-k", type=int, default=2, help="experts a token, for the second token choice layer")
    parser.add_argument("--rounds", type=int, default=9, help="rounds that count")
    options = parser.parse_args()
    torch.manual_seed(0)
    table = Table(title=f"{options.tokens} tokens x hidden {options.hidden}, forward and backward, relative to dense")
    for column in ("experts", "layer", "ratio to dense", "lowest", "highest"):
        table.add_column(column, justify="right" if column != "layer" else "left")
    rows = []
    for experts in options.experts:
        x_BLD = torch.randn(options.tokens // 128, 128, options.hidden)
        runs = {name: step(layer, x_BLD) for name, layer in layers(options.hidden, experts, options.top_k).items()}
        runs["one large product"] = gemm(options.tokens, options.hidden)
        seconds = measure(runs, options.rounds)
        for name, values in seconds.items():
            ratios = [a / b for a, b in zip(values, seconds["dense"], strict=True)]
            row = {"experts": experts, "layer": name, "ratio": statistics.median(ratios)}
            rows.append(row | {"lowest": min(ratios), "highest": max(ratios)})
            table.add_row(str(experts), name, f"{row['ratio']:.2f}", f"{min(ratios):.2f}", f"{max(ratios):.2f}")
    Console().print(table)
    RESULTS.mkdir(exist_ok=True)
    record = {"created": now(), "environment": environment(), "settings": vars(options), "rows": rows}
    path = RESULTS / f"layers-{record['environment']['device'].replace(' ', '-').lower()}.json"
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(f"Stored in {path}")


if __name__ == "__main__":
    main()
