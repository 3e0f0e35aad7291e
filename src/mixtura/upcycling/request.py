"""The settings of an upcycling, what follows from them, and how they affect learning.

Komatsuzaki et al., "Sparse Upcycling" (arXiv 2212.05055), makes every expert a copy of the dense layer. The published
variants are values beside that: `split` is the granularity of He et al. (arXiv 2410.07524), `drop` is that
of Nakamura et al., "Drop-Upcycling" (arXiv 2502.19261), several sources are branch-train-mix (Sukhbaatar et
al., arXiv 2403.07816).
"""

import copy
import math
import re
from dataclasses import dataclass
from typing import Any, Literal

from mixtura.config import UserError
from mixtura.models.configuration_mixture import MixtureConfig

UpcycledFamily = Literal["token_choice", "mixture_of_tokens"]
RouterStartKind = Literal["random", "clusters", "texts"]

# Softmax over logits this far apart is one-hot from the start, and a one-hot router learns slowly.
_LARGEST_SPREAD = 4.0


@dataclass(frozen=True, kw_only=True)
class UpcycleSettings:
    """How dense layers become mixtures; `mixtura.upcycle` describes each value.

    A *copy* is one dense layer with a router row of its own. Its routed columns lie in `parts` experts, so a model has
    `copies` * `parts` experts, and a token runs `active_copies` of the copies.
    """

    family: UpcycledFamily
    num_experts: int
    top_k: int
    layers: str
    split: int
    shared: int
    drop: float
    noise: float
    normalize_top_k: bool
    score_function: Literal["softmax", "sigmoid"]
    router: RouterStartKind
    spread: float | None
    group_size: int | None
    seed: int

    @property
    def parts(self) -> int:
        """Routed experts that one copy is cut into."""
        return self.split - self.shared

    @property
    def copies(self) -> int:
        """Copies of the dense layer."""
        return self.num_experts // self.parts

    @property
    def active_copies(self) -> int:
        """Copies that a token runs."""
        return self.top_k // self.parts

    @property
    def tokens_of_group(self) -> int:
        """G of a mixture-of-tokens layer: by default as many as experts, at least 2."""
        return max(2, self.num_experts) if self.group_size is None else self.group_size

    @property
    def router_spread(self) -> float:
        """Standard deviation of a token's logits over the copies; mixtures of tokens drift when it is large."""
        if self.spread is not None:
            return self.spread
        return 0.05 if self.family == "mixture_of_tokens" else 0.5

    @property
    def undecided_weight(self) -> float:
        """The weight of an expert that a token runs, where the router's logits are all zero."""
        if self.family == "mixture_of_tokens":
            return 1 / self.tokens_of_group
        if self.normalize_top_k:
            return 1 / self.top_k
        return 1 / self.num_experts if self.score_function == "softmax" else 0.5


def check_settings(settings: UpcycleSettings, *, num_sources: int, num_texts: int) -> None:
    """Refuses values that make no sense, alone or together.

    Raises:
        UserError: names the value and the fix.
    """
    s = settings
    if s.family not in ("token_choice", "mixture_of_tokens"):
        raise UserError(f"The family '{s.family}' cannot be upcycled to: use token_choice or mixture_of_tokens.")
    if s.split < 1 or not 0 <= s.shared < s.split:
        raise UserError(
            f"A layer cannot be split into {s.split} parts of which {s.shared} are shared: give 1 part or more, and "
            "share fewer than there are."
        )
    if s.shared and s.family == "mixture_of_tokens":
        raise UserError("Mixture of tokens has no shared expert: leave 'shared' at 0, or upcycle to token_choice.")
    for name, count in (("num_experts", s.num_experts), ("top_k", s.top_k)):
        if count < 1 or count % s.parts:
            raise UserError(
                f"{name} is {count}, but every copy of a layer is {s.parts} routed experts: give a multiple of "
                f"{s.parts}, such as {s.parts * max(1, round(count / s.parts))}."
            )
    if s.top_k > s.num_experts:
        raise UserError(f"A token cannot run {s.top_k} of {s.num_experts} experts: lower top_k or raise num_experts.")
    if s.copies % num_sources:
        raise UserError(
            f"{s.copies} copies cannot be dealt to {num_sources} checkpoints evenly: set num_experts to a multiple of "
            f"{num_sources * s.parts}."
        )
    if s.score_function not in ("softmax", "sigmoid"):
        raise UserError(f"The score function '{s.score_function}' is unknown: use softmax or sigmoid.")
    _check_groups(s)
    _check_shares(s)
    _check_router(s, num_texts)


def _check_groups(s: UpcycleSettings) -> None:
    if s.group_size is not None and s.family != "mixture_of_tokens":
        raise UserError(f"group_size is {s.group_size}, but {s.family} has no groups: leave it out.")
    if s.group_size is not None and s.group_size < 2:
        raise UserError(f"group_size is {s.group_size}: a group needs 2 tokens or more.")


def _check_shares(s: UpcycleSettings) -> None:
    if not 0 <= s.drop <= 1:
        raise UserError(f"drop is {s.drop}: it is a share of the channels and must lie between 0 and 1.")
    if not (0 <= s.noise < math.inf):
        raise UserError(f"noise is {s.noise}: it must be zero or more, such as 0.01 for one percent.")
    if not 0 <= s.seed < 2**32:
        raise UserError(f"seed is {s.seed}: it must lie between 0 and {2**32 - 1}.")


