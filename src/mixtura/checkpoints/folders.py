"""New folders that appear whole or not at all."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mixtura.config import UserError


def check_empty(out: Path) -> None:
    """Raises UserError where `out` is a file or a folder that holds something."""
    if out.is_file() or (out.exists() and any(out.iterdir())):
        raise UserError(f"'{out}' is not empty: name a new folder.")


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A folder beside `out`, in a parent that exists, to be filled; it takes the place of `out` when the block ends.

    Where the block fails nothing is left of it, and an empty folder `out` stays.
    """
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=".new-", ignore_cleanup_errors=True) as temporary:
        new = Path(temporary, out.name)
        new.mkdir()
        yield new
        if out.is_dir():
            out.rmdir()
        new.rename(out)
