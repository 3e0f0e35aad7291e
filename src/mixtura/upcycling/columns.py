"""The arithmetic of upcycling one feed-forward layer: columns, parts, redrawn channels, noise. Pure functions.

Shapes: D hidden, F intermediate width; gated layers only, f(x) = down(act(gate x) * up x).
"""

import hashlib
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class GatedWeights(NamedTuple):
    """The matrices of one gated feed-forward layer, or of one expert."""

    gate_FD: Tensor
    up_FD: Tensor
    down_DF: Tensor

    def channels(self, index: Tensor) -> "GatedWeights":
        """The layer of some of the intermediate channels; the layers of a partition add up to the whole."""
        return GatedWeights(self.gate_FD[index], self.up_FD[index], self.down_DF[:, index])

    def scaled(self, first: float, second: float) -> "GatedWeights":
        """Gate and up times `first`, down times `second`, each in its own dtype."""
        return GatedWeights(*_multiplied((*self,), (first, first, second)))


def _multiplied(weights: Sequence[Tensor], factors: Sequence[float]) -> list[Tensor]:
    return [weight if factor == 1 else weight * factor for weight, factor in zip(weights, factors, strict=True)]


def generator_for(*names: object) -> torch.Generator:
    """Random numbers that depend on names alone, so that nothing depends on the order in which layers are written."""
    digest = hashlib.blake2b("/".join(map(str, names)).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)


def redraw_channels(weights: GatedWeights, share: float, generator: torch.Generator) -> GatedWeights:
    """Draws a share of the intermediate channels anew, the same channels in all three matrices.

    Drop-Upcycling (arXiv 2502.19261): rows of gate and up and columns of down come from a normal
    distribution with mean and standard deviation of the values they replace, in each matrix its own.
    """
    width = weights.gate_FD.size(0)
    index = torch.randperm(width, generator=generator)[: int(share * width)]
    if not len(index):
        return weights
    drawn = []
    for weight, dim in zip(weights, (0, 0, 1), strict=True):
        old = weight.index_select(dim, index).float()
        new = torch.randn(old.shape, generator=generator) * old.std(correction=0) + old.mean()
        drawn.append(weight.index_copy(dim, index, new.to(weight.dtype)))
    return GatedWeights(*drawn)


def add_noise(weights: GatedWeights, relative_std: float, generator: torch.Generator) -> GatedWeights:
    """Adds normal noise of `relative_std` times each matrix's own standard deviation."""
    if not relative_std:
        return weights
    noisy = []
    for weight in weights:
        exact = weight.float()
        noise = torch.randn(exact.shape, generator=generator) * (relative_std * exact.std(correction=0))
        noisy.append((exact + noise).to(weight.dtype))
    return GatedWeights(*noisy)


def mean_of(tensors: Sequence[Tensor]) -> Tensor:
    """The mean in float32, in the dtype of the first; one tensor is returned as it is."""
    if len(tensors) == 1:
        return tensors[0]
    total = tensors[0].float()
    for tensor in tensors[1:]:
        total = total + tensor.float()
    return (total / len(tensors)).to(tensors[0].dtype)
