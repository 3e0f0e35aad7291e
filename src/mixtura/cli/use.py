"""Verbs that use a model: evaluate, generate, translate, classify, diagnose."""

import dataclasses
import json
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

import mixtura
from mixtura.cli.application import (
    DATA_FLAGS,
    MODEL_FLAGS,
    InOption,
    ModelArgument,
    OutOption,
    app,
    check_out,
    column_texts,
    given_texts,
    open_page,
    put_json,
    put_lines,
    quiet_transformers,
)
from mixtura.errors import UserError, need, rewording


@app.command(rich_help_panel="Use")
def evaluate(
    model: ModelArgument,
    text: Annotated[
        Path | None, typer.Option(help="Held-out text: a file or folder of .txt or tables.", show_default=False)
    ] = None,
    text_column: Annotated[
        str, typer.Option(help="Column or key that holds the text; messages.content for chats.")
    ] = "text",
    batch_size: Annotated[int, typer.Option(min=1, help="Sequences at once; a multiple of the group size.")] = 16,
    sequence_length: Annotated[
        int | None, typer.Option(min=2, help="Tokens in a sequence.", show_default="the model's")
    ] = None,
    max_sequences: Annotated[int, typer.Option(min=1, help="Stop after so many sequences.")] = 512,
    tasks: Annotated[
        str | None, typer.Option(help="Tasks of lm-eval, such as hellaswag,arc_easy.", show_default=False)
    ] = None,
    task_folder: Annotated[
        Path | None, typer.Option(help="A folder with tasks of your own, in lm-eval's .yaml.", show_default=False)
    ] = None,
    shots: Annotated[
        int | None, typer.Option(min=0, help="Worked examples in a prompt of a task.", show_default="the task's")
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Examples of a task, from the first.", show_default="all")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Write JSON, with every number unrounded.")] = False,
) -> None:
    """Measure a model's loss on a text, or its scores in tasks.

    The loss is that of each of its modes. Tasks are those of lm-eval, where mixture-of-tokens layers run alone.
    """
    quiet_transformers()
    if (text is None) == (tasks is None):
        raise UserError("Give either a text with --text, for the loss on it, or tasks of lm-eval with --tasks.")
    if tasks is not None:
        _evaluate_tasks(model, tasks, task_folder, shots=shots, limit=limit, batch_size=batch_size, as_json=as_json)
        return
    with rewording(DATA_FLAGS):
        losses = mixtura.evaluate(
            model,
            str(text),
            text_column=text_column,
            batch_size=batch_size,
            sequence_length=sequence_length,
            max_sequences=max_sequences,
        )
    if as_json:
        put_json({mode: dataclasses.asdict(measured) for mode, measured in losses.items()})
        return
    for mode, measured in losses.items():
        typer.echo(
            f"{mode:10} {measured.loss:.4f} nats a token  {measured.bits_per_byte:.4f} bits a byte  "
            f"perplexity {measured.perplexity:.2f}"
        )
    typer.echo(next(iter(losses.values())).extent(), err=True)


def _evaluate_tasks(
    model: Path,
    tasks: str,
    folder: Path | None,
    *,
    shots: int | None,
    limit: int | None,
    batch_size: int,
    as_json: bool,
) -> None:
    from mixtura.benchmarks.task_scores import score_tasks

    names = [name.strip() for name in tasks.split(",") if name.strip()]
    if not names:
        raise UserError(f"--tasks is '{tasks}': name tasks of lm-eval, such as hellaswag,arc_easy.")
    scores = score_tasks(model, names, folder=folder, num_shots=shots, limit=limit, batch_size=batch_size)
    if as_json:
        put_json([score._asdict() for score in scores])
        return
    for score in scores:
        noise = "" if score.standard_error is None else f" +- {score.standard_error:.4f}"
        typer.echo(f"{score.task:24} {score.metric:16} {score.value:.4f}{noise}  ({score.examples:,} examples)")


