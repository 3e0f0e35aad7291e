"""Base models in 4 or 8 bits, on which adapters are trained (QLoRA, arXiv 2305.14314), and what of them really is so.

"nf4" is bitsandbytes' 4-bit NormalFloat, "int8" torchao's weights of 8 bits; an installation has neither package. Both
replace linear layers alone. The experts of a stock mixture are one parameter with an axis of experts, which they leave
as it is without a word: here nf4 stores those too, by bitsandbytes' parametrisations, which dequantise a layer's
experts whenever it runs. Embeddings, heads, norms and routers stay as they are.
"""

from collections.abc import Iterator, Mapping
from importlib import import_module
from importlib.util import find_spec
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, TorchAoConfig

from mixtura.config import UserError

Quantize = Literal["none", "nf4", "int8"]
_PACKAGES = {"nf4": "bitsandbytes", "int8": "torchao"}


class Quantized(NamedTuple):
    """How many weights of a base are stored in few bits: counts as before packing."""

    quantized: int
    total: int
    """Without adapters."""
    quantized_experts: int
    experts: int
    """Weights of stacked experts."""

    def __str__(self) -> str:
        """One sentence."""
        if not self.quantized:
            return "No weight of the base is quantised."
        text = f"{self.quantized:,} of the base's {self.total:,} weights are quantised"
        return text + (f", {self.quantized_experts:,} of the {self.experts:,} of experts." if self.experts else ".")


def loading_options(quantize: Quantize) -> Mapping[str, Any]:
    """What `from_pretrained` takes for a base in few bits; nothing for "none".

    Raises:
        UserError: the package is not installed.
    """
    if quantize == "none":
        return {}
    package = _PACKAGES[quantize]
    if find_spec(package) is None:
        raise UserError(
            f"'base.quantize' is '{quantize}', but the package {package} is not installed: run pip install {package}, "
            "or leave the key out."
        )
    if quantize == "nf4":
        config: Any = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
        )
    else:
        config = TorchAoConfig(import_module("torchao.quantization").Int8WeightOnlyConfig())
    return {"quantization_config": config, "device_map": {"": "cuda" if torch.cuda.is_available() else "cpu"}}


def complete_nf4(model: nn.Module) -> None:
    """Stores stacked experts in 4 bits too, and keeps all layers differentiable, in place."""
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            # On CPUs with AVX-512 bitsandbytes repacks weights at the first evaluation for a product without a
            # gradient, and never back: training after it would stop at every such layer.
            vars(module)["support_avx512bf16_for_cpu"] = False
    replace = import_module("bitsandbytes.nn.parametrize").replace_parameter_4bit
    for module in list(model.modules()):
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.dim() == 3 and parameter.is_floating_point():
                replace(module, name, quant_type="nf4")


def weights(model: nn.Module) -> Iterator[tuple[nn.Parameter, torch.Size, bool]]:
    """Every parameter once, with its shape before packing, and whether it is stored in few bits."""
    seen = set[int]()
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            if id(parameter) not in seen:
                seen.add(id(parameter))
                state = _state(module, parameter)
                shape = parameter.shape if state is None else state.shape
                yield parameter, shape, state is not None or _is_torchao(parameter)


def quantized_weights(model: nn.Module, *, adapters: set[int] | None = None) -> Quantized:
    """Looks at every weight of a model for what it is stored in.

    Args:
        model: any, with or without adapters.
        adapters: the `id` of the parameters that are an adapter's, which are left out.
    """
    own = [(shape, packed) for parameter, shape, packed in weights(model) if id(parameter) not in (adapters or ())]
    packed = [shape for shape, is_packed in own if is_packed]
    everything = [shape for shape, _ in own]
    return Quantized(
        *(
            sum(shape.numel() for shape in shapes if not experts or len(shape) == 3)
            for experts in (False, True)
            for shapes in (packed, everything)
        )
    )


def plain(value: Tensor) -> Tensor:
    """A weight as numbers, also where a class of torchao holds it."""
    return value.dequantize() if _is_torchao(value) else value


def _state(module: nn.Module, parameter: Tensor) -> Any:
    """bitsandbytes' description of a packed weight: of the parameter, or of what dequantises it."""
    own = getattr(parameter, "quant_state", None)
    parts = module if isinstance(module, nn.utils.parametrize.ParametrizationList) else ()
    return own or next((part.quant_state for part in parts if hasattr(part, "quant_state")), None)


def _is_torchao(value: Tensor) -> bool:
    return type(value).__module__.startswith("torchao.")
