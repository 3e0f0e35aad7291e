"""Expert-specialised fine-tuning (ESFT, Wang et al., arXiv 2407.01906): train only those experts that the data uses.

Sample tokens show how the router's choices are shared among the experts (the paper's token selection ratio). In each
layer the smallest set of experts that gets `expert_share` of the choices is trained; everything else stays frozen.
Shares are normalised over the experts of one layer: the published code divides by the sum over layers, which compares
an expert with those of other depths.

Works on Mixtral, Qwen2-MoE, Qwen3-MoE, OLMoE and others whose experts are stacked tensors called with the chosen
indices, and on `mixtura.layers.TokenChoiceMoE`. It is a PEFT method: only the chosen slices are parameters, so
gradients, optimizer state and the saved file have their size, and `merge_and_unload` gives the full model. A forward
writes the slices into a copy of the layer's experts, which is kept for the backward.

Shapes: E experts, T tokens, K top_k.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from peft.config import PeftConfig
from peft.utils.peft_types import PeftType
from torch import Tensor, nn
from torch.func import functional_call

from mixtura.adapters.tuner import AdapterLayer, RoutedTuner, register_method
from mixtura.config import UserError
from mixtura.layers import FeedForward, TokenChoiceMoE
from mixtura.models.batch_context import BatchContext
from mixtura.models.inference import real_tokens

SAMPLE_SIZE = 32
"""Training examples of a run that show which experts its data uses."""

_ATTRIBUTE = "expert_specialized_weights"


@dataclass
class ExpertSpecializedConfig(PeftConfig):
    """The content of `adapter_config.json` for expert-specialised tuning."""

    experts: dict[str, list[int]] = field(default_factory=dict)
    """The trained experts of every mixture layer, by its name; a layer that is left out stays frozen."""
    target_modules: list[str] | str | None = None
    """The mixture layers; set from `experts`."""

    def __post_init__(self) -> None:
        """Derives the targets."""
        super().__post_init__()
        self.peft_type = PeftType("EXPERT_SPECIALIZED")
        self.target_modules = list(self.experts)


class SelectedExperts(nn.Module):
    """Copies of some slices of a layer's stacked expert tensors, which are trained in their place."""

    def __init__(self, experts: nn.Module, chosen: list[int]) -> None:
        """`chosen` are the experts; raises UserError when there are fewer."""
        super().__init__()
        self.chosen = chosen
        self.slices = nn.ParameterDict()
        for name, stacked in stacked_weights(experts).items():
            if not chosen or max(chosen) >= len(stacked):
                raise UserError(f"Experts {chosen} are chosen of {len(stacked)}: the adapter is for another model.")
            self.slices[name] = nn.Parameter(stacked.detach()[chosen].clone())

    def full(self, experts: nn.Module) -> dict[str, Tensor]:
        """The stacked tensors with the trained slices in place."""
        found = {}
        for name, stacked in stacked_weights(experts).items():
            index_N = torch.tensor(self.chosen, device=stacked.device)
            found[name] = stacked.detach().index_copy(0, index_N, self.slices[name].to(stacked.dtype))
        return found


class ExpertSpecializedLayer(AdapterLayer):
    """A mixture layer that runs with some of its experts replaced by trained ones."""

    adapter_layer_names = (_ATTRIBUTE,)
    expert_specialized_weights: nn.ModuleDict

    def __init__(self, base_layer: nn.Module, *, key: str, context: BatchContext) -> None:
        """`key` is the layer's name in the model."""
        super().__init__(base_layer, key=key, context=context)
        self._originals: dict[str, Tensor] = {}

    def add(self, name: str, config: ExpertSpecializedConfig) -> None:
        """Adds an adapter."""
        experts = self.get_base_layer().get_submodule("experts")
        self.add_module_named(name, SelectedExperts(experts, config.experts[self.key]))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The base layer, with the trained experts in place of its own."""
        if self.disable_adapters and self.merged:
            self.unmerge()
        active = self.active_modules()
        if self.merged or not active:
            return self.base_layer(*args, **kwargs)
        weights = active[-1].full(self.base_layer.get_submodule("experts"))
        return functional_call(self.base_layer, {f"experts.{n}": w for n, w in weights.items()}, args, kwargs)

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Writes the trained experts into the base, exactly; `unmerge` puts the originals back."""
        names = [name for name in adapter_names or self.active_adapters if name in self.expert_specialized_weights]
        if self.merged or not names:
            return
        experts = self.get_base_layer().get_submodule("experts")
        self._originals = {name: stacked.detach().clone() for name, stacked in stacked_weights(experts).items()}
        selected: Any = self.expert_specialized_weights[names[-1]]
        for name, weight in selected.full(experts).items():
            stacked_weights(experts)[name].copy_(weight)
        self.merged_adapters.append(names[-1])

    @torch.no_grad()
    def unmerge(self) -> None:
        """Undoes `merge`."""
        for name, stacked in stacked_weights(self.get_base_layer().get_submodule("experts")).items():
            if self.merged:
                stacked.copy_(self._originals[name])
        self._originals = {}
        self.merged_adapters.clear()


