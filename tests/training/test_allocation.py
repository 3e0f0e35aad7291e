"""Freed memory is kept: seen from what the kernel counts, in a process of its own."""

import platform
import subprocess
import sys

import pytest

COUNT_FAULTS = """
import resource, sys
import torch
from mixtura.training.allocation import keep_freed_memory

torch.set_num_threads(1)
if sys.argv[1] == "kept":
    assert keep_freed_memory()
for _ in range(4):
    torch.empty(16 << 20).fill_(1.0)  # 64 MB
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(4):
    torch.empty(16 << 20).fill_(1.0)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library manages its memory in other ways")
def test_a_large_tensor_is_made_from_memory_that_another_left():
    faults = {
        mode: int(subprocess.check_output([sys.executable, "-W", "ignore", "-c", COUNT_FAULTS, mode], text=True))
        for mode in ("default", "kept")
    }
    assert faults["kept"] < 100 < faults["default"]
