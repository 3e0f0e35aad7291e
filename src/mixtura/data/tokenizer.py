"""Tokenizers: a byte-level BPE fitted on the training documents, or any Hugging Face tokenizer.

Byte-level BPE is that of Radford et al. 2019, "Language Models are Unsupervised Multitask Learners", section 2.2: all
256 bytes are in the vocabulary and nothing is normalised, so every text comes back exactly.
"""

from collections.abc import Iterable

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from mixtura.config import UserError
from mixtura.errors import reason_of

PAD_TOKEN, BOS_TOKEN, EOS_TOKEN = "<pad>", "<bos>", "<eos>"
SPECIAL_TOKENS = (PAD_TOKEN, BOS_TOKEN, EOS_TOKEN)
SMALLEST_VOCAB_SIZE = 256 + len(SPECIAL_TOKENS)
# More text hardly changes the merges of a vocabulary of a few thousand, and fitting takes longer with it.
MAX_TRAINING_CHARACTERS = 8_000_000


def train_tokenizer(documents: Iterable[str], *, vocab_size: int) -> PreTrainedTokenizerFast:
    """Fits a byte-level BPE with the special tokens `<pad>`, `<bos>` and `<eos>` (ids 0, 1, 2).

    Decoding gives back the exact text. A special token's name inside a text is plain text to it, never a control token.
    Of a large corpus it reads documents spread evenly, about 8 million characters in all.

    Args:
        documents: training documents only; held-out text must not shape the vocabulary.
        vocab_size: size of the vocabulary, special tokens included. A text too short for that many merges gives fewer.

    Raises:
        UserError: `vocab_size` has no room for the 256 bytes and the special tokens.
    """
    if vocab_size < SMALLEST_VOCAB_SIZE:
        raise UserError(
            f"'data.vocab_size' is {vocab_size}: it must be {SMALLEST_VOCAB_SIZE} or more, "
            f"for 256 bytes and {len(SPECIAL_TOKENS)} special tokens."
        )
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(_sample(list(documents)), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=PAD_TOKEN,
        bos_token=BOS_TOKEN,
        eos_token=EOS_TOKEN,
        clean_up_tokenization_spaces=False,
        split_special_tokens=True,
    )


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """Loads a tokenizer from a folder or the Hugging Face hub; it never runs code from there.

    Raises:
        UserError: there is none, it cannot be read, it needs remote code, or it has no end-of-text token.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except Exception as error:  # The hub client and the Rust parser raise many unrelated classes, bare Exception too.
        raise UserError(
            f"The tokenizer '{name}' cannot be loaded ({reason_of(error)}): "
            'set \'data.tokenizer\' to a folder with a tokenizer.json, a hub name such as "gpt2", or "train".'
        ) from error
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"The tokenizer '{name}' has no end-of-text token to join documents with: "
            "set 'data.tokenizer' to the tokenizer of a causal language model, or \"train\"."
        )
    return tokenizer


def _sample(documents: list[str]) -> list[str]:
    """Every n-th document, so that of a sorted corpus all parts are seen."""
    step = max(1, -(-sum(map(len, documents)) // MAX_TRAINING_CHARACTERS))
    return [document[:MAX_TRAINING_CHARACTERS] for document in documents[::step]]
