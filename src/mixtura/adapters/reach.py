"""Whether an adapter has an effect: which weights it reaches, and that each of them changes the output.

An adapter can fail silently. A target that no longer exists is skipped if another one matches. A layer may use the
frozen weight directly and so bypass the adapter around it. A router whose only weight is normalised to 1 never gets a
gradient. So names prove nothing: the adapter of every target is perturbed, and the output must change.
"""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from peft import PeftModel
from peft.tuners.lora.layer import ParamWrapper
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import ModulesToSaveWrapper
from torch import nn

from mixtura.adapters.attach import adapter_parameters, change_when_perturbed, first_output
from mixtura.adapters.expert_specialized import ExpertSpecializedLayer
from mixtura.adapters.targets import count_parameters
from mixtura.checkpoints.quantized import Quantized, quantized_weights, weights
from mixtura.config import UserError

_PROBE_SHAPE = (2, 16)
_ROUNDING = 1e-6
"""Relative to the largest gradient of all places: smaller ones are rounding errors of terms that cancel in float32."""


class TargetReach(NamedTuple):
    """The part of an adapter that belongs to one weight, or one layer, of the base model."""

    name: str
    """Of the weight or layer, as the base model has it."""
    parameters: int
    """Of the adapter there."""
    adapted: int
    """Parameters of the base model that it changes."""
    output_change: float
    """The largest change of the output (a logit, of a language model) when the adapter there is perturbed."""


class AdapterReach(NamedTuple):
    """What an adapter reaches."""

    targets: tuple[TargetReach, ...]
    unmatched: tuple[str, ...]
    """Targets of the configuration that are nothing in this model."""
    trained: int
    total: int
    """All parameters, with those of the frozen base."""
    expert_parameters: int
    """Parameters of the base in stacked experts."""
    adapted_expert_parameters: int
    """Those of them that the adapter changes."""
    quantized: Quantized
    """What of the base is stored in few bits."""

    def __str__(self) -> str:
        """One or two sentences."""
        text = (
            f"The adapter trains {self.trained:,} of {self.total:,} parameters in {len(self.targets)} places, each "
            f"of which affects the output, and changes {self.adapted_expert_parameters:,} of the "
            f"{self.expert_parameters:,} parameters of experts."
        )
        if self.quantized.quantized:
            text += f" {self.quantized}"
        return text + (f" Nothing is called {' or '.join(self.unmatched)}." if self.unmatched else "")


class _Part(NamedTuple):
    """A place in the model that carries an adapter."""

    name: str
    parameters: list[nn.Parameter]
    adapted: int
    is_experts: bool


def check_adapter(model: PeftModel, batch: Mapping[str, Any] | None = None) -> AdapterReach:
    """Says what an adapter reaches, and refuses one that does nothing somewhere. The model is left as it was.

    Any PEFT model will do, stock mixtures included. It costs a forward for each target and one backward.

    Args:
        model: with an adapter, which is not merged.
        batch: keyword arguments of its forward; None probes a language model with random tokens.

    Raises:
        UserError: there is no adapter, or it does nothing or gets no gradient in places that the message names.
    """
    parts = list(_parts(model))
    if not parts:
        raise UserError(f"{type(model).__name__} carries no adapter: apply one before it is checked.")
    batch = _probe(model) if batch is None else batch
    training = model.training
    model.eval()
    try:
        before = first_output(model, batch)
        changes = [change_when_perturbed(model, part.parameters, batch, before) for part in parts]
        _refuse("does nothing", [part.name for part, change in zip(parts, changes, strict=True) if change == 0], parts)
        _refuse("gets no gradient", _without_gradient(model, parts, batch), parts)
    finally:
        model.train(training)
    total, trained = count_parameters(model)
    quantized = quantized_weights(model, adapters={id(p) for part in parts for p in part.parameters})
    return AdapterReach(
        targets=tuple(
            TargetReach(part.name, sum(p.numel() for p in part.parameters), part.adapted, change)
            for part, change in zip(parts, changes, strict=True)
        ),
        unmatched=_unmatched(model),
        trained=trained,
        total=total,
        expert_parameters=quantized.experts,
        adapted_expert_parameters=sum(part.adapted for part in parts if part.is_experts),
        quantized=quantized,
    )


