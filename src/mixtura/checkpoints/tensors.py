"""Checkpoint files, tensor by tensor: read without loading a model, and written in shards of bounded size.

`StoredWeights` reads, `write_shards` writes safetensors as the hub lays them out (one file, or numbered files with an
index), and `copy_companions` brings along what belongs to the weights: tokenizer, chat template, generation settings
and licence.
"""

import json
import os
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

    def __init__(self, folder: Path, name: str | None = None, *, fix: str = "copy or train the model again") -> None:
        """Finds all tensors.

        Args:
            folder: has the weights in one file, or in several with an index.
            name: what to call the model in errors; its folder when None.
            fix: what to do about weights that are missing or damaged, for errors.

        Raises:
            UserError: weights are missing or damaged, or of a type that no model here is stored in.
        """
        self.folder = folder
        self._name, self._fix = name or str(folder), fix
        self.tensors: dict[str, StoredTensor] = {}
        self.files, indexed = self._find_files()
        for file in self.files:
            with self._opened(file) as opened:
                for tensor in opened.keys():  # noqa: SIM118 - the handle is no mapping
                    part = opened.get_slice(tensor)
                    self.tensors[tensor] = StoredTensor(file, tuple(part.get_shape()), self._dtype(part, tensor))
        if lacking := sorted(indexed - self.tensors.keys()):
            raise UserError(f"'{self._name}' lacks {lacking[0]!r}, which {INDEX} names: {fix}.")

    def read(self, name: str, index: int | None = None) -> Tensor:
        """The tensor of that name, or its part `index` along the first axis."""
        with self._opened(self.tensors[name].file) as opened:
            return opened.get_tensor(name) if index is None else opened.get_slice(name)[index]

    def plan(self, name: str, new_name: str | None = None) -> PlannedTensor:
        """The tensor unchanged, under the same or another name."""
        stored = self.tensors[name]
        return PlannedTensor(new_name or name, stored.shape, stored.dtype, lambda: self.read(name))

    def _find_files(self) -> tuple[list[Path], set[str]]:
        """The files of weights, and the tensors that an index promises."""
        if not (self.folder / INDEX).is_file():
            if (self.folder / WHOLE).is_file():
                return [self.folder / WHOLE], set()
            other = next((file.name for end in ("gguf", "bin") for file in sorted(self.folder.glob(f"*.{end}"))), None)
            found = f"only '{other}'" if other else "no weights"
            raise UserError(f"'{self._name}' has {found}, and no {WHOLE}: {self._fix}.")
        try:
            places = json.loads((self.folder / INDEX).read_text(encoding="utf-8"))["weight_map"]
            names = sorted(set(places.values()))
        except (OSError, ValueError, LookupError, AttributeError, TypeError, RecursionError) as error:
            raise UserError(f"'{INDEX}' of '{self._name}' is damaged ({error!r}): {self._fix}.") from error
        for name in names:
            # A name with folders in it would read files outside of the checkpoint's.
            if not isinstance(name, str) or Path(name).name != name or not os.path.isfile(self.folder / name):
                raise UserError(f"'{self._name}' lacks its shard {name!r}: {self._fix}.")
        return [self.folder / name for name in names], set(places)

    @contextmanager
    def _opened(self, file: Path) -> Iterator[Any]:
        try:
            with safe_open(file, framework="pt") as opened:
                yield opened
        except (SafetensorError, OSError) as error:
            raise UserError(f"'{file.name}' of '{self._name}' is damaged ({error}): {self._fix}.") from error

    def _dtype(self, part: Any, tensor: str) -> torch.dtype:
        kind = part.get_dtype()
        if kind not in _DTYPES:
            raise UserError(
                f"'{tensor}' of '{self._name}' is stored as {kind}: give the model in float32, bfloat16 or float16, "
                "not quantised."
            )
        return _DTYPES[kind]


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
