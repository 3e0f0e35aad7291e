from collections.abc import Callable

import pytest

from mixtura.models import MixtureConfig
from mixtura.planning import FeedForwardShape, active_parameters, model_parameters
from mixtura.planning.parameters import active_layer_parameters, layer_parameters

# Four experts of 2*8*16 = 256 parameters.
EXPERTS = {"hidden_size": 8, "intermediate_size": 16, "num_experts": 4, "group_size": 4}


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
    ],
)
def test_layer_parameters_by_hand(settings: dict, total: int, active: int) -> None:
    layer = FeedForwardShape(**(EXPERTS | settings))
    assert layer_parameters(layer) == total
    assert active_layer_parameters(layer) == active


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
