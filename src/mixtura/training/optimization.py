"""Optimizer and learning rate schedule, the same for every arm; and Muon for the matrices inside a model.

Muon and AdamW for everything else are one optimizer. Jordan et al. 2024 (kellerjordan.github.io/posts/muon): the
momentum of a matrix is replaced by the orthogonal matrix nearest to it, found by five Newton-Schulz steps. Moonshot
(arXiv 2502.16982, section 2.2) scales it by 0.2 * sqrt(max(rows, columns)), after which it is as large as AdamW's
update, so one learning rate and one weight decay serve both. A stack of experts is many matrices, and each is made
orthogonal by itself; so are gate and up, which lie in one tensor. torch.optim.Muon does the same for single matrices
and takes no stacks.

Shapes: P stacked matrices, M rows, N columns.
"""

import math
from collections.abc import Callable, Iterable
from functools import partial
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import distribute_tensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.optim import Adafactor, AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from mixtura.config import TrainingConfig
from mixtura.layers.routing import Router

_ParameterGroup = dict[str, Any]
"""Parameters and what moves them, as torch's optimizers keep them."""
_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_STEPS = 5
_MOMENTUM = 0.95
_ADAM_EPSILON = 1e-8


class Muon(Optimizer):
    """Muon for groups with `matrices` above zero, AdamW for the others."""

    def __init__(self, groups: Iterable[_ParameterGroup], *, lr: float, betas: tuple[float, float]) -> None:
        """Builds the optimizer.

        Args:
            groups: parameter groups, each with `weight_decay` and `matrices`: how many matrices lie on top of each
                other in the rows of one; 0 is AdamW's.
            lr: the learning rate of all.
            betas: AdamW's.
        """
        super().__init__(groups, {"lr": lr, "betas": betas, "weight_decay": 0.0, "matrices": 0})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """One update of every parameter that has a gradient; returns what `closure` returns."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                if group["matrices"]:
                    self._move_by_muon(parameter, group)
                else:
                    self._move_by_adam(parameter, group)
        return loss

    def _move_by_muon(self, parameter: Tensor, group: _ParameterGroup) -> None:
        state, grad = self.state[parameter], parameter.grad
        assert grad is not None
        if not state:
            state["momentum"] = torch.zeros_like(parameter)
        state["momentum"].lerp_(grad, 1 - _MOMENTUM)
        nesterov = torch.lerp(grad, state["momentum"], _MOMENTUM)
        rows = parameter.size(-2) // group["matrices"]
        update_PMN = orthogonalize(_whole(nesterov).reshape(-1, rows, parameter.size(-1)))
        size = 0.2 * max(update_PMN.shape[-2:]) ** 0.5
        update = _part_of(update_PMN.view(parameter.shape).to(parameter.dtype), parameter)
        parameter.add_(update, alpha=-group["lr"] * size)

    def _move_by_adam(self, parameter: Tensor, group: _ParameterGroup) -> None:
        state, grad, (beta1, beta2) = self.state[parameter], parameter.grad, group["betas"]
        assert grad is not None
        if not state:
            state["step"] = torch.zeros(())
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
        state["step"] += 1
        step = state["step"].item()  # on the CPU, so nothing waits for a device
        state["exp_avg"].lerp_(grad, 1 - beta1)
        state["exp_avg_sq"].mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        root = (state["exp_avg_sq"] / (1 - beta2**step)).sqrt_().add_(_ADAM_EPSILON)
        parameter.addcdiv_(state["exp_avg"], root, value=-group["lr"] / (1 - beta1**step))


def _part_of(update: Tensor, parameter: Any) -> Tensor:
    """An update that every process has whole, divided as the parameter is."""
    if not hasattr(parameter, "full_tensor"):
        return update
    return distribute_tensor(update, parameter.device_mesh, parameter.placements, src_data_rank=None)


def orthogonalize(x_PMN: Tensor) -> Tensor:
    """(P, M, N) -> (P, M, N): singular values brought to about 1 (0.7 to 1.2), in bfloat16 on a GPU."""
    if x_PMN.device.type == "cuda":
        x_PMN = x_PMN.bfloat16()
    tall = x_PMN.size(1) > x_PMN.size(2)
    x_PMN = x_PMN.mT if tall else x_PMN
    x_PMN = x_PMN / x_PMN.norm(dim=(1, 2), keepdim=True).clamp_min(1e-7)
    a, b, c = _COEFFICIENTS
    for _ in range(_STEPS):
        gram_PMM = x_PMN @ x_PMN.mT
        x_PMN = torch.baddbmm(x_PMN, torch.baddbmm(gram_PMM, gram_PMM, gram_PMM, beta=b, alpha=c), x_PMN, beta=a)
    return x_PMN.mT if tall else x_PMN


def _matrices_of(model: nn.Module, is_router: Callable[[nn.Module], bool]) -> dict[nn.Parameter, int]:
    """The parameters that Muon moves, each with the number of matrices that lie on top of each other in its rows.

    Those are the weights of linear layers and stacks of experts inside repeated layers: embeddings, heads and vectors
    are AdamW's, and routers too, whose rows are so many classes.
    """
    found = {}
    for layers in model.modules():
        for module in layers.modules() if isinstance(layers, nn.ModuleList) else ():
            if is_router(module):
                continue
            for name, parameter in module.named_parameters(recurse=False):
                if parameter.dim() == 3 or (parameter.dim() == 2 and isinstance(module, nn.Linear)):
                    found[parameter] = 2 if name == "gate_up_proj" else 1
    return found


OPTIMIZER_NAMES = {
    "adamw": "AdamW",
    "adamw_8bit": "AdamW with 8-bit moments",
    "adafactor": "Adafactor",
    "muon": "Muon for matrices, AdamW for the rest",
}
SCHEDULE_NAMES = {"cosine": "cosine schedule", "wsd": "a plateau and a linear decay"}
"""What reports call them."""
_CLIPPING_EPSILON = 1e-6
"""Added by torch to the norm it divides by."""


def build_optimizer(model: nn.Module, config: TrainingConfig, *, learning_rate: float) -> Optimizer:
    """The recipe's optimizer; weight decay applies to matrices only, not to norms, biases and other vectors.

    Adafactor (arXiv 1804.04235) is torch's: its second moments are factored for each expert by itself, it keeps no
    first moment, and its rate is relative to a parameter's size, so the betas do not apply and rates differ.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    matrices = [parameter for parameter in trained if parameter.dim() >= 2]
    vectors = [parameter for parameter in trained if parameter.dim() < 2]
    groups = [
        {"params": parameters, "weight_decay": decay}
        for kind, decay in ((matrices, config.weight_decay), (vectors, 0.0))
        for parameters in _by_mesh(kind)
    ]
    betas = (config.adam_beta1, config.adam_beta2)
    if config.optimizer == "muon":
        return Muon(_muon_groups(model, config), lr=learning_rate, betas=betas)
    if config.optimizer == "adafactor":
        return Adafactor(groups, lr=learning_rate)
    if config.optimizer == "adamw_8bit":
        return import_module("torchao.optim").AdamW8bit(groups, lr=learning_rate, betas=betas)
    fused = all(parameter.device.type in ("cpu", "cuda") for parameter in trained)
    return AdamW(groups, lr=learning_rate, betas=betas, fused=fused)


