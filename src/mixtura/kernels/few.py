"""Sparse routing for the few tokens of a decoding step, where sorting rows costs more than running them.

No order and no counts. On the CPU every chosen expert is multiplied where it lies, without a copy; on an accelerator
the chosen weights are indexed and multiplied in one batched product, with no host synchronisation. Inference only:
under autograd a view of a stacked weight costs a full zero gradient. Definition: `reference.few_ffn`.

Shapes: T tokens, K choices of a token, R = T*K rows, E experts, D hidden, F expert width, H = 2F when gated else F.
"""

import torch
from torch import Tensor

from mixtura.kernels.activation import activate
from mixtura.kernels.precision import at_autocast_dtype

FEW_ROWS = 8
"""Rows up to which this is quicker than sorting them; see `benchmarks/decode.py`."""


def are_few(x_TKD: Tensor) -> bool:
    """Whether `few_ffn` should take these rows; never while gradients are recorded or a graph is compiled."""
    if torch.compiler.is_compiling() or torch.is_grad_enabled():
        return False
    return x_TKD.size(0) * x_TKD.size(1) <= FEW_ROWS


def few_ffn(
    x_TKD: Tensor, expert_TK: Tensor, weight_TK: Tensor, up_EHD: Tensor, down_EDF: Tensor, activation: str, gated: bool
) -> Tensor:
    """(T, K, D) -> (T, D): out[t] = sum over the choices k of weight[t, k] * expert[t, k](x[t, k])."""
    x_TKD, up_EHD, down_EDF = at_autocast_dtype(x_TKD, up_EHD, down_EDF)
    rows_RD, weight_R1 = x_TKD.flatten(0, 1), weight_TK.to(x_TKD.dtype).view(-1, 1)
    product = _product_of_views if x_TKD.device.type == "cpu" else _product_of_copies
    expert_R = expert_TK.flatten()
    h_RF = activate(product(up_EHD, expert_R, rows_RD), activation, gated) * weight_R1
    return product(down_EDF, expert_R, h_RF).view(x_TKD.shape).sum(1)


def _product_of_views(weight_EOI: Tensor, expert_R: Tensor, x_RI: Tensor) -> Tensor:
    """(R, I) -> (R, O): every row times its own expert's matrix, which is read where it lies."""
    y_RO = x_RI.new_empty(len(x_RI), weight_EOI.size(1))
    for expert, x_I, y_O in zip(expert_R.tolist(), x_RI.unbind(), y_RO.unbind(), strict=True):
        torch.mv(weight_EOI[expert], x_I, out=y_O)
    return y_RO


def _product_of_copies(weight_EOI: Tensor, expert_R: Tensor, x_RI: Tensor) -> Tensor:
    """(R, I) -> (R, O), the same from a copy of the matrices, without asking the device which they are."""
    return torch.bmm(weight_EOI[expert_R], x_RI.unsqueeze(-1)).squeeze(-1)
