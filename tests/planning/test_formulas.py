from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mixtura.config import UserError
from mixtura.config.families import FAMILIES
from mixtura.models import MixtureConfig
from mixtura.planning import (
    FeedForwardShape,
    active_parameters,
    flops_per_token,
    flops_ratio,
    match_intermediate_size,
    model_parameters,
    state_memory,
)
from mixtura.planning.formulas import active_layer_parameters, layer_flops, layer_parameters

# Four experts of 2*8*16 = 256 parameters. One row through an expert costs 2*256 = 512 FLOPs, one router product
# 2*8*4 = 64.
EXPERTS = {"hidden_size": 8, "intermediate_size": 16, "num_experts": 4, "group_size": 4}


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        pytest.param({"family": "dense"}, 512, id="dense"),
        pytest.param({"family": "dense", "gated": True}, 768, id="dense, gated"),
        pytest.param({"family": "token_choice"}, 512 + 64, id="token choice"),
        pytest.param({"family": "token_choice", "top_k": 2}, 1024 + 64, id="top-2"),
        pytest.param({"family": "token_choice", "num_shared_experts": 2}, 1536 + 64, id="shared experts"),
        pytest.param({"family": "expert_choice"}, 512 + 64, id="expert choice"),
        pytest.param({"family": "mixture_of_tokens"}, 512 + 3 * 64, id="mixture of tokens"),
        pytest.param({"family": "mixture_of_tokens", "combine": "separate"}, 512 + 4 * 64, id="separate combine"),
        pytest.param({"family": "mixture_of_tokens", "mixtures_per_expert": 2}, 1024 + 6 * 64, id="two mixtures"),
        pytest.param({"family": "mixture_of_tokens", "group_size": 8}, 256 + 3 * 64, id="half an expert"),
        pytest.param(
            {"family": "mixture_of_tokens", "alone_share": 1.0, "alone_top_k": 2},
            1024 + 64,
            id="alone with two mixtures",
        ),
        pytest.param({"family": "mixture_of_tokens", "alone_share": 1.0}, 2048 + 64, id="alone with all"),
        pytest.param(
            {"family": "mixture_of_tokens", "alone_share": 0.25, "alone_top_k": 2, "combine": "separate"},
            0.75 * (512 + 4 * 64) + 0.25 * (1024 + 2 * 64),
            id="a quarter alone",
        ),
        pytest.param({"family": "soft", "group_size": 16}, 128 + 3 * 64, id="soft over 16 positions"),
    ],
)
def test_layer_flops_by_hand(settings: dict, expected: float) -> None:
    assert layer_flops(FeedForwardShape(**(EXPERTS | settings))) == expected


@pytest.mark.parametrize(
    ("num_experts", "ratio"), [(32, 1.047), (128, 1.19), (256, 1.375), (512, 1.75), (1024, 2.5)], ids=str
)
def test_mixing_costs_what_was_measured_on_the_authors_layer(num_experts: int, ratio: float) -> None:
    # Hidden size 256 and groups of 32; all experts together are 32 times as wide as the dense layer of 1024.
    dense = FeedForwardShape(family="dense", hidden_size=256, intermediate_size=1024)
    mixture = FeedForwardShape(
        family="mixture_of_tokens",
        hidden_size=256,
        intermediate_size=1024 * 32 // num_experts,
        num_experts=num_experts,
        group_size=32,
    )
    assert layer_flops(mixture) / layer_flops(dense) == pytest.approx(ratio, abs=0.003)


def test_model_flops_by_hand(tiny_config: Callable[..., MixtureConfig]) -> None:
    # Two layers: queries and outputs 16*16 each, keys and values 16*8 each, scores and values 2*16 for each of 10
    # positions, feed-forward 2*16*32; then the head 16*64. Two FLOPs each.
    expected = 2 * (2 * (2 * 256 + 2 * 128 + 2 * 16 * 10 + 1024) + 1024)
    assert flops_per_token(tiny_config("dense"), sequence_length=10, backward=False) == expected


def test_training_costs_three_forward_passes(tiny_config: Callable[..., MixtureConfig]) -> None:
    forward = flops_per_token(tiny_config("mixture_of_tokens"), sequence_length=10, backward=False)
    assert flops_per_token(tiny_config("mixture_of_tokens"), sequence_length=10) == 3 * forward


def test_tying_the_embeddings_saves_no_flops(tiny_config: Callable[..., MixtureConfig]) -> None:
    tied, untied = (flops_per_token(tiny_config(tie_word_embeddings=t), sequence_length=8) for t in (True, False))
    assert tied == untied


