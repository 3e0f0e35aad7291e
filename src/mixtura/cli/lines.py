"""Texts for the verbs that use a model: from the command line, a file or standard input; and to a file."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from mixtura.errors import UserError, reason_of
from mixtura.files import file_above, folders_above, write_text

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
        UserError: there are none, there are two sources, or the file cannot be read.
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
    return list(texts)


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


def put_text(text: str, out: Path) -> None:
    """Writes a file, whole or not at all, in a folder that need not exist.

    Raises:
        UserError: the file cannot be written.
    """
    check_out(out)
    try:
        with folders_above(out):
            write_text(out, text)
    except OSError as error:
        raise UserError(f"'{out}' cannot be written ({reason_of(error)}): name another file with --out.") from error


def check_out(out: Path | None) -> None:
    """Refuses a place where no file can be, before the model works for it."""
    if out is None:
        return
    if out.is_dir():
        raise UserError(f"'{out}' is a folder: name a file with --out.")
    if (file := file_above(out)) is not None:
        raise UserError(f"'{file}' is a file, so nothing can be written in it: name another file with --out.")
