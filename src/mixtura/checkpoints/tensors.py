"""Checkpoint files, tensor by tensor: read without loading a model, and written in shards of bounded size.

`StoredWeights` reads, `write_shards` writes safetensors as the hub lays them out (one file, or numbered files with an
index), and `copy_companions` brings along what belongs to the weights: tokenizer, chat template, generation settings
and licence.
"""

import json
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from mixtura.config import UserError

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "BOOL": torch.bool,
}


class StoredTensor(NamedTuple):
    """Where a tensor lies, and what it is."""

    file: Path
    shape: tuple[int, ...]
    dtype: torch.dtype


class PlannedTensor(NamedTuple):
    """A tensor to be written: it is made only when its shard is."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    make: Callable[[], Tensor]

    @property
    def bytes(self) -> int:
        """Its size in a file."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


class StoredWeights:
    """The tensors of a checkpoint folder by name; each is read when it is asked for."""

    def __init__(self, folder: Path) -> None:
        """Raises UserError where weights are missing or damaged."""
        self.folder = folder
        self.tensors: dict[str, StoredTensor] = {}
        for file in _weight_files(folder):
            with _opened(file) as opened:
                for name in opened.keys():  # noqa: SIM118 - the handle is no mapping
                    part = opened.get_slice(name)
                    self.tensors[name] = StoredTensor(file, tuple(part.get_shape()), _dtype(part, name, file))

    def read(self, name: str, index: int | None = None) -> Tensor:
        """The tensor of that name, or its part `index` along the first axis."""
        with _opened(self.tensors[name].file) as opened:
            return opened.get_tensor(name) if index is None else opened.get_slice(name)[index]

    def plan(self, name: str, new_name: str | None = None) -> PlannedTensor:
        """The tensor unchanged, under the same or another name."""
        stored = self.tensors[name]
        return PlannedTensor(new_name or name, stored.shape, stored.dtype, lambda: self.read(name))


def _dtype(part: Any, name: str, file: Path) -> torch.dtype:
    kind = part.get_dtype()
    if kind not in _DTYPES:
        raise UserError(
            f"{name} in '{file}' is stored as {kind}: give the model in float32, bfloat16 or float16, not quantised."
        )
    return _DTYPES[kind]


def _weight_files(folder: Path) -> list[Path]:
    index = folder / INDEX
    if not index.is_file():
        if not (folder / WHOLE).is_file():
            raise UserError(f"'{folder}' has no {WHOLE}: its weights are missing, copy or train the model again.")
        return [folder / WHOLE]
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, AttributeError) as error:
        raise UserError(f"'{index}' is damaged ({error}): copy or train the model again.") from error
    for name in names:
        if not (folder / name).is_file():
            raise UserError(f"'{folder}' lacks its shard {name}: copy it there, or train the model again.")
    return [folder / name for name in names]


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    try:
        with safe_open(file, framework="pt") as opened:
            yield opened
    except SafetensorError as error:
        raise UserError(f"'{file}' is damaged ({error}): copy or train the model again.") from error


def write_planned(tensors: list[PlannedTensor], folder: Path, max_bytes: int) -> None:
    """Writes tensors in order with `mixtura.checkpoints.tensors.write_shards`, each made when it is its turn."""
    write_shards(folder, ((tensor.name, _made(tensor)) for tensor in tensors), max_bytes=max_bytes)


def _made(tensor: PlannedTensor) -> Tensor:
    value = tensor.make()
    assert (tuple(value.shape), value.dtype) == (tensor.shape, tensor.dtype), f"{tensor.name} is not as planned"
    return value


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


COMPANIONS = (
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "*.model"),
    *("chat_template*", "generation_config.json", "LICENSE*", "NOTICE*"),
)
"""Patterns of file names. The licence is copied because the weights may only be passed on with it."""


def copy_companions(source: Path, folder: Path) -> None:
    """Copies the files that are there; those of the same name in `folder` are replaced."""
    for pattern in COMPANIONS:
        for path in sorted(source.glob(pattern)):
            if path.is_file():
                shutil.copyfile(path, folder / path.name)
