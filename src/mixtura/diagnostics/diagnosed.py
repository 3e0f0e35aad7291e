"""What diagnosis.json holds: a model, its layers against groups of texts and kinds of tokens, and the findings.

docs/diagnose.md says what each field means.
"""

from dataclasses import dataclass, field

from mixtura.diagnostics.load import LoadSummary
from mixtura.results.details import Association, LayerSpecialization

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
    """Tokens of each kind."""


@dataclass(frozen=True)
class ShownExcerpt:
    """An excerpt as pieces, with the experts of each in every layer, the strongest first."""

    group: str
    excerpt: int
    pieces: list[str]
    experts: list[list[list[int]]] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class TypicalToken:
    """A token that goes to an expert more often than independence would send it."""

    id: int
    count: float
    """The token's rows in this expert."""
    share: float
    """Part of the token's rows that go here."""
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
    """What the diagnosis says, and the place of the layer it is about; None where nothing routes."""

    headline: str
    sentences: list[str]
    layer: int | None


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
    layers: list[LayerDiagnosis]
    samples: list[ShownExcerpt]
    leaks: LeakFindings
    cautions: list[str]
    verdict: DiagnosisVerdict
    schema_version: int = SCHEMA_VERSION
