"""Files of text: which ones a path means, and their lines, or one sentence on why a file cannot be read."""

import bz2
import gzip
import lzma
import os
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from mixtura.config import UserError
from mixtura.errors import reason_of

_UNPACKED_IN_PASSING = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
_PACKED = (*_UNPACKED_IN_PASSING, ".zip", ".zst", ".tar", ".tgz", ".7z")
UNREADABLE = (OSError, EOFError, zlib.error, lzma.LZMAError)
"""What reading a file may raise, one that is unpacked in passing too."""
_SPREADSHEETS = (".xlsx", ".xls", ".ods")
_MEMORIES = (".tmx", ".xliff", ".xlf", ".po", ".sdlxliff")
_MOST_ENDINGS = 5
_COPIES_OF_MACOS = "__MACOSX"
"""The folder in archives of macOS with a file of attributes, "._a.txt", beside each "a.txt"."""
# The kind of a file by its first bytes, whatever its name says.
_SIGNATURES = {
    b"\xff\xfe": "is UTF-16 text: convert it, as with `iconv -f UTF-16 -t UTF-8`",
    b"\xfe\xff": "is UTF-16 text: convert it, as with `iconv -f UTF-16 -t UTF-8`",
    b"\x1f\x8b": "is packed by gzip: unpack it, as with `gunzip`",
    b"BZh": "is packed by bzip2: unpack it, as with `bunzip2`",
    b"\xfd7zXZ": "is packed by xz: unpack it, as with `unxz`",
    b"\x28\xb5\x2f\xfd": "is packed by zstd: unpack it, as with `unzstd`",
    b"PK\x03\x04": "is a zip archive or a spreadsheet: unpack it, or save the sheet as CSV UTF-8",
    b"PAR1": "is a Parquet file: name it .parquet",
    b"%PDF": "is a PDF: take the text out of it",
    b"version https://git-lfs": "is a pointer of Git LFS: fetch the file itself with `git lfs pull`",
}


def ending(path: Path) -> str:
    """The ending of a file in lower case; of a packed one that of what is in it, such as ".jsonl" of a.jsonl.gz.

    Parquet is packed already, and read from its end: a packed one stays what it is.
    """
    inner = _unpacked(path).suffix.lower()
    return path.suffix.lower() if inner == ".parquet" else inner


def without_ending(path: Path) -> Path:
    """The path without what `ending` gives, and without that of a packed file."""
    return _unpacked(path).with_suffix("")


def _unpacked(path: Path) -> Path:
    packed = path.suffix.lower() in _UNPACKED_IN_PASSING
    return path.with_suffix("") if packed and path.with_suffix("").suffix else path


def open_bytes(path: Path) -> IO[bytes]:
    """Opens a file for reading, and unpacks it in passing where its name says that it is packed; see `UNREADABLE`."""
    opener = _UNPACKED_IN_PASSING.get(path.suffix.lower())
    return path.open("rb") if opener is None else opener(path, "rb")


@dataclass(frozen=True)
class Listing:
    """What a path means: one file, or those of a folder."""

    start: Path
    """The file or the folder."""
    found: list[Path]
    """All files, sorted."""
    hidden: int = 0
    """Entries that are nobody's data, see `list_files`."""

    def of_kinds(self, kinds: tuple[str, ...]) -> tuple[list[Path], str]:
        """Files to read, sorted, and what a report says after their name of those not read, if there are any.

        A .json file of a folder is read if it holds a list, since data sets describe themselves in .json files too.

        Raises:
            UserError: there are none.
        """
        start, found, listed = self.start, self.found, ", ".join(kinds)
        if found == [start]:
            if ending(start) not in kinds:
                raise UserError(f"'data.path' is '{start}', which {_other_kind(start, listed)}.")
            if start.stat().st_size == 0:
                raise UserError(f"'data.path' is '{start}', which is empty: give a file with text in it.")
            return [start], ""
        files = [file for file in found if ending(file) in kinds and _holds_rows(file)]
        if not files:
            other = (
                f", such as '{found[0].name}', which {_other_kind(found[0], listed)}"
                if found
                else ": give one with text"
            )
            raise UserError(f"'data.path' is '{start}', a folder without any file of {listed}{other}.")
        return files, _left_unread([file for file in found if file not in set(files)], self.hidden)


def list_files(path: str | None) -> Listing:
    """The file, or the files of a folder with its subfolders; links to folders are not followed.

    Names that begin with a dot, and macOS's `__MACOSX`, are passed over: they hold copies of editors and systems, such
    as `.ipynb_checkpoints`.

    Raises:
        UserError: there is nothing, or it cannot be listed.
    """
    if "://" in str(path):
        raise UserError(f"'data.path' is '{path}', an address: download the file and give its path.")
    try:
        start = Path(str(path)).expanduser()
        return Listing(start, [start]) if start.is_file() else _walk(start)
    except (OSError, RuntimeError) as error:
        raise UserError(f"'data.path' is '{path}', which cannot be read ({reason_of(error)}): correct it.") from None


