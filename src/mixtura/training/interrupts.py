"""Ctrl-C as a request to stop: the step at hand is finished and saved, so nothing that was computed is lost."""

import signal
import threading
from types import FrameType, TracebackType
from typing import Any, Self


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
