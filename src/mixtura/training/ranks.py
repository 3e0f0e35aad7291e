"""Several processes that train one model, as torchrun or `accelerate launch` start them.

The batch of a recipe is that of a whole step, however many processes there are, so a run has the numbers of one
process. They differ in the last digits alone, because sums are taken in another order. Each process takes whole
micro-batches of a step where accumulation steps divide among the processes, and else an equal part of every
micro-batch. A micro-batch is never divided where that would change what a model computes: groups of Mixture of Tokens
stay whole, and layers whose tokens compete over the batch get all of it.

What is random inside a model (dropout, groups that are drawn to be empty) is drawn by each process for its own rows.
"""

import atexit
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from accelerate import PartialState
from torch import nn

from mixtura.config import TrainingConfig, UserError
from mixtura.errors import rank
from mixtura.layers import ExpertChoiceMoE, ExpertThresholdMoE, MixtureOfTokens, TokenChoiceMoE

PATIENCE = timedelta(hours=12)
"""How long a process waits for another: the first one may prepare data or evaluate while the others wait."""


@dataclass(frozen=True)
class Share:
    """What one process takes of every step."""

    batch_size: int
    """Examples of one of its micro-batches."""
    micro_batches: int
    """How many of them it has in a step."""
    parts: bool
    """Whether each is a part of one of the recipe's micro-batches, whose other parts the other processes have."""


def world_size() -> int:
    """The number of processes that this one was started with; 1 without torchrun."""
    return int(os.environ.get("WORLD_SIZE") or 1)


def join() -> None:
    """Meets the other processes, where there are any; called again, it does nothing."""
    if world_size() > 1 and not torch.distributed.is_initialized():
        cpu = not torch.cuda.is_available()
        PartialState(cpu=cpu, timeout=PATIENCE)
        # Threads of the process group that still run when the interpreter exits make it abort.
        atexit.register(_leave)


def _leave() -> None:
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def wait_for_all() -> None:
    """Returns once every process has come here."""
    if world_size() > 1:
        join()
        torch.distributed.barrier()


def of_first(value: float) -> float:
    """The number that the first process has, in all processes, which thereby decide alike."""
    if world_size() == 1:
        return value
    told = _number(value)
    torch.distributed.broadcast(told, src=0)
    return told.item()


@contextmanager
def first_goes_first() -> Iterator[None]:
    """A block that the first process runs while the others wait, and then they run it, as for what is kept in a cache.

    Raises:
        UserError: in the others, where it failed in the first.
    """
    if world_size() == 1 or not is_first():
        if not of_first(1.0):
            raise UserError("The first process has stopped, and says why.")
        yield
        return
    went_well = 0.0
    try:
        yield
        went_well = 1.0
    finally:
        of_first(went_well)


@contextmanager
def together() -> Iterator[None]:
    """A block that all processes run, and after which none goes on where one has failed in it.

    Raises:
        UserError: in the others.
    """
    failed = True
    try:
        yield
        failed = False
    finally:
        lost = any_rank(failed)
    if lost:
        raise UserError("Another process has stopped, and says why.")


def exchanging(model: nn.Module, now: bool) -> AbstractContextManager[Any]:
    """A block whose backward pass exchanges gradients, or, with `now` off, leaves that to a later one."""
    if now or not isinstance(model, nn.parallel.DistributedDataParallel):
        return nullcontext()
    return model.no_sync()


def any_rank(flag: bool) -> bool:
    """Whether the flag is set in any process."""
    if world_size() == 1:
        return flag
    told = _number(float(flag))
    torch.distributed.all_reduce(told, torch.distributed.ReduceOp.MAX)
    return bool(told.item())


def _number(value: float) -> torch.Tensor:
    """A tensor where the processes exchange tensors."""
    join()
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    return torch.tensor(value, dtype=torch.float64, device=device)


def is_first() -> bool:
    """Whether this process is the one that writes files."""
    return rank() == 0


def share_of_step(model: nn.Module, config: TrainingConfig, processes: int) -> Share:
    """Divides the micro-batches of a step among processes so that the model computes what one process would.

    Raises:
        UserError: they cannot be divided; the sentence says what to change.
    """
    batch, count = config.batch_size, config.gradient_accumulation_steps
    whole = Share(batch, count // processes, parts=False)
    if processes == 1:
        return whole
    reason = _why_whole(model, config, processes)
    if count % processes == 0 and (reason or not _sees_order(model)):
        return whole
    if reason is None:
        return Share(batch // processes, count, parts=True)
    raise UserError(
        f"{reason}: make 'training.gradient_accumulation_steps', which is {count}, a multiple of {processes}, so that "
        f"each of the {processes} processes takes whole micro-batches; lower 'training.batch_size' for the same batch "
        "a step."
    )


def _sees_order(model: nn.Module) -> bool:
    """Whether it matters which micro-batches of a step come before which; parts of each keep that order."""
    return getattr(getattr(model, "config", None), "balance_over", "") == "global"


def _why_whole(model: nn.Module, config: TrainingConfig, processes: int) -> str | None:
    """Why a micro-batch cannot be divided among the processes; None where it can."""
    batch = config.batch_size
    if batch % processes:
        return f"'training.batch_size' is {batch}, which {processes} processes cannot share evenly"
    each = batch // processes
    for layer in model.modules():
        if isinstance(layer, MixtureOfTokens | ExpertChoiceMoE) and layer.group_over == "batch":
            group = layer.group_size or batch
            if each % group:
                return (
                    f"Each of {processes} processes would get {each} examples of 'training.batch_size' {batch}, which "
                    f"do not fill groups of {group}, and a group must not be divided"
                )
        elif (competing := _competes(layer)) is not None:
            return f"{competing} over a micro-batch, which {processes} processes would divide"
    return None


def _competes(layer: nn.Module) -> str | None:
    """What goes on between all tokens of a micro-batch in a layer; None where its tokens do not compete."""
    if isinstance(layer, ExpertChoiceMoE) and layer.group_over == "all":
        return "Experts choose their tokens"
    if isinstance(layer, ExpertThresholdMoE):
        return "Thresholds are found"
    if isinstance(layer, TokenChoiceMoE) and layer.capacity_factor is not None:
        return f"A 'capacity_factor' of {layer.capacity_factor:g} drops tokens by their order"
    return None
