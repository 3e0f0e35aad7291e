"""Checkpoints in shards: each process writes its part of weights and optimizer state, any number of them reads it.

torch.distributed.checkpoint does both, in safetensors files whose headers say which part of a tensor each holds. Its
default format keeps that in a pickle, which this library neither writes nor reads. What is not sharded is written once.

Training goes on while files are written: each process copies its part, and a thread writes the copy. The threads talk
through process groups of their own, since messages of two threads in one group would be taken for each other's.
"""

import warnings
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, distributed, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import async_save, save

from mixtura.config import UserError
from mixtura.errors import reason_of
from mixtura.training import ranks

SHARDS = "shards"
"""The folder in a checkpoint."""


class ShardSaver:
    """Writes one checkpoint at a time, in the background where there are several processes, which all call it alike.

    The end of its `with` block waits for the last one.
    """

    def __init__(self) -> None:
        """Nothing is being written."""
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None
        self._group: Any = None

    def __enter__(self) -> Self:
        """The block in which checkpoints are started."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Waits; an error in the block is not replaced by one in the background."""
        try:
            self.settle() if kind is not None else self.wait()
        finally:
            self._thread.shutdown()
            if self._group is not None:
                distributed.destroy_process_group(self._group)

    @property
    def failed(self) -> bool:
        """Whether this process knows that the checkpoint cannot be written; `wait` says why."""
        return self._pending is not None and self._pending.done() and self._pending.exception() is not None

    def start(self, model: nn.Module, optimizer: Any, folder: Path, unfinished: ExitStack) -> None:
        """Copies this process's part of the model and of its optimizer's state, and has the copy written.

        Args:
            model: in shards, or on one process.
            optimizer: of its parameters.
            folder: of the checkpoint, as long as it is unfinished.
            unfinished: is left once all processes have written, or failed to: it then finishes the folder.

        Raises:
            UserError: with one process, the files cannot be written.
        """
        state = _model_state(model) | _optimizer_state(model, optimizer)
        writer = HuggingFaceStorageWriter(str(folder / SHARDS), save_distributed=True)
        if not distributed.is_initialized():
            with unfinished, _as_other_writes_fail(), _alone_in_silence():
                save(state, storage_writer=writer, no_dist=True)
            return
        if self._group is None:
            self._group = distributed.new_group(backend="gloo", timeout=ranks.PATIENCE)
        written = async_save(state, storage_writer=writer, process_group=self._group)
        assert isinstance(written, Future), "which is so for this stager"
        self._pending = self._thread.submit(_finish, written, unfinished)

    def wait(self) -> None:
        """Returns once the last checkpoint is whole.

        Raises:
            UserError: it cannot be written, by this process or another.
        """
        pending, self._pending = self._pending, None
        if pending is None:
            return
        error = pending.exception()
        lost = ranks.any_rank(error is not None)
        if error is not None:
            raise error
        if lost:
            raise UserError("Another process could not write its part of a checkpoint, and says why.")

    def settle(self) -> None:
        """Returns once the last checkpoint is whole or given up, in this process alone."""
        if self._pending is not None:
            self._pending.exception()


def _finish(written: Future[Any], unfinished: ExitStack) -> None:
    with unfinished, _as_other_writes_fail():
        written.result()


@contextmanager
def _as_other_writes_fail() -> Iterator[None]:
    """A block whose failure to save is an OSError."""
    try:
        yield
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
