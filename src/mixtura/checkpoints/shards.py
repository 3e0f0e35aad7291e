"""Safetensors in the hub's layout, written one shard at a time: one file, or numbered files with an index."""

import json
from collections.abc import Iterable
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

INDEX = "model.safetensors.index.json"
WHOLE = "model.safetensors"


def write_shards(folder: Path, tensors: Iterable[tuple[str, Tensor]], *, max_bytes: int) -> int:
    """Writes tensors as they come and keeps no more of them than one shard and the next tensor.

    Args:
        folder: exists.
        tensors: names and tensors, each made when it is asked for.
        max_bytes: of a shard; a tensor that is larger gets one of its own.

    Returns:
        Bytes of all tensors.
    """
    shards: list[tuple[Path, list[str]]] = []
    pending: dict[str, Tensor] = {}
    waiting = total = 0
    for name, tensor in tensors:
        if pending and waiting + tensor.nbytes > max_bytes:
            shards.append(_write(folder, len(shards), pending))
            pending, waiting = {}, 0
        pending[name] = tensor.contiguous()
        waiting += tensor.nbytes
        total += tensor.nbytes
        del tensor  # else it would outlive its shard while the next one is made
    shards.append(_write(folder, len(shards), pending))
    _name(folder, shards, total)
    return total


def _write(folder: Path, number: int, tensors: dict[str, Tensor]) -> tuple[Path, list[str]]:
    path = folder / f"part-{number:05d}.safetensors"
    save_file(tensors, path, metadata={"format": "pt"})
    path.chmod(0o644)  # safetensors makes files that only their owner reads
    return path, list(tensors)


def _name(folder: Path, shards: list[tuple[Path, list[str]]], total: int) -> None:
    """Gives the files their names, which say how many there are, and writes the index."""
    if len(shards) == 1:
        shards[0][0].rename(folder / WHOLE)
        return
    places: dict[str, str] = {}
    for number, (path, names) in enumerate(shards, start=1):
        final = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        path.rename(folder / final)
        places |= dict.fromkeys(names, final)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
