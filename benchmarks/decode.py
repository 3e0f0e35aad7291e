"""Times decoding token by token, with a cache, in every form in which a model can be served, against a dense model.

All models have the same active width: a dense layer of 4 D, one expert of 4 D, or two of 2 D. Rounds alternate between
the models and ratios are taken within a round, so that a slow spell of the machine hits all of them alike. The weights
are random: what is chosen does not change the time. `layer` is one feed-forward layer on one token of each sequence,
`model` the whole of `generate`, prompt and sampling included. Beside the layer stands the least time that this machine
allows, measured in the same rounds: that of summing a buffer as large as the weights that the tokens chose, or of one
large product of as many FLOPs as the tokens cost, if that is more. On one thread the time is processor time.

Run `python benchmarks/decode.py --help`; the table is printed and stored under benchmarks/results/ with versions and
hardware.
"""

import argparse
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from mixtura.benchmarks.decoding_bound import FLOAT_BYTES, FORMS, VOCABULARY, Form, bound
from mixtura.benchmarks.measure import alternating, store_record
from mixtura.models import MixtureConfig, MixtureForCausalLM

RESULTS = Path(__file__).parent / "results"
PROMPT = 8
LARGE = 768
"""Rows and columns of the large product."""


def models(options: argparse.Namespace) -> dict[str, MixtureForCausalLM]:
    """One model for each form; the modes of mixture of tokens share one set of sizes."""

    def build(form: Form) -> MixtureForCausalLM:
        torch.manual_seed(0)
        settings: dict[str, Any] = {"num_experts_per_tok": form.top_k} if form.family == "token_choice" else {}
        if form.family == "mixture_of_tokens":
            settings["alone_top_k"] = form.top_k
        if form.population:
            settings |= {"inference_mode": "population", "population": True}
        config = MixtureConfig(
            vocab_size=VOCABULARY,
            hidden_size=options.hidden,
            intermediate_size=4 * options.hidden,
            moe_intermediate_size=form.width * options.hidden,
            num_hidden_layers=options.layers,
            num_attention_heads=options.hidden // 32,
            mlp_layer_types=[form.family] * options.layers,
            num_experts=options.experts,
            group_size=options.experts,
            **settings,
        )
        return MixtureForCausalLM(config).eval()

    return {name: build(form) for name, form in FORMS.items()}


def step(model: MixtureForCausalLM, x_BLD: torch.Tensor) -> Callable[[], None]:
    """One token of each sequence through the first feed-forward layer."""
    layer = model.model.layers[0].mlp

    def run() -> None:
        with torch.no_grad():
            layer(x_BLD)

    return run


def cost(model: MixtureForCausalLM, form: Form, x_BLD: torch.Tensor) -> tuple[int, int]:
    """Bytes of the weights that these tokens choose in that layer, and the FLOPs that they cost there."""
    layer = model.model.layers[0].mlp
    if form.family == "dense":
        experts, each, router, chosen, choices = 1, sum(value.nbytes for value in layer.parameters()), 0, 1, 1
    else:
        experts, router = layer.experts.num_experts, layer.gate.weight.nbytes
        each = sum(value.nbytes for value in layer.experts.weights) // experts
        choices = form.top_k or experts
        chosen = layer.gate(x_BLD.flatten(0, 1)).topk(choices).indices.unique().numel()
    return each * chosen + router, 2 * len(x_BLD) * (each * choices + router) // FLOAT_BYTES


def decode(model: Any, batch: int, tokens: int) -> Callable[[], None]:
    """`tokens` greedy tokens after a short prompt, even where an end of text is among them."""
    ids_BL = torch.randint(model.config.vocab_size, (batch, PROMPT))
    how = {"attention_mask": torch.ones_like(ids_BL), "max_new_tokens": tokens, "min_new_tokens": tokens}

    def run() -> None:
        model.generate(ids_BL, do_sample=False, pad_token_id=0, **how)

    return run


