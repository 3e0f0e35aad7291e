"""Which of torchrun's processes this is, as its environment variables say; without torchrun, the first and only one."""

import os


def rank() -> int:
    """The number of this process among all; 0 is the one that writes and speaks."""
    return int(os.environ.get("RANK") or 0)


def local_rank() -> int:
    """The number of this process on its machine; 0 says what went wrong there."""
    return int(os.environ.get("LOCAL_RANK") or 0)


def launch() -> str:
    """What all processes of one start have in common and no other start has; empty without torchrun."""
    if int(os.environ.get("WORLD_SIZE") or 1) == 1:
        return ""
    return ":".join(os.environ.get(name, "") for name in ("MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RESTART_COUNT"))
