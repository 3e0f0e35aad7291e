"""The application that the verbs register with, and what they share: options, progress, paths, the browser, and texts
from the command line, a file or standard input.
"""

import json
import math
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from mixtura import __version__
from mixtura.errors import Interrupted, UserError, is_utf8, rank, reason_of


class VerbsByUse(TyperGroup):
    """The list of verbs in `mixtura --help`, under what they are for; rich's panels would cost as much as typer."""

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """Writes a section for every panel, in the order in which the verbs are registered."""
        sections: dict[str, list[tuple[str, str]]] = {}
        room = formatter.width - 6 - max(map(len, self.commands))
        for name, command in self.commands.items():
            panel = str(getattr(command, "rich_help_panel", None))
            sections.setdefault(panel, []).append((name, command.get_short_help_str(room)))
        for panel, rows in sections.items():
            with formatter.section(panel):
                formatter.write_dl(rows)


app = typer.Typer(
    name="mixtura",
    cls=VerbsByUse,
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
    str | None,
    typer.Option(
        help="A recipe that comes with Mixtura, such as quick or full; a wrong name lists all.", show_default=False
    ),
]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", help="Change a key, such as --set training.steps=100. Repeatable.", show_default=False),
]
ResumeOption = Annotated[
    bool, typer.Option("--resume/--no-resume", help="Go on with what the folder holds, or start over.")
]
ParallelOption = Annotated[
    int,
    typer.Option("--arms-in-parallel", metavar="N", help="Runs that train at a time, each on its cores or its GPU."),
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
    """Bars on a terminal, lines in a log; Ctrl-C where a run does not catch it stops at once.

    Under torchrun the first process alone shows progress, and what `say` is told.
    """
    from rich.console import Console

    from mixtura.training import LineProgress, RichProgress, SilentProgress

    quiet_transformers()
    console = Console()
    shown: Any = nullcontext(SilentProgress() if rank() else LineProgress(console))
    if console.is_terminal and not rank():
        shown = RichProgress(console, total_steps=total_steps)
    try:
        with shown as reporter:
            yield reporter
    except KeyboardInterrupt:
        raise Interrupted("Stopped: all up to the last checkpoint is saved.") from None


DATA_FLAGS = {
    "'data.path'": "--text",
    "'data.text_column'": "--text-column",
    ", lower 'data.sequence_length' or change 'data.validation_fraction'": " or lower --sequence-length",
    "'data.sequence_length'": "--sequence-length",
    "'base.name'": "the model",
}
MODEL_FLAGS = {
    "of 'data.sequence_length'": "of one sequence",
    **DATA_FLAGS,
    ", lower 'data.sequence_length' or change 'data.validation_fraction'": "",
}
"""For verbs where the model alone says how long a sequence is."""


def say(text: str) -> None:
    """Shows a result; under torchrun the first process alone does."""
    if not rank():
        typer.echo(text)


def quiet_transformers() -> None:
    """Turns off the progress bars that transformers shows for each file, and its tables of what a model lacks."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()


def recipe_path(recipe: Path | None, preset: str | None) -> Path:
    """The recipe that the user named, by path or as a preset: one of the two."""
    from mixtura.config import PRESETS, preset_path

    if (recipe is None) == (preset is None):
        raise UserError(f"Give either a recipe or --preset with one of {', '.join(PRESETS)}.")
    return recipe if recipe is not None else preset_path(str(preset))


def open_page(page: Path) -> None:
    """Opens a page in a browser where there is a screen: never in CI, over ssh or on a machine without one."""
    if _has_display():
        import webbrowser

        webbrowser.open(page.resolve().as_uri())


def _has_display() -> bool:
    if os.environ.get("CI") or os.environ.get("SSH_CONNECTION"):
        return False
    return sys.platform in ("darwin", "win32") or bool(os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))


_TABLES = (".jsonl", ".json", ".csv", ".tsv", ".parquet")

InOption = Annotated[
    Path | None, typer.Option("--in", help="A text file, a text a line; - reads standard input.", show_default=False)
]
OutOption = Annotated[
    Path | None, typer.Option("--out", help="The file to write, a line for each line read.", show_default=False)
]


def given_texts(texts: Sequence[str], source: Path | None, *, what: str) -> list[str]:
    """The texts that were typed, or the lines of a file; a lone "-" is standard input.

    Args:
        texts: what was typed.
        source: the file of --in.
        what: what a text is called, such as "prompt".

    Raises:
        UserError: there are none, one is no text, there are two sources, or the file cannot be read.
    """
    if "-" in texts and len(texts) > 1:
        raise UserError(f"A {what} is -, which stands for standard input: give it alone, or leave it out.")
    if list(texts) == ["-"] and source is None:
        return read_lines(Path("-"), what=what)
    if bool(texts) == (source is not None):
        raise UserError(f"Give either a {what} or a file of them with --in; - is standard input.")
    if source is not None:
        return read_lines(source, what=what)
    for text in texts:
        if not text.strip():
            raise UserError(f"The {what} is empty: give some text.")
        if not is_utf8(text):
            raise UserError(f"The {what} is not UTF-8 text: set the terminal's encoding to UTF-8, or retype it.")
    return list(texts)


def column_texts(source: Path | None, column: str) -> list[str]:
    """What a column of a table holds, a text for each row; an empty one where a row has none.

    Raises:
        UserError: no table is named, it cannot be read, or no row has text in that column.
    """
    from mixtura.data.formats.rows import find_cell
    from mixtura.data.formats.table_files import file_rows
    from mixtura.data.formats.text_files import ending

    if source is None or ending(source) not in _TABLES:
        named = "no file is given with --in" if source is None else f"'{source}' is no table"
        raise UserError(f"--text-column is '{column}', but {named}: give one of {', '.join(_TABLES)}, or leave it out.")
    if not source.is_file():
        raise UserError(f"There is no file '{source}': give a table with texts.")
    texts, names = [], dict[str, object]()
    for row in file_rows(source, [column]):
        value = find_cell(row, column)[1]
        texts.append(value if isinstance(value, str) and is_utf8(value) else "")
        names.update(row.values)
    if not any(text.strip() for text in texts):
        listed = f", some of {', '.join(list(names)[:20])}" if names else ""
        raise UserError(f"No row of '{source}' has text in '{column}': name another column with --text-column{listed}.")
    return texts


def read_lines(source: Path, *, what: str) -> list[str]:
    """The lines of a UTF-8 file or of standard input ("-"), without their ends; empty ones too.

    Raises:
        UserError: it cannot be read, is a table, or has no text at all.
    """
    name = "Standard input" if str(source) == "-" else f"'{source}'"
    if source.suffix.lower() in _TABLES:
        raise UserError(f"{name} is a table: give a text file with a {what} a line.")
    try:
        content = sys.stdin.buffer.read() if str(source) == "-" else source.read_bytes()
        text = content.decode("utf-8-sig")
    except OSError as error:
        raise UserError(f"{name} cannot be read ({reason_of(error)}): give a text file with a {what} a line.") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{name} is not UTF-8 text (byte {error.start:,}): convert it.") from None
    # Only at line feeds: other characters that Python takes for ends of lines may stand within one.
    lines = [line.removesuffix("\r") for line in text.removesuffix("\n").split("\n")]
    if not any(line.strip() for line in lines):
        raise UserError(f"{name} is empty: give a {what} a line.")
    return lines


def put_lines(lines: Sequence[str], out: Path | None) -> None:
    """Writes lines to a file, whole or not at all, or to standard output.

    Raises:
        UserError: the file cannot be written.
    """
    if out is None:
        for line in lines:
            typer.echo(line)
        return
    put_text("".join(f"{line}\n" for line in lines), out)
    typer.echo(f"{len(lines):,} lines: {out}", err=True)


def put_json(value: Any) -> None:
    """Writes JSON to standard output; a number that JSON does not have, such as an infinite perplexity, is null."""
    typer.echo(json.dumps(_finite(value), indent=1, allow_nan=False))


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def put_text(text: str, out: Path) -> None:
    """Writes a file, whole or not at all, in a folder that need not exist.

    Raises:
        UserError: the file cannot be written.
    """
    from mixtura.files import folders_above, write_text

    check_out(out)
    try:
        with folders_above(out):
            write_text(out, text)
    except OSError as error:
        raise UserError(f"'{out}' cannot be written ({reason_of(error)}): name another file with --out.") from error


def check_out(out: Path | None) -> None:
    """Refuses a place where no file can be, before the model works for it."""
    from mixtura.files import file_above

    if out is None:
        return
    if out.is_dir():
        raise UserError(f"'{out}' is a folder: name a file with --out.")
    if (file := file_above(out)) is not None:
        raise UserError(f"'{file}' is a file, so nothing can be written in it: name another file with --out.")
