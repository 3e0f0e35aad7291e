"""Stage 1: are the kernels right on this device? Outputs and gradients against the definitions in float64.

An error is ||found - expected|| / ||expected||, the largest of the output and every gradient. Inputs are random and
fresh for every check. Layers run as in training: float32 weights, with autocast where the check says bfloat16.

Shapes: B batch, L length, N groups, G tokens of a group, E experts, C mixtures of an expert, S = E*C, D hidden, T
tokens, K choices of a token, R routed rows.
"""

import copy
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from mixtura import kernels
from mixtura.benchmarks.contenders import Size, own_layers
from mixtura.benchmarks.gpu.journal import Journal
from mixtura.kernels import accelerator, reference
from mixtura.results.document import Plain

ALLOWED = {torch.float32: 1e-4, torch.bfloat16: 2e-2}
"""Float32 products on the matrix units are off by 3e-4, which would be told from rounding here."""
LAYER = Size(tokens=2048, hidden=256, experts=16, top_k=2, multiple_of=8)
SMALL_LAYER = Size(tokens=64, hidden=32, experts=4, top_k=2, multiple_of=8)
Pairs = tuple[list[Tensor], list[Tensor]]
"""What was found, and what the definition gives."""


class WithoutTriton(nn.Module):
    """A layer on torch's own operators: what Triton's kernels are worth."""

    def __init__(self, layer: nn.Module) -> None:
        """Wraps a layer of ours."""
        super().__init__()
        self.layer = layer

    def forward(self, x_BLD: Tensor) -> Tensor:
        """What is chosen in the forward pass decides about the backward pass too."""
        installed, accelerator.TRITON = accelerator.TRITON, False
        try:
            return self.layer(x_BLD)
        finally:
            accelerator.TRITON = installed


def run_checks(journal: Journal, device: torch.device, *, smoke: bool) -> None:
    """Every check, kernels first, then layers, then what captures them."""
    size = SMALL_LAYER if smoke else LAYER
    checks: list[tuple[str, torch.dtype, Callable[[], Pairs]]] = []
    if device.type == "cuda" and accelerator.TRITON:
        checks += [("sorted choices", torch.float32, partial(_sort, device))]
        checks += [
            (f"mixing, groups of {group}, {experts} experts", dtype, partial(_groups, group, experts, slots, dtype))
            for group, experts, slots in ((32, 32, 1), (24, 10, 2), (128, 128, 1))
            for dtype in ALLOWED
        ]
    checks += [("rows of sparse experts", dtype, partial(_rows, dtype, device)) for dtype in ALLOWED]
    for name in own_layers(size):
        checks += [(f"layer: {name}", dtype, partial(_layer, name, size, dtype, device)) for dtype in ALLOWED]
    for name in ("token choice", "mixture of tokens"):
        if device.type == "cuda":
            checks += [(f"CUDA graph: {name}", torch.bfloat16, partial(_captured, name, size, device))]
        checks += [(f"torch.compile, fullgraph: {name}", torch.float32, partial(_compiled, name, size, device))]
    for name, dtype, check in checks:
        journal.attempt("checks", f"{name}, {_word(dtype)}", partial(_checked, check, dtype))


def _checked(check: Callable[[], Pairs], dtype: torch.dtype) -> Plain:
    found, expected = check()
    errors = [_error(a, b) for a, b in zip(found, expected, strict=True)]
    worst = max(errors)
    return {
        "error": errors[0],
        "gradient_error": max(errors[1:], default=None),
        "allowed": ALLOWED[dtype],
        "passed": worst <= ALLOWED[dtype],
        "dtype": _word(dtype),
    }


def _error(found: Tensor, expected: Tensor) -> float:
    difference = (found.double() - expected.double()).norm() / expected.double().norm()
    if not bool(difference.isfinite()):
        raise ArithmeticError("the result is not finite")
    return difference.item()


