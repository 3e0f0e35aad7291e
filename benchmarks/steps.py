"""Times whole training steps of small models on a CPU: every family in all layers against a dense model of equal FLOPs.

A step is forward, backward, clipping and fused AdamW, with attention, embeddings and head as they are in a model; the
steps of all models alternate, and ratios are taken within a round. A second table says where each step's milliseconds
go. Run `python benchmarks/steps.py`; it needs a checkout, `PYTHONPATH=src` where Mixtura is not installed, and ten
minutes at the sizes it starts with; `--tokens 512 --rounds 2 --layers 1` is a minute. The tables are printed and stored
under benchmarks/results/ with versions and hardware.
"""

import argparse
import statistics
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from mixtura.benchmarks.contenders import Size, parameters
from mixtura.benchmarks.measure import interleaved, ratios, store_record
from mixtura.benchmarks.speed_table import PARTS, Part, model_of, training_step_by_part
from mixtura.config import Family
from mixtura.training.process import keep_freed_memory

RESULTS = Path(__file__).parent / "results"
CHOICES = ((8, 2), (32, 2), (64, 8), (256, 8))
"""Experts, and how many of them token choice runs for a token."""
FAMILIES: tuple[Family, ...] = ("dense", "token_choice", "mixture_of_tokens")


def main() -> None:
    """Measures, prints and stores the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=8192, help="tokens of a step")
    parser.add_argument("--hidden", type=int, default=256, help="hidden size, a multiple of 32")
    parser.add_argument("--layers", type=int, default=4, help="layers, all mixtures")
    parser.add_argument("--vocabulary", type=int, default=4096, help="tokens of the vocabulary")
    parser.add_argument("--rounds", type=int, default=7, help="rounds that count")
    parser.add_argument("--experts", type=int, nargs="*", help="only these, of 8, 32, 64 and 256")
    options = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()
    rows = []
    for experts, top_k in CHOICES:
        if options.experts and experts not in options.experts:
            continue
        rows += _measure(Size(tokens=options.tokens, hidden=options.hidden, experts=experts, top_k=top_k), options)
    title = f"{options.tokens} tokens x {options.hidden}, {options.layers} layers"
    console = Console(width=120)
    console.print(_speeds(f"Training steps, {title}", rows))
    console.print(_parts(f"Milliseconds of a step, {title}", rows))
    path = store_record(RESULTS, "steps", settings=vars(options), suffix=f"-{options.tokens}", rows=rows)
    print(f"Stored in {path}")


def _measure(size: Size, options: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for every family."""
    ids_BL = torch.randint(options.vocabulary, (size.batch, size.length))
    sizes = {"layers": options.layers, "heads": options.hidden // 32, "vocab_size": options.vocabulary}
    models = {family: model_of(family, size, **sizes) for family in FAMILIES}
    steps = {family: training_step_by_part(model, ids_BL, max_grad_norm=1.0) for family, model in models.items()}
    parts: dict[Family, list[dict[Part, float]]] = {family: [] for family in FAMILIES}

    def run(family: Family) -> None:
        parts[family].append(steps[family]())

    seconds = interleaved(
        {family: partial(run, family) for family in FAMILIES}, baseline="dense", rounds=options.rounds
    )
    rows = []
    for family, (median, lowest, highest) in ratios(seconds, baseline="dense").items():
        counted = parts[family][-options.rounds :]
        row = {"experts": size.experts, "top_k": size.top_k, "family": family}
        row |= {"tokens_per_second": ids_BL.numel() / statistics.median(seconds[family])}
        row |= {"ratio": median, "lowest": lowest, "highest": highest, "parameters": parameters(models[family])}
        row["seconds"] = {part: statistics.median(one[part] for one in counted) for part in PARTS}
        rows.append(row)
    return rows


def _speeds(title: str, rows: list[dict[str, Any]]) -> Table:
    table = Table(title=title)
    for column in ("experts", "family", "tokens/s", "x dense", "lowest", "highest", "M parameters"):
        table.add_column(column, justify="left" if column == "family" else "right")
    for row in rows:
        numbers = (f"{row[key]:.2f}" for key in ("ratio", "lowest", "highest"))
        millions = f"{row['parameters'] / 1e6:.1f}"
        table.add_row(*_name(row), f"{row['tokens_per_second']:,.0f}", *numbers, millions)
    return table


def _parts(title: str, rows: list[dict[str, Any]]) -> Table:
    table = Table(title=title)
    for column in ("experts", "family", *PARTS):
        table.add_column(column, justify="left" if column == "family" else "right")
    for row in rows:
        table.add_row(*_name(row), *(f"{1000 * row['seconds'][part]:,.0f}" for part in PARTS))
    return table


def _name(row: dict[str, Any]) -> tuple[str, str]:
    return f"{row['experts']}, top {row['top_k']}", row["family"].replace("_", " ")


if __name__ == "__main__":
    main()
