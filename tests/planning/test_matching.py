from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mixtura.config import UserError
from mixtura.models import MixtureConfig
from mixtura.planning import FeedForwardShape, flops_ratio, match_intermediate_size
from mixtura.planning.formulas import layer_flops

SETTINGS: dict[str, Any] = {"hidden_size": 128, "intermediate_size": 0, "num_experts": 16, "group_size": 16}


def matched(family: Any, *, dense: int = 512, multiple_of: int = 4, **changes: Any) -> int:
    layer = FeedForwardShape(family=family, **(SETTINGS | changes))
    return match_intermediate_size(layer, dense_intermediate_size=dense, multiple_of=multiple_of)


@pytest.mark.parametrize(
    ("family", "changes", "expected"),
    [
        ("dense", {}, 512),
        ("token_choice", {}, 504),
        ("token_choice", {"top_k": 2}, 252),
        ("token_choice", {"num_shared_experts": 1}, 252),
        ("expert_choice", {}, 504),
        ("mixture_of_tokens", {}, 488),
        ("mixture_of_tokens", {"alone_share": 0.5, "alone_top_k": 8}, 488),
        ("mixture_of_tokens", {"combine": "separate"}, 480),
        ("mixture_of_tokens", {"group_size": 32}, 976),
        ("mixture_of_tokens", {"mixtures_per_expert": 2}, 232),
        ("soft", {"group_size": 128}, 488 * 8),
    ],
)
def test_matched_widths_by_hand(family: Any, changes: dict[str, Any], expected: int) -> None:
    assert matched(family, **changes) == expected


@given(
    family=st.sampled_from(["token_choice", "expert_choice", "mixture_of_tokens"]),
    hidden_size=st.sampled_from([64, 128, 256]),
    gated=st.booleans(),
    num_experts=st.sampled_from([4, 8, 16]),
    top_k=st.integers(1, 4),
    num_shared_experts=st.integers(0, 2),
    group_size=st.sampled_from([4, 16, 32]),
    combine=st.sampled_from(["same", "separate"]),
)
def test_a_matched_layer_costs_the_dense_layer_within_half_a_rounding_step(
    family: Any, hidden_size: int, gated: bool, **settings: Any
) -> None:
    common = {"hidden_size": hidden_size, "gated": gated}
    dense = FeedForwardShape(family="dense", intermediate_size=4 * hidden_size, **common)
    width = matched(family, dense=4 * hidden_size, **common, **settings)
    mixture, step, empty = (
        FeedForwardShape(family=family, intermediate_size=size, **common, **settings) for size in (width, 2, 0)
    )
    half_a_step = layer_flops(step) - layer_flops(empty)
    assert abs(layer_flops(mixture) - layer_flops(dense)) <= half_a_step * (1 + 1e-9)


def test_widths_are_multiples_of_what_was_asked_for() -> None:
    assert matched("token_choice", multiple_of=64) == 512
    assert matched("token_choice", multiple_of=1, num_experts=15) == 504
    assert matched("token_choice", dense=1, num_experts=1) == 4


def test_routing_dearer_than_the_dense_layer_is_refused_with_the_numbers() -> None:
    with pytest.raises(UserError, match=r"512 experts.*393,216.*262,144.*fewer experts"):
        matched("mixture_of_tokens", num_experts=512)


def test_the_ratio_compares_whole_models(tiny_config: Callable[..., MixtureConfig]) -> None:
    dense, wide = tiny_config("dense"), tiny_config("dense", intermediate_size=64)
    assert flops_ratio(dense, baseline=dense, sequence_length=8) == 1.0
    # Forward products a token: 2 layers of attention 768 + 256 and feed-forward 1024 or 2048, and the head's 1024.
    assert flops_ratio(wide, baseline=dense, sequence_length=8) == pytest.approx((2 * 3072 + 1024) / (2 * 2048 + 1024))
