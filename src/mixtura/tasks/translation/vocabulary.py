"""A byte-level BPE over all languages of a comparison, with its prompt tokens, kept between runs."""

import hashlib
import json
from collections.abc import Sequence
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from mixtura.config import UserError
from mixtura.data.tokenizer import load_tokenizer, train_tokenizer
from mixtura.files import cache_entry
from mixtura.tasks.translation.prompts import add_prompt_tokens

# Raise it when the same texts would give another tokenizer than before.
CACHE_FORMAT = 1


def train_translation_tokenizer(
    texts: Sequence[str], languages: Sequence[str], *, vocab_size: int, cache_dir: Path | None
) -> PreTrainedTokenizerBase:
    """A tokenizer of `vocab_size` tokens, the separator and one for each target language among them.

    Args:
        texts: training sentences of all languages; held-out text must not shape the vocabulary.
        languages: target languages.
        vocab_size: size of the vocabulary.
        cache_dir: where it is kept under a hash of all it depends on; None keeps nothing.

    Raises:
        UserError: the vocabulary is too small, or the cache folder cannot be written.
    """
    folder = None if cache_dir is None else cache_dir / f"tokenizer-{_key(texts, languages, vocab_size)}"
    if folder is not None and folder.is_dir():
        with suppress(UserError):  # damaged: made anew
            return load_tokenizer(str(folder))
    tokenizer = train_tokenizer(texts, vocab_size=vocab_size - len(languages) - 1)
    add_prompt_tokens(tokenizer, languages)
    if folder is not None:
        _store(tokenizer, folder)
    return tokenizer


def _key(texts: Sequence[str], languages: Sequence[str], vocab_size: int) -> str:
    settings = [CACHE_FORMAT, vocab_size, list(languages), version("tokenizers"), version("transformers")]
    digest = hashlib.blake2b(json.dumps(settings).encode(), digest_size=16)
    for text in texts:
        digest.update(text.encode() + b"\0")
    return digest.hexdigest()


def _store(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    try:
        with cache_entry(folder) as new:
            tokenizer.save_pretrained(new)
    except OSError as error:
        raise UserError(f"The cache folder '{folder.parent}' cannot be written ({error}): name another.") from error
