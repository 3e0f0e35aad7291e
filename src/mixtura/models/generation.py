"""Text from a trained model, one token after the other."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import TextStreamer

from mixtura.config import UserError
from mixtura.config.families import never_served
from mixtura.errors import is_utf8, reason_of
from mixtura.models.loading import load_model

CHAT_FILE = "chat.json"
"""In a folder that chat tuning wrote: the base that an adapter is on, and the tokens that end an answer."""


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is chosen."""

    max_new_tokens: int = 64
    temperature: float = 0.0
    """0 takes the likeliest token each time; the rest is for temperatures above 0."""
    top_p: float = 1.0
    """The likeliest tokens that together have this probability are drawn from; 1 is all."""
    top_k: int = 0
    """So many of the likeliest tokens are drawn from; 0 is all."""
    seed: int = 0

    def __post_init__(self) -> None:
        """Raises UserError for values that mean nothing."""
        if self.temperature and not 1e-3 <= self.temperature <= 1e3:
            raise UserError(
                f"The temperature is {self.temperature:g}: give 0 for the likeliest token each time, or 0.001 to 1000."
            )
        if not 0 < self.top_p <= 1:
            raise UserError(f"top-p is {self.top_p:g}: give a share of the probability above 0, up to 1.")
        if self.top_k < 0:
            raise UserError(f"top-k is {self.top_k}: give the number of tokens to draw from, or 0 for all.")
        if not self.temperature and (self.top_p < 1 or self.top_k):
            raise UserError("top-p and top-k choose what is drawn from, and temperature 0 draws nothing: raise it.")

    def settings(self) -> dict[str, Any]:
        """The same for transformers' `generate`."""
        if not self.temperature:
            return {"max_new_tokens": self.max_new_tokens, "do_sample": False}
        drawn = {"temperature": self.temperature, "top_p": self.top_p, "top_k": self.top_k}
        return {"max_new_tokens": self.max_new_tokens, "do_sample": True, **drawn}


class Writer:
    """A model that goes on from prompts, or answers them."""

    def __init__(self, folder: Path | str, *, chat: bool = False, opened: tuple[Any, Any] | None = None) -> None:
        """Opens a model folder.

        Args:
            folder: as `save_pretrained` writes it, tokenizer included.
            chat: put each prompt as a user's message into the tokenizer's chat template, and give the answer alone.
            opened: the folder's model and tokenizer, where it takes more than the folder to load them.

        Raises:
            UserError: the model cannot be loaded or cannot answer one request alone, or has no chat template.
        """
        self.chat = chat
        self.model, self.tokenizer = load_model(Path(folder)) if opened is None else opened
        for family in never_served(getattr(self.model.config, "mlp_layer_types", None) or []):
            raise UserError(
                f"A model with {family} layers cannot generate: a token's output depends on other tokens to come."
            )
        if chat and not self.tokenizer.chat_template:
            raise UserError(f"The tokenizer in '{folder}' has no chat template: leave --chat out.")

    def encode(self, prompt: str) -> Any:
        """The prompt as tensors of one row, (1, L).

        Raises:
            UserError: it is empty, or no text.
        """
        if not prompt:
            raise UserError("The prompt is empty: give some text to go on from.")
        if not is_utf8(prompt):
            raise UserError("The prompt is not UTF-8 text: it has half a character, so correct it.")
        if not self.chat:
            return self.tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
        messages = [{"role": "user", "content": prompt}]
        try:
            return self.tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
            )
        except Exception as error:  # a template is a program of the model's author
            raise UserError(
                f"The chat template cannot be used ({reason_of(error)}): leave --chat out, or mend the template."
            ) from error

    def beyond_positions(self, prompt: str, sampling: Sampling) -> str | None:
        """What to tell a user whose text outgrows the positions that the model was made for; None where it does not."""
        positions = getattr(self.model.config, "max_position_embeddings", None)
        length = self.encode(prompt)["input_ids"].shape[1]
        if positions is None or length + sampling.max_new_tokens <= positions:
            return None
        if length >= positions:
            return (
                f"The prompt has {length:,} tokens and the model {positions:,} positions: it was not trained for what "
                "is beyond them, so shorten the prompt."
            )
        return (
            f"The prompt's {length:,} tokens and {sampling.max_new_tokens:,} new ones are more than the model's "
            f"{positions:,} positions: the end is written beyond what it was trained for, so lower --max-new-tokens."
        )

    def write(self, prompt: str, sampling: Sampling, *, on_text: Callable[[str], None] | None = None) -> str:
        """The prompt and its continuation, or in a chat the answer.

        It depends on nothing but the prompt and `sampling`, whatever was written before.

        Args:
            prompt: some text.
            sampling: how tokens are chosen.
            on_text: called with each piece of the text as soon as it is certain.

        Raises:
            UserError: the prompt cannot be used, the model has no place for a text so long, or it gives no numbers.
        """
        inputs = self.encode(prompt)
        streamer = None if on_text is None else _Pieces(self.tokenizer, on_text, skip_prompt=self.chat)
        torch.manual_seed(sampling.seed)
        try:
            output = self.model.generate(
                **inputs, **sampling.settings(), streamer=streamer, logits_processor=[check_logits]
            )
        except IndexError as error:
            if (told := self.beyond_positions(prompt, sampling)) is None:
                raise
            raise UserError(f"{told} It has no embedding for them.") from error
        start = inputs["input_ids"].shape[1] if self.chat else 0
        return self.tokenizer.decode(output[0, start:], skip_special_tokens=True)


def check_logits(_: Tensor, logits_BV: Tensor) -> Tensor:
    """Refuses what no token can be chosen by; transformers calls it for every token."""
    if not bool((logits_BV < torch.inf).all()):
        raise UserError("The model gives no finite probabilities: its weights are broken, so train or export it again.")
    return logits_BV


class _Pieces(TextStreamer):
    """Hands each piece of a text on."""

    def __init__(self, tokenizer: Any, on_text: Callable[[str], None], *, skip_prompt: bool) -> None:
        super().__init__(tokenizer, skip_prompt=skip_prompt, skip_special_tokens=True)
        self._on_text = on_text

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """The base class calls this with whole words, and with the rest at the end."""
        if text:
            self._on_text(text)


def generate_text(model_folder: Path, prompt: str, *, max_new_tokens: int, temperature: float, seed: int) -> str:
    """The prompt and its continuation by the model in a folder; see `Writer` for more.

    Raises:
        UserError: see `Writer`, `Sampling` and `Writer.write`.
    """
    sampling = Sampling(max_new_tokens=max_new_tokens, temperature=temperature, seed=seed)
    return Writer(model_folder).write(prompt, sampling)
