"""The application that the verbs register with, and what they share: options, progress, paths, the browser."""

import os
import sys
import webbrowser
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Annotated, Any

import typer

from mixtura import __version__
from mixtura.config import PRESETS, Interrupted, UserError, preset_path

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
DryRunOption = Annotated[
    bool, typer.Option("--dry-run", help="Say what it would take on this machine, and write nothing.")
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


@contextmanager
def progress(total_steps: int | None) -> Iterator[Any]:
    """Bars on a terminal, lines in a log; Ctrl-C where a run does not catch it stops at once."""
    from rich.console import Console

    from mixtura.training import LineProgress, RichProgress

    hush()
    console = Console()
    shown = (
        RichProgress(console, total_steps=total_steps) if console.is_terminal else nullcontext(LineProgress(console))
    )
    try:
        with shown as reporter:
            yield reporter
    except KeyboardInterrupt:
        raise Interrupted("Stopped: all up to the last checkpoint is saved.") from None


def hush() -> None:
    """Turns off the progress bars that transformers shows for each file, and its tables of what a model lacks."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()


def recipe_path(recipe: Path | None, preset: str | None) -> Path:
    """The recipe that the user named, by path or as a preset: one of the two."""
    if (recipe is None) == (preset is None):
        raise UserError(f"Give either a recipe or --preset with one of {', '.join(PRESETS)}.")
    return recipe if recipe is not None else preset_path(str(preset))


def open_page(page: Path) -> None:
    """Opens a page in a browser where there is a screen: never in CI, over ssh or on a machine without one."""
    if _has_display():
        webbrowser.open(page.resolve().as_uri())


def _has_display() -> bool:
    if os.environ.get("CI") or os.environ.get("SSH_CONNECTION"):
        return False
    return sys.platform in ("darwin", "win32") or bool(os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))
