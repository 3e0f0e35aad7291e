"""What our PEFT methods share: registration under their own type, and layers that know about the batch."""

from typing import Any

import torch
from peft.config import PeftConfig
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils.peft_types import PeftType, register_peft_method
from torch import Tensor, nn

from mixtura.config import UserError
from mixtura.models.batch_context import BatchContext


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
        self.in_decoder = False
        """Whether it is part of a decoder with an encoder beside it; the tuner says so."""
        setattr(self, self.adapter_layer_names[0], nn.ModuleDict())
        self._disable_adapters = False
        self.merged_adapters = []

    def add(self, name: str, config: Any) -> None:
        """Makes the adapter that `config` asks for, and hands it to `add_module_named`."""
        raise NotImplementedError

    def add_module_named(self, name: str, adapter: nn.Module) -> None:
        """Keeps an adapter, on the base layer's device, in its type and mode, and activates it."""
        like = next(self.get_base_layer().parameters())
        if like.device.type != "meta" and all(p.device.type != "meta" for p in adapter.parameters()):
            adapter = adapter.to(like.device, like.dtype if like.is_floating_point() else torch.float32)
        # One left in train() beside a model in eval() would mix the examples of a batch.
        getattr(self, self.adapter_layer_names[0])[name] = adapter.train(self.get_base_layer().training)
        self.set_adapter(self.active_adapters)

    def mask_for(self, x: Tensor) -> Tensor | None:
        """`BatchContext.mask_for` for the side that the layer is on."""
        return self.context.mask_for(x, in_decoder=self.in_decoder)

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
        self.decoder_names = self.context.watch(model)

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
        layer.in_decoder = current_key.startswith(self.decoder_names)
        layer._active_adapter = adapter_name
        layer.add(adapter_name, peft_config)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        return key.replace(f".{cls.attribute}.{adapter_name}.", f".{cls.attribute}.")
