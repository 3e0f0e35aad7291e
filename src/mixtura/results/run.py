"""What one run leaves: its held-out measures, its curves, how its training went, and details that differ by task.

A run is stored in `arms/<arm>/seed<k>/result.json` and again, with what its curve cost, among the `runs` of an arm in
results.json. docs/report.md says what each field means. The details of a task are told apart by their `kind`.
"""

from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class Peakedness:
    """The weights of one mixture-of-tokens layer, each token's sorted from the largest, then averaged over tokens."""

    layer: int
    """Depth, from 0."""
    sorted_weights: list[float]
    """S means: of the largest weight of a token, of the second largest, and so on."""
    gate_shares: list[float]
    """S means: the part of a token's summed output weights (with ReLU experts, m^2) that lies in its largest one, two,
    three, ...; the last is 1."""


@dataclass(frozen=True, kw_only=True)
class Continuation:
    """The beginning of a held-out text, how it really goes on, and how the run goes on, as deployed and greedily."""

    prompt: str
    reference: str
    output: str


@dataclass(frozen=True, kw_only=True)
class PretrainingDetails:
    """Details of a language model."""

    peakedness: list[Peakedness]
    """One entry for each mixture-of-tokens layer."""
    continuations: list[Continuation] = field(default_factory=list)
    """Empty in files that were written before continuations were kept."""
    kind: Literal["pretraining"] = "pretraining"


@dataclass(frozen=True, kw_only=True)
class PairScores:
    """Scores of one language pair, from 0 to 100."""

    chrf: float
    chrf_pp: float
    bleu: float
    copy_chrf: float
    """The score of the untranslated source."""
    copy_bleu: float
    sentences: int
    beam_chrf: float | None = None
    """The score with beam search; None where it was not asked for."""
    beam_bleu: float | None = None
    comet: float | None = None
    """About 0 to 100; it and that of the source are None where no checkpoint was named."""
    copy_comet: float | None = None
    engine_chrf: float | None = None
    """Scores of a production engine; None where it is not installed or has not the direction."""
    engine_chrf_pp: float | None = None
    engine_bleu: float | None = None


@dataclass(frozen=True, kw_only=True)
class Sample:
    """A test sentence and what the run makes of it."""

    pair: str
    source: str
    reference: str
    output: str


@dataclass(frozen=True, kw_only=True)
class Association:
    """How much the expert of a routed row says about the group of its token, in bits, and how much chance gives."""

    mutual_information: float
    """The value as counted on the sample."""
    chance: float
    """Mean over permutations of the labels."""
    chance_high: float
    """95 % of the permutations stay below this value."""
    corrected: float
    """The counted value minus chance, at least zero."""
    p_value: float
    """Share of permutations that reach what was counted, the real labels among them."""


@dataclass(frozen=True, kw_only=True)
class LayerSpecialization(Association):
    """One layer's experts against the groups; E lists of G where there are two axes."""

    layer: int
    """Depth, from 0."""
    name: str
    num_experts: int
    rows_per_token: float
    rows: list[list[float]]
    """Routed rows of each expert and group."""
    share: list[list[float]]
    """The part of each group's rows that goes to each expert."""
    max_bits: float
    """The largest possible value for so many experts and so many groups of equal size."""
    group_bits: float
    """Entropy of the groups as counted."""
    entropy: float
    """Entropy of the experts' load, in bits."""
    imbalance: float
    """Largest load divided by the mean load."""
    dead: list[int]
    """Experts with next to no load."""


@dataclass(frozen=True)
class Specialization:
    """How far each routed layer's experts divide the groups among them."""

    groups: list[str]
    layers: list[LayerSpecialization]


@dataclass(frozen=True, kw_only=True)
class TranslationDetails:
    """Details of a translation model."""

    pairs: dict[str, PairScores]
    signatures: dict[str, str]
    """Signatures of sacrebleu, by measure."""
    samples: list[Sample]
    specialization: Specialization | None = None
    """None where nothing is routed."""
    kind: Literal["translation"] = "translation"


@dataclass(frozen=True, kw_only=True)
class CalibrationBin:
    """Answers whose confidence lies in (low, high]."""

    low: float
    high: float
    confidence: float | None
    """Mean confidence of the answers; it and the accuracy are None without answers."""
    accuracy: float | None
    count: int


@dataclass(frozen=True)
class LabelCounts:
    """How often one of several labels was true and given."""

    hits: int
    """Test texts that have it and were given it."""
    true: int
    answered: int


