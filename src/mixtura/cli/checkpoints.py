"""Verbs that turn one checkpoint into another."""

from pathlib import Path
from typing import Annotated, Any

import typer

from mixtura.cli.application import app, hush


@app.command()
def upcycle(
    source: Annotated[str, typer.Argument(help="A dense model: a folder, a hub name, or smollm2.")],
    destination: Annotated[Path, typer.Argument(help="The folder to write; it must be new or empty.")],
    family: Annotated[str, typer.Option(help="token_choice or mixture_of_tokens.")] = "token_choice",
    num_experts: Annotated[int, typer.Option(min=1, help="Routed experts of a layer.")] = 8,
    top_k: Annotated[int, typer.Option(min=1, help="Experts a token runs.")] = 2,
    layers: Annotated[str, typer.Option(help="all, later_half, or numbers from 0 such as 0,4-11.")] = "all",
    split: Annotated[int, typer.Option(min=1, help="Parts that every copy is cut into, an expert each.")] = 1,
    shared: Annotated[int, typer.Option(min=0, help="How many of the parts every token runs.")] = 0,
    drop: Annotated[float, typer.Option(help="Share of every expert's channels that is drawn anew.")] = 0.0,
    noise: Annotated[float, typer.Option(help="Noise on the experts, relative to their weights' spread.")] = 0.0,
    normalize: Annotated[bool, typer.Option(help="Make a token's weights sum to one, which is exact.")] = True,
    score_function: Annotated[str, typer.Option(help="softmax or sigmoid.")] = "softmax",
    router: Annotated[str, typer.Option(help="Where it starts: random, clusters or texts.")] = "random",
    router_spread: Annotated[
        float | None,
        typer.Option(help="Spread of a token's logits over the copies.", show_default="0.5, or 0.05 for tokens"),
    ] = None,
    group_size: Annotated[
        int | None, typer.Option(help="Tokens of a group of mixture of tokens.", show_default="num_experts")
    ] = None,
    others: Annotated[
        list[str] | None,
        typer.Option("--with", help="Another model of the same shape, whose layers become experts too. Repeatable."),
    ] = None,
    text: Annotated[
        list[Path] | None, typer.Option(help="A text to start the routers on: .txt, .jsonl or .parquet. Repeatable.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="For all that is drawn.")] = 0,
) -> None:
    """Make a mixture of a dense model, ready to be trained on.

    Every expert starts as a copy of the dense layer, or as a part of one, so that the mixture computes what the model
    did; --drop, --noise and mixtures of tokens start from nearby.
    """
    from mixtura.conversion.upcycle import upcycle as run_upcycle

    hush()
    # The choices are checked where they are used, for Python and the command line alike.
    choices: dict[str, Any] = {"family": family, "score_function": score_function, "router": router}
    result = run_upcycle(
        source,
        destination,
        num_experts=num_experts,
        top_k=top_k,
        layers=layers,
        split=split,
        shared=shared,
        drop=drop,
        noise=noise,
        normalize_top_k=normalize,
        router_spread=router_spread,
        group_size=group_size,
        others=others or [],
        texts=text or [],
        seed=seed,
        **choices,
    )
    for warning in result.warnings:
        typer.echo(f"Warning: {warning}", err=True)
    output = "equal to the dense model's, up to rounding" if result.exact else "near the dense model's, not equal"
    typer.echo(
        f"{len(result.layers)} of {result.config.num_hidden_layers} layers are mixtures of {num_experts} experts, "
        f"{result.num_bytes / 1e9:.2f} GB in all; the output is {output}.\nModel: {result.folder}"
    )
