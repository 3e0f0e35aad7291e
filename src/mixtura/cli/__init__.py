"""The command line: one verb a function, parsing only. Importing a module of verbs registers them.

A mistake of the user is one sentence on standard error and exit code 2; an interrupted run exits with 130 and says how
to go on; SIGTERM, which a batch system sends before it takes the machine away, is Ctrl-C. Else it is a bug and shows
its traceback. Under torchrun one process of a machine says what is wrong, and the first of all says the rest.
"""

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from mixtura import __version__
from mixtura.cli.mistakes import check_recipe_file, name_flags
from mixtura.errors import Interrupted, UserError, disk_error, local_rank, missing_extra
from mixtura.threads import prepare_threads


def __getattr__(name: str) -> Any:
    """Builds `app`, the application of typer with all verbs, when it is first asked for."""
    if name != "app":
        raise AttributeError(f"module 'mixtura.cli' has no attribute {name!r}")
    from mixtura.cli import train, use, convert, machine  # isort: skip  # noqa: F401 (the order of --help)
    from mixtura.cli.application import app

    return app


def main() -> None:
    """Runs the command line and turns users' mistakes into one sentence and exit code 2."""
    # A terminal of another encoding than UTF-8 shows an escape where it has no character, and the run is not lost.
    reconfigure = getattr(sys.stdout, "reconfigure", None)
    if reconfigure is not None:
        reconfigure(errors="backslashreplace")
    if sys.argv[1:] == ["--version"]:
        print(f"mixtura {__version__}")  # typer takes longer to import than everything else this verb needs
        sys.exit(0)
    prepare_threads()  # verbs import torch
    try:
        with _terminated_as_interrupted():
            check_recipe_file(sys.argv[1:])
            sys.modules[__name__].app()  # built by `__getattr__`
    except UserError as error:
        _fail(name_flags(str(error), sys.argv[1:]))
    except Interrupted as interruption:
        _say(f"\nmixtura: {interruption} The same command goes on from there.")
        sys.exit(130)
    except ModuleNotFoundError as error:
        if (sentence := missing_extra(error)) is None:
            raise
        _fail(sentence)
    except Exception as error:
        if (reason := disk_error(error)) is None:
            raise
        filename = getattr(error, "filename", None)
        where = f"'{filename}' cannot be written" if filename else "Writing failed"
        _fail(f"{where}: {reason}. Free some space or choose another folder with --out.")


def _fail(sentences: str) -> None:
    first, *others = sentences.splitlines()
    if others:
        first = "\n- ".join(["the recipe has several mistakes:", first, *others])
    _say(f"mixtura: {first}")
    sys.exit(2)


def _say(text: str) -> None:
    if local_rank() == 0:
        print(text.encode(errors="backslashreplace").decode(), file=sys.stderr)


@contextmanager
def _terminated_as_interrupted() -> Iterator[None]:
    """Makes SIGTERM a KeyboardInterrupt, so that whatever runs cleans up after itself as it does after Ctrl-C."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
