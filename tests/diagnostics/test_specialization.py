"""Mutual information by hand, chance that is told apart from specialisation, and real models."""

import json
import math
from collections.abc import Callable
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor, nn

from mixtura.config import UserError
from mixtura.diagnostics import measure_specialization
from mixtura.diagnostics.specialization import association, mutual_information
from mixtura.layers import TokenChoiceMoE
from mixtura.models import MixtureConfig, MixtureForCausalLM
from mixtura.results.json_form import to_plain


@pytest.mark.parametrize(
    ("rows", "bits"),
    [
        pytest.param([[5, 0], [0, 5]], 1.0, id="two groups split"),
        pytest.param([[3, 0, 0, 0], [0, 3, 0, 0], [0, 0, 3, 0], [0, 0, 0, 3]], 2.0, id="four groups split"),
        pytest.param([[2, 2, 0, 0], [0, 0, 2, 2]], 1.0, id="two experts a group"),
        pytest.param([[3, 6], [1, 2]], 0.0, id="independent"),
        pytest.param([[7, 0], [3, 0]], 0.0, id="one expert"),
        # p = 3/8, 1/8, 1/8, 3/8 against 1/4 each: 2 * 3/8 * log2(3/2) + 2 * 1/8 * log2(1/2).
        pytest.param([[3, 1], [1, 3]], 0.75 * math.log2(1.5) - 0.25, id="three in four"),
    ],
)
def test_mutual_information_by_hand(rows: list[list[int]], bits: float) -> None:
    assert mutual_information(numpy.array(rows, dtype=float)) == pytest.approx(bits, abs=1e-12)


def rows_of(expert_U: numpy.ndarray) -> tuple[numpy.ndarray, numpy.ndarray, numpy.ndarray]:
    """One row a unit."""
    return numpy.arange(len(expert_U)), expert_U, numpy.ones(len(expert_U))


def test_chance_is_taken_off_a_small_sample() -> None:
    draw = numpy.random.default_rng(1)
    expert_U, group_U = draw.integers(8, size=200), draw.integers(4, size=200)
    found = association(rows_of(expert_U), group_U, num_groups=4, num_experts=8)
    # The Miller-Madow estimate of the bias: (E - 1) (G - 1) / (2 U ln 2).
    assert found.chance == pytest.approx(7 * 3 / (2 * 200 * math.log(2)), rel=0.15)
    assert found.mutual_information > 0.05
    assert found.corrected < 0.04
    assert found.p_value > 0.05


def test_a_split_stays_after_the_correction() -> None:
    group_U = numpy.arange(200) % 4
    found = association(rows_of(group_U), group_U, num_groups=4, num_experts=4)
    assert found.mutual_information == pytest.approx(2.0)
    assert found.corrected == pytest.approx(2.0 - found.chance)
    assert found.chance < found.chance_high < 0.1
    assert found.p_value == pytest.approx(1 / 201)


def test_chance_deals_whole_examples_not_their_tokens() -> None:
    """Ten texts of a hundred tokens that each stick to one expert are ten draws, not a thousand."""
    draw = numpy.random.default_rng(0)
    unit_R = numpy.arange(10).repeat(100)
    expert_R = draw.integers(4, size=10)[unit_R]
    group_U = numpy.arange(10) % 2
    found = association((unit_R, expert_R, numpy.ones(1000)), group_U, num_groups=2, num_experts=4)
    assert found.chance > 0.1
    assert found.p_value > 0.05