def _refuse(what: str, names: list[str], parts: list[_Part]) -> None:
    if names:
        raise UserError(
            f"The adapter {what} in {len(names)} of {len(parts)} places ({', '.join(names[:3])}): adapt other weights, "
            "or leave these out."
        )


def _parts(model: nn.Module) -> Iterator[_Part]:
    for name, module in model.named_modules():
        name = name.removeprefix("base_model.model.").replace(".base_layer", "")
        if isinstance(module, ParamWrapper):
            weight = module.get_param()
            name = f"{name}.{module.parameter_name}"
            yield _Part(name, adapter_parameters(module), weight.numel(), weight.dim() == 3)
        elif isinstance(module, ExpertSpecializedLayer):
            parameters = adapter_parameters(module)
            yield _Part(name, parameters, sum(p.numel() for p in parameters), True)
        elif isinstance(module, BaseTunerLayer):
            adapted = sum(shape.numel() for _, shape, _ in weights(module.get_base_layer()))
            yield _Part(name, adapter_parameters(module), adapted, False)
        elif isinstance(module, ModulesToSaveWrapper):
            parameters = list(module.modules_to_save.parameters())
            yield _Part(name, parameters, sum(p.numel() for p in parameters), False)


def _probe(model: PeftModel) -> dict[str, Any]:
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(0)
    base: Any = model.get_base_model()
    ids_BL = torch.randint(base.config.vocab_size, _PROBE_SHAPE, generator=generator)
    batch = {"input_ids": ids_BL.to(device)}
    if base.config.is_encoder_decoder:
        batch["decoder_input_ids"] = batch["input_ids"].flip(1)
    return batch


def _without_gradient(model: nn.Module, parts: list[_Part], batch: Mapping[str, Any]) -> list[str]:
    """Places that are trained, but whose adapter gets no more than rounding errors as its gradient.

    A little noise is put on, because the half of an adapter behind its zeros has no gradient; with much, routers
    saturate.
    """
    trained = [p for part in parts for p in part.parameters if p.requires_grad]
    saved = [(p, p.detach().clone(), p.grad) for p in trained]
    generator = torch.Generator().manual_seed(0)
    try:
        with torch.no_grad():
            for parameter in trained:
                parameter.grad = None
                parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator).to(parameter))
        with torch.enable_grad():
            output: Any = model(**batch)
            logits = output.logits if hasattr(output, "logits") else output[0]
            # A plain sum would cancel where outputs are normalised.
            logits.float().square().sum().backward()
        largest = {
            part.name: max((p.grad.abs().max().item() for p in part.parameters if p.grad is not None), default=0.0)
            for part in parts
            if any(p.requires_grad for p in part.parameters)
        }
        return [name for name, value in largest.items() if value <= _ROUNDING * max(largest.values())]
    finally:
        with torch.no_grad():
            for parameter, value, gradient in saved:
                parameter.copy_(value)
                parameter.grad = gradient


def _unmatched(model: PeftModel) -> tuple[str, ...]:
    config: Any = model.active_peft_config
    tuner: Any = model.base_model
    found = [*getattr(tuner, "targeted_module_names", []), *getattr(tuner, "targeted_parameter_names", [])]
    targets: list[str] = []
    for wanted in (getattr(config, "target_modules", None), getattr(config, "target_parameters", None)):
        targets += [] if wanted is None or isinstance(wanted, str) else sorted(wanted)
    return tuple(t for t in targets if not any(name == t or name.endswith(f".{t}") for name in found))
