"""Where a router starts: rows of random numbers, cluster centres or the means of texts, brought to a chosen spread.

Logits are centred: what all tokens have in common says nothing about which expert to choose, and the routers have no
bias to take it out, so no row has a share of the inputs' mean.

Shapes: T tokens, D hidden, C copies of the layer, a router row each.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from scipy.cluster.vq import kmeans2
from torch import Tensor

# A logit this far from a token's mean leaves the other experts next to no weight, whatever the mean spread is.
_LARGEST_LOGIT = 8.0
_ITERATIONS = 20


@dataclass(frozen=True)
class RouterStart:
    """The rows of one layer's router, and what they do at the start."""

    rows_CD: Tensor
    spread: float | None
    """Standard deviation of a token's logits over the copies, mean over tokens; None where no text was read."""
    load_C: list[float] | None
    """Share of the tokens whose first choice is each copy."""


def uncalibrated_rows(norm_D: Tensor, *, copies: int, spread: float, generator: torch.Generator) -> RouterStart:
    """Random rows (C, D) for inputs that are not known but for the weight of the norm before the router.

    A normed input has components of mean square norm_d^2, so rows with standard deviation s give logits with
    s * |norm|.
    """
    rows_CD = torch.randn(copies, norm_D.numel(), generator=generator)
    return RouterStart(rows_CD * (spread / float(norm_D.float().norm().clamp_min(1e-12))), None, None)


def calibrated_rows(
    x_KTD: Sequence[Tensor], *, kind: str, copies: int, spread: float, generator: torch.Generator
) -> RouterStart:
    """Rows (C, D) from the router's real inputs.

    Args:
        x_KTD: inputs (T, D) of each text; "texts" needs as many as copies, the others take all together.
        kind: "random", "clusters" (k-means on the directions of the centred inputs), or "texts" (their means).
        copies: C.
        spread: standard deviation of a token's logits over the copies, mean over the tokens. Where single logits would
            then lie far out, it becomes smaller.
        generator: for random rows and the first centres.
    """
    x_TD = torch.cat(list(x_KTD)).float()
    if kind == "texts":
        rows_CD = torch.stack([x.float().mean(0) for x in x_KTD])
        rows_CD = rows_CD - rows_CD.mean(0)
    elif kind == "clusters":
        rows_CD = _centres(x_TD, copies, generator)
    else:
        rows_CD = torch.randn(copies, x_TD.size(1), generator=generator)
    mean_D = x_TD.mean(0)
    along_C1 = (rows_CD @ mean_D).unsqueeze(1) / mean_D.square().sum().clamp_min(1e-12)
    rows_CD = rows_CD - along_C1 * mean_D
    rows_CD = rows_CD / rows_CD.norm(dim=1, keepdim=True).clamp_min(1e-12)
    return _brought_to(rows_CD, x_TD, spread)


def _centres(x_TD: Tensor, copies: int, generator: torch.Generator) -> Tensor:
    centred_TD = x_TD - x_TD.mean(0)
    directions_TD = centred_TD / centred_TD.norm(dim=1, keepdim=True).clamp_min(1e-12)
    first = _spread_out(directions_TD, copies, generator)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a centre that no token is nearest to stays where it was
        centres, _ = kmeans2(directions_TD.numpy(), first.numpy(), iter=_ITERATIONS, minit="matrix", missing="warn")
    return torch.from_numpy(centres).float()


def _spread_out(x_TD: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Rows to start clusters from: a random one, then always the one that is farthest from those chosen."""
    chosen = [int(torch.randint(len(x_TD), (), generator=generator))]
    distance_T = torch.full((len(x_TD),), torch.inf)
    for _ in range(count - 1):
        distance_T = torch.minimum(distance_T, (x_TD - x_TD[chosen[-1]]).square().sum(1))
        chosen.append(int(distance_T.argmax()))
    return x_TD[chosen]


def _brought_to(rows_CD: Tensor, x_TD: Tensor, spread: float) -> RouterStart:
    logits_TC = x_TD @ rows_CD.T
    centred_TC = logits_TC - logits_TC.mean(1, keepdim=True)
    now = float(centred_TC.std(1, correction=0).mean())
    far = float(centred_TC.abs().flatten().kthvalue(max(1, round(0.999 * centred_TC.numel()))).values)
    factor = min(spread / max(now, 1e-12), _LARGEST_LOGIT / max(far, 1e-12))
    first_T = logits_TC.argmax(1)
    load_C = torch.bincount(first_T, minlength=len(rows_CD)).double() / len(x_TD)
    return RouterStart(rows_CD * factor, now * factor, [round(share, 4) for share in load_C.tolist()])
