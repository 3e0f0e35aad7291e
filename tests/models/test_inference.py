"""Running mixture-of-tokens layers in another mode for a while."""

import pytest

from mixtura.models import MixtureForCausalLM
from mixtura.models.inference import grouped_layers, mixing_layers, running_in


@pytest.fixture
def model(tiny_config):
    return MixtureForCausalLM(tiny_config("mixture_of_tokens", inference_mode="group", alone_top_k=3))


def test_layers_run_in_the_mode_and_are_then_as_they_were(model):
    (layer,) = mixing_layers(model)
    with running_in([layer], "alone"):
        assert (layer.inference_mode, layer.alone_top_k) == ("alone", 3) and not grouped_layers(model)
    assert (layer.inference_mode, layer.alone_top_k) == ("group", 3) and grouped_layers(model) == [layer]
    assert model.config.inference_mode == "group"


def test_a_mode_that_a_layer_lacks_leaves_all_as_they_were(model):
    with pytest.raises(ValueError, match="calibrate it"), running_in(mixing_layers(model), "population"):
        pass
    assert grouped_layers(model) == mixing_layers(model)
