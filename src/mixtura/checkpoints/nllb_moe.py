"""NLLB-MoE, computed as it was published, and its experts pruned for some languages.

The layer (NLLB Team 2022, arXiv 2207.04672, section 6.2; gating of GShard, arXiv 2006.16668) is

    MoE(x) = sum_e G_e(x) FFN_e(x),   G(x): softmax of the router, its two largest entries divided by their sum, else 0.

transformers from 5.0 on hands its experts the mask of the first choices where they expect indices, so that expert 1
computes every token's first choice and expert 0 the second. It also trains with ordinary dropout where the authors'
code masks whole expert outputs, and keeps the capacity of the last evaluation. `compute_as_published` mends all three
in a model that is loaded; names and shapes of weights stay.

Shapes: T tokens, D hidden, E experts, K 2 choices.
"""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.models.nllb_moe.modeling_nllb_moe import NllbMoeExperts, NllbMoeSparseMLP

from mixtura.config import UserError

TOP_K = 2


class PublishedExperts(NllbMoeExperts):
    """The experts of a layer, given the indices and weights of each token's choices."""

    def forward(self, x_TD: Tensor, expert_TK: Tensor, weight_TK: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """(T, D) -> (T, D): sum_k w_k FFN_k(x); a weight of zero is an expert that does not run.

        Expert output masking (section 6.2): in training each expert's output for a token is left out with probability
        `moe_token_dropout`, the others are not scaled up, and deployed all are scaled down.
        """
        if self.moe_token_dropout > 0:
            kept = 1 - self.moe_token_dropout
            weight_TK = weight_TK * (torch.rand_like(weight_TK) < kept if self.training else kept)
        y_TD = torch.zeros_like(x_TD)
        for index in range(self.num_experts):
            token_R, choice_R = ((expert_TK == index) & (weight_TK > 0)).nonzero(as_tuple=True)
            if len(token_R):
                output_RD = self[f"expert_{index}"](x_TD[token_R]) * weight_TK[token_R, choice_R].unsqueeze(-1)
                y_TD.index_add_(0, token_R, output_RD.to(y_TD.dtype))
        return y_TD


class PublishedFeedForward(NllbMoeSparseMLP):
    """A feed-forward layer of NLLB-MoE; the router is transformers' own."""

    def forward(self, hidden_states: Tensor, padding_mask: Tensor | None = None) -> Tensor:
        """(B, L, D) -> (B, L, D); padding is given to no expert."""
        x_TD = hidden_states.flatten(0, 1)
        if self.training:
            # Else it stays what the last evaluation set; None is 2 * ceil(T / E) rows, as in the authors' code.
            router: Any = self.router
            router.expert_capacity = None
        _, gate_TE, _ = self.router(x_TD, padding_mask)
        weight_TK, expert_TK = gate_TE.topk(TOP_K, dim=-1)
        return self.experts(x_TD, expert_TK, weight_TK).view(hidden_states.shape)


def compute_as_published(model: nn.Module) -> None:
    """Makes the layers of an NLLB-MoE that transformers loaded compute their formula, in place; others stay."""
    for module in model.modules():
        if type(module) is NllbMoeSparseMLP:
            module.__class__ = PublishedFeedForward
            module.experts.__class__ = PublishedExperts


class Pruned(NamedTuple):
    """What was kept of one layer."""

    layer: str
    """Its name in the model."""
    kept: tuple[int, ...]
    """Experts, in their old numbering and order."""
    share: float
    """Of the weight that the sample's tokens give to all experts, the part that goes to these."""


@torch.no_grad()
def prune_experts(model: nn.Module, batches: Iterable[Mapping[str, Any]], *, keep: int) -> list[Pruned]:
    """Keeps the experts of every layer that a sample uses most, in place: of a few languages' sentences, theirs.

    Koishekenov et al. 2023 (arXiv 2212.09811) remove 80 % of the experts of NLLB-200's 54 billion parameters so, with
    little loss for the languages that stay. The two largest gates are divided by their sum, so a token whose two
    experts are both kept gets exactly what it got before.

    Args:
        model: an NLLB-MoE, loaded by `mixtura.checkpoints.pretrained.load_base`.
        batches: keyword arguments of its forward, over sentences of the languages that count.
        keep: experts that stay in every layer.

    Raises:
        UserError: it has no such layers, or not so many experts.
    """
    layers = {name: part for name, part in model.named_modules() if isinstance(part, PublishedFeedForward)}
    config: Any = getattr(model, "config", None)
    if not layers:
        raise UserError(f"{type(model).__name__} has no layers of NLLB-MoE, and only their experts can be pruned.")
    if not TOP_K <= keep <= config.num_experts:
        raise UserError(f"keep is {keep}: it must lie between {TOP_K} and the {config.num_experts} experts there are.")
    used = _used_experts(model, layers, batches)
    pruned = []
    for name, layer in layers.items():
        used_E = used[name]
        kept = sorted(used_E.topk(keep).indices.tolist())
        pruned.append(Pruned(name, tuple(kept), float(used_E[kept].sum() / used_E.sum().clamp_min(1e-30))))
        _keep_in_layer(layer, kept)
    config.num_experts = keep
    return pruned


def _used_experts(
    model: nn.Module, layers: Mapping[str, PublishedFeedForward], batches: Iterable[Mapping[str, Any]]
) -> dict[str, Tensor]:
    """The summed gates (E,) of every layer's experts over the batches, in eval()."""
    used = {name: torch.zeros(layer.num_experts, dtype=torch.float64) for name, layer in layers.items()}

    def watch(name: str) -> Any:
        def look(_module: nn.Module, _args: Any, output: tuple[Tensor, ...]) -> None:
            used[name] += output[1].sum(0).double().cpu()

        return look

    handles = [layer.router.register_forward_hook(watch(name)) for name, layer in layers.items()]
    training = model.training
    model.eval()
    try:
        for batch in batches:
            model(**batch)
    finally:
        model.train(training)
        for handle in handles:
            handle.remove()
    return used


def _keep_in_layer(layer: PublishedFeedForward, kept: list[int]) -> None:
    """Renumbers the experts that stay, and takes their rows of the router."""
    router, experts = layer.router, layer.experts
    old: Any = router.classifier
    new = nn.Linear(old.in_features, len(kept), bias=old.bias is not None).to(old.weight)
    new.weight.copy_(old.weight[kept])
    if old.bias is not None:
        new.bias.copy_(old.bias[kept])
    router.classifier = new
    modules = [experts[f"expert_{index}"] for index in kept]
    for index in range(layer.num_experts):
        del experts[f"expert_{index}"]
    experts.update({f"expert_{index}": module for index, module in enumerate(modules)})
    layer.num_experts = router.num_experts = experts.num_experts = len(kept)
