"""Checkpoints in shards: each process writes its part of weights and optimizer state, any number of them reads it.

torch.distributed.checkpoint does both, in safetensors files whose headers say which part of a tensor each holds. Its
default format keeps that in a pickle, which this library neither writes nor reads. What is not sharded is written once.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from mixtura.config import UserError
from mixtura.errors import reason_of

SHARDS = "shards"
"""The folder in a checkpoint."""


def save_shards(model: nn.Module, optimizer: Any, folder: Path) -> None:
    """Writes this process's part of the model and of its optimizer's state; all processes call it alike.

    Raises:
        OSError: a file cannot be written in full, by this process or another.
    """
    state = _model_state(model) | _optimizer_state(model, optimizer)
    writer = HuggingFaceStorageWriter(str(folder / SHARDS), save_distributed=True)
    try:
        with _alone_in_silence():
            save(state, storage_writer=writer, no_dist=not distributed.is_initialized())
    except CheckpointException as error:
        raise OSError(f"{SHARDS} could not be written: {_first_reason(error)}") from error


def load_model(model: nn.Module, folder: Path, *, alone: bool = False) -> None:
    """Reads the weights and buffers that `save_shards` wrote, in whatever layout, into a model in any other.

    Args:
        model: in shards or not.
        folder: the checkpoint.
        alone: whether every process reads the whole by itself, into a model that is not in shards.

    Raises:
        UserError: the files are damaged or of another model.
    """
    _load(_model_state(model), folder, alone=alone)


def load_optimizer(model: nn.Module, optimizer: Any, folder: Path) -> None:
    """Reads the optimizer's state, as `load_model` does the weights."""
    _make_state(optimizer)
    _load(_optimizer_state(model, optimizer), folder)


def _load(state: dict[str, Tensor], folder: Path, *, alone: bool = False) -> None:
    reader = HuggingFaceStorageReader(str(folder / SHARDS))
    try:
        with _alone_in_silence():
            load(state, storage_reader=reader, no_dist=alone or not distributed.is_initialized())
    except (CheckpointException, Exception) as error:  # files, headers and plans each have errors of their own
        raise UserError(
            f"The checkpoint '{folder}' is damaged or of another model: its {SHARDS} cannot be read "
            f"({_first_reason(error)}); remove the folder to go on from the one before it, or from the start."
        ) from error


@contextmanager
def _alone_in_silence() -> Iterator[None]:
    """A block in which torch does not warn that one process saves and loads by itself, which is meant."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
        yield


def _first_reason(error: BaseException) -> str:
    """Why it failed, in the first process where it did."""
    if isinstance(error, CheckpointException):
        error = next((failed for failed, _ in error.failures.values()), error)
    return reason_of(error) if isinstance(error, Exception) else str(error)


def _model_state(model: nn.Module) -> dict[str, Tensor]:
    """Parameters, each once, and persistent buffers; the tensors themselves."""
    state = model.state_dict()  # before the parameters are read: brings all of them back into shards
    parameters = dict(model.named_parameters(remove_duplicate=False))
    buffers = {name: tensor for name, tensor in state.items() if name not in parameters}
    found = {name: parameter.detach() for name, parameter in model.named_parameters()} | buffers
    return {f"model.{name}": _with_axis(tensor) for name, tensor in found.items()}


def _optimizer_state(model: nn.Module, optimizer: Any) -> dict[str, Tensor]:
    """What the optimizer keeps of each parameter, by the parameter's name."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    return {
        f"optimizer.{names[parameter]}.{key}": _with_axis(value)
        for parameter, state in optimizer.state.items()
        for key, value in state.items()
    }


def _with_axis(tensor: Tensor) -> Tensor:
    """The same numbers with one axis at least, by which files can be cut."""
    return tensor if tensor.dim() else tensor.view(1)


def _make_state(optimizer: Any) -> None:
    """Makes an optimizer that has not stepped keep what it keeps; parameters do not move."""
    if optimizer.state:
        return
    rates = [group["lr"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"] = 0.0
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
