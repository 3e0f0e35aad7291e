"""How peaked the weights of mixture-of-tokens layers are: whether a token lives in a few mixtures or in many.

Run alone, a token enters mixture s with weight m_s and, with ReLU experts, gets m_s^2 of its expert's output back. The
sharper these weights, the less a token takes from its neighbours in a group, and the less it loses without them.

Shapes: B batch, L length, T = B*L tokens, D hidden, S mixtures.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from mixtura.config import UserError
from mixtura.layers import MixtureOfTokens
from mixtura.models.modeling_mixture import MixtureDecoderLayer, MixturePreTrainedModel
from mixtura.results.details import Peakedness


@torch.no_grad()
def measure_peakedness(model: MixturePreTrainedModel, batches: Iterable[Tensor]) -> list[Peakedness]:
    """The weights that tokens have alone, layer by layer, while the model runs in its own inference mode.

    Args:
        model: left as it was found.
        batches: token ids (B, L).

    Raises:
        UserError: no layer is a mixture of tokens, or there is no batch.
    """
    decoder = [module for module in model.modules() if isinstance(module, MixtureDecoderLayer)]
    layers = {depth: block.mlp for depth, block in enumerate(decoder) if isinstance(block.mlp, MixtureOfTokens)}
    if not layers:
        raise UserError("The model has no mixture-of-tokens layer, so no weight of one can be measured.")
    sums = {depth: _Sums() for depth in layers}
    hooks = [layer.register_forward_pre_hook(sums[depth]) for depth, layer in layers.items()]
    was_training, tokens = model.training, 0
    model.eval()
    try:
        for ids_BL in batches:
            model.base_model(input_ids=ids_BL.to(model.device), use_cache=False)
            tokens += ids_BL.numel()
    finally:
        model.train(was_training)
        for hook in hooks:
            hook.remove()
    if not tokens:
        raise UserError("There is no batch to measure the weights on: give text that fills at least one.")
    return [
        Peakedness(
            layer=depth,
            sorted_weights=(total.weights_S / tokens).tolist(),
            gate_shares=(total.shares_S / tokens).tolist(),
        )
        for depth, total in sums.items()
    ]


class _Sums:
    """Adds up what a layer is given; called before each of its passes."""

    def __init__(self) -> None:
        """Nothing so far."""
        self.weights_S: Any = 0.0
        self.shares_S: Any = 0.0

    def __call__(self, layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        """`inputs` are the layer's, the hidden states (B, L, D) first."""
        assert isinstance(layer, MixtureOfTokens)
        scale_TS, weight_TS = layer.weights_alone(inputs[0].flatten(0, 1))
        gate_TS = (scale_TS * weight_TS).double().sort(-1, descending=True).values
        self.weights_S = self.weights_S + scale_TS.double().sort(-1, descending=True).values.sum(0)
        self.shares_S = self.shares_S + (gate_TS.cumsum(-1) / gate_TS.sum(-1, keepdim=True)).sum(0)
