"""Muon for the matrices inside a model, AdamW for everything else, as one optimizer.

Jordan et al. 2024 (kellerjordan.github.io/posts/muon): the momentum of a matrix is replaced by the orthogonal matrix
nearest to it, found by five Newton-Schulz steps. Moonshot (arXiv 2502.16982, section 2.2) scales it by
0.2 * sqrt(max(rows, columns)), after which it is as large as AdamW's update, so one learning rate and one weight decay
serve both. A stack of experts is many matrices, and each is made orthogonal by itself; so are gate and up, which lie
in one tensor. torch.optim.Muon does the same for single matrices and takes no stacks.

Shapes: P stacked matrices, M rows, N columns.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

ParameterGroup = dict[str, Any]
"""Parameters and what moves them, as torch's optimizers keep them."""
_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_STEPS = 5
_MOMENTUM = 0.95
_ADAM_EPSILON = 1e-8


class Muon(Optimizer):
    """Muon for groups with `matrices` above zero, AdamW for the others."""

    def __init__(self, groups: Iterable[ParameterGroup], *, lr: float, betas: tuple[float, float]) -> None:
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

    def _move_by_muon(self, parameter: Tensor, group: ParameterGroup) -> None:
        state, grad = self.state[parameter], parameter.grad
        assert grad is not None
        if not state:
            state["momentum"] = torch.zeros_like(parameter)
        state["momentum"].lerp_(grad, 1 - _MOMENTUM)
        nesterov = torch.lerp(grad, state["momentum"], _MOMENTUM)
        rows = parameter.size(-2) // group["matrices"]
        update_PMN = orthogonalize(nesterov.reshape(-1, rows, parameter.size(-1)))
        size = 0.2 * max(update_PMN.shape[-2:]) ** 0.5
        parameter.add_(update_PMN.view(parameter.shape).to(parameter.dtype), alpha=-group["lr"] * size)

    def _move_by_adam(self, parameter: Tensor, group: ParameterGroup) -> None:
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


def matrices_of(model: nn.Module, is_router: Callable[[nn.Module], bool]) -> dict[nn.Parameter, int]:
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
