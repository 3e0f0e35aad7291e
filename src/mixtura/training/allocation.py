"""How the process gets its memory: on Linux, large tensors are otherwise handed back and zeroed anew at every step."""

import ctypes
import platform

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