@dataclass(frozen=True, kw_only=True)
class ClassificationDetails:
    """Details of a classifier."""

    labels: list[str]
    confusion: list[list[int]]
    """Counts, with a row for each true class and a column for each answer; empty where a text has several labels."""
    calibration: list[CalibrationBin]
    label_counts: list[LabelCounts] | None = None
    """For each of the labels, where a text has any number of them."""
    threshold: float | None = None
    """Probability from which such a label was given."""
    layer_weights: list[float] | None = None
    """Weights of the blended layers, the embeddings first; None without a blend."""
    kind: Literal["classification"] = "classification"


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A value and the ends of its 95 % interval over held-out chats."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, kw_only=True)
class ChatScores:
    """One measure on the test chats."""

    own: Interval
    """Of the run."""
    base: Interval
    """Of the base before any training."""
    gain: Interval
    """The run minus the base, on the same chats."""


@dataclass(frozen=True, kw_only=True)
class ChatSample:
    """A test chat's last question, and what is answered."""

    prompt: str
    reference: str
    base: str
    """The answer before any training."""
    output: str


@dataclass(frozen=True, kw_only=True)
class ChatDetails:
    """Of a chat model."""

    scores: dict[str, ChatScores]
    """"loss" over the test chats; "exact_match" and "token_f1", in percent, over those that were answered."""
    chats: int
    answered: int
    samples: list[ChatSample]
    kind: Literal["chat"] = "chat"


RunDetails = PretrainingDetails | TranslationDetails | ClassificationDetails | ChatDetails


@dataclass(frozen=True)
class Measure:
    """A number that judges a model on held-out data."""

    key: str
    """Its key in results, such as "loss" or "chrf"."""
    name: str
    """Its name in sentences and tables: "held-out loss", "chrF", "accuracy"."""
    unit: str
    """What follows the number: "nats a token", "points", "%"; may be empty."""
    better: Literal["lower", "higher"]
    digits: int = 3
    """Decimals in tables."""


LOSS = Measure("loss", "held-out loss", "nats a token", "lower")

ByMode = dict[str, float | None]
"""A value for each inference mode; None where a run diverged."""


@dataclass(frozen=True, kw_only=True)
class CurvePoint:
    """One evaluation during a run."""

    step: int
    tokens: float
    """Training tokens so far."""
    seconds: float
    """Training time so far. In results.json it is computed from the seconds a step that were measured side by side."""
    measures: dict[str, ByMode]
    """Values by measure and then by mode, including the loss."""
    flops: float | None = None
    """Training FLOPs so far; None until the arm's costs are known."""

    @property
    def loss(self) -> ByMode:
        """The held-out loss in each mode."""
        return self.measures.get("loss", {})


@dataclass(frozen=True)
class TrainPoint:
    """The mean training loss over a stretch of steps that ends at `step`."""

    step: int
    loss: float | None


@dataclass(frozen=True)
class GradientNorm:
    """The gradient norm over all steps, before clipping."""

    mean: float
    max: float


@dataclass(frozen=True)
class Spikes:
    """How often a series jumped."""

    loss: int
    grad_norm: int


@dataclass(frozen=True)
class LoadHistory:
    """Each expert's share of the load at every evaluation."""

    layers: list[int]
    """Depths of the mixture layers."""
    steps: list[int]
    share: list[list[list[float]]]
    """`share[step][layer][expert]`; the shares of a layer sum to one."""


@dataclass(frozen=True, kw_only=True)
class TrainingHistory:
    """How a run trained, read from its metrics alone."""

    curve: list[CurvePoint]
    train_curve: list[TrainPoint]
    grad_norm: GradientNorm | None
    """None before the first step."""
    spikes: Spikes
    load: LoadHistory | None
    """None for a model without mixtures, as are the next three fields."""
    load_imbalance: float | None
    """Largest load divided by the mean load, averaged over layers, at the last evaluation."""
    dropped_share: float | None
    """Share of the routed rows that were dropped, at the last evaluation."""
    router_entropy: float | None
    """Entropy of the router's weights divided by its maximum, at the last evaluation."""


@dataclass(frozen=True, kw_only=True)
class RunResult(TrainingHistory):
    """All that is kept of one arm and one seed."""

    seed: int
    learning_rate: float
    """Peak learning rate."""
    steps: int
    train_seconds: float
    final: dict[str, dict[str, float | None]]
    """Final measures by mode and key; measures that need decoding exist in the deployed mode only."""
    details: RunDetails | None = None
    """Details that depend on the task; None for a trial of the search."""

    @property
    def diverged(self) -> bool:
        """Whether the run ended without a finite measure."""
        return all(value is None for measures in self.final.values() for value in measures.values())
