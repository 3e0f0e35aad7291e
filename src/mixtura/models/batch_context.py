"""What layers inside someone else's model must know about the batch: padding, tasks, and where statistics go.

An adapter's layer, or a mixture in place of a feed-forward layer, sees hidden states and nothing else, but padding must
enter no mixture and no statistic, and routing by task needs the task of every example. Both are kept in one
`BatchContext` of the model: the padding mask is read from the model's own `attention_mask` when its forward begins,
task ids are given by `set_task_ids`.

Shapes: B batch, L length, T = B*L tokens, E experts.
"""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.modeling_utils import PreTrainedModel

from mixtura.config import UserError
from mixtura.layers import RoutingStats
from mixtura.models.inference import real_tokens

Named = dict[str, Any]
"""Arguments of a forward, by name."""


class BatchContext:
    """What the layers of one model know about the batch, and the statistics that they leave."""

    def __init__(self) -> None:
        """Knows nothing yet."""
        self.mask_BL: Tensor | None = None
        self.decoder_mask_BL: Tensor | None = None
        """Of the decoder's tokens, where the model has an encoder too, whose tokens `mask_BL` is of."""
        self.task_ids_B: Tensor | None = None
        self.num_tasks: int | None = None
        self.observe = False
        """Keep statistics in eval() too; in train() they always are."""
        self.stats: dict[str, RoutingStats] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> "BatchContext":
        """A copied model starts without a batch: statistics hold a graph, which cannot be copied."""
        copied = BatchContext()
        copied.num_tasks = self.num_tasks
        return copied

    def begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: Named) -> None:
        """Forward pre-hook of the model: takes its padding mask and forgets the last batch's statistics.

        The mask stays until the next forward, for a backward that runs layers again under gradient checkpointing.
        """
        self.mask_BL = _mask_of(module, "attention_mask", args, kwargs)
        self.decoder_mask_BL = _mask_of(module, "decoder_attention_mask", args, kwargs)
        self.stats = {}

    def begin_encoder(self, module: nn.Module, args: tuple[Any, ...], kwargs: Named) -> None:
        """Forward pre-hook of an encoder beside a decoder: `generate` calls it by itself, not through the model."""
        self.mask_BL = _mask_of(module, "attention_mask", args, kwargs)

    def watch(self, model: nn.Module) -> tuple[str, ...]:
        """Reads the masks of every forward of a model from now on.

        Returns:
            How the names of a decoder's modules begin, for each encoder-decoder that the model is or holds.
        """
        decoders: tuple[str, ...] = ()
        for root in _entrances(model):
            root.register_forward_pre_hook(self.begin, with_kwargs=True)
            if getattr(getattr(root, "config", None), "is_encoder_decoder", False):
                whole: Any = root
                whole.get_encoder().register_forward_pre_hook(self.begin_encoder, with_kwargs=True)
                decoder = whole.get_decoder()
                decoders += tuple(f"{name}." for name, part in model.named_modules() if part is decoder)
        return decoders

    def mask_for(self, x: Tensor, *, in_decoder: bool = False) -> Tensor | None:
        """(B, L) bool of this call's tokens, from a mask that may also cover those in a cache; None if all are real.

        Inputs of another shape than (B, L, width), such as pooled vectors, have no padding. `in_decoder` is said by the
        layers of a decoder that has an encoder beside it.
        """
        known_BL = self.decoder_mask_BL if in_decoder else self.mask_BL
        if known_BL is None or x.dim() != 3 or x.size(0) != known_BL.size(0):
            return None
        mask_BL = known_BL[:, -x.size(1) :].bool()
        return mask_BL if mask_BL.shape == x.shape[:2] else None

    def set_task_ids(self, task_ids_B: Tensor | None) -> None:
        """Keeps the task of every example, or forgets them.

        Raises:
            UserError: an id is no task of the adapter.
        """
        if task_ids_B is not None and self.num_tasks is not None and len(task_ids_B):
            lowest, highest = int(task_ids_B.min()), int(task_ids_B.max())
            if lowest < 0 or highest >= self.num_tasks:
                raise UserError(
                    f"The task ids lie between {lowest} and {highest} but the adapter has {self.num_tasks} tasks: they "
                    f"must lie between 0 and {self.num_tasks - 1}."
                )
        self.task_ids_B = task_ids_B

    def task_ids_for(self, x: Tensor) -> Tensor:
        """Task of every token, (T,); see `example_tasks`."""
        tasks_B = self.example_tasks(x)
        return tasks_B.repeat_interleave(x.numel() // x.size(-1) // len(tasks_B))

    def example_tasks(self, x: Tensor) -> Tensor:
        """Task of every example, (B,); a batch that beams or samples expanded repeats each example's task in place.

        Raises:
            UserError: no ids were given, or not as many as the batch has examples.
        """
        if self.task_ids_B is None:
            raise UserError("The model routes by task but no task was given: call set_task_ids(model, ids) first.")
        batch, tasks = x.size(0), len(self.task_ids_B)
        if batch % tasks:
            raise UserError(f"There are {tasks} task ids for a batch of {batch} examples: give one for each example.")
        return self.task_ids_B.to(x.device).repeat_interleave(batch // tasks)


def _mask_of(module: nn.Module, name: str, args: tuple[Any, ...], kwargs: Named) -> Tensor | None:
    """The padding mask (B, L) among a forward's arguments, by name or by position."""
    mask: Any = kwargs.get(name)
    if mask is None and len(args) > 1:
        names = list(inspect.signature(module.forward).parameters)
        position = names.index(name) if name in names else len(args)
        mask = args[position] if position < len(args) else None
    cache: Any = kwargs.get("past_key_values")
    return real_tokens(mask, seen=cache.get_seq_length() if isinstance(cache, Cache) else 0)


def _entrances(model: nn.Module) -> list[nn.Module]:
    """The outermost transformers models: the model itself, or those that a wrapper holds, or else the wrapper."""
    found: list[tuple[str, nn.Module]] = []
    for name, module in model.named_modules():
        inside = any(not outer or name.startswith(f"{outer}.") for outer, _ in found)
        if isinstance(module, PreTrainedModel) and not inside:
            found.append((name, module))
    return [module for _, module in found] or [model]


def batch_context(model: nn.Module) -> BatchContext:
    """The context of the adapters or mixtures in a model.

    Raises:
        UserError: the model has none.
    """
    for module in model.modules():
        context = module.__dict__.get("context")
        if isinstance(context, BatchContext):
            return context
    raise UserError("The model has no mixture adapter: apply one with apply_adapter.")


def set_task_ids(model: nn.Module, task_ids_B: Tensor | None) -> None:
    """Says the task of every example of the batches to come, until it is called again.

    Args:
        model: a model with an adapter that routes by task.
        task_ids_B: (B,) integers. A batch of n*B rows gives each example n rows in place, as `generate` expands beams
            and samples; None forgets them.

    Raises:
        UserError: an id is no task of the adapter.
    """
    batch_context(model).set_task_ids(task_ids_B)


@contextmanager
def task_ids(model: nn.Module, task_ids_B: Tensor) -> Iterator[None]:
    """`set_task_ids` for the length of a block, which must include the backward under gradient checkpointing."""
    context = batch_context(model)
    before = context.task_ids_B
    context.set_task_ids(task_ids_B)
    try:
        yield
    finally:
        context.set_task_ids(before)


@contextmanager
def observe_routing(model: nn.Module) -> Iterator[None]:
    """Keeps routing statistics in eval() too, for `routing_stats`."""
    context = batch_context(model)
    context.observe = True
    try:
        yield
    finally:
        context.observe = False