def _check_router(s: UpcycleSettings, num_texts: int) -> None:
    if s.router not in ("random", "clusters", "texts"):
        raise UserError(f"The router's start '{s.router}' is unknown: use random, clusters or texts.")
    if not 0 < s.router_spread <= _LARGEST_SPREAD:
        raise UserError(
            f"router_spread is {s.router_spread}: it must be greater than 0, where all experts tie, and at most "
            f"{_LARGEST_SPREAD:g}, where the router is saturated."
        )
    if s.router != "random" and not num_texts:
        raise UserError(f"A router that starts from {s.router} needs a text: give --text FILE.")
    if s.router == "texts" and num_texts != s.copies:
        raise UserError(f"There are {num_texts} texts for {s.copies} copies: give --text once for each, in order.")


def chosen_layers(layers: str, num_layers: int) -> list[int]:
    """The depths that a phrase names: "all", "later_half", or numbers and ranges from 0, such as "0,4-11".

    Raises:
        UserError: the phrase cannot be read, or names a layer that there is not.
    """
    if layers in ("all", "later_half"):
        return list(range(num_layers // 2 if layers == "later_half" else 0, num_layers))
    chosen: set[int] = set()
    for piece in layers.split(","):
        found = re.fullmatch(r"(\d+)(?:-(\d+))?", piece.strip())
        if found is None:
            raise UserError(f"The layers '{layers}' cannot be read: give all, later_half, or numbers such as 0,4-11.")
        first, last = int(found[1]), int(found[2] or found[1])
        if not first <= last < num_layers:
            raise UserError(f"There are no layers '{piece.strip()}': the model's are 0 to {num_layers - 1}.")
        chosen |= set(range(first, last + 1))
    return sorted(chosen)


def mixture_config(settings: UpcycleSettings, dense: MixtureConfig) -> MixtureConfig:
    """The configuration of the mixture that a dense decoder becomes.

    Raises:
        UserError: the layers do not exist, or their width cannot be split evenly.
    """
    if dense.intermediate_size % settings.split:
        raise UserError(
            f"The feed-forward width {dense.intermediate_size} cannot be split into {settings.split} equal parts: "
            "choose a divisor of it."
        )
    config: Any = copy.deepcopy(dense)
    chosen = set(chosen_layers(settings.layers, dense.num_hidden_layers))
    config.architectures = ["MixtureForCausalLM"]
    config.mlp_layer_types = [
        settings.family if depth in chosen else "dense" for depth in range(dense.num_hidden_layers)
    ]
    config.moe_intermediate_size = dense.intermediate_size // settings.split
    config.num_experts = settings.num_experts
    if settings.family == "token_choice":
        config.num_experts_per_tok = settings.top_k
        config.norm_topk_prob, config.scoring_func = settings.normalize_top_k, settings.score_function
        config.num_shared_experts = settings.shared
    else:
        config.group_size, config.alone_top_k = settings.tokens_of_group, settings.top_k
        config.inference_mode, config.zero_fill = "alone", 1.0
    return config


def is_exact(settings: UpcycleSettings, *, num_sources: int) -> bool:
    """Whether the mixture computes what the dense model does, whatever its router says."""
    return (
        settings.family == "token_choice"
        and settings.normalize_top_k
        and settings.drop == settings.noise == 0
        and num_sources == 1
    )


def learning_warnings(settings: UpcycleSettings, *, num_sources: int) -> list[str]:
    """Sentences on what the values do to the output at the start and to the router's gradient, with the way out."""
    s = settings
    equal_copies = s.drop == s.noise == 0 and s.copies > num_sources
    found: list[str] = []
    if s.family == "mixture_of_tokens":
        found.append(
            "A mixture of tokens computes what the dense model does only where its router is undecided, and only "
            "alone: in groups every expert sees a mean of tokens, so the model is set to train alone (zero_fill = 1)."
        )
    elif s.normalize_top_k and s.top_k == 1:
        found.append(
            "One expert a token with renormalised gates always weighs 1: the loss never gives the router a gradient. "
            "Use --top-k 2, or --no-normalize."
        )
    elif s.normalize_top_k and equal_copies and s.parts == 1:
        found.append(
            "The copies are equal and their gates renormalised: the loss gives the router no gradient until the "
            "copies differ. Use --noise 0.01 or --drop 0.5 to make them differ from the start."
        )
    elif s.normalize_top_k and equal_copies:
        found.append(
            "The copies are equal and their gates renormalised: the loss says nothing about which copy to choose until "
            "they differ. Use --noise 0.01 or --drop 0.5 to make them differ from the start."
        )
    if s.family == "token_choice" and not s.normalize_top_k:
        found.append(
            "Without renormalised gates the output is scaled to be right where the router is undecided, and is near "
            "the dense model's elsewhere."
        )
    if s.drop:
        found.append(
            f"{s.drop:.0%} of the channels of every expert are drawn anew: the loss starts higher than the dense "
            "model's and pays off over long training only."
        )
    if num_sources > 1:
        found.append(
            f"All but the experts is the mean of {num_sources} checkpoints: this works for branches of one model, and "
            "the mixture has to be trained."
        )
    return found
