"""The verb: a question becomes advice, and advice a page and JSON."""

import dataclasses
from pathlib import Path
from typing import Any

from mixtura.comparison.advice_page import render_advice
from mixtura.errors import UserError, reason_of
from mixtura.files import write_text
from mixtura.planning.advice import Advice, advise_on, question_of
from mixtura.planning.evidence import load_evidence


def advise(
    *,
    tokens: float,
    width: int | None = None,
    parameters: float | None = None,
    layers: int = 4,
    vocabulary: int = 1024,
    memory: float | None = None,
    token_by_token: bool = True,
    out: Path | str | None = None,
) -> Advice:
    """Ranks the families for a decoder of a size and a budget, by measured runs and the law fitted to them.

    Args:
        tokens: training tokens.
        width: hidden size of the dense model, whose FLOPs all families match; or give `parameters`.
        parameters: its parameters without embeddings and head.
        layers: decoder layers.
        vocabulary: tokens of the vocabulary, for the memory.
        memory: bytes for weights, gradients and AdamW's moments in float32; None is no limit.
        token_by_token: whether the model must answer one request at a time; if not, mixtures of tokens may be served
            in groups, as they train.
        out: an HTML page to write.

    Returns:
        The families from the best at equal FLOPs to the worst, those that do not fit last.

    Raises:
        UserError: a value is out of range, width and parameters are both given or both missing, or the page cannot be
            written.
    """
    question = question_of(
        tokens=tokens,
        width=width,
        parameters=parameters,
        layers=layers,
        vocabulary=vocabulary,
        memory=memory,
        token_by_token=token_by_token,
    )
    advice = advise_on(question)
    if out is not None:
        try:
            write_text(Path(out), render_advice(advice, load_evidence()))
        except OSError as error:
            raise UserError(f"'{out}' cannot be written ({reason_of(error)}): name another file.") from error
    return advice


def plain_advice(advice: Advice) -> dict[str, Any]:
    """Advice as JSON has it."""
    return dataclasses.asdict(advice)
