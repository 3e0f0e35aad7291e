"""Answers of a chat model: generated greedily, compared with those of the data, with intervals over the chats.

Exact match and token F1 are SQuAD's (Rajpurkar et al. 2016, arXiv 1606.05250, section 6.1): words without case,
punctuation and English articles, and the overlap of their counts.
"""

import json
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn
from transformers import GenerationConfig

from mixtura.adapters.attach import load_adapter
from mixtura.checkpoints.pretrained import load_base
from mixtura.config import UserError
from mixtura.data.held_out import normalise
from mixtura.models.generation import CHAT_FILE
from mixtura.models.loading import load_model, open_tokenizer
from mixtura.results.document import PairedTest
from mixtura.results.run import Interval
from mixtura.tasks.tuning import two_sided_p

BATCH = 8
"""Prompts that are answered at once."""
RESAMPLES = 2000
MEASURES = ("loss", "exact_match", "token_f1")


class Question(NamedTuple):
    """A held-out prompt and its answer."""

    prompt: list[int]
    text: str
    """The last user's message."""
    reference: str
    chat: int
    """Which test chat it is of."""


@dataclass(frozen=True, kw_only=True)
class Judged:
    """What one model made of the test chats."""

    nats: dict[int, float]
    """Summed over the answer's tokens, by test chat."""
    tokens: dict[int, int]
    """How many those are."""
    outputs: list[str]
    """The answer to each question."""

    @property
    def loss(self) -> float:
        """Nats a token of an answer."""
        return sum(self.nats.values()) / sum(self.tokens.values())


def answer(
    model: Any, questions: Sequence[Question], *, ends: Sequence[int], pad: int, max_new_tokens: int
) -> list[list[int]]:
    """New tokens for every question, the likeliest each time, up to a token that ends an answer and without it.

    The model is in the mode in which it is to answer. Questions of similar length are answered together.
    """
    outputs: list[list[int]] = [[] for _ in questions]
    order = sorted(range(len(questions)), key=lambda i: (len(questions[i].prompt), i))
    how = GenerationConfig(
        max_new_tokens=max_new_tokens, do_sample=False, pad_token_id=pad, eos_token_id=list(ends), use_cache=True
    )
    for start in range(0, len(order), BATCH):
        chosen = order[start : start + BATCH]
        longest = max(len(questions[i].prompt) for i in chosen)
        gaps = [longest - len(questions[i].prompt) for i in chosen]
        ids_BL = torch.tensor([[pad] * gap + questions[i].prompt for gap, i in zip(gaps, chosen, strict=True)])
        mask_BL = torch.tensor([[0] * gap + [1] * (longest - gap) for gap in gaps])
        generated = model.generate(
            input_ids=ids_BL.to(model.device), attention_mask=mask_BL.to(model.device), generation_config=how
        )
        for i, row in zip(chosen, generated[:, longest:].tolist(), strict=True):
            stop = next((place for place, token in enumerate(row) if token in ends), len(row))
            outputs[i] = row[:stop]
    return outputs


def _words(text: str) -> list[str]:
    return re.sub(r"\b(a|an|the)\b", " ", normalise(text)).split()


def exact_match(output: str, reference: str) -> float:
    """1 where both have the same words, else 0."""
    return float(_words(output) == _words(reference))


def token_f1(output: str, reference: str) -> float:
    """Harmonic mean of the shares of words that the two have in common, from 0 to 1."""
    own, wanted = _words(output), _words(reference)
    if not own or not wanted:
        return float(own == wanted)
    both = sum((Counter(own) & Counter(wanted)).values())
    return 2 * both / (len(own) + len(wanted))


