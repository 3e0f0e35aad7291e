"""What every test runs under: no network, one thread, a fixed seed; and the smallest model and corpus."""

import os
import random
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mixtura.config import Recipe
    from mixtura.models import MixtureConfig

pytest_plugins = ["fixtures.bases", "fixtures.browser", "fixtures.results", "fixtures.stock_checkpoints"]

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
# Triton decides when a kernel is defined, hence for the whole process; nothing but direct calls runs its kernels here.
if not Path("/dev/nvidiactl").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")

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


@pytest.fixture(scope="session")
def tiny_text(tiny_corpus: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny corpus as one text file, a document a paragraph."""
    path = tmp_path_factory.mktemp("text") / "tiny.txt"
    path.write_text("\n\n".join(tiny_corpus), encoding="utf-8")
    return path


@pytest.fixture
def tiny_recipe(tiny_text: Path) -> "Callable[..., Recipe]":
    """A factory: `tiny_recipe(steps=4)` compares dense and mixture of tokens on the tiny text within seconds.

    `arms` replaces the arms, `seeds` the seeds; other keywords are keys of [training].
    """
    from mixtura.config import recipe_from_dict

    def make(*, arms: dict[str, Any] | None = None, seeds: tuple[int, ...] = (0,), **training: Any) -> "Recipe":
        mixture = {"family": "mixture_of_tokens", "num_experts": 4, "group_size": 4}
        settings = {"steps": 4, "batch_size": 4, "eval_every": 2, "eval_sequences": 8, "final_eval_sequences": 8}
        return recipe_from_dict(
            {
                "name": "tiny",
                "description": "A tiny comparison for tests.",
                "seeds": list(seeds),
                "data": {
                    "source": "local",
                    "path": str(tiny_text),
                    "vocab_size": 300,
                    "sequence_length": 16,
                    "validation_fraction": 0.2,
                },
                "model": {
                    "hidden_size": 32,
                    "num_hidden_layers": 2,
                    "num_attention_heads": 2,
                    "intermediate_size": 64,
                },
                "training": {**settings, "save_every": 2, **training},
                "arms": arms or {"dense": {"family": "dense"}, "mixture_of_tokens": mixture},
            }
        )

    return make


@pytest.fixture
def keep_checkpoints(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that ended keeps its checkpoints, as one that was cut off just before its end does."""
    from mixtura.comparison import runs

    monkeypatch.setattr(runs, "drop_checkpoints", lambda *_, **__: None)
