"""What runs where: versions and hardware, as results and folders record them, and the time."""

import os
import platform
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

import torch

from mixtura import __version__
from mixtura.kernels import native
from mixtura.training import ranks


def environment() -> dict[str, str | int | None]:
    """Versions and hardware, as results.json has them."""
    return {
        "mixtura": __version__,
        **{name: _version(name) for name in ("torch", "transformers", "accelerate", "tokenizers", "numpy")},
        **{name: _version(name) for name in ("peft", "sacrebleu")},
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": _processor(),
        "cpu_count": os.cpu_count(),
        "threads": torch.get_num_threads(),
        **({"processes": ranks.world_size()} if ranks.world_size() > 1 else {}),
        "cpu_experts": "compiled C" if native.library() is not None else "torch (no C compiler, or no BLAS to call)",
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
    }


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.machine()


def now() -> str:
    """The time in UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")
