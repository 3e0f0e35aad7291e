"""A decoding step of mixture of tokens alone: few tokens, few mixtures of each, and as few calls as that needs.

Next to the products of a single token every call counts, so weights are computed as plain numbers for the chosen
mixtures only. The choice is made among logits, which sort as the weights do. Definition: `MixtureOfTokens` alone.

Shapes: T tokens, D hidden, S mixtures.
"""

import math

from torch import Tensor, nn

from mixtura import kernels

# exp of more than this is no double any more, and the weight is zero long before.
_LARGEST_EXPONENT = 700.0


def run_few_alone(
    x_TD: Tensor,
    router: nn.Module,
    experts: nn.Module,
    *,
    temperature: float,
    log_mass: float,
    top_k: int,
    mixtures_per_expert: int,
) -> Tensor:
    """(T, D) -> (T, D): sum over a token's `top_k` largest weights m of m * f_e(m * x), m = sigmoid(l - log_mass).

    On the CPU and without autograd only; l are the logits over the temperature. `router` and `experts` are a `Router`
    and `Experts`, or adapters around them.
    """
    logits_TK, mixture_TK = router(x_TD).topk(top_k, dim=-1)
    weights = [[_sigmoid(logit / temperature - log_mass) for logit in row] for row in logits_TK.tolist()]
    chosen = [[mixture // mixtures_per_expert for mixture in row] for row in mixture_TK.tolist()]
    inputs = [[x_D] * top_k for x_D in x_TD.unbind()]
    return experts(inputs, kernels.few_rows, chosen, weights, weights)


def _sigmoid(value: float) -> float:
    return 1.0 / (1.0 + math.exp(min(-value, _LARGEST_EXPONENT)))
