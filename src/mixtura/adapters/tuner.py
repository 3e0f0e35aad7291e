"""What our PEFT methods share: registration under their own type, and what layers must know about the batch.

An adapter's layer sees hidden states and nothing else, but padding must enter no mixture and no statistic, and routing
by task needs the task of every example. Both are kept in one `BatchContext` of the model: the padding mask is read from
the model's own `attention_mask` when its forward begins, task ids are given by `set_task_ids`.

Shapes: B batch, L length, T = B*L tokens, E experts.
"""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft.config import PeftConfig
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils.peft_types import PeftType, register_peft_method
from torch import Tensor, nn
from transformers.modeling_utils import PreTrainedModel

from mixtura.config import UserError
from mixtura.layers import RoutingStats
from mixtura.models.inference import real_tokens


def register_method(name: str, config_cls: type[PeftConfig], model_cls: type[BaseTuner]) -> None:
    """Makes PEFT know a method, so that `PeftModel.from_pretrained` loads what it saved.

    `register_peft_method` wants the type in PEFT's enumeration, which is closed; so the member is added as Python's own
    enum would.
    """
    value = name.upper()
    if value not in PeftType.__members__:
        member = str.__new__(PeftType, value)
        member._name_, member._value_ = value, value
        type.__setattr__(PeftType, value, member)
        PeftType._member_names_.append(value)
        PeftType._member_map_[value] = member
        PeftType._value2member_map_[value] = member
    register_peft_method(name=name, config_cls=config_cls, model_cls=model_cls)