def _by_mesh(parameters: Iterable[Tensor]) -> list[list[Any]]:
    """Parameters that one operation of torch can take together: those that are divided alike, or not at all."""
    groups: dict[Any, list[Tensor]] = {}
    for parameter in parameters:
        groups.setdefault(getattr(parameter, "device_mesh", None), []).append(parameter)
    return list(groups.values())


def _muon_groups(model: nn.Module, config: TrainingConfig) -> list[_ParameterGroup]:
    """Parameters by who moves them and whether they decay, in the model's order."""
    matrices = _matrices_of(model, lambda module: isinstance(module, Router))
    groups: dict[tuple[int, float], list[nn.Parameter]] = {}
    for parameter in model.parameters():
        if parameter.requires_grad:
            decay = config.weight_decay if parameter.dim() >= 2 else 0.0
            groups.setdefault((matrices.get(parameter, 0), decay), []).append(parameter)
    return [
        {"params": parameters, "matrices": stacked, "weight_decay": decay}
        for (stacked, decay), parameters in groups.items()
    ]


def clip_gradients(parameters: Iterable[nn.Parameter], max_norm: float) -> Tensor:
    """Scales gradients down to norm `max_norm`, returns their norm before; as torch's clip_grad_norm_, to the bit.

    If the norm is within the bound, torch multiplies all gradients by 1. On the CPU that pass over the gradients of
    every expert is left out; on a GPU, finding out whether it is needed would wait for the device.

    Of gradients in shards, the norm is that of the whole gradient of all parameters, however each is divided.
    """
    trained = [parameter for parameter in parameters if parameter.grad is not None]
    groups = _by_mesh(parameter.grad for parameter in trained if parameter.grad is not None)
    norms = [_whole(get_total_norm(grads)) for grads in groups]
    norm = norms[0] if len(norms) == 1 else get_total_norm(norms)
    within = norm.device.type == "cpu" and bool(norm + _CLIPPING_EPSILON <= max_norm)
    if not within:
        for some in _by_mesh(trained):
            clip_grads_with_norm_(some, max_norm, norm)
    return norm


