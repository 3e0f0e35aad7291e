"""Times whole training steps of small models on a CPU: every family in all layers against a dense model of equal FLOPs.

A step is forward, backward, clipping and fused AdamW, with attention, embeddings and head as they are in a model; the
steps of all models alternate, and ratios are taken within a round. Run `python benchmarks/steps.py`; it needs a
checkout, `PYTHONPATH=src` where Mixtura is not installed, and a quarter of an hour at the
sizes it starts with; `--tokens 512 --rounds 2 --layers 1` is a minute. The table is printed and stored under
benchmarks/results/ with versions and hardware.
"""

import argparse
import statistics
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from mixtura.benchmarks.contenders import Size, parameters
from mixtura.benchmarks.measure import interleaved, ratios
from mixtura.benchmarks.records import store_record
from mixtura.benchmarks.steps import model_of, training_step
from mixtura.config import Family
from mixtura.training.allocation import keep_freed_memory

RESULTS = Path(__file__).parent / "results"
CHOICES = ((8, 2), (32, 2), (64, 8), (256, 8))
"""Experts, and how many of them token choice runs for a token."""
FAMILIES: tuple[Family, ...] = ("dense", "token_choice", "mixture_of_tokens")


def main() -> None:
    """Measures, prints and stores the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=8192, help="tokens of a step")
    parser.add_argument("--hidden", type=int, default=256, help="hidden size, a multiple of 32")
    parser.add_argument("--layers", type=int, default=2, help="layers, all mixtures")
    parser.add_argument("--vocabulary", type=int, default=4096, help="tokens of the vocabulary")
    parser.add_argument("--rounds", type=int, default=7, help="rounds that count")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    keep_freed_memory()
    table = Table(title=f"Training steps, {options.tokens} tokens x {options.hidden}, {options.layers} layers")
    for column in ("experts", "family", "tokens/s", "x dense", "lowest", "highest", "M parameters"):
        table.add_column(column, justify="left" if column == "family" else "right")
    rows = []
    for experts, top_k in CHOICES:
        size = Size(tokens=options.tokens, hidden=options.hidden, experts=experts, top_k=top_k)
        ids_BL = torch.randint(options.vocabulary, (size.batch, size.length))
        sizes = {"layers": options.layers, "heads": options.hidden // 32, "vocab_size": options.vocabulary}
        models = {family: model_of(family, size, **sizes) for family in FAMILIES}
        runs = {family: training_step(model, ids_BL, max_grad_norm=1.0) for family, model in models.items()}
        seconds = interleaved(runs, baseline="dense", rounds=options.rounds)
        for family, (median, lowest, highest) in ratios(seconds, baseline="dense").items():
            row = {"experts": experts, "top_k": top_k, "family": family}
            row |= {"tokens_per_second": ids_BL.numel() / statistics.median(seconds[family])}
            row |= {"ratio": median, "lowest": lowest, "highest": highest, "parameters": parameters(models[family])}
            rows.append(row)
            numbers = (f"{row['tokens_per_second']:,.0f}", *(f"{value:.2f}" for value in (median, lowest, highest)))
            table.add_row(f"{experts}, top {top_k}", family, *numbers, f"{parameters(models[family]) / 1e6:.1f}")
    Console(width=120).print(table)
    threads = "" if options.threads == 1 else f"-{options.threads}-threads"
    print(f"Stored in {store_record(RESULTS, 'steps', settings=vars(options), suffix=threads, rows=rows)}")


if __name__ == "__main__":
    main()
