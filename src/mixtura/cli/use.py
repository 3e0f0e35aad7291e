"""Verbs that use a model: evaluate, generate, translate, classify, diagnose."""

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

import mixtura
from mixtura.cli.application import ModelArgument, app, hush, open_page


@app.command(rich_help_panel="Use")
def evaluate(
    model: ModelArgument,
    text: Annotated[Path, typer.Option(help="Held-out text: a file or folder of .txt or tables.")],
    text_column: Annotated[
        str, typer.Option(help="Column or key that holds the text; messages.content for chats.")
    ] = "text",
    batch_size: Annotated[int, typer.Option(min=1, help="Sequences at once; a multiple of the group size.")] = 16,
    sequence_length: Annotated[
        int | None, typer.Option(min=2, help="Tokens in a sequence.", show_default="the model's")
    ] = None,
) -> None:
    """Measure a model's loss on a text, in each of its modes."""
    hush()
    losses = mixtura.evaluate(
        model, text, text_column=text_column, batch_size=batch_size, sequence_length=sequence_length
    )
    for mode, measured in losses.items():
        typer.echo(
            f"{mode:10} {measured.loss:.4f} nats a token  {measured.bits_per_byte:.4f} bits a byte  "
            f"perplexity {measured.perplexity:.2f}"
        )


@app.command(rich_help_panel="Use")
def generate(
    model: ModelArgument,
    prompt: Annotated[str, typer.Argument(help="The text to go on from.")],
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to write.")] = 64,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 takes the likeliest token each time.")] = 0.0,
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="For temperatures above 0.")] = 0,
) -> None:
    """Continue a prompt, token by token.

    Mixture-of-tokens layers run alone: what they write depends on nothing but the prompt.
    """
    from mixtura.models.generation import generate_text

    hush()
    typer.echo(generate_text(model, prompt, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed))


@app.command(rich_help_panel="Use")
def translate(
    model: Annotated[
        Path, typer.Argument(help="A translation model, such as runs/translation/arms/dense/seed0/checkpoint.")
    ],
    text: Annotated[str, typer.Argument(help="What to translate, a sentence or two a line.")],
    source_language: Annotated[str, typer.Option("--from", help="Language of the text, such as en.")],
    target_language: Annotated[str, typer.Option("--to", help="Language to translate into, such as de.")],
    num_beams: Annotated[int, typer.Option("--beams", min=1, help="1 is greedy.")] = 1,
) -> None:
    """Translate a text with a model that was tuned for it."""
    from mixtura.tasks.translation.trained_model import translate as run_translation

    hush()
    typer.echo(
        run_translation(
            model, text, source_language=source_language, target_language=target_language, num_beams=num_beams
        )
    )


@app.command(rich_help_panel="Use")
def classify(
    model: Annotated[
        Path, typer.Argument(help="A classifier, such as runs/classification/arms/layer_mix/seed0/checkpoint.")
    ],
    texts: Annotated[list[str], typer.Argument(help="Texts, each judged by itself.")],
) -> None:
    """Label texts with a model that was tuned for it."""
    from mixtura.tasks.classification.classifier import classify as run_classifier

    hush()
    for text, answer in zip(texts, run_classifier(model, texts), strict=True):
        typer.echo(f"{answer.label:12} {answer.probability:6.1%}  {text}")


@app.command(rich_help_panel="Use")
def diagnose(
    model: ModelArgument,
    text: Annotated[
        list[str] | None,
        typer.Option(help="NAME=FILE, such as de=german.txt; repeatable. A translation run has its own sentences."),
    ] = None,
    text_column: Annotated[
        str, typer.Option(help="Column or key that holds the text; messages.content for chats.")
    ] = "text",
    max_tokens: Annotated[int, typer.Option(min=1, help="Tokens read of each text.")] = 20_000,
    out: Annotated[Path | None, typer.Option(help="The folder to write.", show_default="diagnosis")] = None,
    show: Annotated[bool, typer.Option("--open", help="Open the page in a browser.")] = False,
) -> None:
    """Show what a model's experts have learned.

    Load, texts and token types by expert, and sentences coloured by expert.
    """
    hush()
    folder = out or Path("diagnosis")
    found = mixtura.diagnose(
        model,
        text or [],
        out=folder,
        text_column=text_column,
        max_tokens=max_tokens,
        command=shlex.join(["mixtura", *sys.argv[1:]]),
    )
    page = folder / "diagnosis.html"
    typer.echo(f"{found.headline}\n\nPage: {page}")
    if show:
        open_page(page)