def local_files(path: str | None, kinds: tuple[str, ...]) -> tuple[list[Path], str]:
    """Files to read, and what a report says of those not read; see `list_files` and `Listing.of_kinds`.

    Raises:
        UserError: there are none, or they cannot be listed.
    """
    return list_files(path).of_kinds(kinds)


def _left_unread(files: list[Path], hidden: int) -> str:
    """How many, and their endings, the most frequent first: a packed file may be most of somebody's data."""
    endings = Counter(file.suffix.lower() or "without an ending" for file in files).most_common(_MOST_ENDINGS)
    listed = ", ".join(ending for ending, _ in endings)
    parts = [f"{len(files)} of other kinds not read: {listed}"] if files else []
    parts += [f"{hidden} hidden not read"] if hidden else []
    return f" ({'; '.join(parts)})" if parts else ""


def _other_kind(file: Path, listed: str) -> str:
    suffix = file.suffix.lower()
    if suffix in _PACKED:
        return f"is packed: unpack it to one of {listed}"
    if suffix in _SPREADSHEETS:
        return "is a spreadsheet: save it as CSV UTF-8"
    if suffix in _MEMORIES:
        return "is a translation memory: export it as .tsv, a column for each language"
    plain = ", or rename it to .txt if it is plain text" if ".txt" in listed else ""
    return f"is none of {listed}: give a file of one of these kinds{plain}"


def _holds_rows(file: Path) -> bool:
    if ending(file) != ".json":
        return True
    try:
        with open_bytes(file) as opened:
            return opened.read(1024).removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"[")
    except UNREADABLE:
        return True  # whoever reads it says what is wrong


def read_lines(path: Path) -> Iterator[str]:
    """Lines of a UTF-8 file with \\n line ends, without a byte order mark.

    Raises:
        UserError: it cannot be read, or is no UTF-8 text.
    """
    offset = 0
    try:
        with open_bytes(path) as file:
            for line in file:
                if b"\0" in line:
                    place = offset + line.index(b"\0")
                    no_text = f"holds a NUL byte at {place}, so it is no UTF-8 text: convert or remove it"
                    raise UserError(f"'{path}' {format_of(path) or no_text}.")
                text = line.decode().replace("\r\n", "\n")
                yield text if offset else text.removeprefix("\ufeff")
                offset += len(line)
    except UnicodeDecodeError as error:
        # Excel's plain CSV is in the system's encoding: where Latin 1 has control characters, Windows has quotes.
        saved = ", or save it anew as 'CSV UTF-8'" if ending(path) == ".csv" else ""
        no_text = (
            f"is not UTF-8 text at byte {offset + error.start}: convert it, as with `iconv -f CP1252 -t UTF-8`{saved}"
        )
        raise UserError(f"'{path}' {format_of(path) or no_text}.") from None
    except UNREADABLE as error:
        raise UserError(f"'{path}' {cannot_be_read(error)}.") from None


def cannot_be_read(error: Exception) -> str:
    """What is wrong with a file and what to do, after one of `UNREADABLE`, to stand after its name."""
    if isinstance(error, OSError) and error.errno is not None:
        return f"cannot be read ({reason_of(error)}): check its permissions"
    return f"cannot be unpacked ({reason_of(error)}): fetch or pack it anew"


def format_of(path: Path, *, besides: bytes = b"") -> str | None:
    """What a file that could not be read really is and what to do, to stand after its name.

    Args:
        path: the file.
        besides: the first bytes of what it should be.

    Returns:
        None where its first bytes do not show it.
    """
    try:
        with open_bytes(path) as file:
            start = file.read(32)
    except UNREADABLE as error:
        return cannot_be_read(error)
    known = (
        advice for signature, advice in _SIGNATURES.items() if signature != besides and start.startswith(signature)
    )
    return next(known, None)


def _walk(folder: Path) -> Listing:
    if not folder.is_dir():
        raise UserError(f"'data.path' is '{folder}', where there is no file or folder: correct the path.")

    def refuse(error: OSError) -> None:  # os.walk passes over unreadable folders unless told otherwise
        raise UserError(f"The folder '{error.filename}' cannot be read ({error.strerror}): check its permissions.")

    files, hidden = list[Path](), 0
    for parent, folders, names in os.walk(folder, onerror=refuse):
        hidden += sum(map(_is_hidden, (*folders, *names)))
        folders[:] = [name for name in folders if not _is_hidden(name)]  # which os.walk then enters
        files += [Path(parent, name) for name in names if not _is_hidden(name)]
    return Listing(folder, sorted(file for file in files if file.is_file()), hidden)


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name == _COPIES_OF_MACOS
