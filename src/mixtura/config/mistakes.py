"""The two ways in which a user ends a job early: by a mistake, and by stopping it."""

from collections.abc import Callable, Iterable


class UserError(ValueError):
    """A mistake in what the user gave: one sentence that names the value and the fix; the command line exits with 2.

    Several mistakes in a recipe are said together, a sentence a line.
    """


class TooLittleText(UserError):
    """Training or held-out text that does not fill one sequence."""

    def __init__(self, sentence: str, *, held_out: bool) -> None:
        """`held_out` says which side has too little."""
        super().__init__(sentence)
        self.held_out = held_out


def refuse_together(checks: Iterable[Callable[[], object]]) -> None:
    """Runs checks that each raise a UserError, and raises all they found as one, a sentence a line.

    What one mistake makes impossible to check, such as a division by a number of zero heads, is left out beside it.

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