@pytest.mark.parametrize(
    ("settings", "total", "active"),
    [
        pytest.param({"family": "dense"}, 256, 256, id="dense"),
        pytest.param({"family": "dense", "gated": True}, 384, 384, id="dense, gated"),
        pytest.param({"family": "token_choice"}, 1024 + 32, 256 + 32, id="token choice"),
        pytest.param({"family": "token_choice", "top_k": 3}, 1024 + 32, 768 + 32, id="top-3"),
        pytest.param({"family": "token_choice", "num_shared_experts": 2}, 1536 + 32, 768 + 32, id="shared experts"),
        pytest.param({"family": "expert_choice"}, 1024 + 32, 256 + 32, id="expert choice"),
        pytest.param({"family": "mixture_of_tokens"}, 1024 + 32, 256 + 32, id="mixture of tokens"),
        pytest.param({"family": "mixture_of_tokens", "combine": "separate"}, 1088, 320, id="separate combine"),
        pytest.param({"family": "mixture_of_tokens", "mixtures_per_expert": 2}, 1088, 576, id="two mixtures"),
        pytest.param({"family": "mixture_of_tokens", "group_size": 8}, 1024 + 32, 128 + 32, id="half an expert"),
        pytest.param({"family": "soft"}, 1024 + 33, 256 + 33, id="soft, with its scale"),
        pytest.param({"family": "merged_experts", "segment_length": 3}, 1024 + 32, 256 + 32, id="merged experts"),
    ],
)
def test_layer_parameters_by_hand(settings: dict, total: int, active: int) -> None:
    layer = FeedForwardShape(**(EXPERTS | settings))
    assert layer_parameters(layer) == total
    assert active_layer_parameters(layer) == active


@pytest.mark.parametrize(
    ("settings", "active"),
    [
        pytest.param({"alone_top_k": 2}, 512 + 32, id="two mixtures run"),
        pytest.param({"alone_top_k": None}, 1024 + 32, id="all run"),
        pytest.param({"alone_top_k": 6, "mixtures_per_expert": 2}, 1024 + 64, id="more mixtures than experts"),
        pytest.param(
            {"alone_top_k": 2, "combine": "separate", "num_shared_experts": 1}, 768 + 64, id="a shared expert"
        ),
        pytest.param({"family": "token_choice", "alone_top_k": 2}, 256 + 32, id="token choice as it trains"),
    ],
)
def test_deployed_without_groups_a_token_pays_for_the_mixtures_that_run(settings: dict, active: int) -> None:
    layer = FeedForwardShape(**(EXPERTS | {"family": "mixture_of_tokens"} | settings))
    assert active_layer_parameters(layer, deployed=True) == active


def test_a_dense_model_is_active_in_full(tiny_config: Callable[..., MixtureConfig]) -> None:
    config = tiny_config("dense")
    assert active_parameters(config, sequence_length=8) == model_parameters(config)


def test_more_experts_cost_parameters_but_only_router_columns_are_active(
    tiny_config: Callable[..., MixtureConfig],
) -> None:
    few, many = (tiny_config("token_choice", num_experts=e) for e in (4, 8))
    assert model_parameters(many) - model_parameters(few) == 4 * (2 * 16 * 16 + 16)
    assert active_parameters(many, sequence_length=8) - active_parameters(few, sequence_length=8) == 4 * 16


def test_untied_embeddings_are_a_second_table(tiny_config: Callable[..., MixtureConfig]) -> None:
    tied, untied = (model_parameters(tiny_config(tie_word_embeddings=tie)) for tie in (True, False))
    assert untied - tied == 64 * 16


def test_adamw_in_float32_keeps_sixteen_bytes_a_parameter(tiny_config: Callable[..., MixtureConfig]) -> None:
    config = tiny_config("token_choice")
    memory = state_memory(config)
    assert (memory.parameters, memory.gradients, memory.optimizer) == tuple(
        size * model_parameters(config) for size in (4, 4, 8)
    )
    assert memory.total == 16 * model_parameters(config)
    assert state_memory(config, dtype="bfloat16").total * 2 == memory.total


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
    family=st.sampled_from(sorted(set(FAMILIES) - {"dense"})),
    hidden_size=st.sampled_from([64, 128, 256]),
    gated=st.booleans(),
    num_experts=st.sampled_from([4, 8, 16]),
    top_k=st.integers(1, 4),
    num_shared_experts=st.integers(0, 2),
    group_size=st.sampled_from([4, 16, 32]),
    combine=st.sampled_from(["same", "separate"]),
    latent_size=st.sampled_from([None, 32, 48]),
    constant_experts=st.integers(0, 2),
)
def test_a_matched_layer_costs_the_dense_layer_within_half_a_rounding_step(
    family: Any, hidden_size: int, gated: bool, **settings: Any
) -> None:
    common = {"hidden_size": hidden_size, "gated": gated}
    if family == "token_choice":
        settings["free_experts"] = settings["constant_experts"]
    else:
        settings |= {"latent_size": None, "constant_experts": 0}
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