def ratio_to_dense(seconds: dict[str, list[float]], name: str) -> float:
    """Median over rounds of how many times as fast as dense, 1 being equal."""
    return statistics.median(d / s for d, s in zip(seconds["dense"], seconds[name], strict=True))


def layers(
    built: dict[str, MixtureForCausalLM], x_BLD: torch.Tensor, rounds: int
) -> dict[str, tuple[list[float], list[float]]]:
    """Seconds of every form's layer in each round, and the least that the machine would have allowed in that round."""
    costs = {name: cost(model, FORMS[name], x_BLD) for name, model in built.items()}
    runs: dict[str, Callable[[], object]] = {name: step(model, x_BLD) for name, model in built.items()}
    large = torch.ones(LARGE, LARGE)
    runs |= {f"reading {name}": torch.ones(costs[name][0] // FLOAT_BYTES).sum for name in built}
    seconds = alternating(runs | {"product": lambda: large @ large}, rounds=rounds, repeats=10)
    return {
        name: (
            seconds[name],
            [
                max(reading, product * costs[name][1] / (2 * LARGE**3))
                for reading, product in zip(seconds[f"reading {name}"], seconds["product"], strict=True)
            ],
        )
        for name in built
    }


def rows_of(options: argparse.Namespace, batch: int) -> list[dict[str, object]]:
    """What was measured with one batch size, a row for each form."""
    built = models(options)
    layer = layers(built, torch.randn(batch, 1, options.hidden), options.rounds)
    own = {name: seconds for name, (seconds, _) in layer.items()}
    whole = alternating(
        {name: decode(model, batch, options.tokens) for name, model in built.items()}, rounds=options.rounds, repeats=1
    )
    return [
        {
            "batch": batch,
            "form": name,
            "layer_microseconds": 1e6 * statistics.median(own[name]),
            "layer_ratio": ratio_to_dense(own, name),
            "layer_bound_microseconds": 1e6 * statistics.median(layer[name][1]),
            "layer_of_bound": statistics.median(least / taken for taken, least in zip(*layer[name], strict=True)),
            "tokens_per_second": batch * options.tokens / statistics.median(whole[name]),
            "model_ratio": ratio_to_dense(whole, name),
            "megabytes": sum(value.nbytes for value in [*model.parameters(), *model.buffers()]) / 1e6,
        }
        for name, model in built.items()
    ]


def main() -> None:
    """Measures, prints and stores the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=256, help="hidden size, a multiple of 32")
    parser.add_argument("--layers", type=int, default=4, help="layers, all mixtures")
    parser.add_argument("--experts", type=int, default=16, help="experts, and tokens of a training group")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 64], help="sequences at once")
    parser.add_argument("--tokens", type=int, default=32, help="new tokens of each sequence")
    parser.add_argument("--rounds", type=int, default=9, help="rounds that count")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    table = Table(title=f"Decoding, hidden {options.hidden}, {options.layers} layers, {options.experts} experts")
    columns = ("batch", "form", "layer, us", "bound, us", "of bound", "tokens/s", "x dense", "by weights", "MB")
    for column in columns:
        table.add_column(column, justify="left" if column == "form" else "right")
    sizes = {key: getattr(options, key) for key in ("hidden", "layers", "experts")}
    rows = [row for batch in options.batch for row in rows_of(options, batch)]
    for row in rows:
        table.add_row(
            str(row["batch"]),
            str(row["form"]),
            f"{row['layer_microseconds']:.0f}",
            f"{row['layer_bound_microseconds']:.0f}",
            f"{row['layer_of_bound']:.2f}",
            f"{row['tokens_per_second']:.0f}",
            f"{row['model_ratio']:.2f}",
            f"{bound(str(row['form']), batch=int(str(row['batch'])), **sizes):.2f}",
            f"{row['megabytes']:.1f}",
        )
    Console(width=120).print(table)
    path = store_record(RESULTS, "decode", settings=vars(options), suffix=f"-{options.hidden}", rows=rows)
    print(f"Stored in {path}")


if __name__ == "__main__":
    main()
