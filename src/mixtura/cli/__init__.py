"""The command line: one verb a function, parsing only. Importing a module of verbs registers them, in this order.

A user's mistake is one sentence on standard error and exit code 2; an interrupted run exits with 130 and says how to go
on. Anything else is a bug and shows its traceback.
"""

import errno
import sys
from typing import Any, cast

import typer

from mixtura import __version__
from mixtura.cli.application import app as app
from mixtura.errors import Interrupted, UserError, missing_extra

from mixtura.cli import train, use, convert, machine  # isort: skip  # noqa: F401

_DISK_ERRORS = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EROFS: "it is read-only",
}


def main() -> None:
    """Runs the command line and turns users' mistakes into one sentence and exit code 2."""
    # A terminal of another encoding than UTF-8 shows an escape where it has no character, and the run is not lost.
    reconfigure = getattr(sys.stdout, "reconfigure", None)
    if reconfigure is not None:
        reconfigure(errors="backslashreplace")
    if sys.argv[1:] == ["--version"]:
        # Typer imports pydantic when it parses an option, which takes longer than everything else this verb needs.
        typer.echo(f"mixtura {__version__}")
        sys.exit(0)
    try:
        cast(Any, app)()
    except UserError as error:
        _fail(str(error))
    except Interrupted as interruption:
        typer.echo(f"\nmixtura: {interruption} The same command goes on from there.", err=True)
        sys.exit(130)
    except ModuleNotFoundError as error:
        if (sentence := missing_extra(error)) is None:
            raise
        _fail(sentence)
    except OSError as error:
        if error.errno not in _DISK_ERRORS:
            raise
        where = f"'{error.filename}' cannot be written" if error.filename else "Writing failed"
        _fail(f"{where}: {_DISK_ERRORS[error.errno]}. Free some space or choose another folder with --out.")


def _fail(sentence: str) -> None:
    typer.echo(f"mixtura: {sentence}", err=True)
    sys.exit(2)