class ByToken(nn.Module):
    """An embedding and a layer whose expert is the token's id."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding.from_pretrained(torch.eye(4))
        self.layer = TokenChoiceMoE(4, intermediate_size=4, num_experts=4, top_k=1)
        nn.init.eye_(self.layer.gate.weight)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.layer(self.embed(input_ids))


def test_a_model_that_splits_its_groups_is_measured_by_hand() -> None:
    model = ByToken().train()
    ids_BL = torch.tensor([[0, 1, 3], [2, 2, 3], [1, 0, 3], [2, 2, 2]])
    mask_BL = torch.tensor([[1, 1, 0], [1, 1, 0], [1, 1, 0], [1, 1, 1]])
    found = measure_specialization(
        model, [({"input_ids": ids_BL}, torch.tensor([0, 1, 0, 1]), mask_BL)] * 5, groups=["ones", "twos"]
    )
    assert found.groups == ["ones", "twos"]
    (layer,) = found.layers
    assert layer.rows == [[10, 0], [10, 0], [0, 25], [0, 0]]
    assert layer.share == [[0.5, 0], [0.5, 0], [0, 1], [0, 0]]
    shares = [20 / 45, 25 / 45]
    assert layer.mutual_information == pytest.approx(-sum(p * math.log2(p) for p in shares))
    assert layer.max_bits == 1.0
    assert layer.p_value < 0.01
    assert layer.entropy == pytest.approx(-sum(p * math.log2(p) for p in (10 / 45, 10 / 45, 25 / 45)))
    assert (layer.dead, layer.num_experts, layer.name) == ([3], 4, "layer.choice_tap")
    assert model.training
    json.dumps(to_plain(found), allow_nan=False)


def test_groups_of_tokens_are_counted_one_by_one() -> None:
    ids_BL = torch.tensor([[0, 1, 2, 3]]).repeat(20, 1)
    found = measure_specialization(
        ByToken(), [({"input_ids": ids_BL}, ids_BL // 2, torch.ones_like(ids_BL))], groups=["low", "high"]
    )
    assert found.layers[0].rows == [[20, 0], [20, 0], [0, 20], [0, 20]]
    assert found.layers[0].mutual_information == pytest.approx(1.0)
    assert found.layers[0].chance < 0.1


@pytest.mark.parametrize("family", ["token_choice", "mixture_of_tokens"])
@pytest.mark.parametrize("alone_top_k", [2, None])
def test_a_random_model_knows_nothing_of_random_groups(
    tiny_config: Callable[..., MixtureConfig], family: str, alone_top_k: int | None
) -> None:
    model = MixtureForCausalLM(tiny_config(family, alone_top_k=alone_top_k))
    batches: list[Any] = []
    for _ in range(4):
        ids_BL = torch.randint(64, (8, 12))
        mask_BL = torch.ones_like(ids_BL)
        mask_BL[:, 9:] = 0
        batches.append(({"input_ids": ids_BL, "attention_mask": mask_BL}, torch.arange(8) % 2, mask_BL))
    (layer,) = measure_specialization(model, batches, groups=["a", "b"]).layers
    rows = 4 * 8 * 9 * (1 if family == "mixture_of_tokens" and alone_top_k is None else 2)
    assert sum(map(sum, layer.rows)) == pytest.approx(rows)
    assert sum(row[0] for row in layer.share) == pytest.approx(1.0)
    assert layer.corrected < 0.05


def test_what_cannot_be_measured_is_said(tiny_config: Callable[..., MixtureConfig]) -> None:
    ids_BL = torch.zeros(1, 4, dtype=torch.int64)
    batch = ({"input_ids": ids_BL}, torch.zeros(1, dtype=torch.int64), torch.ones_like(ids_BL))
    with pytest.raises(UserError, match="no layer that gives tokens experts"):
        measure_specialization(MixtureForCausalLM(tiny_config("dense")), [batch], groups=["a"])
    model = MixtureForCausalLM(tiny_config("token_choice"))
    with pytest.raises(UserError, match="No token is left"):
        measure_specialization(model, [(*batch[:2], torch.zeros_like(ids_BL))], groups=["a"])
    with pytest.raises(UserError, match="names for 1 groups"):
        measure_specialization(model, [(batch[0], torch.ones(1, dtype=torch.int64), batch[2])], groups=["a"])
