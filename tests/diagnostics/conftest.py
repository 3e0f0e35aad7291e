"""A small diagnosed model: its folder, texts in two alphabets, and what was found."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from mixtura.data import train_tokenizer
from mixtura.diagnostics.examine import diagnose_model
from mixtura.diagnostics.findings import Diagnosis
from mixtura.models import MixtureConfig, MixtureForCausalLM

LATIN = ["the old house stands near the long river and the garden is quiet in winter"] * 12
GREEK = [
    "".join(chr(0x3B1 + (ord(letter) - ord("a")) % 24) if letter.isalpha() else letter for letter in text)
    for text in LATIN
]
TEXTS = {"latin": LATIN, "greek": GREEK}


@pytest.fixture(scope="session")
def small_tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer([*LATIN, *GREEK, "<script>alert('owned')</script> 1984!"], vocab_size=300)


@pytest.fixture
def save_model(small_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> Callable[[Any], Path]:
    """Writes a random model of a configuration, with the tokenizer, and returns the folder."""

    def save(config: Any) -> Path:
        config.vocab_size = len(small_tokenizer)
        config.eos_token_id = config.bos_token_id = config.pad_token_id = None
        torch.manual_seed(0)
        folder = tmp_path / "model"
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
        small_tokenizer.save_pretrained(folder)
        return folder

    return save


@pytest.fixture
def make_diagnosis(
    tiny_config: Callable[..., MixtureConfig], small_tokenizer: PreTrainedTokenizerFast
) -> Callable[..., Diagnosis]:
    """A factory: `make_diagnosis("token_choice", texts=...)` diagnoses a random model with two mixture layers."""

    def make(family: str = "token_choice", *, texts: dict[str, list[str]] | None = None, **changes: Any) -> Diagnosis:
        torch.manual_seed(0)
        config = tiny_config(family, vocab_size=len(small_tokenizer), mlp_layer_types=[family, family], **changes)
        model = MixtureForCausalLM(config).eval()
        return diagnose_model(model, small_tokenizer, texts or TEXTS, name="tiny", max_tokens=400)

    return make