class ExpertSpecializedModel(RoutedTuner):
    """PEFT's tuner for `ExpertSpecializedConfig`."""

    prefix = "expert_specialized_"
    tuner_layer_cls = ExpertSpecializedLayer
    attribute = _ATTRIBUTE

    def new_layer(self, config: Any, target: nn.Module, name: str, parent: nn.Module, key: str) -> AdapterLayer:
        """A mixture layer's."""
        return ExpertSpecializedLayer(target, key=key, context=self.context)


def stacked_weights(experts: nn.Module) -> dict[str, nn.Parameter]:
    """The stacked tensors (E, ...) of a module of experts, by name."""
    return {name: weight for name, weight in experts.named_parameters(recurse=False) if weight.dim() == 3}


def mixture_blocks(model: nn.Module) -> dict[str, nn.Module]:
    """The layers whose tokens choose among stacked experts, by name.

    Raises:
        UserError: there are none.
    """
    found = {}
    for name, module in model.named_modules():
        experts = getattr(module, "experts", None)
        chosen_by_tokens = not isinstance(module, FeedForward) or isinstance(module, TokenChoiceMoE)
        if isinstance(experts, nn.Module) and chosen_by_tokens and stacked_weights(experts):
            found[name] = module
    if not found:
        raise UserError(
            f"{type(model).__name__} has no layer whose tokens choose among experts: use another adapter.method."
        )
    return found


@torch.no_grad()
def expert_shares(model: nn.Module, batches: Iterable[Mapping[str, Any]]) -> dict[str, Tensor]:
    """Share of the router's choices that goes to each expert, (E,) for every mixture layer; padding does not count.

    Args:
        model: a mixture without adapters; it is run in eval().
        batches: keyword arguments of its forward, with `attention_mask` where there is padding.

    Raises:
        UserError: the model is no mixture, or no batch has a real token.
    """
    blocks = mixture_blocks(model)
    counts_E: dict[str, Tensor] = {}
    training = model.training
    model.eval()
    for batch in batches:
        with _counting(blocks, counts_E, real_tokens(batch.get("attention_mask"))):
            model(**batch)
    model.train(training)
    if not counts_E or not all(count_E.any() for count_E in counts_E.values()):
        raise UserError("No sample was given to choose experts by: give at least one batch with a token in it.")
    return {name: count_E / count_E.sum() for name, count_E in counts_E.items()}


@contextmanager
def _counting(blocks: dict[str, nn.Module], counts_E: dict[str, Tensor], mask_BL: Tensor | None) -> Iterator[None]:
    """Adds every choice of a real token to the counts while the block lasts."""

    def add(name: str, count_E: Tensor) -> None:
        counts_E[name] = counts_E[name] + count_E if name in counts_E else count_E

    def count_stock(name: str, num_experts: int) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            index_TK = kwargs["top_k_index"] if "top_k_index" in kwargs else args[1]
            real_TK = index_TK if mask_BL is None else index_TK[mask_BL.flatten().bool()]
            add(name, torch.bincount(real_TK.flatten(), minlength=num_experts)[:num_experts].double())

        return hook

    def count_own(name: str, num_experts: int) -> Any:
        def hook(module: TokenChoiceMoE, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            stats = module.route_and_run(args[0], mask_BL, True)[1]
            assert stats is not None
            # Behind those with weights stand experts of no cost, which have nothing to train.
            add(name, stats.tokens_per_expert_E[:num_experts].double())

        return hook

    handles = []
    for name, block in blocks.items():
        experts = block.get_submodule("experts")
        num_experts = len(next(iter(stacked_weights(experts).values())))
        if isinstance(block, TokenChoiceMoE):
            handles.append(block.register_forward_pre_hook(count_own(name, num_experts), with_kwargs=True))
        else:
            handles.append(experts.register_forward_pre_hook(count_stock(name, num_experts), with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def select_experts(share_E: Tensor, expert_share: float) -> list[int]:
    """The smallest set of experts that carries `expert_share` of one layer's choices, in order of number.

    Raises:
        UserError: the share does not lie above 0 and up to 1.
    """
    if not 0 < expert_share <= 1:
        raise UserError(f"'expert_share' is {expert_share}: it must lie above 0 and not above 1.")
    order_E = share_E.argsort(descending=True, stable=True)
    carried_E = share_E[order_E].cumsum(0)
    # The tolerance: a sum that is below the share only because of rounding counts as reaching it.
    needed = int((carried_E < expert_share - 1e-9).sum()) + 1
    return sorted(order_E[: min(needed, len(share_E))].tolist())


def apply_expert_specialized(
    model: nn.Module, batches: Iterable[Mapping[str, Any]], *, expert_share: float
) -> PeftModel:
    """Measures on sample batches which experts are used, and makes those trainable, in place.

    Args:
        model: a mixture without adapters.
        batches: keyword arguments of its forward.
        expert_share: of the router's choices in each layer.
    """
    shares = expert_shares(model, batches)
    experts = {name: select_experts(share_E, expert_share) for name, share_E in shares.items()}
    return get_peft_model(model, ExpertSpecializedConfig(experts=experts))  # pyright: ignore[reportReturnType]


register_method("expert_specialized", ExpertSpecializedConfig, ExpertSpecializedModel)
