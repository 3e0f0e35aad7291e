"""transformers' own tests of models, run unmodified on Mixtura's decoder.

They are in transformers' source package, not in what pip installs: unpack the one of the installed version and name its
folder in MIXTURA_TRANSFORMERS_TESTS. Nothing of them is copied here. The package on PyPI lacks the tests of generation
and export; a checkout of the repository has them, and then they run too.
"""

import importlib
import os
import sys
import unittest
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import pytest
import torch
from transformers.models.auto import modeling_auto

from mixtura.models import MixtureConfig, MixtureForCausalLM, MixtureForSequenceClassification, MixtureModel

_SOURCE = os.environ.get("MIXTURA_TRANSFORMERS_TESTS")
if _SOURCE is None:
    pytest.skip("MIXTURA_TRANSFORMERS_TESTS names no transformers source folder", allow_module_level=True)
pytest.importorskip("parameterized", reason="transformers' tests need the package parameterized")

_FOLDER = Path(_SOURCE) / "tests"
assert (_FOLDER / "test_modeling_common.py").is_file(), (
    f"MIXTURA_TRANSFORMERS_TESTS={_SOURCE} has no transformers tests"
)

# The warnings of transformers' own tests are transformers'.
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

# What test_modeling_common imports and the package on PyPI leaves out, with the names that are asked of it.
_ABSENT: dict[str, dict[str, Any]] = {
    "exporters.test_export": {"ExportTesterMixin": type("ExportTesterMixin", (), {})},
    "generation.test_utils": {"GenerationTesterMixin": type("GenerationTesterMixin", (), {})},
}


def _suite(name: str) -> ModuleType:
    """A module of transformers' tests, under a package name of its own so that it cannot meet this folder's."""
    package = ModuleType("transformers_suite")
    package.__path__ = [str(_FOLDER)]
    sys.modules.setdefault(package.__name__, package)
    for path, names in _ABSENT.items():
        if (_FOLDER / f"{path.replace('.', '/')}.py").is_file():
            continue
        parent, _, _ = path.partition(".")
        for module_name in (parent, path):
            module = ModuleType(f"{package.__name__}.{module_name}")
            module.__path__ = []
            sys.modules.setdefault(module.__name__, module)
        vars(sys.modules[f"{package.__name__}.{path}"]).update(names)
    return importlib.import_module(f"{package.__name__}.{name}")


_common, _training = _suite("test_modeling_common"), _suite("test_training_mixin")
_generation = sys.modules["transformers_suite.generation.test_utils"]

# The suite reads which inputs and labels a class takes from transformers' tables of names, not from the Auto classes.
for _table, _class in (
    (modeling_auto.MODEL_MAPPING_NAMES, MixtureModel),
    (modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MixtureForCausalLM),
    (modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES, MixtureForSequenceClassification),
):
    _table["mixtura"] = _class.__name__


class _Tester:
    """What the suite asks of a model's tester: a tiny configuration and inputs for it."""

    base_model_class, causal_lm_class = MixtureModel, MixtureForCausalLM
    batch_size, seq_length, is_training = 4, 7, True
    num_hidden_layers, hidden_size, num_attention_heads, vocab_size = 2, 32, 2, 99

    def __init__(self, parent: Any) -> None:
        self.parent = parent

    def get_config(self) -> MixtureConfig:
        """Two layers, the second of the family under test."""
        return MixtureConfig(
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            num_hidden_layers=self.num_hidden_layers,
            num_attention_heads=self.num_attention_heads,
            num_key_value_heads=1,
            intermediate_size=48,
            moe_intermediate_size=24,
            max_position_embeddings=512,
            hidden_act="silu",
            gated=True,
            num_experts=4,
            num_experts_per_tok=2,
            alone_top_k=2,
            group_size=4,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            mlp_layer_types=["dense", self.parent.family],
        )

    def prepare_config_and_inputs_for_common(self) -> tuple[MixtureConfig, dict[str, Any]]:
        """The configuration and a batch whose first example begins with padding."""
        input_ids = torch.randint(3, self.vocab_size, (self.batch_size, self.seq_length))
        mask = torch.ones_like(input_ids)
        mask[0, :2] = 0
        return self.get_config(), {"input_ids": input_ids, "attention_mask": mask}


class _ModelSuite(_common.ModelTesterMixin, _generation.GenerationTesterMixin, _training.TrainingTesterMixin):
    """The suite with Mixtura's classes in it."""

    family: ClassVar[str]
    all_model_classes = (MixtureModel, MixtureForCausalLM, MixtureForSequenceClassification)
    all_generative_model_classes = (MixtureForCausalLM,)
    pipeline_model_mapping: ClassVar[dict[str, Any]] = {}
    model_tester: Any = None

    def setUp(self) -> None:
        self.model_tester = _Tester(self)

    @unittest.skipUnless((_FOLDER / "__init__.py").is_file(), "the package on PyPI lacks what ConfigTester imports")
    def test_config(self) -> None:
        configuration = _suite("test_configuration_common")
        configuration.ConfigTester(self, config_class=MixtureConfig, hidden_size=32).run_common_tests()


class TestTokenChoice(_ModelSuite, unittest.TestCase):
    family = "token_choice"


class TestMixtureOfTokens(_ModelSuite, unittest.TestCase):
    family = "mixture_of_tokens"
