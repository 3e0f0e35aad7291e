"""Times decoding token by token, with a cache, in every form in which a model can be served, against a dense model.

All models have the same active width: a dense layer of 4 D, one expert of 4 D, or two of 2 D. Rounds alternate between
the models and ratios are taken within a round, so that a slow spell of the machine hits all of them alike. The weights
are random: what is chosen does not change the time. `layer` is one feed-forward layer on one token of each sequence,
`model` the whole of `generate`, prompt and sampling included.

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

from mixtura.benchmarks.decoding_bound import FORMS, VOCABULARY, Form, bound
from mixtura.benchmarks.measure import alternating, store_record
from mixtura.models import MixtureConfig, MixtureForCausalLM

RESULTS = Path(__file__).parent / "results"
PROMPT = 8


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


def step(model: MixtureForCausalLM, batch: int) -> Callable[[], None]:
    """One token of each sequence through the first feed-forward layer."""
    layer, x_BLD = model.model.layers[0].mlp, torch.randn(batch, 1, model.config.hidden_size)

    def run() -> None:
        with torch.no_grad():
            layer(x_BLD)

    return run


def decode(model: MixtureForCausalLM, batch: int, tokens: int) -> Callable[[], None]:
    """`tokens` greedy tokens after a short prompt."""
    ids_BL = torch.randint(model.config.vocab_size, (batch, PROMPT))
    mask_BL = torch.ones_like(ids_BL)

    def run() -> None:
        model.generate(ids_BL, attention_mask=mask_BL, max_new_tokens=tokens, do_sample=False, pad_token_id=0)

    return run


def ratio_to_dense(seconds: dict[str, list[float]], name: str) -> float:
    """Median over rounds of how many times as fast as dense, 1 being equal."""
    return statistics.median(d / s for d, s in zip(seconds["dense"], seconds[name], strict=True))


def rows_of(options: argparse.Namespace, batch: int) -> list[dict[str, object]]:
    """What was measured with one batch size, a row for each form."""
    built = models(options)
    layer = alternating({name: step(model, batch) for name, model in built.items()}, rounds=options.rounds, repeats=20)
    whole = alternating(
        {name: decode(model, batch, options.tokens) for name, model in built.items()}, rounds=options.rounds, repeats=1
    )
    return [
        {
            "batch": batch,
            "form": name,
            "layer_microseconds": 1e6 * statistics.median(layer[name]),
            "layer_ratio": ratio_to_dense(layer, name),
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
    columns = ("batch", "form", "layer, us", "layer, x dense", "tokens/s", "model, x dense", "bound", "MB of weights")
    for column in columns:
        table.add_column(column, justify="left" if column == "form" else "right")
    sizes = {key: getattr(options, key) for key in ("hidden", "layers", "experts")}
    rows = [row for batch in options.batch for row in rows_of(options, batch)]
    for row in rows:
        us, layer, speed, model, size = (row[key] for key in list(row)[2:])
        table.add_row(
            str(row["batch"]),
            str(row["form"]),
            f"{us:.0f}",
            f"{layer:.2f}",
            f"{speed:.0f}",
            f"{model:.2f}",
            f"{bound(str(row['form']), batch=int(str(row['batch'])), **sizes):.2f}",
            f"{size:.1f}",
        )
    Console(width=120).print(table)
    path = store_record(RESULTS, "decode", settings=vars(options), suffix=f"-{options.hidden}", rows=rows)
    print(f"Stored in {path}")


if __name__ == "__main__":
    main()