def _whole(tensor: Any) -> Tensor:
    """The tensor that shards on several processes are parts of; a plain one is that already."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def build_schedule(optimizer: Optimizer, config: TrainingConfig) -> LambdaLR:
    """Linear warm-up, then a cosine or a plateau and a linear decay; see `learning_rate_factor`."""
    factor = partial(
        learning_rate_factor,
        steps=config.steps,
        warmup_steps=warmup_steps(config),
        minimum=config.min_learning_rate_fraction,
        decay_fraction=config.decay_fraction if config.schedule == "wsd" else None,
    )
    return LambdaLR(optimizer, factor)


def set_schedule(optimizer: Optimizer, schedule: LambdaLR, step: int) -> None:
    """Brings the schedule, and the rates that it sets, to where they are after so many steps."""
    schedule.last_epoch = step
    rates = [base * factor(step) for base, factor in zip(schedule.base_lrs, schedule.lr_lambdas, strict=True)]
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    schedule._last_lr = rates


def warmup_steps(config: TrainingConfig) -> int:
    """Number of steps before the learning rate reaches its peak."""
    return min(config.steps, round(config.steps * config.warmup_fraction))


def learning_rate_factor(
    index: int, *, steps: int, warmup_steps: int, minimum: float, decay_fraction: float | None = None
) -> float:
    """Share of the peak learning rate at step `index`, counted from 0.

    No step is wasted on a rate of zero: the first takes 1 / warmup_steps, and the last exactly `minimum`. With a
    `decay_fraction` the peak is held until that share of the steps is left, which then falls linearly (MiniCPM, arXiv
    2404.06395, section 4; the linear form is Haegele et al., arXiv 2405.18392, section 3); without one it is a cosine.
    """
    step = index + 1
    if step < warmup_steps:
        return step / warmup_steps
    if decay_fraction is not None:
        decay = max(1, round(steps * decay_fraction))
        return minimum + (1 - minimum) * min(1.0, max(0, steps - step) / decay)
    progress = min(1.0, (step - warmup_steps) / max(1, steps - warmup_steps))
    return minimum + (1 - minimum) * 0.5 * (1 + math.cos(math.pi * progress))
