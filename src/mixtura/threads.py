"""How many threads torch starts and how they wait, which has to be settled before torch is imported.

A thread that waits for the others keeps its core busy for a while before it sleeps. On a machine with other work, the
others may then not get a core at all: with one busy process on each of two cores, steps took over 20 times as long as
alone, and two and a half times with threads that sleep soon. Threads that sleep at once cost a quarter of the time
where nothing else runs, since every product wakes them anew; with a short spin it was within the noise
(docs/performance.md).
"""

import os
from collections.abc import MutableMapping
from pathlib import Path

SPINS = 5000
"""How often a waiting thread looks before it sleeps: some twenty microseconds. GNU's OpenMP looks 300,000 times."""
_BLOCK_MILLISECONDS = 1
"""The same for Intel's OpenMP, which waits for 200."""
_WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")


def prepare_threads(environment: MutableMapping[str, str] = os.environ) -> None:
    """Lets waiting threads sleep soon, and starts no more threads than a container may run; what is set stays.

    Called before torch is imported; later it changes nothing.
    """
    if waits_as_installed(environment):
        environment["GOMP_SPINCOUNT"] = str(SPINS)
        environment["KMP_BLOCKTIME"] = str(_BLOCK_MILLISECONDS)
    # torch counts the machine's cores, also where a container may use a few of them only.
    if "OMP_NUM_THREADS" not in environment and (cores := usable_cores()) < (os.cpu_count() or 1):
        environment["OMP_NUM_THREADS"] = str(cores)


def waits_as_installed(environment: MutableMapping[str, str] = os.environ) -> bool:
    """Whether nobody has said how threads wait."""
    return not any(name in environment for name in _WAITING)


def usable_cores() -> int:
    """Cores that this process may use: of the machine, of its affinity and of its container."""
    affinity = getattr(os, "sched_getaffinity", None)
    cores = len(affinity(0)) if affinity is not None else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text(encoding="ascii").split()
        return max(1, min(cores, round(int(quota) / int(period))))
    except (OSError, ValueError):  # no cgroup of version 2, or "max"
        return cores


def crowded() -> bool:
    """Whether other programs want the cores too: more is running, on average over a minute, than there are cores."""
    load = getattr(os, "getloadavg", None)
    return load is not None and load()[0] > usable_cores() + 0.5
