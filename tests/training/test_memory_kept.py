"""Freed memory is kept: seen from what the kernel counts, in a process of its own."""

import platform
import subprocess
import sys

import pytest

from mixtura.training import process

COUNT_FAULTS = """
import resource, runpy, sys

keep_freed_memory = runpy.run_path(sys.argv[2])["keep_freed_memory"]
if sys.argv[1] == "kept":
    assert keep_freed_memory()
for _ in range(4):
    bytes([120]) * (64 << 20)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(4):
    bytes([120]) * (64 << 20)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library manages its memory in other ways")
def test_a_large_block_is_made_from_memory_that_another_left():
    faults = {}
    for mode in ("default", "kept"):
        command = [sys.executable, "-c", COUNT_FAULTS, mode, process.__file__]
        faults[mode] = int(subprocess.check_output(command, text=True))
    assert faults["kept"] < 100 < faults["default"]


def test_another_c_library_is_left_alone(monkeypatch):
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    assert process.keep_freed_memory() is False
