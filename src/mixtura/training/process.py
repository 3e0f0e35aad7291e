"""What a training run needs from its process and machine: memory that is kept, Ctrl-C that stops after a step, speed.

On Linux, large tensors are otherwise handed back to the system and zeroed anew at every step. Ctrl-C and SIGTERM become
a request: the current step is finished and saved, so nothing that was computed is lost.

`slow_settings` and `slow_memory` find what makes training here many times slower than it need be. They change nothing:
each finding is a sentence with the fix.
"""

import ctypes
import os
import platform
import signal
import threading
import time
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Self

import torch
from torch import nn

from mixtura.config import TrainingConfig
from mixtura.threads import SPINS, crowded, usable_cores, waits_as_installed

_TRIM_THRESHOLD, _MMAP_MAX = -1, -4
"""mallopt's parameters, as in malloc.h of glibc."""


def keep_freed_memory() -> bool:
    """Tells glibc to keep memory that is freed for what is allocated next, and says whether it did.

    By default a block above 32 MB comes from the kernel and goes back to it, and every page of it is zeroed when it is
    first touched, which took seven times as long as filling it. Activations and gradients are such blocks, at every
    step. The process then holds on to the most memory that it ever needed. Elsewhere than on glibc nothing is changed.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    libc = ctypes.CDLL(None)
    return bool(libc.mallopt(_MMAP_MAX, 0)) and bool(libc.mallopt(_TRIM_THRESHOLD, 2**31 - 1))


class StopRequest:
    """While in its `with` block, Ctrl-C or SIGTERM only sets `requested`; a second Ctrl-C interrupts at once.

    A batch system sends SIGTERM before it takes the machine away, often more than once. Outside the main thread, where
    Python takes no signal handlers, both keep their meaning.
    """

    def __init__(self) -> None:
        """Nothing has been requested yet."""
        self.requested = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Self:
        """Takes over SIGINT and SIGTERM."""
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._handle) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Gives them back."""
        for number, previous in self._previous.items():
            signal.signal(number, previous)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.requested = True


_SIDE = 512
_WORTH_SAYING = 1.5
"""How many times slower bfloat16 must be; it is chosen for speed, and a measurement varies."""
_MANY_TIMES = 4
"""Cores a thread, or threads a core, that are worth saying."""


def slow_settings(config: TrainingConfig) -> list[str]:
    """Sentences on the number format, the threads and an accelerator that is left idle.

    On a machine that trains on an accelerator there are none.
    """
    if torch.cuda.is_available():
        return []
    checks = (_idle_accelerator(), _slow_bfloat16(config), _odd_threads(config), _spinning_threads(config))
    return [found for found in checks if found]


def slow_memory(model: nn.Module, label: str) -> str | None:
    """A sentence where weights, gradients and the optimizer's state alone need more memory than is free, on the CPU.

    Args:
        model: as it will be trained.
        label: names the run.
    """
    kept = 0
    for parameter in model.parameters():
        # A gradient and AdamW's two moments, for what is trained.
        kept += parameter.numel() * parameter.element_size() * (4 if parameter.requires_grad else 1)
    free = _free_memory()
    held = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    if torch.cuda.is_available() or free is None or kept - held <= free:
        return None
    return (
        f"{label} keeps {kept / 1e9:.1f} GB of weights, gradients and optimizer state, and {(free + held) / 1e9:.1f} "
        "GB are free for it: it will swap, or the system will end it; make the model smaller, train less of it, or "
        "take a machine with more memory."
    )


def _idle_accelerator() -> str | None:
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
    if hidden or not Path("/dev/nvidia0").exists():
        return None
    how = "is built without CUDA" if torch.version.cuda is None else "cannot use it"
    return f"This machine has an NVIDIA GPU, but torch {torch.__version__} {how}: everything runs on the CPU."


def _slow_bfloat16(config: TrainingConfig) -> str | None:
    if config.dtype != "bfloat16":
        return None
    times_slower = _seconds(torch.bfloat16) / _seconds(torch.float32)
    if times_slower < _WORTH_SAYING:
        return None
    return (
        f"Matrix products in bfloat16 take {times_slower:.1f} times as long as in float32 on this CPU: set "
        "'training.dtype' to \"float32\"."
    )


def _seconds(dtype: torch.dtype) -> float:
    """Of one matrix product, the quickest of three after one that does not count."""
    left, right = (torch.ones(_SIDE, _SIDE, dtype=dtype) for _ in range(2))
    taken = []
    for _ in range(4):
        started = time.perf_counter()
        torch.mm(left, right)
        taken.append(time.perf_counter() - started)
    return min(taken[1:])


def _odd_threads(config: TrainingConfig) -> str | None:
    threads = config.threads or torch.get_num_threads()
    cores = max(1, usable_cores() // int(os.environ.get("LOCAL_WORLD_SIZE") or 1))
    if threads * _MANY_TIMES > cores and threads < cores * _MANY_TIMES:
        return None
    worse = "most of the cores stay idle" if threads < cores else "the threads wait for each other"
    return f"The number of threads is {threads} on {cores} cores, so {worse}: set 'training.threads' to {cores}."


def _spinning_threads(config: TrainingConfig) -> str | None:
    if (config.threads or torch.get_num_threads()) == 1 or not (crowded() and waits_as_installed()):
        return None
    return (
        "Other programs keep this machine's cores busy, and threads that wait for each other would hold the cores "
        f"meanwhile: set GOMP_SPINCOUNT={SPINS} in the environment before Python starts, as the command line does."
    )


def _free_memory() -> int | None:
    """Bytes that this process may still take without swapping; None where the system does not say."""
    free = []
    try:
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                free.append(int(line.split()[1]) * 1024)
        limit, used = (
            int(Path("/sys/fs/cgroup", name).read_text(encoding="ascii")) for name in ("memory.max", "memory.current")
        )
        free.append(limit - used)
    except (OSError, ValueError):  # no such file, or "max"
        pass
    return min(free, default=None)