class BatchContext:
    """What the layers of one model know about the batch, and the statistics that they leave."""

    def __init__(self) -> None:
        """Knows nothing yet."""
        self.mask_BL: Tensor | None = None
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

    def begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Forward pre-hook of the model: takes its padding mask and forgets the last batch's statistics.

        The mask stays until the next forward, for a backward that runs layers again under gradient checkpointing.
        """
        mask: Any = kwargs.get("attention_mask")
        if mask is None and len(args) > 1:
            names = list(inspect.signature(module.forward).parameters)
            position = names.index("attention_mask") if "attention_mask" in names else len(args)
            mask = args[position] if position < len(args) else None
        self.mask_BL = real_tokens(mask)
        self.stats = {}

    def mask_for(self, x: Tensor) -> Tensor | None:
        """(B, L) bool of this call's tokens, from a mask that may also cover those in a cache; None if all are real.

        Inputs of another shape than (B, L, width), such as pooled vectors, have no padding.
        """
        if self.mask_BL is None or x.dim() != 3 or x.size(0) != self.mask_BL.size(0):
            return None
        mask_BL = self.mask_BL[:, -x.size(1) :].bool()
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
        """Task of every token, (T,); a batch that beams or samples expanded repeats each example's task in place.

        Raises:
            UserError: no ids were given, or not as many as the batch has examples.
        """
        if self.task_ids_B is None:
            raise UserError("The adapter routes by task but no task was given: call set_task_ids(model, ids) first.")
        batch, tasks = x.size(0), len(self.task_ids_B)
        if batch % tasks:
            raise UserError(f"There are {tasks} task ids for a batch of {batch} examples: give one for each example.")
        tokens = x.numel() // x.size(-1)
        return self.task_ids_B.to(x.device).repeat_interleave(tokens // tasks)


class AdapterLayer(nn.Module, BaseTunerLayer):
    """What the layers of our methods share: the frozen layer, its adapters by name, and the batch context.

    A subclass names the attribute with its adapters in `adapter_layer_names`, makes an adapter in `add`, and says in
    `unmergeable` why it cannot be merged, if it cannot.
    """

    other_param_names = ()
    unmergeable: str

    def __init__(self, base_layer: nn.Module, *, key: str, context: BatchContext) -> None:
        """`key` is the layer's name in the model, under which it leaves its statistics."""
        super().__init__()
        self.base_layer, self.key, self.context = base_layer, key, context
        setattr(self, self.adapter_layer_names[0], nn.ModuleDict())
        self._disable_adapters = False
        self.merged_adapters = []

    def add(self, name: str, config: Any) -> None:
        """Makes the adapter that `config` asks for, and hands it to `add_module_named`."""
        raise NotImplementedError

    def add_module_named(self, name: str, adapter: nn.Module) -> None:
        """Keeps an adapter, on the base layer's device and in its type, and activates it."""
        like = next(self.get_base_layer().parameters())
        if like.device.type != "meta" and all(p.device.type != "meta" for p in adapter.parameters()):
            adapter = adapter.to(like.device, like.dtype if like.is_floating_point() else torch.float32)
        getattr(self, self.adapter_layer_names[0])[name] = adapter
        self.set_adapter(self.active_adapters)

    def active_modules(self) -> list[Any]:
        """The adapters that the layer applies now."""
        if self.disable_adapters:
            return []
        modules = getattr(self, self.adapter_layer_names[0])
        return [modules[name] for name in self.active_adapters if name in modules]

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Refuses."""
        raise UserError(self.unmergeable)

    def unmerge(self) -> None:
        """Nothing to do: nothing is ever merged."""


class TwoPartLayer(AdapterLayer):
    """An adapter of a whole feed-forward layer, which in BERT is two modules.

    Of such a layer this replaces the first half. The linear layer that ends the second half, `down`, stays where it is,
    and a forward hook there hands on what the first half left in `pending`.
    """

    def __init__(self, base_layer: nn.Module, *, key: str, context: BatchContext, down: nn.Module | None) -> None:
        """`down` is given for a layer of two modules."""
        super().__init__(base_layer, key=key, context=context)
        self._outside = (down,)  # in a tuple, so that its parameters are not registered twice
        self.pending: Tensor | None = None
        if down is not None:
            down.register_forward_hook(self.leave)

    @property
    def down(self) -> nn.Module | None:
        """The linear layer that ends a layer of two modules."""
        return self._outside[0]

    def finish(self, output: Tensor, pending: Tensor) -> Tensor:
        """What the second half gives out, from its own output and what the first half left."""
        raise NotImplementedError

    def leave(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        """Forward hook of `down`."""
        pending, self.pending = self.pending, None
        return output if pending is None else self.finish(output, pending)


class RoutedTuner(BaseTuner):
    """A PEFT tuner whose layers share one `BatchContext`. Subclasses are PEFT's own kind of extension point."""

    target_module_mapping: dict[str, list[str]] = {}  # noqa: RUF012 - PEFT declares a plain class attribute
    attribute: str
    """The layers' attribute with the adapters, a ModuleDict by name."""

    def _pre_injection_hook(self, model: nn.Module, config: PeftConfig, adapter_name: str) -> None:
        if "context" in self.__dict__:
            return
        self.context = BatchContext()
        for root in _entrances(model):
            root.register_forward_pre_hook(self.context.begin, with_kwargs=True)

    def _prepare_adapter_config(self, peft_config: PeftConfig, model_config: dict) -> PeftConfig:
        if peft_config.target_modules is None:  # pyright: ignore[reportAttributeAccessIssue]
            raise UserError("The adapter has no targets: use apply_adapter, or name target_modules.")
        return peft_config

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        """PEFT's own also copies `weight`, which a whole feed-forward layer does not have."""
        setattr(parent, child_name, new_module)

    def new_layer(self, config: Any, target: nn.Module, name: str, parent: nn.Module, key: str) -> AdapterLayer:
        """The layer that takes the place of `target`, which is `parent`'s child `name` and the model's module `key`."""
        raise NotImplementedError

    def _create_and_replace(
        self,
        peft_config: PeftConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        if isinstance(target, AdapterLayer):
            target.add(adapter_name, peft_config)
            return
        layer = self.new_layer(peft_config, target, target_name, parent, current_key)
        layer._active_adapter = adapter_name
        layer.add(adapter_name, peft_config)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        return key.replace(f".{cls.attribute}.{adapter_name}.", f".{cls.attribute}.")


def _entrances(model: nn.Module) -> list[nn.Module]:
    """The outermost transformers models: the model itself, or those that a wrapper holds, or else the wrapper."""
    found: list[tuple[str, nn.Module]] = []
    for name, module in model.named_modules():
        inside = any(not outer or name.startswith(f"{outer}.") for outer, _ in found)
        if isinstance(module, PreTrainedModel) and not inside:
            found.append((name, module))
    return [module for _, module in found] or [model]


def batch_context(model: nn.Module) -> BatchContext:
    """The context of the adapters of a model.

    Raises:
        UserError: the model has none of our adapters.
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
