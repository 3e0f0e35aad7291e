"""Tiny models and data of every family, for training tests."""

import numpy as np
import pytest
import torch

from mixtura.config import TrainingConfig
from mixtura.data import PackedTokens, PreparedData, train_tokenizer
from mixtura.models import MixtureConfig, MixtureForCausalLM
from mixtura.tasks.language_modelling.task import LanguageModelling
from mixtura.training import train

VOCAB, LENGTH = 300, 16


@pytest.fixture(scope="session")
def tiny_data():
    """Sequences with something to learn: every token is its predecessor plus a step that the sequence keeps."""
    tokenizer = train_tokenizer(["some text to fit a tokenizer on"], vocab_size=270)
    rng = np.random.default_rng(0)

    def packed(count):
        starts_N1, steps_N1 = rng.integers(0, 250, (count, 1)), rng.integers(1, 4, (count, 1))
        return PackedTokens(((starts_N1 + steps_N1 * np.arange(LENGTH)) % 256).astype(np.int32), bytes_per_token=2.0)

    vocab_size = max(tokenizer.get_vocab().values()) + 1
    return PreparedData(tokenizer, packed(96), packed(32), {"vocab_size": vocab_size, "bytes_per_token": 2.0})


@pytest.fixture
def tiny_model():
    """Makes a two-layer model whose second layer is of the family asked for; `seed` initialises it."""

    def make(family="dense", *, seed=0, **settings):
        torch.manual_seed(seed)
        sizes = {"hidden_size": 32, "intermediate_size": 64, "moe_intermediate_size": 16, "num_experts": 4}
        shape = {"vocab_size": VOCAB, "num_hidden_layers": 2, "num_attention_heads": 2, "group_size": 4}
        return MixtureForCausalLM(MixtureConfig(**{**sizes, **shape, "mlp_layer_types": ["dense", family], **settings}))

    return make


@pytest.fixture
def tiny_training():
    """Six steps of four sequences, evaluated every third and saved every second."""

    def make(**settings):
        defaults = {"steps": 6, "batch_size": 4, "eval_every": 3, "eval_sequences": 8, "save_every": 2}
        return TrainingConfig(**{**defaults, **settings})

    return make


@pytest.fixture
def run(tiny_data, tiny_training, tmp_path):
    """Trains a model in a folder below `tmp_path`."""

    def start(
        model,
        *,
        out="run",
        resume=False,
        learning_rate=3e-3,
        seed=0,
        reporter=None,
        data=tiny_data,
        task=None,
        **settings,
    ):
        config = tiny_training(**settings)
        return train(
            model,
            task=task or LanguageModelling(data, config),
            config=config,
            learning_rate=learning_rate,
            seed=seed,
            out=tmp_path / out,
            label="tiny, seed 0",
            resume=resume,
            reporter=reporter,
        )

    return start
