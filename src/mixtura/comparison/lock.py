"""The lock of a comparison's folder, which one process at a time writes.

The process locks a file in the folder. The system ends the lock with the process, however that ends, so that no lock is
ever left over. The file says who holds it, for the sentence that a second process gets. Some network disks know no
locks: there the file itself has to do.
"""

import errno
import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from mixtura.config import UserError
from mixtura.errors import launch, rank, reason_of
from mixtura.results.document import Plain

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

HOLDER = ".in-use.json"
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP}
_SECONDS_TO_WAIT = 300.0


def unwritable(out: Path, error: OSError) -> UserError:
    """What is said of a folder that cannot be written."""
    return UserError(f"'{out}' cannot be written ({reason_of(error)}): choose another folder with --out.")


@contextmanager
def locked(file: Path) -> Iterator[None]:
    """Locks a file of this process's own for the length of a block; the file goes with the lock.

    Raises:
        UserError: another process holds it, or it cannot be written.
    """
    try:
        handle = _lock(file)
    except OSError as error:
        raise unwritable(file.parent, error) from None
    try:
        yield
    finally:
        with suppress(OSError):  # still locked, so that no other process can lock the file while it is being removed
            file.unlink(missing_ok=True)
        os.close(handle)


def _lock(file: Path) -> int:
    """Locks the file and writes into it who this is."""
    while True:
        handle = os.open(file, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            _take(handle, file)
            # The process before may have removed the file between open and lock: then this lock protects nothing.
            if file.exists() and os.path.samestat(os.fstat(handle), file.stat()):
                _introduce(file)
                return handle
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)


def _introduce(file: Path) -> None:
    try:
        write_holder(file)
    except OSError:  # a full disk
        file.unlink(missing_ok=True)
        raise


def _take(handle: int, file: Path) -> None:
    holder = _read_holder(file)
    try:
        if fcntl is None:
            raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"{_in_use(file, holder)}: wait for it, or choose another folder with --out.") from None
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        if _may_live(holder):
            raise UserError(
                f"{_in_use(file, holder)}: wait for it, or choose another folder with --out. This disk has no locks: "
                f"if that process is gone, delete '{file}'."
            ) from None


def _in_use(file: Path, holder: Plain) -> str:
    if "pid" not in holder:
        return f"'{file.parent}' is in use by another process"
    return (
        f"'{file.parent}' is in use by process {holder['pid']} on {holder.get('host')} since {holder.get('since')} UTC"
    )


def _may_live(holder: Plain) -> bool:
    """Whether the process may still run; one on another machine cannot be asked, so it may."""
    if "pid" not in holder:
        return False
    if holder.get("host") != socket.gethostname():
        return True
    try:
        os.kill(int(holder["pid"]), 0)
    except ProcessLookupError:
        return False
    except (OSError, ValueError):
        return True
    return int(holder["pid"]) != os.getpid()


def write_holder(file: Path, **more: Any) -> None:
    """Writes into the file who holds it. It is not replaced by a new file, since that would not be locked."""
    told = {"pid": os.getpid(), "host": socket.gethostname(), "since": f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S}"}
    file.write_text(json.dumps(told | more) + "\n", encoding="utf-8")


def _read_holder(file: Path) -> Plain:
    try:
        told = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return told if isinstance(told, dict) else {}


def wait_for_first_rank(out: Path) -> None:
    """Returns once the first rank of this launch says that the folder is ready.

    Raises:
        UserError: that takes too long, as where the machines do not share the disk.
    """
    end = time.monotonic() + _SECONDS_TO_WAIT
    while _read_holder(out / HOLDER).get("launch") != launch():
        if time.monotonic() > end:
            raise UserError(
                f"Rank {rank()} does not see '{out}', which the first rank makes: choose a folder on a disk that all "
                "machines share, with --out."
            )
        time.sleep(0.05)
