"""What a diagnosis found: the records of diagnosis.json, the verdict in words, and what to know before believing it.

Specialisation is claimed where fewer than one of twenty random permutations reaches the measured association, divided
by the number of layers that were tested (Bonferroni). docs/diagnose.md says how association is measured.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from mixtura.diagnostics.health import LoadSummary
from mixtura.results.run import Association, LayerSpecialization

SCHEMA_VERSION = 2
"""The version of diagnosis.json; 1 called a model's `architecture` its `class`."""


@dataclass(frozen=True, kw_only=True)
class ModelFacts:
    """What was diagnosed."""

    name: str
    architecture: str
    parameters: int
    num_layers: int | None
    routed_layers: list[str]
    unread_layers: list[str]
    """Layers whose tokens compete with others, so that no token has experts of its own."""
    families: list[str]
    route_by: str
    expert_names: list[str] | None
    mode: str
    """In which it ran."""


@dataclass(frozen=True)
class GroupFacts:
    """How much was read of one group."""

    name: str
    excerpts: int
    tokens: int
    token_types: list[int]
    """Tokens of each kind, in the order of the diagnosis' `token_types`."""


@dataclass(frozen=True)
class ShownExcerpt:
    """An excerpt that the page shows, as pieces."""

    group: str
    excerpt: int
    """Its place among all excerpts."""
    pieces: list[str]
    """Its tokens as text."""
    experts: list[list[list[int]]] = field(default_factory=list)
    """Of each layer and token, the strongest first, at most three."""


@dataclass(frozen=True, kw_only=True)
class TypicalToken:
    """A token that goes to an expert more often than independence would send it."""

    id: int
    count: float
    """The token's rows in this expert."""
    share: float
    """Part of the token's rows that go here; in a `LayerDiagnosis`, part of its occurrences."""
    pmi: float
    """Pointwise mutual information, in bits."""
    text: str = ""


@dataclass(frozen=True, kw_only=True)
class ByTokenType(Association):
    """A layer's experts against the kinds of tokens."""

    rows: list[list[float]]
    share: list[list[float]]
    max_bits: float
    group_bits: float


@dataclass(frozen=True, kw_only=True)
class LayerLoad(LoadSummary):
    """How even a layer's load is."""

    share: list[float]
    """Of each expert."""


@dataclass(frozen=True, kw_only=True)
class LayerDiagnosis(LayerSpecialization):
    """One layer against the groups and the kinds of tokens."""

    token_types: ByTokenType
    typical_tokens: list[list[TypicalToken]]
    """For each expert, the most typical first."""
    load: LayerLoad


@dataclass(frozen=True, kw_only=True)
class LeakFindings:
    """Whether a token's logits depend on what it must not see, as deployed; or the `reason` why that was not tried."""

    probed: bool
    reason: str | None = None
    future: bool | None = None
    batch: bool | None = None
    probes: int | None = None
    largest_future_change: float | None = None
    largest_batch_change: float | None = None


@dataclass(frozen=True)
class DiagnosisVerdict:
    """What the diagnosis says."""

    headline: str
    sentences: list[str]
    layer: int | None
    """The place among `layers` of the one that the headline is about; None where nothing routes."""


@dataclass(frozen=True, kw_only=True)
class Diagnosis:
    """All of it."""

    created: str
    command: str
    model: ModelFacts
    group_word: str
    """What a group is called in sentences."""
    groups: list[GroupFacts]
    token_types: list[str]
    """Names of the kinds of tokens."""
    layers: list[LayerDiagnosis]
    samples: list[ShownExcerpt]
    leaks: LeakFindings
    cautions: list[str]
    verdict: DiagnosisVerdict
    schema_version: int = SCHEMA_VERSION


SIGNIFICANCE = 0.05
FEW_EXCERPTS = 10


def verdict(
    model: ModelFacts, groups: Sequence[GroupFacts], layers: Sequence[LayerDiagnosis], *, group_word: str
) -> DiagnosisVerdict:
    """The headline, about the layer whose experts tell most, and the sentences below it."""
    if not layers:
        return DiagnosisVerdict(_nothing_routed(model), [], None)
    word, many = group_word, len(groups) > 1
    by_type = _claim([layer.token_types for layer in layers], layers, "the kind of token")
    if not many:
        headline, place = by_type
        sentences = [f"One {word} was given, so only kinds of tokens can be compared."]
    else:
        headline, place = _claim(layers, layers, f"the {word}")
        sentences = [by_type[0]]
    return DiagnosisVerdict(headline, [*sentences, _load_sentence(layers)], place)


def bits(value: float) -> str:
    """Two decimals; three below a tenth, where chance is."""
    if 0 < value < 0.0005:
        return "<\N{NO-BREAK SPACE}0.001"
    return f"{value:.3f}" if value < 0.1 else f"{value:.2f}"


def _claim(
    measures: Sequence[ByTokenType | LayerDiagnosis], layers: Sequence[LayerDiagnosis], about: str
) -> tuple[str, int]:
    """A sentence on the layer whose experts tell most, and its place."""
    place = max(range(len(measures)), key=lambda i: measures[i].corrected)
    found, depth = measures[place], layers[place].layer
    most = min(found.max_bits, found.group_bits)
    amount = f"{bits(found.mutual_information)} of {bits(most)} bits about {about}"
    chance = f"chance gives {bits(found.chance).replace('<', 'less than')}"
    if found.p_value * len(measures) > SIGNIFICANCE:
        return (
            f"No layer's experts tell {about} better than chance: the most is {amount}, in layer {depth}; {chance}.",
            place,
        )
    return f"Layer {depth}'s experts carry {amount}; {chance}.", place


def _nothing_routed(model: ModelFacts) -> str:
    if model.unread_layers:
        return "In this model tokens compete for experts, so no token has experts of its own and none can be read."
    return "This model routes nothing: it is dense, so there are no experts to diagnose."


def _load_sentence(layers: Sequence[LayerDiagnosis]) -> str:
    dead = sum(len(layer.dead) for layer in layers)
    total = sum(layer.num_experts for layer in layers)
    worst = max(layers, key=lambda layer: layer.load.imbalance)
    busy = f"the busiest, in layer {worst.layer}, has {worst.load.imbalance:.1f} times an even share of the rows"
    if not dead:
        return f"All {total} experts are used; {busy}."
    return f"{dead} of {total} experts are dead; {busy}."


def cautions(
    model: ModelFacts, groups: Sequence[GroupFacts], layers: Sequence[LayerDiagnosis], leaks: LeakFindings
) -> list[str]:
    """Sentences on what weakens the numbers, the gravest first."""
    found = []
    if leaks.future:
        found.append("A token's output depends on later tokens: as a causal language model this cannot be deployed.")
    if leaks.batch:
        found.append("A token's output depends on other examples of its batch, so it is not reproducible when served.")
    if model.route_by != "token" and layers:
        found.append(
            f"The experts of this model are named by the {model.route_by} of an example, so what they tell about it "
            "is so by construction and was not learned."
        )
    if model.unread_layers and layers:
        found.append(f"Layers whose tokens compete are left out: {', '.join(model.unread_layers)}.")
    few = [group.name for group in groups if group.excerpts < FEW_EXCERPTS]
    if few and len(groups) > 1 and layers:
        found.append(
            f"There are fewer than {FEW_EXCERPTS} excerpts of {', '.join(few)}: give more text, or chance drowns what "
            "the experts tell."
        )
    return found
