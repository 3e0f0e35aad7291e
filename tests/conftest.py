"""What every test runs under: no network, one thread, a fixed seed; and the smallest model and corpus."""

import os
import random
import tempfile
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mixtura.models import MixtureConfig

# Set before any library reads them, hence above the imports of torch and numpy.
_CACHE = tempfile.TemporaryDirectory(prefix="mixtura-tests-")
for _name, _value in {
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_HOME": _CACHE.name,
    "TOKENIZERS_PARALLELISM": "false",
    "OMP_NUM_THREADS": "1",
    "MPLBACKEND": "Agg",
}.items():
    os.environ.setdefault(_name, _value)

import hypothesis
import numpy as np
import pytest
import torch

torch.set_num_threads(1)
# The same examples on every machine, however slow it is.
hypothesis.settings.register_profile("mixtura", deadline=None, derandomize=True, database=None)
hypothesis.settings.load_profile("mixtura")

_WORDS = [
    *("the", "a", "film", "plot", "scene", "actor", "music", "light", "night", "river", "house", "story", "city"),
    *("friend", "winter", "road", "ship", "letter", "garden", "war", "is", "has", "makes", "leaves", "finds", "loses"),
    *("breaks", "follows", "remembers", "and", "but", "because", "while", "never", "slowly", "quite", "badly", "good"),
    *("long", "cold", "strange", "quiet", "brave", "old", "bright", "two", "hundred", "years"),
]


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    """Every test starts from the same random state, whatever ran before it."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture
def device() -> torch.device:
    """The accelerator if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def tiny_config() -> "Callable[..., MixtureConfig]":
    """A factory: `tiny_config("token_choice", num_experts=8)` has two layers, the second of that family."""
    from mixtura.models import MixtureConfig

    def make(family: str = "dense", **changes: Any) -> MixtureConfig:
        settings: dict[str, Any] = {
            "vocab_size": 64,
            "hidden_size": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "intermediate_size": 32,
            "moe_intermediate_size": 16,
            "max_position_embeddings": 64,
            "mlp_layer_types": ["dense", family],
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "group_size": 4,
            "alone_top_k": 2,
        }
        return MixtureConfig(**(settings | changes))

    return make


@pytest.fixture(scope="session")
def tiny_corpus() -> list[str]:
    """200 different documents of 20 to 60 plain words, the same on every machine."""
    draw = random.Random(0)
    return [" ".join(draw.choices(_WORDS, k=draw.randint(20, 60))) + "." for _ in range(200)]
