"""What is done about a text that is too short for the recipe: more is held out, and sequences are shorter."""

import dataclasses
from collections.abc import Callable

from mixtura.config import DataConfig
from mixtura.data.prepare import PreparedData
from mixtura.errors import TooLittleText

MOST_HELD_OUT = 0.25
"""The largest share that is held out of a text in place of a smaller one that holds out too little."""
SHORTEST, HALVINGS = 16, 3
"""Tokens of the shortest sequence, and halvings at most, that a text too short for the recipe's gets in its place."""


def fit_held_out(
    data: DataConfig, prepare: Callable[[DataConfig], PreparedData], *, wanted: int
) -> tuple[DataConfig, PreparedData]:
    """Prepared text with at least one sequence on either side, and the recipe's `[data]` that gives it.

    Where that is not the one given, more is held out, up to a quarter, and then sequences are shorter.

    Args:
        data: the recipe's `[data]`.
        prepare: `prepare_data`, with a cache folder.
        wanted: sequences to hold out, unless they are more than a fifth of all.

    Raises:
        UserError: the text is too short even so, or cannot be used.
    """
    fitted, halvings, refusal = data, 0, None
    while True:
        try:
            prepared = prepare(fitted)
            found = prepared.validation.num_sequences
            enough = found >= min(wanted, (found + prepared.train.num_sequences) // 5)
            if enough or fitted.validation_fraction >= MOST_HELD_OUT:
                return fitted, prepared
            more = True
        except TooLittleText as error:
            refusal = refusal or error
            more = error.held_out and fitted.validation_fraction < MOST_HELD_OUT
            if not more and (halvings == HALVINGS or fitted.sequence_length < 2 * SHORTEST):
                raise refusal from None
        if more:
            share = min(MOST_HELD_OUT, 2 * fitted.validation_fraction)
            fitted = dataclasses.replace(fitted, validation_fraction=share)
        else:
            fitted, halvings = dataclasses.replace(fitted, sequence_length=fitted.sequence_length // 2), halvings + 1
