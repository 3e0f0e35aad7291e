"""The file of a stage: what was measured so far, on the disk after every item, so that nothing is lost with a process.

A stage is a list of items. An item that fails is named with the reason and the next one begins. One that hangs, or that
breaks the CUDA context, ends the process; a new process of the same stage then reads the file and goes on after it.
"""

import contextlib
import faulthandler
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from mixtura.benchmarks.gpu.stages import BROKEN_CONTEXT, read_journal
from mixtura.comparison.environment import environment, now
from mixtura.files import write_json
from mixtura.results.document import Plain

LONGEST_ITEM = 60.0
"""Seconds after which an item is taken to hang."""
_BROKEN = ("CUDA error", "Triton Error [CUDA]", "CUBLAS_STATUS", "CUDNN_STATUS")


class Journal:
    """What one stage has measured; `items` are values by section and label, `left_out` reasons by label."""

    def __init__(self, path: Path, *, seconds: float, settings: Plain) -> None:
        """Goes on with what an earlier process of the stage left at `path`.

        Args:
            path: the file.
            seconds: after which nothing new is begun; all that runs ends with them.
            settings: what is measured with, for the record.
        """
        self.path, self.end = path, time.monotonic() + seconds
        self.record: Plain = {"created": now(), "environment": environment(), "settings": settings}
        self.record |= {"items": {}, "seconds": {}, "left_out": {}, "running": None, "finished": False}
        if path.is_file():
            self.record = read_journal(path)

    def seconds_left(self) -> float:
        """Seconds until the stage ends."""
        return self.end - time.monotonic()

    def keep(self, section: str, label: str, value: object) -> None:
        """Stores a value, in place of what the label had before."""
        self.record["items"].setdefault(section, {})[label] = value
        write_json(self.path, self.record)

    def attempt(
        self, section: str, label: str, run: Callable[[], object], *, most_seconds: float = LONGEST_ITEM
    ) -> bool:
        """Runs an item and stores what it returns; whether there is a value of it now, from this process or before.

        Args:
            section: the part of the record that the value belongs to.
            label: names the item within the stage.
            run: measures it; what it returns goes to the file. None means that it has kept its values itself.
            most_seconds: after which it is taken to hang and the process ends.
        """
        done = label in self.record["items"].get(section, {})
        if done or label in self.record["left_out"]:
            return done
        if self.seconds_left() <= 0:
            self.leave_out(label, "the time was used up")
            return False
        self.record["running"] = label
        write_json(self.path, self.record)
        started = time.monotonic()
        try:
            with _ended_after(min(most_seconds, max(1.0, self.seconds_left() + 1))):
                value = run()
            if value is not None:
                self.keep(section, label, value)
        except Exception as error:  # the rest of the stage is worth having without this item, and names it
            self.leave_out(label, reason(error))
            if any(sign in str(error) for sign in _BROKEN):
                sys.exit(BROKEN_CONTEXT)
            return False
        self.record["running"] = None
        self.record["seconds"][label] = time.monotonic() - started
        write_json(self.path, self.record)
        return True

    def finish(self) -> None:
        """Says that every item was run or left out."""
        self.record["finished"] = True
        write_json(self.path, self.record)

    def leave_out(self, label: str, why: str) -> None:
        """Names an item that has no value, and why."""
        self.record["running"], self.record["left_out"][label] = None, why
        write_json(self.path, self.record)


def reason(error: BaseException) -> str:
    """The kind of an error and the first line of what it says."""
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"


@contextlib.contextmanager
def _ended_after(seconds: float) -> Iterator[None]:
    """Ends the process, with its stack on standard error, where the block takes longer.

    A thread in C does it, which runs while Python waits for a device.
    """
    faulthandler.dump_traceback_later(seconds, exit=True, file=sys.__stderr__ or 2)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()
