"""Models whose experts are named by an example's language: generation, padding, losses, disk and configuration."""

import pytest
import torch
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, GenerationConfig

from mixtura.models import MixtureForCausalLM
from mixtura.planning import flops_per_token, model_parameters

NAMES = ["de", "fr", "es", "it"]
EXPERTS_B = torch.tensor([3, 0, 2])
IDS_BL = torch.randint(3, 64, (3, 7), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def build(tiny_config):
    def make(**changes):
        torch.manual_seed(0)
        special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": False}
        named = {"route_by": "target", "num_experts_per_tok": 1, "expert_names": NAMES, "num_shared_experts": 1}
        return MixtureForCausalLM(
            tiny_config("token_choice", **({"initializer_range": 0.3} | special | named | changes))
        )

    return make


def test_every_example_runs_its_own_expert_whatever_the_batch(build):
    model = build().eval()
    together = model(IDS_BL, expert_ids=EXPERTS_B).logits
    for row in range(3):
        alone = model(IDS_BL[row : row + 1], expert_ids=EXPERTS_B[row : row + 1]).logits
        assert_close(alone[0], together[row], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(model(IDS_BL, expert_ids=torch.zeros(3, dtype=torch.int64)).logits[0], together[0])


@pytest.mark.parametrize("num_beams", [1, 3], ids=["greedy", "beams"])
def test_generation_carries_the_experts_through_cache_beams_and_padding(build, num_beams):
    model = build().eval()
    how = GenerationConfig(max_new_tokens=8, do_sample=False, num_beams=num_beams, pad_token_id=0, eos_token_id=None)
    together = model.generate(IDS_BL, expert_ids=EXPERTS_B, generation_config=how)
    padded = torch.cat([torch.zeros(3, 2, dtype=torch.int64), IDS_BL], dim=1)
    mask = (padded != 0).long()
    with_padding = model.generate(padded, attention_mask=mask, expert_ids=EXPERTS_B, generation_config=how)
    assert torch.equal(with_padding[:, 9:], together[:, 7:])
    for row in range(3):
        ids, expert = IDS_BL[row : row + 1], EXPERTS_B[row : row + 1]
        assert torch.equal(model.generate(ids, expert_ids=expert, generation_config=how)[0], together[row])
    others = model.generate(IDS_BL, expert_ids=(EXPERTS_B + 1) % 4, generation_config=how)
    assert not torch.equal(others, together)


def test_nothing_is_balanced_where_languages_name_the_experts(build):
    outputs = build().train()(IDS_BL, labels=IDS_BL, expert_ids=EXPERTS_B, output_routing=True)
    assert outputs.aux_loss is None and outputs.z_loss is None and outputs.loss is outputs.language_loss
    assert outputs.routing[0] is None and outputs.routing[1].tokens_per_expert_E.tolist() == [7, 0, 7, 7]


def test_such_a_model_goes_to_disk_and_back(build, tmp_path):
    model = build().eval()
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert (loaded.config.route_by, loaded.config.expert_names) == ("target", NAMES)
    assert torch.equal(loaded(IDS_BL, expert_ids=EXPERTS_B).logits, model(IDS_BL, expert_ids=EXPERTS_B).logits)


def test_planning_counts_no_router(build, tiny_config):
    model = build()
    assert model_parameters(model.config) == sum(p.numel() for p in model.parameters())
    routed = tiny_config("token_choice", num_experts_per_tok=1, num_shared_experts=1)
    named = tiny_config("token_choice", num_experts_per_tok=1, num_shared_experts=1, route_by="pair")
    saved = [flops_per_token(c, sequence_length=8, backward=False) for c in (routed, named)]
    assert saved[0] - saved[1] == 2 * 16 * 4


def test_experts_must_be_named_exactly_where_the_configuration_says(build, tiny_config):
    with pytest.raises(ValueError, match="routes by target: give expert_ids"):
        build()(IDS_BL)
    with pytest.raises(ValueError, match="routes by token"):
        MixtureForCausalLM(tiny_config("token_choice"))(IDS_BL, expert_ids=EXPERTS_B)


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        pytest.param({"route_by": "script"}, "must be one of token, pair, source, target", id="unknown"),
        pytest.param({"route_by": "pair", "expert_names": ["de"]}, "1 names for 4 experts", id="too few names"),
        pytest.param({"expert_names": NAMES}, "leave it out where tokens choose", id="names for tokens"),
        pytest.param({"intermediate_sizes": [4]}, "1 widths but num_hidden_layers is 2", id="too few widths"),
    ],
)
def test_the_configuration_refuses_what_makes_no_sense(tiny_config, changes, complaint):
    with pytest.raises(Exception, match=complaint):
        tiny_config("token_choice", **changes)
