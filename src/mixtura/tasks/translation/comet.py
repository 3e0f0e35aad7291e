"""COMET, a learned score of translations, where its package and a checkpoint are there.

Rei et al. 2020, "COMET: A Neural Framework for MT Evaluation" (arXiv 2009.09025). The package is no part of
an installation, and its checkpoints are pickles: one is opened only where a recipe names it in `evaluation.comet`.

Shapes: N sentences.
"""

import functools
import json
from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mixtura.config import UserError
from mixtura.data.parallel import SentencePair
from mixtura.errors import reason_of
from mixtura.results.document import PairedTest
from mixtura.tasks.translation.chrf import NUM_RESAMPLES
from mixtura.tasks.tuning import two_sided_p

BATCH_SIZE = 16
KEY = "comet"
"""Of a sentence's score in `outputs.jsonl`."""


def check_comet(checkpoint: str) -> None:
    """Refuses a checkpoint that could not be used, before hours of training.

    Raises:
        UserError: the package is not installed, or there is no such file.
    """
    if find_spec("comet") is None:
        raise UserError(
            f"'evaluation.comet' is '{checkpoint}', but the package unbabel-comet is not installed: run pip install "
            "unbabel-comet, or leave the key out."
        )
    if not Path(checkpoint).is_file():
        raise UserError(
            f"'evaluation.comet' is '{checkpoint}', which is no file: give the path of a COMET checkpoint, such as "
            "wmt22-comet-da/checkpoints/model.ckpt."
        )


def comet_scores(checkpoint: str, pairs: Sequence[SentencePair], outputs: Sequence[str]) -> list[float]:
    """The score of every sentence, about 0 to 100, with its source and its reference.

    Args:
        checkpoint: path of a COMET checkpoint.
        pairs: sources and references.
        outputs: a translation of each.

    Raises:
        UserError: the checkpoint cannot be used.
    """
    rows = [(pair.source, output, pair.target) for pair, output in zip(pairs, outputs, strict=True)]
    return list(_scores(checkpoint, tuple(rows)))


# The untranslated sources are the same for every arm and seed, and each run's outputs are asked for once.
@functools.lru_cache(maxsize=4)
def _scores(checkpoint: str, rows: tuple[tuple[str, str, str], ...]) -> tuple[float, ...]:
    samples = [dict(zip(("src", "mt", "ref"), row, strict=True)) for row in rows]
    gpus = int(torch.cuda.is_available())
    try:
        found = _model(checkpoint).predict(samples, batch_size=BATCH_SIZE, gpus=gpus, progress_bar=False)
    except Exception as error:  # a pickle, Lightning and a model of any class raise what they like
        raise UserError(
            f"'evaluation.comet' is '{checkpoint}', with which COMET fails ({reason_of(error)}): give a checkpoint of "
            "the installed unbabel-comet, or leave the key out."
        ) from error
    return tuple(100 * float(score) for score in found.scores)


@functools.lru_cache(maxsize=1)
def _model(checkpoint: str) -> Any:
    return import_module("comet").load_from_checkpoint(checkpoint)


def means_by_direction(scores: Sequence[float] | None, pairs: Sequence[SentencePair]) -> dict[str, float]:
    """The mean score of every direction that has sentences; empty without scores."""
    found: dict[str, list[float]] = {}
    for pair, value in zip(pairs, scores or (), strict=scores is not None):
        found.setdefault(pair.pair, []).append(value)
    return {direction: sum(values) / len(values) for direction, values in found.items()}


def read_scores(path: Path) -> list[float | None]:
    """The scores in a finished run's `outputs.jsonl`, None where it has none."""
    return [json.loads(line).get(KEY) for line in path.read_text(encoding="utf-8").splitlines()]


def paired_bootstrap(baseline: Sequence[float], arm: Sequence[float]) -> PairedTest:
    """The mean of `arm` less that of `baseline` on the same sentences, and a two-sided p-value (Koehn 2004)."""
    difference_N = np.asarray(arm) - np.asarray(baseline)
    if not difference_N.any():
        return PairedTest(difference=0.0, p_value=1.0)
    draw = np.random.default_rng(0)
    count = len(difference_N)
    means = np.array([difference_N[draw.integers(count, size=count)].mean() for _ in range(NUM_RESAMPLES)])
    return PairedTest(difference=float(difference_N.mean()), p_value=two_sided_p(means))
