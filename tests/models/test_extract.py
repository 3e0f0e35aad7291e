"""One language's dense model out of a mixture routed by language: exact, and of summed width."""

import pytest
import torch
from torch.testing import assert_close

from mixtura.config import UserError
from mixtura.models import MixtureForCausalLM
from mixtura.models.transition import extract_language_model
from mixtura.planning import model_parameters

IDS_BL = torch.randint(64, (3, 9), generator=torch.Generator().manual_seed(1))
NAMES = ["de", "fr", "es", "it"]


@pytest.fixture
def build(tiny_config):
    def make(**changes):
        torch.manual_seed(0)
        settings = {"initializer_range": 0.3, "route_by": "target", "num_experts_per_tok": 1, "expert_names": NAMES}
        return MixtureForCausalLM(tiny_config("token_choice", **(settings | changes))).eval()

    return make


@pytest.mark.parametrize("shared", [0, 1, 2], ids=["language expert alone", "shared expert", "two shared experts"])
@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
def test_the_extracted_model_has_equal_logits(build, gated, shared):
    model = build(num_shared_experts=shared, gated=gated, hidden_act="silu" if gated else "relu")
    for expert in range(4):
        small = extract_language_model(model, expert)
        expected = model(IDS_BL, expert_ids=torch.full((3,), expert)).logits
        assert_close(small(IDS_BL).logits, expected, atol=1e-6, rtol=1e-6)
    assert small.config.intermediate_sizes == [32, 16 * (1 + shared)]
    assert model_parameters(small.config) == sum(p.numel() for p in small.parameters())


def test_each_language_has_a_model_of_its_own(build):
    first, second = (extract_language_model(build(), expert) for expert in (0, 1))
    assert not torch.allclose(first(IDS_BL).logits, second(IDS_BL).logits, atol=1e-3)


def test_an_extracted_model_goes_to_disk_and_back(build, tmp_path):
    small = extract_language_model(build(num_shared_experts=1), 2)
    small.save_pretrained(tmp_path)
    loaded = MixtureForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(loaded(IDS_BL).logits, small(IDS_BL).logits)
    assert {type(layer.mlp).__name__ for layer in loaded.model.layers} == {"DenseFFN"}


def test_extraction_says_what_it_cannot_extract(build, tiny_config):
    with pytest.raises(UserError, match="no expert 4: choose one from 0 to 3"):
        extract_language_model(build(), 4)
    with pytest.raises(UserError, match="tokens of this model choose their experts"):
        extract_language_model(MixtureForCausalLM(tiny_config("token_choice")), 0)