def _word(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _sort(device: torch.device) -> Pairs:
    expert_TK = torch.randint(200, (5000, 8), device=device)
    expected_R = expert_TK.flatten().argsort(stable=True)
    found = list(kernels.sort_choices(expert_TK, 200))
    expected = [expected_R, expected_R.argsort().view(5000, 8), expert_TK.flatten().bincount(minlength=200)]
    return found, expected


def _groups(group: int, experts: int, slots: int, dtype: torch.dtype) -> Pairs:
    x_NGD = torch.randn(3, group, 128, device="cuda", dtype=dtype)
    logits_NGS = torch.randn(3, group, experts * slots, device="cuda")
    leaves = [x_NGD.requires_grad_(), logits_NGS.requires_grad_()]
    if not kernels.can_run_groups(x_NGD[:, None]):
        raise RuntimeError("the kernel does not take such groups")
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    y_NGD = kernels.logits_mixed_ffn(leaves[0][:, None], leaves[1][:, None], None, slots, lambda z: z).squeeze(1)
    weight_NGEC = exact[1].softmax(1).unflatten(-1, (experts, slots))
    expected_NGD = reference.spread(reference.mix(exact[0], weight_NGEC), weight_NGEC)
    grad_NGD = torch.randn_like(y_NGD)
    found = [y_NGD, *torch.autograd.grad(y_NGD, leaves, grad_NGD)]
    return found, [expected_NGD, *torch.autograd.grad(expected_NGD, exact, grad_NGD.double())]


def _rows(dtype: torch.dtype, device: torch.device) -> Pairs:
    tokens, experts, hidden, width = 96, 12, 128, 72
    expert_TK = torch.rand(tokens, experts - 2, device=device).topk(3).indices  # two experts are without rows
    order_R = expert_TK.flatten().argsort(stable=True)
    counts_E = expert_TK.flatten().bincount(minlength=experts)
    leaves = [
        torch.randn(tokens, hidden, device=device),
        torch.rand(3 * tokens, device=device) + 0.1,
        torch.randn(experts, 2 * width, hidden, device=device) / hidden**0.5,
        torch.randn(experts, hidden, width, device=device) / width**0.5,
    ]
    leaves = [leaf.to(dtype) for leaf in leaves]
    results: list[list[Tensor]] = []
    for precision, run in ((dtype, kernels.sparse_ffn), (torch.float64, reference.sparse_ffn)):
        x_TD, weight_R, up, down = own = [leaf.detach().to(precision).requires_grad_() for leaf in leaves]
        y_TD = run(x_TD, order_R // 3, weight_R, counts_E, kernels.ExpertWeights(up, down, "silu", True))
        results.append([y_TD, *torch.autograd.grad(y_TD.double().square().sum(), own)])
    return results[0], results[1]


def _layer(name: str, size: Size, dtype: torch.dtype, device: torch.device) -> Pairs:
    """A layer as it is trained, against the same layer in float64 without Triton."""
    layer = own_layers(size)[name].to(device)
    exact = WithoutTriton(copy.deepcopy(layer).double())
    x_BLD = size.inputs().to(device)
    grad_BLD = torch.randn_like(x_BLD)
    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        found = _with_gradients(layer, x_BLD, grad_BLD)
    return found, _with_gradients(exact, x_BLD.double(), grad_BLD.double())


def _with_gradients(layer: nn.Module, x_BLD: Tensor, grad_BLD: Tensor) -> list[Tensor]:
    leaves = [x_BLD.requires_grad_(), *layer.parameters()]
    y_BLD = layer(leaves[0])
    return [y_BLD, *torch.autograd.grad(y_BLD, leaves, grad_BLD.to(y_BLD.dtype))]


def _captured(name: str, size: Size, device: torch.device) -> Pairs:
    layer, x_BLD = own_layers(size)[name].to(device, torch.bfloat16), size.inputs().to(device, torch.bfloat16)
    with torch.no_grad():
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            layer(x_BLD)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y_BLD = layer(x_BLD)
        x_BLD.copy_(size.inputs())  # a replay computes, it does not repeat
        graph.replay()
        return [y_BLD], [layer(x_BLD)]


def _compiled(name: str, size: Size, device: torch.device) -> Pairs:
    layer, x_BLD = own_layers(size)[name].to(device), size.inputs().to(device)
    backend = "inductor" if device.type == "cuda" else "aot_eager"
    grad_BLD = torch.randn_like(x_BLD)
    compiled: nn.Module = torch.compile(layer, fullgraph=True, backend=backend)  # pyright: ignore
    return _with_gradients(compiled, x_BLD, grad_BLD), _with_gradients(layer, x_BLD.detach(), grad_BLD)
