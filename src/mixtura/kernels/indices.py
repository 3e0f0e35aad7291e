"""Indices on their way into compiled code, which follows them wherever they point.

Python refuses an index that is out of range; C reads or writes past the end of an array, and takes the bytes of int32
for half as many int64. So the dtype is brought to int64 here, and the functions in C return whether every index was in
range, which costs less there than two reductions by torch.
"""

from collections.abc import Sequence
from typing import NoReturn

import torch
from torch import Tensor


def as_int64(name: str, index: Tensor) -> Tensor:
    """The index as contiguous int64, which is itself if it is that already.

    Raises:
        TypeError: it holds no whole numbers.
    """
    if index.dtype is not torch.int64:
        if index.dtype.is_floating_point or index.dtype.is_complex or index.dtype is torch.bool:
            raise TypeError(f"{name} has dtype {index.dtype}: indices must be whole numbers, such as torch.int64.")
        index = index.to(torch.int64)
    return index if index.is_contiguous() else index.contiguous()


def check_shape(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    """Raises ValueError unless the tensor has that shape."""
    if tensor.shape != shape:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}: it must be {shape}.")


def check_counts(counts: Sequence[int], num_experts: int, rows: int) -> None:
    """Raises ValueError unless there is a count of rows for every expert, none negative, and all add up to the rows."""
    if len(counts) != num_experts or sum(counts) != rows or min(counts, default=0) < 0:
        raise ValueError(
            f"tokens_per_expert_E is {list(counts)} for {num_experts} experts and {rows} rows: it must have one count "
            "for each expert, and they must add up to the rows."
        )


def refuse(name: str, index: Tensor, limit: int) -> NoReturn:
    """Raises IndexError for an index of which some number is not in range(limit), and names one of those."""
    outside = index[(index < 0) | (index >= limit)]
    raise IndexError(f"{name} contains {outside[0].item()}: every index must lie between 0 and {limit - 1}.")
