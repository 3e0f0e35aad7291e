"""Verbs that turn one checkpoint into another."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

import mixtura
from mixtura.cli.application import MODEL_FLAGS, ModelArgument, app, quiet_transformers
from mixtura.errors import UserError, need, rewording

NewFolderArgument = Annotated[Path, typer.Argument(help="The folder to write; it must be new or empty.")]


@app.command(rich_help_panel="Convert")
def upcycle(
    source: Annotated[str, typer.Argument(help="A dense model: a folder, a hub name, or smollm2.")],
    destination: NewFolderArgument,
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
    quiet_transformers()
    # The choices are checked where they are used, for Python and the command line alike.
    choices: dict[str, Any] = {"family": family, "score_function": score_function, "router": router}
    with rewording(MODEL_FLAGS):
        result = mixtura.upcycle(
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


class TransitionTarget(StrEnum):
    """What a mixture-of-tokens model can become."""

    token_choice = "token_choice"
    alone = "alone"


@app.command(rich_help_panel="Convert")
def calibrate(
    model: ModelArgument,
    out: NewFolderArgument,
    text: Annotated[Path, typer.Option(help="Text to take averages from: a file or folder.")],
    text_column: Annotated[str, typer.Option(help="Column or key that holds the text.")] = "text",
    max_sequences: Annotated[int, typer.Option(min=1, help="Stop after so many sequences.")] = 512,
) -> None:
    """Take a text's averages, to stand for a token's neighbours.

    For mixture-of-tokens models.

    The new model answers in mode "population"; `mixtura evaluate` compares all modes on a held-out text.
    """
    quiet_transformers()
    with rewording(MODEL_FLAGS):
        made = mixtura.calibrate(model, out, text, text_column=text_column, max_sequences=max_sequences)
    typer.echo(f"{made.layers} layers keep averages over {made.groups:,} groups each.\nModel: {made.folder}")


@app.command(rich_help_panel="Convert")
def transition(
    model: ModelArgument,
    out: NewFolderArgument,
    to: Annotated[TransitionTarget, typer.Option(help="What its layers become.")],
    text: Annotated[
        Path | None,
        typer.Option(help="For token choice: text on which outputs are matched, a file or folder.", show_default=False),
    ] = None,
    text_column: Annotated[str, typer.Option(help="Column or key that holds the text.")] = "text",
    top_k: Annotated[
        int | None, typer.Option(min=1, help="Experts a token gets.", show_default="as many as the model has alone")
    ] = None,
) -> None:
    """Turn mixture of tokens into token choice, or train it alone.

    All parameters are kept.
    """
    quiet_transformers()
    with rewording(MODEL_FLAGS):
        made = mixtura.transition(model, out, to=to.value, text=text, text_column=text_column, top_k=top_k)
    config = made.model.config
    experts = config.num_experts_per_tok if to is TransitionTarget.token_choice else config.alone_top_k
    typer.echo(f"Layers: {to.value}, {experts or 'all'} of {config.num_experts} experts a token.\nModel: {out}")


@app.command(rich_help_panel="Convert")
def export(
    model: ModelArgument,
    out: NewFolderArgument,
    to: Annotated[
        str,
        typer.Option(
            help="mixtral, granite_moe, qwen2_moe, qwen3_moe, glm4_moe, llama, mistral, qwen2, qwen3; remote_code "
            "brings its own code; auto takes the first that holds the model exactly."
        ),
    ] = "auto",
    base_model: Annotated[
        str | None,
        typer.Option(help="Hub name of the model that this one was made from, for the card.", show_default=False),
    ] = None,
    shard_size: Annotated[float, typer.Option(min=0.001, help="Gigabytes in a weight file, at most.")] = 5.0,
    check: Annotated[
        bool, typer.Option("--check/--no-check", help="Compare with the source before the folder is put in place.")
    ] = True,
) -> None:
    """Write a checkpoint in the form that other tools serve.

    That is a stock architecture of transformers, vLLM and llama.cpp, or a folder with its own code; of a classifier a
    folder for transformers' pipelines.

    Nothing is written unless the export computes what the source computes.
    """
    quiet_transformers()
    if (model / "classifier.json").is_file():
        need("mixtura.tasks.classification.sequence_classifier").export_classifier(model, out)
        typer.echo(
            f"Exported to {out}: import mixtura.tasks.classification.sequence_classifier, then transformers' "
            "AutoModelForSequenceClassification reads it."
        )
        return
    exported = mixtura.export(
        model, out, to=to, base_model=base_model, max_shard_bytes=round(shard_size * 1e9), check=check
    )
    typer.echo(f"Exported to {out} as {exported.container}.")
    if exported.receipt is not None:
        typer.echo(f"\n{exported.receipt.table()}")


@app.command(rich_help_panel="Convert")
def verify(
    source: Annotated[Path, typer.Argument(help="The model that was exported, or the dense one it was made from.")],
    exported: Annotated[Path, typer.Argument(help="The folder to judge.")],
    engines: Annotated[
        list[str] | None,
        typer.Option(
            "--with",
            help="transformers, vllm or llama.cpp, or NAME=PYTHON for an interpreter that has it. Repeatable.",
            show_default="transformers",
        ),
    ] = None,
    converter: Annotated[
        Path | None, typer.Option(help="For llama.cpp: the folder of its convert_hf_to_gguf.py.", show_default=False)
    ] = None,
) -> None:
    """Compare the log-probabilities of an export and its source.

    In every engine asked for.

    Leaves receipt.json and a table in the export's card. Exits with 1 where an engine computes something else.
    """
    from mixtura.exporting.engines import parse_engine

    quiet_transformers()
    receipt = mixtura.verify(source, exported, [parse_engine(name, converter) for name in engines or ["transformers"]])
    typer.echo(receipt.table())
    if all(found.status == "not tried" for found in receipt.comparisons):
        reasons = ", ".join(found.reason for found in receipt.comparisons)
        raise UserError(
            f"Nothing was compared ({reasons}): install an engine, or name an interpreter that has it, as in "
            "--with vllm=/opt/vllm/bin/python."
        )
    if not receipt.passed:
        typer.echo(f"\nmixtura: {receipt.complaint()}", err=True)
        raise typer.Exit(1)
