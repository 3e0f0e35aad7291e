"""Documents that were packed into rows: which token belongs to which, for layers that look along a row.

Attention is told by a mask or by positions that begin anew. Merged experts have their segments along a row, so they are
given every document as a row of its own.

Shapes: B batch, L length, N documents of the batch, M tokens of the longest, D hidden.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from mixtura.models.configuration_mixture import MixtureConfig


class Documents(NamedTuple):
    """The documents of a batch of which a row has several."""

    number_BL: Tensor
    """To which of the N documents a token belongs."""
    place_BL: Tensor
    """Where in it."""
    mask_NM: Tensor
    """True where a document has a real token."""

    def as_rows(self, x_BLD: Tensor) -> Tensor:
        """(B, L, D) -> (N, M, D): every document as a row, filled up with zeros."""
        rows_NMD = x_BLD.new_zeros(*self.mask_NM.shape, x_BLD.size(-1))
        return rows_NMD.index_put((self.number_BL, self.place_BL), x_BLD)

    def together(self, y_NMD: Tensor) -> Tensor:
        """(N, M, D) -> (B, L, D): the documents back in their rows."""
        return y_NMD[self.number_BL, self.place_BL]

    @property
    def last_B(self) -> Tensor:
        """The last document of each row."""
        return self.number_BL[:, -1]


def documents_of(
    config: MixtureConfig,
    hidden_BLD: Tensor,
    position_ids: Tensor | None,
    attention_mask: Any,
    real_BL: Tensor | None,
    *,
    seen: Any = 0,
) -> Documents | None:
    """The documents packed into the rows of a batch, where a layer of the model has to know; else None.

    One begins at a token whose position is not above that of the real token before it, or that may not attend to it.

    Args:
        config: the model's.
        hidden_BLD: hidden states, for their sizes.
        position_ids: (B, L) or (1, L), where they are given.
        attention_mask: (B, 1, L, keys) says which tokens may attend to which; others say nothing on that.
        real_BL: true where a token is real; None where all are.
        seen: tokens in the cache before those of this call; rows that go on from some are not packed.
    """
    batch, length, _ = hidden_BLD.shape
    if length < 2 or "merged_experts" not in (config.mlp_layer_types or []):
        return None
    pairs = isinstance(attention_mask, Tensor) and attention_mask.dim() == 4 and attention_mask.size(3) >= length
    if (position_ids is None and not pairs) or seen:
        return None
    index_L = torch.arange(length, device=hidden_BLD.device)
    real_BL = hidden_BLD.new_ones(batch, length, dtype=torch.bool) if real_BL is None else real_BL.bool()
    before_BL = torch.where(real_BL, index_L, -1).cummax(1).values[:, :-1]  # the real token before, from the second on
    found_BL, begins_BL = before_BL.clamp_min(0), torch.zeros_like(real_BL[:, 1:])
    if position_ids is not None:
        position_BL = position_ids.expand(batch, -1)
        begins_BL = position_BL[:, 1:] <= position_BL.gather(1, found_BL)
    if pairs:
        may_BLK = attention_mask[:, 0, 1:] if attention_mask.dtype == torch.bool else attention_mask[:, 0, 1:] == 0
        begins_BL = begins_BL | ~may_BLK.expand(batch, -1, -1).gather(2, found_BL.unsqueeze(-1)).squeeze(-1)
    return _numbered(begins_BL & (before_BL >= 0), real_BL)


def _numbered(begins_BL: Tensor, real_BL: Tensor) -> Documents | None:
    """The documents that begin where it is said, from the second token on; None where none begins at a real token."""
    first_BL = F.pad(begins_BL & real_BL[:, 1:], (1, 0), value=True)
    if int(first_BL.sum()) == len(first_BL):
        return None
    index_L = torch.arange(real_BL.size(1), device=real_BL.device)
    number_BL = first_BL.flatten().cumsum(0).view(first_BL.shape) - 1
    place_BL = index_L - torch.where(first_BL, index_L, 0).cummax(1).values
    mask_NM = real_BL.new_zeros(int(number_BL[-1, -1]) + 1, int(place_BL.max()) + 1)
    return Documents(number_BL, place_BL, mask_NM.index_put((number_BL, place_BL), real_BL))
