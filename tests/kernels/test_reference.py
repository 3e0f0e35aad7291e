"""The definitions themselves, by hand: everything else is tested against them."""

import torch
from torch.testing import assert_close

from mixtura.kernels import ExpertWeights, reference

# Two experts on D = F = 1 with ReLU: the first gives 2 x for positive x, the second -3 x for negative x.
UP_EHD = torch.tensor([[[1.0]], [[-1.0]]])
DOWN_EDF = torch.tensor([[[2.0]], [[3.0]]])
RELU = ExpertWeights(UP_EHD, DOWN_EDF, "relu", False)


def test_one_expert_on_its_rows():
    x_RD = torch.tensor([[5.0], [-5.0]])
    assert_close(reference.expert_ffn(x_RD, UP_EHD[0], DOWN_EDF[0], "relu", False), torch.tensor([[10.0], [0.0]]))
    assert_close(reference.expert_ffn(x_RD, UP_EHD[1], DOWN_EDF[1], "relu", False), torch.tensor([[0.0], [15.0]]))


def test_sparse_rows_add_up_in_their_tokens():
    token_R, weight_R = torch.tensor([0, 2, 2]), torch.tensor([0.5, 1.0, 10.0])
    x_TD = torch.tensor([[1.0], [2.0], [-3.0]])
    y_TD = reference.sparse_ffn(x_TD, token_R, weight_R, torch.tensor([2, 1]), RELU)
    assert_close(y_TD, torch.tensor([[1.0], [0.0], [90.0]]))


def test_batched_rows_each_see_their_own_expert():
    x_ERD = torch.tensor([[[1.0], [-1.0]], [[1.0], [-1.0]]])
    y_ERD = reference.batched_ffn(x_ERD, RELU)
    assert_close(y_ERD, torch.tensor([[[2.0], [0.0]], [[0.0], [3.0]]]))


def test_scaled_experts_see_the_scaled_token():
    scale_TE, weight_TE = torch.tensor([[2.0, -1.0]]), torch.tensor([[1.0, 0.5]])
    y_TD = reference.scaled_ffn(torch.tensor([[4.0]]), scale_TE, weight_TE, None, RELU)
    assert_close(y_TD, torch.tensor([[16.0 + 6.0]]))


def test_mixing_and_spreading_are_weighted_sums_over_a_group():
    x_NGD = torch.tensor([[[1.0], [10.0]], [[2.0], [20.0]]])
    weights_NGEC = torch.tensor([[[[0.5], [1.0]], [[0.25], [0.0]]], [[[1.0], [0.0]], [[1.0], [0.1]]]])
    assert_close(reference.mix(x_NGD, weights_NGEC), torch.tensor([[[3.0], [22.0]], [[1.0], [2.0]]]))
    y_ERD = torch.tensor([[[1.0], [2.0]], [[10.0], [20.0]]])
    assert_close(reference.spread(y_ERD, weights_NGEC), torch.tensor([[[10.5], [0.25]], [[2.0], [4.0]]]))
