"""The two ways in which a user ends a job early: by a mistake, and by stopping it."""


class UserError(ValueError):
    """A mistake in what the user gave: one sentence that names the value and the fix; the command line exits with 2."""


class Interrupted(Exception):
    """The user stopped a long job; everything so far is saved, and the same command goes on from there."""
