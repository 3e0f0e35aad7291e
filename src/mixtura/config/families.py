"""The table of families: what the rest of the library knows of a feed-forward layer without looking into it.

A new family is an entry here, a name in `Family`, its settings in `config.arms`, and the file of its layer.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

Family = Literal[
    "dense", "token_choice", "expert_choice", "expert_threshold", "remoe", "merged_experts", "soft", "mixture_of_tokens"
]
Routing = Literal["none", "tokens choose", "experts choose", "merging", "mixing"]
"""How tokens meet experts, on which every formula of cost stands: each token through one network; each token to
`top_k` experts, or to as many on average; each expert to its share of a group's tokens; a segment's tokens to one
network, merged from all experts; each expert to mixtures of a group's tokens."""
Serving = Literal["as trained", "token by token", "never"]
"""How a trained layer answers one request: as it was trained; in a mode of its own, without its group; or not at all,
since a token's output depends on tokens to come."""


@dataclass(frozen=True, kw_only=True)
class FamilyFacts:
    """One family."""

    layer: str
    """Where its class is, as "module:class"."""
    routing: Routing
    serving: Serving
    words: str
    """What it is called in running text."""
    colours: tuple[str, str]
    """Of its curves and names, in a light and a dark theme; the hues follow Okabe and Ito's palette."""
    routes: str
    """What is routed, in a phrase."""
    future: str
    """Whether the future leaks: "no", or what is the case."""
    batch: str
    """Whether other examples of the batch leak: "no", or what is the case."""
    alone: str
    """Whether it runs token by token: "no", or how."""
    stock: str
    """Models of Hugging Face with the same mathematics, or "none"."""
    group_over: tuple[str, ...] = ()
    """What its groups may be formed over; empty where it has none of `group_size` tokens."""
    follows_load: bool = False
    """Whether it has state that a step's load moves in place of a gradient, which trainers of language models do."""
    router_scalars: int = 0
    """Parameters of a router besides a vector for each of its columns."""
    model_settings: tuple[str, ...] = ()
    """Fields of `MixtureConfig` that the layer takes by the same name and that no recipe has."""

    @property
    def has_stock_form(self) -> bool:
        """Whether an architecture of Hugging Face computes the same."""
        return self.stock != "none"


FAMILIES: dict[Family, FamilyFacts] = {
    "dense": FamilyFacts(
        layer="mixtura.layers.feed_forward:DenseFFN",
        routing="none",
        serving="as trained",
        words="dense",
        colours=("#59636e", "#aab4c0"),
        routes="nothing: the baseline",
        future="no",
        batch="no",
        alone="yes",
        stock="Llama, Qwen",
    ),
    "token_choice": FamilyFacts(
        layer="mixtura.layers.token_choice:TokenChoiceMoE",
        routing="tokens choose",
        serving="as trained",
        words="token-choice MoE",
        colours=("#0a6ebd", "#5cb3f2"),
        routes="a token picks its top-k experts",
        future="no",
        batch="not when dropless",
        alone="yes",
        stock="Mixtral, Qwen3-MoE, OLMoE, DeepSeek-V3",
        model_settings=("routed_scaling_factor",),
    ),
    "expert_choice": FamilyFacts(
        layer="mixtura.layers.expert_choice:ExpertChoiceMoE",
        routing="experts choose",
        serving="never",
        words="expert-choice MoE",
        colours=("#0b7d5e", "#3ec79c"),
        routes="an expert picks its top tokens",
        future="not over the batch at one position",
        batch="yes",
        alone="no",
        stock="none",
        group_over=("batch", "all"),
    ),
    "expert_threshold": FamilyFacts(
        layer="mixtura.layers.expert_threshold:ExpertThresholdMoE",
        routing="tokens choose",
        serving="as trained",
        words="expert-threshold MoE",
        colours=("#7d6a00", "#e3cf3f"),
        routes="a token enters every expert whose threshold it passes",
        future="only in the first steps of training",
        batch="only in the first steps of training",
        alone="yes",
        stock="none",
        follows_load=True,
    ),
    "remoe": FamilyFacts(
        layer="mixtura.layers.remoe:ReMoE",
        routing="tokens choose",
        serving="as trained",
        words="ReMoE",
        colours=("#a3173f", "#ff8fa8"),
        routes="a token runs the experts whose ReLU gates are open",
        future="no",
        batch="no",
        alone="yes",
        stock="none",
        follows_load=True,
    ),
    "merged_experts": FamilyFacts(
        layer="mixtura.layers.merged_experts:MergedExperts",
        routing="merging",
        serving="as trained",
        words="merged experts",
        colours=("#3b4cc0", "#9aa7ff"),
        routes="the experts' weights are averaged for a segment, as the segment before decides",
        future="no",
        batch="no",
        alone="yes",
        stock="none",
    ),
    "soft": FamilyFacts(
        layer="mixtura.layers.soft:SoftMoE",
        routing="mixing",
        serving="never",
        words="Soft MoE",
        colours=("#9c4a94", "#e19bd8"),
        routes="every slot is a mixture of one sequence's tokens",
        future="yes: for encoders",
        batch="no",
        alone="no",
        stock="none",
        router_scalars=1,
    ),
    "mixture_of_tokens": FamilyFacts(
        layer="mixtura.layers.mixture_of_tokens:MixtureOfTokens",
        routing="mixing",
        serving="token by token",
        words="MoT",
        colours=("#c8501a", "#f5955c"),
        routes="an expert gets mixtures of a group's tokens: one position, several examples",
        future="no",
        batch="only in training groups",
        alone="yes, in `alone` mode",
        stock="none",
        group_over=("batch", "sequence"),
        model_settings=("population",),
    ),
}
MIXTURES: tuple[Family, ...] = tuple(family for family in FAMILIES if family != "dense")


def facts_of(family: str) -> FamilyFacts:
    """The entry of a family, whose name may come from a file.

    Raises:
        KeyError: there is no such family.
    """
    return FAMILIES[family]  # pyright: ignore[reportArgumentType]


def never_served(families: Iterable[str]) -> list[str]:
    """Those of some families that cannot answer one request, each once, in the order of the table."""
    present = set(families)
    return [family for family, facts in FAMILIES.items() if family in present and facts.serving == "never"]
