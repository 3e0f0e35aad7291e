"""Groups, sorted rows and router logits."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from mixtura import kernels
from mixtura.layers import Experts, SparseRouting
from mixtura.layers.routing import (
    from_groups,
    router_logits,
    sort_by_expert,
    sparse_experts,
    to_groups,
)


def test_groups_over_the_batch_hold_consecutive_examples_at_one_position():
    x_BLD = torch.arange(8.0).view(4, 2, 1)  # example b has 2 b and 2 b + 1
    groups = to_groups(x_BLD, 2, "batch").squeeze(-1).tolist()
    assert groups == [[0, 2], [4, 6], [1, 3], [5, 7]]


def test_groups_over_the_sequence_hold_consecutive_positions_of_one_example():
    x_BLD = torch.arange(6.0).view(2, 3, 1) + 1
    groups = to_groups(x_BLD, 2, "sequence").squeeze(-1).tolist()
    assert groups == [[1, 2], [3, 0], [4, 5], [6, 0]]


@settings(max_examples=50, deadline=None, derandomize=True)
@given(
    batch=st.integers(1, 7),
    length=st.integers(1, 7),
    group_size=st.integers(1, 5),
    group_over=st.sampled_from(["batch", "sequence"]),
)
def test_taking_groups_apart_undoes_forming_them(batch, length, group_size, group_over):
    x_BLD = torch.randn(batch, length, 3)
    x_NGD = to_groups(x_BLD, group_size, group_over)
    assert x_NGD.shape[1:] == (group_size, 3)
    assert torch.equal(from_groups(x_NGD, batch, length, group_over), x_BLD)
    assert (x_NGD.abs().sum(-1) > 0).sum() == batch * length, "all else is zeros"


def test_rows_are_sorted_by_expert_and_tokens_stay_in_order():
    choice_TK = torch.tensor([[2, 0], [0, 2], [2, 1]])
    weight_TK = torch.tensor([[0.1, 0.2], [0.3, 0.4], [0.5, 0.6]])
    routing = sort_by_expert(choice_TK, weight_TK, num_experts=4)
    assert routing.token_R.tolist() == [0, 1, 2, 0, 1, 2]
    assert_close(routing.weight_R, torch.tensor([0.2, 0.3, 0.6, 0.1, 0.4, 0.5]))
    assert routing.tokens_per_expert_E.tolist() == [2, 1, 3, 0]


def test_counts_equal_bincount():
    expert_TK = torch.randint(5, (20, 3))
    order_R, rows_E = kernels.order_by_expert(expert_TK, 6)
    assert rows_E.tolist() == torch.bincount(expert_TK.flatten(), minlength=6).tolist()
    assert (expert_TK.flatten()[order_R].diff() >= 0).all()


def test_a_token_without_a_row_gets_zeros():
    experts = Experts(2, intermediate_size=2, num_experts=2)
    routing = SparseRouting(torch.tensor([1]), torch.tensor([1.0]), torch.tensor([0, 1]))
    y_TD = sparse_experts(experts, torch.randn(3, 2), routing)
    assert (y_TD[[0, 2]] == 0).all() and (y_TD[1] != 0).any()


def test_router_logits_are_never_below_float32():
    x_TD, weight_ED = torch.randn(5, 64), torch.randn(3, 64)
    exact = x_TD.double() @ weight_ED.double().T
    with torch.autocast("cpu", torch.bfloat16):
        logits_TE = router_logits(x_TD, weight_ED)
    assert logits_TE.dtype == torch.float32
    assert_close(logits_TE, exact.float(), rtol=1e-5, atol=1e-5)
    assert router_logits(x_TD.bfloat16(), weight_ED.bfloat16()).dtype == torch.float32
    assert_close(router_logits(x_TD.double(), weight_ED.double()), exact, rtol=0, atol=1e-12)