@app.command(rich_help_panel="Use")
def generate(
    model: ModelArgument,
    prompts: Annotated[
        list[str] | None, typer.Argument(help="Texts to go on from, each by itself; - reads them line by line.")
    ] = None,
    source: InOption = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", help="A .jsonl to write, a line for each prompt with prompt and text.", show_default=False
        ),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to write.")] = 64,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 takes the likeliest token each time.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Draw from the likeliest tokens of this probability together.")] = 1.0,
    top_k: Annotated[int, typer.Option(min=0, help="Draw from so many of the likeliest tokens; 0 is all.")] = 0,
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="For temperatures above 0.")] = 0,
    chat: Annotated[
        bool, typer.Option("--chat", help="Use the tokenizer's chat template, and show the answer.")
    ] = False,
    stream: Annotated[
        bool | None,
        typer.Option("--stream/--no-stream", help="Show words as they are written.", show_default="on a terminal"),
    ] = None,
) -> None:
    """Continue prompts, token by token.

    Mixture-of-tokens layers run alone: what they write depends on nothing but the prompt. An empty line lies between
    the texts of several prompts.
    """
    from mixtura.models.generation import CHAT_FILE, Sampling, Writer

    quiet_transformers()
    texts = [text for text in given_texts(prompts or [], source, what="prompt") if text.strip()]
    check_out(out)
    sampling = Sampling(max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, top_k=top_k, seed=seed)
    opened = None
    if (model / CHAT_FILE).is_file():  # an adapter of a chat run is no model without its base
        opened = need("mixtura.tasks.chat.answers").load_chat_model(model)
    writer = Writer(model, chat=chat, opened=opened)
    streaming = out is None and (sys.stdout.isatty() if stream is None else stream)
    rows = []
    for number, text in enumerate(texts):
        if (note := writer.beyond_positions(text, sampling)) is not None:
            typer.echo(f"Note: {note}", err=True)
        if number and out is None:
            typer.echo()
        written = writer.write(text, sampling, on_text=_show if streaming else None)
        rows.append(json.dumps({"prompt": text, "text": written}, ensure_ascii=False))
        if out is None:
            typer.echo("" if streaming else written)
    if out is not None:
        put_lines(rows, out)


def _show(piece: str) -> None:
    typer.echo(piece, nl=False)
    sys.stdout.flush()


@app.command(rich_help_panel="Use")
def translate(
    model: Annotated[
        Path, typer.Argument(help="A translation model, such as runs/translation/arms/dense/seed0/checkpoint.")
    ],
    source_language: Annotated[str, typer.Option("--from", help="Language of the text, such as en.")],
    target_language: Annotated[str, typer.Option("--to", help="Language to translate into, such as de.")],
    text: Annotated[
        str | None, typer.Argument(help="What to translate, a sentence or two a line; - reads standard input.")
    ] = None,
    source: InOption = None,
    out: OutOption = None,
    num_beams: Annotated[int, typer.Option("--beams", min=1, help="1 is greedy.")] = 1,
) -> None:
    """Translate a text with a model that was tuned for it.

    Line by line: empty lines stay.
    """
    from mixtura.tasks.translation.trained_model import translate_lines

    quiet_transformers()
    check_out(out)
    lines = given_texts([] if text is None else [text], source, what="text")
    if text is not None and text != "-":
        lines = text.splitlines()
    done = translate_lines(
        model, lines, source_language=source_language, target_language=target_language, num_beams=num_beams
    )
    put_lines(done.lines, out)
    if done.cut:
        _note_cut(done.cut, "of the translations ended at the model's longest, not by themselves")


@app.command(rich_help_panel="Use")
def classify(
    model: Annotated[
        Path, typer.Argument(help="A classifier, such as runs/classification/arms/layer_mix/seed0/checkpoint.")
    ],
    texts: Annotated[
        list[str] | None, typer.Argument(help="Texts, each judged by itself; - reads them line by line.")
    ] = None,
    source: InOption = None,
    text_column: Annotated[
        str | None, typer.Option(help="Where --in names a table: the column that holds the texts.", show_default=False)
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            help="The file to write: label, tab and probability for each line or row; of several labels all pairs.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Label texts with a model that was tuned for it.

    An empty line or cell of a file gets an empty line; a text without any of several labels gets a dash.
    """
    from mixtura.tasks.classification.classifier import classify as run_classifier

    quiet_transformers()
    check_out(out)
    if text_column is None:
        with rewording({"give a text file with a text a line.": "name its column of texts with --text-column."}):
            lines = given_texts(texts or [], source, what="text")
    elif texts:
        raise UserError("Texts are given beside --text-column: give either.")
    else:
        lines = column_texts(source, text_column)
    asked = [number for number, line in enumerate(lines) if line.strip()]
    answers = dict(zip(asked, run_classifier(model, [lines[number] for number in asked]), strict=True))
    shown = [_label_line(line, answers.get(number), to_file=out is not None) for number, line in enumerate(lines)]
    put_lines(shown, out)
    if cut := [number + 1 for number in asked if answers[number].cut]:
        _note_cut(cut, "of the texts were longer than the classifier reads, and only their beginnings were judged")


def _label_line(text: str, answer: Any, *, to_file: bool) -> str:
    if answer is None:
        return ""
    given = [(label, answer.probabilities[label]) for label in answer.labels]
    if to_file:
        return "\t".join(f"{label}\t{probability:.6f}" for label, probability in given) or "-"
    text = text.replace("\n", " ")  # a cell may have several lines
    if len(given) == 1:
        return f"{answer.label:12} {answer.probability:6.1%}  {text}"
    return f"{', '.join(f'{label} {probability:.1%}' for label, probability in given) or '-':20}  {text}"


def _note_cut(numbers: list[int], what: str) -> None:
    listed = ", ".join(map(str, numbers[:10])) + (", ..." if len(numbers) > 10 else "")
    typer.echo(f"Note: {len(numbers):,} {what}: line {listed}.", err=True)


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
    quiet_transformers()
    folder = out or Path("diagnosis")
    with rewording(MODEL_FLAGS):
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
