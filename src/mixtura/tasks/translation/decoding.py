"""Translations from a model: greedy or by beams, a batch at a time, the same for a sentence whatever its batch.

Shapes: B batch, L length.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import GenerationConfig

from mixtura.models.batch_context import set_task_ids
from mixtura.models.generation import check_logits

BATCH_TOKENS = 4096
"""Prompt tokens decoded at once, padding counted."""


@dataclass(frozen=True)
class ExampleRouting:
    """How a model gets the experts of an example, where the languages of the example choose them."""

    expert_of_direction: tuple[int, ...] | None = None
    """The expert of each direction; None where tokens choose their experts themselves."""
    through: Literal["expert_ids", "task_ids"] = "expert_ids"
    """A keyword argument of the model's forward, or a setting of the adapter that stays until it is set again."""

    def name_experts(self, model: nn.Module, directions_B: Tensor) -> dict[str, Tensor]:
        """Keyword arguments of a forward over these examples; on an adapter it sets the experts and returns none."""
        if self.expert_of_direction is None:
            return {}
        experts_B = torch.tensor(self.expert_of_direction, device=directions_B.device)[directions_B]
        if self.through == "expert_ids":
            return {"expert_ids": experts_B}
        set_task_ids(model, experts_B)
        return {}


def decode(
    model: Any,
    prompts: Sequence[Sequence[int]],
    *,
    directions: Sequence[int],
    routing: ExampleRouting,
    max_length: int,
    pad: int,
    eos: int,
    num_beams: int = 1,
) -> list[list[int]]:
    """New tokens of every prompt, up to eos and without it, in the order of the prompts.

    A translation ends at eos, after twice as many tokens as its prompt has and 16 more, or where both together reach
    `max_length`. Prompts are sorted by length, so that a batch has little padding.

    Args:
        model: a causal language model in the mode in which it is to decode, see `running`.
        prompts: token ids.
        directions: the direction of each prompt, for `routing`.
        routing: how the model gets the experts of an example.
        max_length: tokens of prompt and translation together.
        pad: token for padding, which is masked.
        eos: token that ends a translation.
        num_beams: 1 is greedy; otherwise beam search, scores divided by length.
    """
    outputs: list[list[int]] = [[] for _ in prompts]
    order = sorted(range(len(prompts)), key=lambda i: (len(prompts[i]), i))
    limits = [token_limit(len(prompt), max_length) for prompt in prompts]
    for batch in batches_by_length(order, [len(prompt) for prompt in prompts], num_beams=num_beams):
        longest = max(len(prompts[i]) for i in batch)
        ids_BL = torch.tensor([[pad] * (longest - len(prompts[i])) + list(prompts[i]) for i in batch])
        mask_BL = torch.tensor([[0] * (longest - len(prompts[i])) + [1] * len(prompts[i]) for i in batch])
        named = routing.name_experts(model, torch.tensor([directions[i] for i in batch], device=model.device))
        how = GenerationConfig(
            max_new_tokens=max(limits[i] for i in batch),
            do_sample=False,
            num_beams=num_beams,
            pad_token_id=pad,
            eos_token_id=eos,
        )
        generated = model.generate(
            input_ids=ids_BL.to(model.device),
            attention_mask=mask_BL.to(model.device),
            generation_config=how,
            logits_processor=[check_logits],
            **named,
        )
        for i, row in zip(batch, generated[:, longest:].tolist(), strict=True):
            end = row.index(eos) if eos in row else len(row)
            outputs[i] = row[: min(end, limits[i])]
    return outputs


def token_limit(prompt_length: int, max_length: int) -> int:
    """How many tokens a translation may have, by those of its prompt and of both together."""
    return min(max_length - prompt_length, 2 * prompt_length + 16)


def batches_by_length(order: list[int], lengths: list[int], *, num_beams: int) -> Iterator[list[int]]:
    """Cuts an order by length so that the longest of a batch times its rows and beams stays within `BATCH_TOKENS`.

    Which beam wins depends on where the search has to end, so that beams need batches of one length.
    """
    batch: list[int] = []
    for i in order:
        full = lengths[i] * num_beams * (len(batch) + 1) > BATCH_TOKENS
        if batch and (full or (num_beams > 1 and lengths[i] != lengths[batch[0]])):
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch
