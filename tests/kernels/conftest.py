"""Fixtures of the tests of kernels."""

import pytest
import torch


@pytest.fixture
def threads(request):
    """As many threads of torch's as the test's parameter says, for the length of the test."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)
