"""Files and folders that appear whole or not at all, the cache folder, and files inside packages.

Whatever is written gets a temporary name beside its place and is renamed last, so that a reader, or the next run after
a power cut, finds what was there before or all of what is there now. What users keep is brought to the disk before it
is renamed: otherwise a rename may outlive the bytes of the file. Caches are not, since they can be made again.
"""

import hashlib
import importlib.util
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from mixtura.errors import UserError, disk_error, is_utf8, reason_of


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A place beside `path` to write a file to; it takes the place of `path` when the block ends.

    Where the block fails nothing is left of it, and what `path` held stays.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # Two processes that write the same file must not write into each other's.
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        yield temporary
        _to_disk(temporary)
        os.replace(temporary, path)
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Writes a text as UTF-8 with the line ends it has; a name of a file that UTF-8 cannot hold becomes an escape."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace", newline="\n")


def write_json(path: Path, value: Any) -> None:
    """Writes JSON; NaN is refused, since no other reader takes it."""
    write_text(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


def checksum(path: Path) -> str:
    """A hash of a file's bytes, by which one that was damaged or changed is noticed."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def check_name(out: Path) -> None:
    """Raises UserError where UTF-8 cannot hold the path, by which tokenizers and weights are written."""
    if not is_utf8(str(out)):
        raise UserError(f"'{out}' has a name that is not UTF-8 text: name another folder.")


def check_empty(out: Path) -> None:
    """Raises UserError where `out` is a file, a folder that holds something, or lies where none can be made."""
    check_name(out)
    if out.is_file() or (out.is_dir() and any(out.iterdir())):
        raise UserError(f"'{out}' is not empty: name a new folder.")
    if (file := file_above(out)) is not None:
        raise UserError(f"'{file}' is a file: name a folder elsewhere.")
    if not os.access(nearest := nearest_folder(out), os.W_OK):
        raise UserError(f"'{nearest}' may not be written: name a folder elsewhere.")


def check_inside(folder: Path, name: str | None = None) -> None:
    """Refuses a model folder with a link, or an index of weights with a name, that leads out of it.

    Someone else's folder could otherwise bring files of this machine into a model, or into what is exported and
    published. The hub's cache links from its snapshots to its own blobs, which is fine.

    Args:
        folder: as someone gave it; one that does not exist passes.
        name: what to call it in the error; its path when None.

    Raises:
        UserError: names the file.
    """
    if not os.path.isdir(folder):  # unlike Path's, this is False for a name that no file system takes
        return
    inside = folder.resolve()
    blobs = inside.parents[1] / "blobs" if inside.parent.name == "snapshots" else None
    for path in [*folder.glob("*"), *folder.glob("*/*")]:
        if path.is_symlink() and not (target := path.resolve()).is_relative_to(inside) and target.parent != blobs:
            shown = path.relative_to(folder)
            raise UserError(f"'{shown}' of '{name or folder}' is a link out of its folder: copy the file there.")
    for index in folder.glob("*.index.json"):
        for file in _indexed(index):
            if Path(file).name != file:
                raise UserError(
                    f"'{index.name}' of '{name or folder}' names {file!r}, which is no file beside it: copy or fetch "
                    "the model again."
                )


def _indexed(index: Path) -> set[str]:
    """The names of files in an index of weights; none where it is damaged, which whoever reads the weights says."""
    try:
        places = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        return {file for file in places.values() if isinstance(file, str)}
    except (OSError, ValueError, LookupError, AttributeError, TypeError, RecursionError):
        return set()


def file_above(path: Path) -> Path | None:
    """The file that stands where a folder above `path` would have to be; None where there is none."""
    return next((parent for parent in path.parents if parent.is_file()), None)


def free_bytes(out: Path) -> int:
    """Room on the disk that would hold the folder `out`, which need not exist."""
    return shutil.disk_usage(nearest_folder(out)).free


def nearest_folder(out: Path) -> Path:
    """The folder `out`, or the one nearest above it that exists."""
    return next(parent for parent in (out, *out.absolute().parents) if parent.is_dir())


@contextmanager
def folders_above(out: Path) -> Iterator[None]:
    """Makes the folders above `out`; where the block fails, those that were not there are removed again.

    Raises:
        UserError: they cannot be made.
    """
    made = [parent for parent in out.parents if not parent.exists()]  # the innermost first
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"'{out}' cannot be written ({reason_of(error)}): name a place elsewhere.") from error
    try:
        yield
    except BaseException:
        for folder in made:
            with suppress(OSError):  # another process has put something there
                folder.rmdir()
        raise


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A folder beside `out` to be filled; it takes the place of `out` when the block ends.

    Where the block fails nothing is left of it, nor of the folders made above it, and an empty folder `out` stays.

    Raises:
        UserError: the disk is full or cannot be written.
    """
    try:
        with (
            folders_above(out),
            tempfile.TemporaryDirectory(dir=out.parent, prefix=".new-", ignore_cleanup_errors=True) as temporary,
        ):
            new = Path(temporary, out.name)
            new.mkdir()
            yield new
            put_folder(new, out)
    except Exception as error:
        if (reason := disk_error(error)) is None:
            raise
        raise UserError(f"'{out}' cannot be written: {reason}. Make room, or name a folder elsewhere.") from error


@contextmanager
def cache_entry(entry: Path) -> Iterator[Path]:
    """As `new_folder`, for what can be made again: one that another process has stored meanwhile stays, being equal."""
    entry.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=entry.parent, prefix=".new-", ignore_cleanup_errors=True) as temporary:
        new = Path(temporary, "entry")
        new.mkdir()
        yield new
        with suppress(OSError):  # the place is taken
            os.rename(new, entry)


def put_folder(new: Path, out: Path) -> None:
    """Puts a filled folder in a place where there is none, or an empty one."""
    for path in new.rglob("*"):
        if path.is_file():
            _to_disk(path)
    if out.is_dir():
        out.rmdir()
    os.rename(new, out)


def _to_disk(path: Path) -> None:
    """Waits until the file's bytes are on the disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def cache_folder() -> Path:
    """`$MIXTURA_CACHE`, else `$XDG_CACHE_HOME/mixtura`, else `~/.cache/mixtura`; it need not exist."""
    if named := os.environ.get("MIXTURA_CACHE"):
        return Path(named).expanduser()
    if caches := os.environ.get("XDG_CACHE_HOME"):
        return Path(caches, "mixtura")
    return Path("~/.cache/mixtura").expanduser()


def package_path(package: str, *parts: str) -> Path | None:
    """A file or folder inside an installed package, found without running the package; None where there is none."""
    spec = importlib.util.find_spec(package)
    folders = spec.submodule_search_locations if spec else None
    path = Path(next(iter(folders)), *parts) if folders else None
    return path if path is not None and path.exists() else None