def scores(judged: Judged, questions: Sequence[Question]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """For each of `MEASURES` what every example adds to a sum, and with which weight, (N,) each; shares in percent."""
    chats = sorted(judged.nats)
    pairs = list(zip(judged.outputs, questions, strict=True))
    ones = np.ones(len(pairs))
    return {
        "loss": (np.array([judged.nats[i] for i in chats]), np.array([float(judged.tokens[i]) for i in chats])),
        "exact_match": (100 * np.array([exact_match(own, of.reference) for own, of in pairs]), ones),
        "token_f1": (100 * np.array([token_f1(own, of.reference) for own, of in pairs]), ones),
    }


def interval(sums_N: np.ndarray, weights_N: np.ndarray) -> Interval:
    """A weighted mean with its 95 % interval: `sums_N` is what each example adds, `weights_N` its weight."""
    low, high = np.quantile(_resampled(sums_N, weights_N), (0.025, 0.975))
    return Interval(value=float(sums_N.sum() / weights_N.sum()), low=float(low), high=float(high))


def paired_test(arm_N: np.ndarray, baseline_N: np.ndarray, weights_N: np.ndarray) -> PairedTest:
    """Arm minus baseline on the same examples, by drawing these again: what each example adds to either's sum."""
    means_R = _resampled(arm_N - baseline_N, weights_N)
    low, high = np.quantile(means_R, (0.025, 0.975))
    return PairedTest(
        difference=float((arm_N - baseline_N).sum() / weights_N.sum()),
        low=float(low),
        high=float(high),
        p_value=two_sided_p(means_R),
    )


def _resampled(sums_N: np.ndarray, weights_N: np.ndarray) -> np.ndarray:
    """Weighted means of examples that are drawn again with replacement, the same examples for every measure."""
    drawn_RN = np.random.default_rng(0).integers(len(sums_N), size=(RESAMPLES, len(sums_N)))
    return sums_N[drawn_RN].sum(1) / weights_N[drawn_RN].sum(1)


class BaseReference:
    """What the base makes of the test chats before any training: measured once, and kept in a folder."""

    def __init__(self, judge: Callable[[nn.Module], Judged], build: Callable[[], nn.Module], file: Path | None) -> None:
        """`judge` measures a model, `build` makes the base; None keeps no file."""
        self._judge, self._build, self._file = judge, build, file
        self._found: Judged | None = None

    def judged(self) -> Judged:
        """The measures, from the file where there is one."""
        if self._found is None and self._file is not None and self._file.is_file():
            self._found = _read_judged(self._file)
        if self._found is None:
            self._found = self._judge(self._build())
            if self._file is not None:
                self._file.parent.mkdir(parents=True, exist_ok=True)
                write_judged(self._file, self._found)
        return self._found


def write_judged(file: Path, judged: Judged) -> None:
    """Keeps measures as JSON."""
    chats = [[chat, judged.nats[chat], judged.tokens[chat]] for chat in sorted(judged.nats)]
    file.write_text(json.dumps({"chats": chats, "outputs": judged.outputs}), encoding="utf-8")


def _read_judged(file: Path) -> Judged | None:
    """The measures in a file; None where it is damaged, so that they are taken anew."""
    try:
        stored = json.loads(file.read_text(encoding="utf-8"))
        return Judged(
            nats={chat: nats for chat, nats, _ in stored["chats"]},
            tokens={chat: tokens for chat, _, tokens in stored["chats"]},
            outputs=stored["outputs"],
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None


def read_judged(file: Path) -> Judged:
    """The measures of a finished run.

    Raises:
        UserError: there is no such file, or it is damaged.
    """
    found = _read_judged(file)
    if found is None:
        raise UserError(f"'{file}' cannot be read: run this arm and seed again.")
    return found


def load_chat_model(folder: Path) -> tuple[Any, Any]:
    """The model and the tokenizer in the `checkpoint` of a chat run, whole or an adapter on its base.

    Raises:
        UserError: the folder is none of a chat run, or is damaged, or its base is gone.
    """
    try:
        settings = json.loads((folder / CHAT_FILE).read_text(encoding="utf-8"))
        base, ends = settings["base"], settings["ends"]
    except (OSError, ValueError, KeyError) as error:
        raise UserError(
            f"'{folder}' is no chat model (it has no readable {CHAT_FILE}): give the checkpoint of a chat run."
        ) from error
    tokenizer = open_tokenizer(folder)
    if (folder / "adapter_config.json").is_file():
        try:
            whole, _ = load_base(base["name"], num_layers=base["num_layers"], quantize=base.get("quantize", "none"))
            model: Any = load_adapter(whole, folder).eval()
        except UserError as error:
            raise UserError(
                f"The chat model in '{folder}' cannot be loaded: it is an adapter on '{base['name']}'. {error}"
            ) from error
    else:
        model = load_model(folder)[0]
    model.generation_config.eos_token_id = ends
    return model, tokenizer
