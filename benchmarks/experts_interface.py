"""The experts of a stock mixture on Mixtura's kernels, beside transformers' own implementations.

One module of Mixtral's experts, gated SiLU, with random weights and an even random choice of experts. Rounds alternate
between the implementations and ratios are taken within a round, so that a slow spell of the machine hits all of them
alike. `forward` is without gradients, `train` a forward and a backward to the input and all weights. batched_mm copies
the weights of every row and is left out beyond 64 tokens.

Run `python benchmarks/experts_interface.py --help`; the table is printed and stored under benchmarks/results/ with
versions and hardware.
"""

import argparse
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

import mixtura.models  # noqa: F401 -- registers the implementation
from mixtura.benchmarks.measure import alternating, store_record

RESULTS = Path(__file__).parent / "results"
IMPLEMENTATIONS = ("eager", "batched_mm", "grouped_mm", "mixtura")
MOST_TOKENS_OF_BATCHED = 64


def experts(options: argparse.Namespace, num_experts: int) -> Any:
    """One module of experts, which every implementation runs in turn."""
    torch.manual_seed(0)
    config = MixtralConfig(
        hidden_size=options.hidden, intermediate_size=options.width, num_local_experts=num_experts, hidden_act="silu"
    )
    module = MixtralExperts(config)
    for weight in module.parameters():
        torch.nn.init.normal_(weight, std=0.02)
    return module


def passes(module: Any, tokens: int, top_k: int) -> dict[str, Callable[[str], None]]:
    """What is timed, as functions of the implementation's name."""
    x_TD = torch.randn(tokens, module.hidden_dim)
    index_TK = torch.rand(tokens, module.num_experts).topk(top_k).indices
    weight_TK = torch.rand(tokens, top_k).softmax(-1)
    grad_TD = torch.randn_like(x_TD)

    def forward(name: str) -> None:
        module.config._experts_implementation = name
        with torch.no_grad():
            module(x_TD, index_TK, weight_TK)

    def train(name: str) -> None:
        module.config._experts_implementation = name
        x = x_TD.detach().requires_grad_()
        module.zero_grad()
        module(x, index_TK, weight_TK).backward(grad_TD)

    return {"forward": forward, "train": train}


def rows_of(options: argparse.Namespace, num_experts: int, tokens: int) -> list[dict[str, object]]:
    """What was measured with one number of experts and tokens, a row for each implementation and pass."""
    module = experts(options, num_experts)
    names = [name for name in IMPLEMENTATIONS if name != "batched_mm" or tokens <= MOST_TOKENS_OF_BATCHED]
    rows = []
    for what, run in passes(module, tokens, options.top_k).items():
        # A backward writes a gradient of all weights, however few the tokens are, and is long enough by itself.
        repeats = max(1, 32 // tokens) if what == "forward" else 1
        seconds = alternating({name: partial(run, name) for name in names}, rounds=options.rounds, repeats=repeats)
        for name in names:
            rows.append(
                {
                    "experts": num_experts,
                    "tokens": tokens,
                    "pass": what,
                    "implementation": name,
                    "milliseconds": 1e3 * statistics.median(seconds[name]),
                    "times_eager": statistics.median(
                        eager / own for eager, own in zip(seconds["eager"], seconds[name], strict=True)
                    ),
                }
            )
    return rows


def main() -> None:
    """Measures, prints and stores the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=256, help="hidden size")
    parser.add_argument("--width", type=int, default=512, help="width of one expert")
    parser.add_argument("--experts", type=int, nargs="+", default=[8, 32], help="experts")
    parser.add_argument("--top-k", type=int, default=2, help="experts of a token")
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 64, 2048], help="tokens at once")
    parser.add_argument("--rounds", type=int, default=9, help="rounds that count")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows = [row for e in options.experts for tokens in options.tokens for row in rows_of(options, e, tokens)]
    table = Table(title=f"Mixtral's experts, hidden {options.hidden}, width {options.width}, top {options.top_k}")
    for column in rows[0]:
        table.add_column(column.replace("_", " "), justify="left" if column in ("pass", "implementation") else "right")
    for row in rows:
        table.add_row(*(f"{value:.2f}" if isinstance(value, float) else str(value) for value in row.values()))
    Console(width=120).print(table)
    path = store_record(RESULTS, "experts", settings=vars(options), suffix=f"-{options.hidden}", rows=rows)
    print(f"Stored in {path}")


if __name__ == "__main__":
    main()
