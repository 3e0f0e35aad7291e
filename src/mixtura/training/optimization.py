"""Optimizer and learning rate schedule, the same for every arm."""

import math
from collections.abc import Iterable
from functools import partial
from importlib import import_module

from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.optim import Adafactor, AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from mixtura.config import TrainingConfig
from mixtura.layers.routing import Router
from mixtura.training.muon import Muon, ParameterGroup, matrices_of

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
        for parameters, decay in ((matrices, config.weight_decay), (vectors, 0.0))
        if parameters
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


def _muon_groups(model: nn.Module, config: TrainingConfig) -> list[ParameterGroup]:
    """Parameters by who moves them and whether they decay, in the model's order."""
    matrices = matrices_of(model, lambda module: isinstance(module, Router))
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
    """
    trained = [parameter for parameter in parameters if parameter.grad is not None]
    norm = get_total_norm([parameter.grad for parameter in trained if parameter.grad is not None])
    within = norm.device.type == "cpu" and bool(norm + _CLIPPING_EPSILON <= max_norm)
    if not within:
        clip_grads_with_norm_(trained, max_norm, norm)
    return norm


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
