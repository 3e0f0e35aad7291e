"""Tiny random models of the kinds that adapters go to."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from torch import nn
from transformers import (
    BertConfig,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from mixtura.models import MixtureConfig, MixtureForCausalLM

_SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
}
_DECODER: dict[str, Any] = {**_SIZES, "num_key_value_heads": 1, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def _llama() -> nn.Module:
    return LlamaForCausalLM(LlamaConfig(**_DECODER, initializer_range=0.3))


def _qwen3() -> nn.Module:
    return Qwen3ForCausalLM(Qwen3Config(**_DECODER, head_dim=8, initializer_range=0.3))


def _bert() -> nn.Module:
    config = BertConfig(**_SIZES, initializer_range=0.3, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    return BertModel(config, add_pooling_layer=False)


def _mixtura() -> nn.Module:
    return MixtureForCausalLM(MixtureConfig(**_DECODER, initializer_range=0.3))


@pytest.fixture
def make_base() -> Callable[[str], nn.Module]:
    """A factory: `make_base("llama")` is the same tiny model, in eval(), however often it is called."""
    makers = {"llama": _llama, "qwen3": _qwen3, "bert": _bert, "mixtura": _mixtura}

    def make(name: str) -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(1)
            return makers[name]().eval()

    return make


@pytest.fixture
def batch() -> dict[str, torch.Tensor]:
    """Four examples of six tokens; the last example has two tokens of padding at its left."""
    generator = torch.Generator().manual_seed(2)
    input_ids = torch.randint(3, 64, (4, 6), generator=generator)
    attention_mask = torch.ones_like(input_ids)
    attention_mask[3, :2] = 0
    return {"input_ids": input_ids, "attention_mask": attention_mask}


_GOOD, _BAD, _PLAIN = ("good", "great", "lovely"), ("bad", "awful", "dull"), ("film", "plot", "the", "was", "a", "very")


@pytest.fixture(scope="session")
def encoder_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random BERT of two layers and a tokenizer of whole words."""
    folder = tmp_path_factory.mktemp("encoder")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *_GOOD, *_BAD, *_PLAIN]
    tokenizer = Tokenizer(WordLevel({word: index for index, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", words.index("[CLS]")), ("[SEP]", words.index("[SEP]"))]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
    ).save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    BertModel(BertConfig(vocab_size=len(words), max_position_embeddings=16, **sizes)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def reviews(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """240 tiny reviews as JSON lines: the label says whether a good or a bad word is in it."""
    draw = random.Random(0)
    rows = []
    for index in range(240):
        words = [*draw.choices(_PLAIN, k=draw.randint(1, 9)), draw.choice((_BAD, _GOOD)[index % 2])]
        draw.shuffle(words)
        rows.append({"text": f"{' '.join(words)} {index}", "label": ("negative", "positive")[index % 2]})
    path = tmp_path_factory.mktemp("reviews") / "reviews.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return path
