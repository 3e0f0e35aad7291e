"""SetFit beside the arms on few texts, where its package is installed: a reference, never an arm.

Tunstall et al. 2022, "Efficient Few-Shot Learning Without Prompts" (arXiv 2209.11055): the base is tuned so that texts
of one class have like embeddings, in `ITERATIONS` pairs of each kind a text, one pass, and a logistic regression is
fitted on its mean-pooled embeddings. It reads the same few texts and the same base as the arms. Of several labels each
gets a regression of its own.
"""

import contextlib
import io
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import numpy as np
from torch import nn
from transformers import PreTrainedTokenizerBase

from mixtura.config import UserError

ITERATIONS = 20
"""R of the paper's section 3."""
_BATCH = 16


def check_setfit() -> None:
    """Refuses a recipe that asks for SetFit, before anything is trained.

    Raises:
        UserError: the package is not installed.
    """
    if find_spec("setfit") is None:
        raise UserError(
            "'setfit' is true, but the package setfit is not installed: run pip install setfit, or leave the key out."
        )


def setfit_answers(
    base: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    labels: np.ndarray,
    asked: Sequence[str],
    *,
    max_length: int,
    seed: int,
) -> np.ndarray:
    """What SetFit answers after training on a few texts.

    Args:
        base: the pretrained encoder, which is left as it is.
        tokenizer: its tokenizer.
        texts: to train on.
        labels: of these, (N,) int64 or (N, C) of 0 and 1.
        asked: texts to answer.
        max_length: tokens of a text.
        seed: of the pairs and the training.

    Returns:
        As `labels`, of the asked texts.
    """
    with tempfile.TemporaryDirectory(prefix="setfit-") as folder, _silence():
        setfit, parts = import_module("setfit"), import_module("sentence_transformers.models")
        whole: Any = base
        whole.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        reader = parts.Transformer(folder, max_seq_length=max_length)
        pooling = parts.Pooling(whole.config.hidden_size, pooling_mode="mean")
        body = import_module("sentence_transformers").SentenceTransformer(modules=[reader, pooling], device="cpu")
        several = {"multi_target_strategy": "one-vs-rest"} if labels.ndim == 2 else {}
        model = setfit.SetFitModel(model_body=body, model_head=_head(several), **several)
        arguments = setfit.TrainingArguments(
            output_dir=folder,
            batch_size=_BATCH,
            num_epochs=1,
            num_iterations=ITERATIONS,
            seed=seed,
            save_strategy="no",
            report_to="none",
            show_progress_bar=False,
        )
        rows = import_module("datasets").Dataset.from_dict(
            {"text": list(texts), "label": labels.astype(np.int64).tolist()}
        )
        setfit.Trainer(model=model, args=arguments, train_dataset=rows).train()
        return np.asarray(model.predict(list(asked), batch_size=64, show_progress_bar=False, as_numpy=True))


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Hides the packages' progress bars, reports and warnings, which are not about the user's data."""
    with (
        warnings.catch_warnings(),
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        warnings.simplefilter("ignore")
        yield


def _head(several: dict[str, str]) -> Any:
    regression = import_module("sklearn.linear_model").LogisticRegression()
    return import_module("sklearn.multiclass").OneVsRestClassifier(regression) if several else regression
