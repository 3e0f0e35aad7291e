"""Top-k and sorting by expert, in C and by torch, against their definitions."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mixtura.kernels import dispatch, native

sizes = st.tuples(st.integers(0, 40), st.integers(1, 70), st.integers(1, 9), st.integers(0, 99))


@pytest.fixture(params=["C", "torch"], autouse=True, scope="module")
def path(request):
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "torch":
            patch.setattr(native, "can_read", lambda *tensors, dtype=None: False)
        elif native.library() is None:
            pytest.skip("no C compiler")
        else:
            patch.setattr(dispatch, "FEWEST_SCORES", 0)
        yield request.param


@given(sizes)
def test_the_largest_scores_are_chosen_the_largest_first(size):
    tokens, experts, choices, seed = size
    choices = min(choices, experts)
    scores_TE = torch.rand(tokens, experts, generator=torch.Generator().manual_seed(seed))
    expert_TK = dispatch.top_k(scores_TE, choices)
    assert expert_TK.dtype == torch.int64
    assert torch.equal(scores_TE.gather(1, expert_TK), scores_TE.topk(choices).values)


def test_what_cannot_be_ordered_still_gives_different_experts():
    scores_TE = torch.tensor([[float("nan")] * 4, [float("-inf")] * 4, [0.5] * 4])
    expert_TK = dispatch.top_k(scores_TE, 3)
    assert all(len(set(row)) == 3 and set(row) <= set(range(4)) for row in expert_TK.tolist())


def test_of_equal_scores_the_first_is_taken(path):
    if path == "C":
        assert dispatch.top_k(torch.tensor([[0.1, 0.4, 0.1, 0.4, 0.4]]), 4).tolist() == [[1, 3, 4, 0]]


def test_a_router_in_training_may_be_asked():
    scores_TE = torch.rand(3, 5, requires_grad=True).softmax(-1)
    assert not dispatch.top_k(scores_TE, 2).requires_grad


@given(sizes)
def test_rows_are_sorted_stably_and_counted(size):
    tokens, experts, choices, seed = size
    expert_TK = torch.randint(experts, (tokens, choices), generator=torch.Generator().manual_seed(seed))
    order_R, rows_E = dispatch.order_by_expert(expert_TK, experts)
    assert torch.equal(order_R, expert_TK.flatten().argsort(stable=True))
    assert torch.equal(rows_E, expert_TK.flatten().bincount(minlength=experts))


@pytest.mark.parametrize("value", [-1, 3])
def test_a_choice_of_no_expert_is_refused(value):
    with pytest.raises((IndexError, RuntimeError), match=r"out of bounds|expert_TK contains"):
        dispatch.order_by_expert(torch.tensor([[0, value]]), 3)


def test_choices_of_any_whole_dtype_are_sorted():
    expert_TK = torch.tensor([[2, 0], [1, 2]], dtype=torch.int32)
    order_R, rows_E = dispatch.order_by_expert(expert_TK, 3)
    assert (order_R.tolist(), rows_E.tolist()) == ([1, 2, 0, 3], [1, 1, 2])
    with pytest.raises(TypeError, match=r"expert_TK has dtype torch\.float32"):
        dispatch.order_by_expert(expert_TK.float(), 3)


def test_no_more_experts_are_chosen_than_there_are():
    with pytest.raises(ValueError, match="4 experts are to be chosen: there are 3"):
        dispatch.top_k(torch.zeros(2, 3), 4)
