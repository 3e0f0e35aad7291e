"""A decoding step of mixture of tokens alone: few tokens, few mixtures of each, and as few calls as that needs.

Next to the products of a single token every call counts, so weights are computed as plain numbers for the chosen
mixtures only. The choice is made among logits, which sort as the weights do. Definition: `MixtureOfTokens` alone.

Shapes: T tokens, D hidden, S mixtures.
"""

import math

from torch import Tensor

from mixtura import kernels
from mixtura.layers.experts import Experts
from mixtura.layers.routing import router_logits

# exp of more than this is no double any more, and the weight is zero long before.
_LARGEST_EXPONENT = 700.0


def run_few_alone(
    x_TD: Tensor,
    gate_SD: Tensor,
    experts: Experts,
    *,
    temperature: float,
    log_mass: float,
    top_k: int,
    mixtures_per_expert: int,
) -> Tensor:
    """(T, D) -> (T, D): sum over a token's `top_k` largest weights m of m * f_e(m * x), m = sigmoid(l - log_mass).

    On the CPU and without autograd only; l are the logits over the temperature.
    """
    logits_TK, mixture_TK = router_logits(x_TD, gate_SD).topk(top_k, dim=-1)
    weights = [[_sigmoid(logit / temperature - log_mass) for logit in row] for row in logits_TK.tolist()]
    chosen = [[mixture // mixtures_per_expert for mixture in row] for row in mixture_TK.tolist()]
    inputs = [[x_D] * top_k for x_D in x_TD.unbind()]
    return kernels.few_rows(
        inputs, chosen, weights, weights, *experts.weights, activation=experts.activation, gated=experts.gated
    )


def _sigmoid(value: float) -> float:
    return 1.0 / (1.0 + math.exp(min(-value, _LARGEST_EXPONENT)))
