"""The C code beside this file, compiled on first use by the machine's own compiler and kept in the cache folder.

It is named by a hash of its source, the compiler and the processor, so that a home shared by several machines holds one
for each.
"""

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
from pathlib import Path
from typing import Any

import torch

from mixtura.config.assets import cache_folder
from mixtura.files import replacing

_SOURCES = sorted(Path(__file__).parent.glob("native*.c"))
_HEADERS = sorted(Path(__file__).parent.glob("native*.h"))
_FLAGS = ("-O3", "-march=native", "-fopenmp", "-fno-math-errno", "-fno-trapping-math", "-shared", "-fPIC")


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled code, or None where it cannot be had."""
    if os.environ.get("MIXTURA_NATIVE") == "0" or sgemm() is None:
        return None
    compiler = os.environ.get("CC") or next((name for name in ("cc", "gcc", "clang") if shutil.which(name)), None)
    if compiler is None:
        return None
    try:
        return ctypes.CDLL(str(_compiled(compiler, cache_folder() / "native")))
    except (OSError, subprocess.SubprocessError):
        return None  # an unwritable cache, or a compiler that does not know the flags: torch does it


def call(name: str, *arguments: Any) -> int:
    """Calls a function of the library and returns what it returns, which is 0 where it has nothing to complain about.

    `native.can_run` says before whether there is a library.
    """
    native = library()
    assert native is not None, "ask `can_run` first"
    return getattr(native, name)(*arguments)


@functools.cache
def sgemm() -> int | None:
    """Address of BLAS's `sgemm` in torch's own library, which builds with MKL or OpenBLAS inside export."""
    for name in ("libtorch_cpu.so", "libtorch_cpu.dylib"):
        path = Path(torch.__file__).parent / "lib" / name
        if path.exists():
            function = getattr(ctypes.CDLL(str(path)), "sgemm_", None)
            return None if function is None else ctypes.cast(function, ctypes.c_void_p).value
    return None


def _compiled(compiler: str, folder: Path) -> Path:
    """The shared library for this source, compiler and processor; compiled unless it is there."""
    version = subprocess.run([compiler, "--version"], capture_output=True, check=True, timeout=60).stdout
    source = b"".join(path.read_bytes() for path in [*_SOURCES, *_HEADERS])
    digest = hashlib.blake2b(source + version + _processor() + " ".join(_FLAGS).encode(), digest_size=12)
    path = folder / f"{digest.hexdigest()}.so"
    if not path.exists():
        with replacing(path) as made:  # whole or not at all: other processes may be compiling it too
            command = [compiler, *_FLAGS, "-o", str(made), *map(str, _SOURCES)]
            subprocess.run(command, capture_output=True, check=True, timeout=120)
    return path


def _processor() -> bytes:
    """What -march=native depends on: a folder may be shared by machines of different kinds."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="ascii", errors="replace").splitlines() if info.exists() else []
    named = {line for line in lines if line.startswith(("model name", "flags", "Features"))}
    return "\n".join([platform.machine(), platform.processor(), *sorted(named)]).encode()
