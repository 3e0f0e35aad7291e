"""What a training run asks of its process: to keep memory that was freed, and to stop after the step at hand.

On Linux, large tensors are otherwise handed back to the system and zeroed anew at every step. Ctrl-C and SIGTERM become
a request: the step is finished and saved, so nothing that was computed is lost.
"""

import ctypes
import platform
import signal
import threading
from types import FrameType, TracebackType
from typing import Any, Self

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
