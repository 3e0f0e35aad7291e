"""A model in shards: each process keeps a part of every weight, of its gradient and of the optimizer's state (FSDP2).

Layers are gathered one at a time, just before they run, and every process runs its own share of a step's batch, so a
run has the numbers of one process, as in `ranks`. The experts may be divided besides: each process of a group then
keeps some of them whole or in shards, and tokens or mixtures travel, see `mixtura.kernels.exchange`.

`divide` leaves the caller's model as it is and shards another one around the same parameters. `gather` brings the
trained weights home.

Letters of the layout are those of `mixtura plan`: replicas (DP), shards (FSDP), expert ranks (EP).
"""

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import distributed, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, Shard
from transformers import PreTrainedModel

from mixtura.config import TrainingConfig, UserError
from mixtura.kernels import ExpertExchange
from mixtura.layers import Experts, MergedExperts, MixtureOfTokens, SoftMoE
from mixtura.models import MixtureForCausalLM
from mixtura.models.experts_backends import NAME, kernel_activation, stock_experts
from mixtura.training import ranks

_OPTIMIZERS = ("adamw", "muon")


@dataclass(frozen=True)
class Layout:
    """How processes hold a model together."""

    processes: int
    shards: int
    """Processes that hold one copy of what is not an expert."""
    expert_ranks: int
    """Processes among which the experts of one copy are divided."""

    @property
    def expert_shards(self) -> int:
        """Processes that hold one rank's experts together, as in `mixtura.planning`."""
        return max(1, self.shards // self.expert_ranks)


def in_shards(config: TrainingConfig) -> bool:
    """Whether checkpoints are written in shards, which any number of processes can read."""
    return config.shards != 1 or config.expert_ranks > 1


def layout_of(config: TrainingConfig, processes: int) -> Layout | None:
    """The layout that a recipe asks for; None where each process holds a whole copy, as one alone does.

    Raises:
        UserError: the processes do not divide so.
    """
    if processes == 1 or not in_shards(config):
        return None
    shards, expert_ranks = config.shards or processes, config.expert_ranks
    for key, value in (("shards", shards), ("expert_ranks", expert_ranks)):
        if processes % value:
            raise UserError(
                f"'training.{key}' is {value}, but {processes} processes do not divide into groups of {value}: set it "
                f"to a divisor of {processes}, or start another number of processes."
            )
    if shards % expert_ranks and expert_ranks % shards:
        raise UserError(
            f"'training.shards' is {shards} and 'training.expert_ranks' {expert_ranks}: one must be a multiple of the "
            "other, so that shards of experts are of one size."
        )
    return Layout(processes, shards, expert_ranks)


def check_layout(model: nn.Module, config: TrainingConfig, processes: int) -> Layout | None:
    """`layout_of`, after refusing what cannot be trained in it.

    Raises:
        UserError: names the setting and the fix.
    """
    if not in_shards(config):
        return None
    fix = "leave 'training.shards' and 'training.expert_ranks' at 1"
    if not _layers(model) or getattr(model, "is_quantized", False):
        raise UserError(
            f"A {type(model).__name__} is not trained in shards, only language models that are tuned whole are: {fix}."
        )
    if config.optimizer not in _OPTIMIZERS:
        raise UserError(
            f"'training.optimizer' is '{config.optimizer}', which cannot step in shards: use adamw or muon, or {fix}."
        )
    if config.compile:
        raise UserError(f"'training.compile' is true, but models in shards are not compiled: leave it out, or {fix}.")
    if isinstance(model, MixtureForCausalLM) and model.config.transition_to is not None:
        raise UserError(f"'transition_to' is '{model.config.transition_to}', which reads all weights at once: {fix}.")
    layout = layout_of(config, processes)
    if layout is not None and layout.expert_ranks > 1:
        if config.experts_backend != "auto":
            raise UserError(
                f"'training.experts_backend' is '{config.experts_backend}', but experts that processes share run on "
                "Mixtura's kernels alone: set it to \"auto\", or 'training.expert_ranks' to 1."
            )
        _check_experts(model, layout)
    return layout


def _layers(model: nn.Module) -> list[nn.Module]:
    """The decoder layers of a language model of ours or of transformers; none where adapters or heads are trained."""
    if not isinstance(model, PreTrainedModel) or model.config.is_encoder_decoder:
        return []
    if not (isinstance(model, MixtureForCausalLM) or all(each.requires_grad for each in model.parameters())):
        return []
    kinds = model._no_split_modules or ()
    return [layer for layer in model.modules() if type(layer).__name__ in kinds]


def _check_experts(model: nn.Module, layout: Layout) -> None:
    where, fix = f"'training.expert_ranks' is {layout.expert_ranks}", "set it to 1"
    if isinstance(model, MixtureForCausalLM):
        if model.config.zero_fill or model.config.alone_fraction:
            raise UserError(
                f"{where}, but 'zero_fill' and 'alone_fraction' draw other groups on every process, whose mixtures "
                f"would not be as many: leave these out, or {fix}."
            )
        if any(isinstance(layer, MergedExperts) for layer in model.mixture_layers()):
            raise UserError(f"{where}, but merged experts need the weights of all experts everywhere: {fix}.")
    for experts in _experts(model):
        if not isinstance(experts, Experts):
            kernel_activation(experts)
        if experts.num_experts % layout.expert_ranks:
            raise UserError(
                f"{where}, which does not divide the {experts.num_experts} experts of a layer: set it to a divisor."
            )
        widths = [weight.size(1) for weight in experts.parameters(recurse=False)]
        if any(width % layout.expert_shards for width in widths):
            raise UserError(
                f"{where} and 'training.shards' {layout.shards}, so {layout.expert_shards} processes would share the "
                f"{' and '.join(map(str, widths))} rows of an expert's projections, which they cannot evenly: choose "
                "'training.shards' so that they can."
            )


def _experts(model: nn.Module) -> list[Any]:
    """The modules of experts, ours or those that transformers' interface reaches."""
    return [*(each for each in model.modules() if isinstance(each, Experts)), *stock_experts(model)]


def check_batches(
    model: MixtureForCausalLM, layout: Layout, batches: Sequence[Mapping[str, Any]], device: torch.device
) -> None:
    """Refuses a step whose batches have other lengths on other processes, where these exchange mixtures of one size.

    Raises:
        UserError: on all processes alike, which would otherwise wait for each other for ever.
    """
    if layout.expert_ranks == 1 or not any(isinstance(each, MixtureOfTokens | SoftMoE) for each in model.modules()):
        return
    sizes = torch.tensor([tuple(batch["input_ids"].shape) for batch in batches], device=device)
    least, most = sizes.clone(), sizes.clone()
    for each, chosen in ((least, distributed.ReduceOp.MIN), (most, distributed.ReduceOp.MAX)):
        distributed.all_reduce(each, chosen)
    if not torch.equal(least, most):
        raise UserError(
            "The processes have batches of different lengths, so their mixtures are not as many as one another's: set "
            "'training.expert_ranks' to 1."
        )


def divide(model: nn.Module, layout: Layout, device: torch.device) -> nn.Module:
    """A model with the same weights, of which this process holds its shards on the device; `model` stays as it is.

    All processes call this alike. The copy is trained as any other model is; a gradient is a mean over all processes.
    """
    # Parameters are shared until they are replaced by shards, layer by layer, so no second copy is ever held.
    divided = copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})
    mesh = _mesh(device, layout.processes // layout.shards, layout.shards)
    numbers = _keep_numbers_whole(divided, device)
    expert_mesh = None
    if layout.expert_ranks > 1:
        copies = layout.processes // (layout.expert_shards * layout.expert_ranks)
        expert_mesh = _mesh(device, copies, layout.expert_shards, layout.expert_ranks)
    experts = _experts(divided)
    if expert_mesh is not None and not all(isinstance(each, Experts) for each in experts):
        divided.set_experts_implementation(NAME)  # pyright: ignore[reportCallIssue]
    for layer in _layers(divided):
        _copy_to(layer, device)
        within = set(layer.modules())
        for each in experts:
            if expert_mesh is not None and each in within:
                _divide_experts(each, mesh, expert_mesh, layout)
        along = partial(_sharded_along, shards=layout.shards)
        fully_shard(layer, mesh=mesh, ignored_params=numbers, shard_placement_fn=along)
    _copy_to(divided, device)
    fully_shard(divided, mesh=mesh, ignored_params=numbers)
    # Else accelerate would wrap it in DistributedDataParallel, which takes no shards.
    divided._is_accelerate_prepared = True  # pyright: ignore[reportAttributeAccessIssue, reportArgumentType]
    return divided


def _mesh(device: torch.device, *sizes: int) -> DeviceMesh:
    return init_device_mesh(device.type, sizes, mesh_dim_names=("replicas", "shards", "expert_ranks")[: len(sizes)])


def _keep_numbers_whole(divided: nn.Module, device: torch.device) -> set[nn.Parameter]:
    """Gives every process all parameters that are single numbers, which have no axis to shard; returns them."""
    found = set()
    for part in divided.modules():
        for name, parameter in list(part.named_parameters(recurse=False)):
            if parameter.dim():
                continue
            own = nn.Parameter(parameter.detach().to(device, copy=True), parameter.requires_grad)
            if own.requires_grad:
                own.register_post_accumulate_grad_hook(_average)
            setattr(part, name, own)
            found.add(own)
    return found


@torch.no_grad()
def _average(parameter: torch.Tensor) -> None:
    """Makes a gradient the mean over all processes; what was averaged before is the same on all and stays."""
    assert parameter.grad is not None
    distributed.all_reduce(parameter.grad)
    parameter.grad /= distributed.get_world_size()


def _copy_to(module: nn.Module, device: torch.device) -> None:
    """Replaces parameters by ones on the device, and no parameter that was replaced before; tied ones stay tied."""
    copies: dict[int, nn.Parameter] = {}
    for part in module.modules():
        for name, parameter in part.named_parameters(recurse=False, remove_duplicate=False):
            if isinstance(parameter, DTensor) or not parameter.dim():
                continue
            if id(parameter) not in copies:
                copies[id(parameter)] = nn.Parameter(parameter.detach().to(device), parameter.requires_grad)
            setattr(part, name, copies[id(parameter)])


def _sharded_along(parameter: nn.Parameter, *, shards: int) -> Shard:
    """The axis of a weight that processes divide: rows of a stack of experts where these are too few to go round."""
    by_rows = parameter.dim() == 3 and parameter.size(0) % shards and not parameter.size(1) % shards
    return Shard(1) if by_rows else Shard(0)


def _divide_experts(experts: Any, mesh: DeviceMesh, expert_mesh: DeviceMesh, layout: Layout) -> None:
    """Leaves this process its run of the experts, in shards of their rows where several processes have the same."""
    for shared in experts.children():
        if any(True for _ in shared.parameters()):  # into and out of a space that they share
            fully_shard(shared, mesh=mesh)
    among = expert_mesh["expert_ranks"]
    for name, parameter in list(experts.named_parameters(recurse=False)):
        own = parameter.detach().chunk(layout.expert_ranks)[among.get_local_rank()].clone()
        divided = DTensor.from_local(own, among, [Shard(0)], run_check=False)
        setattr(experts, name, nn.Parameter(divided, parameter.requires_grad))
    experts.exchange = ExpertExchange(among.get_group(), experts.num_experts)
    # Rows, because the experts themselves are divided by the other axis of the mesh.
    fully_shard(experts, mesh=expert_mesh["replicas", "shards"], shard_placement_fn=lambda _: Shard(1))


@torch.no_grad()
def gather(divided: nn.Module, model: nn.Module) -> None:
    """Copies the weights and buffers of `divided` into the model that it was made from, one tensor at a time."""
    whole = model.state_dict()
    for name, value in divided.state_dict().items():
        whole[name].copy_(value.full_tensor() if isinstance(value, DTensor) else value)


@contextmanager
def reading(divided: nn.Module, part: nn.Module) -> Iterator[None]:
    """A block in which the weights of a part of the model can be used outside a forward pass; all processes enter it.

    The part may be of a model that is not in shards.
    """
    within = set(part.modules())
    holders = [
        module
        for module in divided.modules()
        if isinstance(module, FSDPModule) and module is not divided and within & set(module.modules())
    ]
    for holder in holders:
        holder.unshard()
    try:
        yield
    finally:
        for holder in holders:
            holder.reshard()


def in_step(model: nn.Module, config: TrainingConfig, device: torch.device) -> tuple[nn.Module, nn.Module]:
    """On the device, the model whose parameters an optimizer steps, and the one that runs, whose gradients are means.

    Both are the model itself where one process is alone, and another one where processes hold shards.
    """
    processes = ranks.world_size()
    layout = layout_of(config, processes)
    if layout is not None:
        ranks.join()
        divided = divide(model, layout, device)
        return divided, divided
    model.to(device)
    if processes == 1:
        return model, model
    ranks.join()
    return model, nn.parallel.DistributedDataParallel(model)
