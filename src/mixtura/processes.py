"""Processes that share the work of this one, each with what it needs to begin."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing.context import SpawnContext
from typing import Any

from mixtura.errors import UserError

CONTEXT: SpawnContext = multiprocessing.get_context("spawn")
"""How they are started: forked ones would have this one's threads half-way."""


@contextmanager
def worker_pool(
    processes: int, begin: Callable[..., None], arguments: tuple[Any, ...], *, lost: str
) -> Iterator[ProcessPoolExecutor]:
    """A pool of processes, which end with the block, what they are at first, and with this process.

    Args:
        processes: how many.
        begin: called in each of them, before anything else.
        arguments: of `begin`.
        lost: what to say where a process is gone and a result is asked for.

    Raises:
        UserError: `lost`.
    """
    pool = ProcessPoolExecutor(processes, mp_context=CONTEXT, initializer=_begin, initargs=(begin, arguments))
    try:
        yield pool
    except BrokenProcessPool:
        raise UserError(lost) from None
    finally:
        pool.shutdown(cancel_futures=True)


def _begin(begin: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    # Ctrl-C reaches every process of a terminal; the one that started this one passes it on, once.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    begin(*arguments)


def _end_with_parent() -> None:
    """Ends the process when the one that started it is gone: its folder may then be taken by another command."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
