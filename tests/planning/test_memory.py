from collections.abc import Callable

from mixtura.models import MixtureConfig
from mixtura.planning import model_parameters, state_memory


def test_adamw_in_float32_keeps_sixteen_bytes_a_parameter(tiny_config: Callable[..., MixtureConfig]) -> None:
    config = tiny_config("token_choice")
    memory = state_memory(config)
    assert (memory.parameters, memory.gradients, memory.optimizer) == tuple(
        size * model_parameters(config) for size in (4, 4, 8)
    )
    assert memory.total == 16 * model_parameters(config)
    assert state_memory(config, dtype="bfloat16").total * 2 == memory.total
