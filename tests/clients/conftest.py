"""Settings of the tests that run other tools on Mixtura's models."""

import pytest

_MARKS = (
    *("accelerate_tests", "flash_attn_test", "flash_attn_3_test", "flash_attn_4_test", "generate", "is_training_test"),
    *("torch_compile_test", "order", "run_first"),
)


def pytest_configure(config: pytest.Config) -> None:
    """Names the marks that transformers' own tests carry, which strict markers would refuse."""
    for name in _MARKS:
        config.addinivalue_line("markers", f"{name}: a mark of transformers' own tests")
