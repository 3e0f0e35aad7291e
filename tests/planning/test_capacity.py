import pytest

from mixtura.planning.capacity import capacity


@pytest.mark.parametrize(
    ("tokens", "top_k", "num_experts", "capacity_factor", "expected"),
    [
        pytest.param(16, 1, 4, 1.0, 4, id="an even share"),
        pytest.param(16, 2, 4, 1.0, 8, id="top-2 doubles it"),
        pytest.param(16, 1, 4, 1.25, 5, id="a factor"),
        pytest.param(10, 1, 4, 1.0, 3, id="rounded up"),
        pytest.param(10, 1, 1, 1.1, 10, id="no more than the tokens"),
        pytest.param(2, 1, 64, 1.0, 1, id="at least one"),
    ],
)
def test_capacity_by_hand(tokens: int, top_k: int, num_experts: int, capacity_factor: float, expected: int) -> None:
    assert capacity(tokens, top_k, num_experts, capacity_factor) == expected


def test_binary_fractions_do_not_round_up_a_whole_capacity() -> None:
    assert 1.1 * 100 > 110
    assert capacity(1000, 1, 10, 1.1) == 110


def test_balanced_tokens_are_never_dropped_at_factor_one() -> None:
    for tokens in range(1, 40):
        for num_experts in range(1, 12):
            assert capacity(tokens, 1, num_experts) * num_experts >= tokens
