"""What a training run asks of its process: to keep memory that was freed, and to stop after the step at hand.

On Linux, large tensors are otherwise handed back to the system and zeroed anew at every step. Ctrl-C becomes a request:
the step is finished and saved, so nothing that was computed is lost.
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
    """While in its `with` block, the first Ctrl-C only sets `requested`; a second one interrupts at once.

    Outside the main thread, where Python takes no signal handlers, Ctrl-C keeps its meaning.
    """

    def __init__(self) -> None:
        """Nothing has been requested yet."""
        self.requested = False
        self._previous: Any = None

    def __enter__(self) -> Self:
        """Takes over SIGINT."""
        if threading.current_thread() is threading.main_thread():
            self._previous = signal.signal(signal.SIGINT, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Gives SIGINT back."""
        if self._previous is not None:
            signal.signal(signal.SIGINT, self._previous)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
