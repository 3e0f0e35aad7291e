"""Verbs that turn one checkpoint into another."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from mixtura.cli.application import ModelArgument, app, hush

NewFolderArgument = Annotated[Path, typer.Argument(help="The folder to write, a new one.")]


class TransitionTarget(StrEnum):
    """What a mixture-of-tokens model can become."""

    token_choice = "token_choice"
    alone = "alone"


@app.command()
def calibrate(
    model: ModelArgument,
    out: NewFolderArgument,
    text: Annotated[Path, typer.Option(help="Text to take averages from: a file or folder.")],
    text_column: Annotated[str, typer.Option(help="Column or key that holds the text.")] = "text",
    max_sequences: Annotated[int, typer.Option(min=1, help="Stop after so many sequences.")] = 512,
) -> None:
    """Give a mixture-of-tokens model the averages of the groups in a text, to stand for the neighbours it has not.

    The new model answers in mode "population"; `mixtura evaluate` compares all modes on a held-out text.
    """
    from mixtura.conversion.deployment import calibrate_folder

    hush()
    seen = calibrate_folder(model, out, text, text_column=text_column, max_sequences=max_sequences)
    typer.echo(f"{seen['layers']} layers keep averages over {seen['groups']:,} groups each.\nModel: {out}")


@app.command()
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
    """Turn a mixture-of-tokens model into token choice, or one that trains alone from now on, with its parameters."""
    from mixtura.conversion.deployment import transition_folder

    hush()
    made = transition_folder(model, out, to=to.value, text=text, text_column=text_column, top_k=top_k)
    experts = made.config.num_experts_per_tok if to is TransitionTarget.token_choice else made.config.alone_top_k
    typer.echo(f"Layers: {to.value}, {experts or 'all'} of {made.config.num_experts} experts a token.\nModel: {out}")
