import dataclasses

import pytest

from mixtura.planning import FeedForwardShape, model_parameters
from mixtura.planning.shapes import capacity, feed_forward_shapes


@dataclasses.dataclass
class PlainShape:
    vocab_size: int = 10
    hidden_size: int = 4
    num_hidden_layers: int = 2
    num_attention_heads: int = 2
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    intermediate_size: int = 6
    intermediate_sizes: list[int] | None = None
    moe_intermediate_size: int = 3
    mlp_layer_types: list[str] | None = None
    gated: bool = False
    num_experts: int = 4
    num_experts_per_tok: int = 1
    num_shared_experts: int = 0
    route_by: str = "token"
    group_size: int = 2
    segment_length: int = 2
    mixtures_per_expert: int = 1
    combine: str = "same"
    alone_top_k: int | None = 2
    zero_fill: float = 0.0
    alone_fraction: float = 0.0
    transition_fraction: float = 0.0
    dense_router_gradient: bool = False
    zero_experts: int = 0
    copy_experts: int = 0
    constant_experts: int = 0
    free_expert_balance: float = 0.75
    latent_size: int | None = None
    layer_mix: bool = False
    tie_word_embeddings: bool = True


def test_a_plain_dataclass_is_a_model_shape() -> None:
    # Table 10*4, norms 5*4, and for each of 2 layers attention 4*4*4 and feed-forward 2*4*6.
    assert model_parameters(PlainShape()) == 40 + 20 + 2 * (64 + 48)


def test_open_fields_mean_what_the_configuration_means_by_them() -> None:
    filled = PlainShape(num_key_value_heads=2, head_dim=2, mlp_layer_types=["dense", "dense"])
    assert model_parameters(PlainShape()) == model_parameters(filled)


def test_dense_layers_are_dense_wide_and_mixtures_expert_wide() -> None:
    layers = feed_forward_shapes(PlainShape(mlp_layer_types=["dense", "mixture_of_tokens"]), sequence_length=8)
    assert [(layer.family, layer.intermediate_size) for layer in layers] == [("dense", 6), ("mixture_of_tokens", 3)]


def test_soft_slots_are_shared_by_the_sequence_and_mixtures_by_the_group() -> None:
    shape = PlainShape(mlp_layer_types=["soft", "mixture_of_tokens"], mixtures_per_expert=3)
    soft, mixture = feed_forward_shapes(shape, sequence_length=8)
    assert soft.rows_per_token == 4 * 3 / 8
    assert mixture.rows_per_token == 4 * 3 / 2


@pytest.mark.parametrize(
    ("top_k", "group_size", "expected"), [(1, 8, 1.0), (2, 8, 2.0), (1, 2, 2.0), (1, 6, 4 * 2 / 6)]
)
def test_expert_choice_pays_for_the_rows_experts_take(top_k: int, group_size: int, expected: float) -> None:
    layer = FeedForwardShape(
        family="expert_choice",
        hidden_size=4,
        intermediate_size=3,
        num_experts=4,
        top_k=top_k,
        group_size=group_size,
    )
    assert layer.rows_per_token == pytest.approx(expected)


def test_every_mixture_may_have_shared_experts() -> None:
    shape = PlainShape(mlp_layer_types=["token_choice", "mixture_of_tokens"], num_shared_experts=2)
    assert [layer.shared_experts for layer in feed_forward_shapes(shape, sequence_length=8)] == [2, 2]


def test_layers_may_have_widths_of_their_own() -> None:
    # Instead of 2*4*6 twice: 2*4*6 and 2*4*9.
    assert model_parameters(PlainShape(intermediate_sizes=[6, 9])) == 40 + 20 + 2 * 64 + 48 + 72


def test_tokens_alone_are_those_of_the_last_steps_and_a_share_of_those_before() -> None:
    shape = PlainShape(mlp_layer_types=["token_choice", "mixture_of_tokens"], zero_fill=0.5, alone_fraction=0.2)
    assert [layer.alone_share for layer in feed_forward_shapes(shape, sequence_length=8)] == [0.0, pytest.approx(0.6)]


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
