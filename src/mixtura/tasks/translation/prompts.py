"""How a sentence is put to a model: as tokens of our own, or in words to a model that already knows language.

`tokens`, for a model from scratch: <2xx> source <sep> | target <eos>, where <2xx> names the target language (Johnson et
al. 2017, "Google's Multilingual Neural Machine Translation System", section 3). `instruction`, for a pretrained model:
the words of ALMA (Xu et al. 2024, arXiv 2309.11674, section 2). The loss counts what comes after the bar.

A model from scratch reads with a byte-level BPE over all languages of the comparison, with its prompt tokens.
"""

import hashlib
import json
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from transformers import AddedToken, PreTrainedTokenizerBase

from mixtura.config import UserError
from mixtura.config.languages import language_name
from mixtura.data.parallel import SentencePair
from mixtura.data.prepare import load_tokenizer, train_tokenizer
from mixtura.files import cache_entry

PromptKind = Literal["tokens", "instruction"]
SEPARATOR = "<sep>"


def language_token(language: str) -> str:
    """The token that asks for a language, such as "<2de>"."""
    return f"<2{language}>"


def add_prompt_tokens(tokenizer: PreTrainedTokenizerBase, languages: Iterable[str]) -> None:
    """Gives a tokenizer the separator and a token for each target language; texts that spell them stay plain text."""
    names = [SEPARATOR, *map(language_token, languages)]
    tokens: list[str | AddedToken] = [AddedToken(name, special=True, normalized=False) for name in names]
    tokenizer.add_tokens(tokens, special_tokens=True)


@dataclass(frozen=True)
class Prompts:
    """Sentences to token ids and back."""

    kind: PromptKind
    tokenizer: PreTrainedTokenizerBase

    @property
    def eos(self) -> int:
        """The token that ends a translation."""
        eos = self.tokenizer.eos_token_id
        if not isinstance(eos, int):
            raise UserError("The tokenizer has no end-of-text token, so no translation could end: choose another base.")
        return eos

    @property
    def pad(self) -> int:
        """The padding token, or eos where there is none: padding is masked, so its token does not matter."""
        pad = self.tokenizer.pad_token_id
        return pad if isinstance(pad, int) else self.eos

    def encode(self, pairs: Sequence[SentencePair]) -> list[list[int]]:
        """The ids of every pair's prompt, of source and languages alone."""
        sources = [" ".join(pair.source.split()) for pair in pairs]
        if self.kind == "instruction":
            texts = [_instruction(source, pair) for source, pair in zip(sources, pairs, strict=True)]
            return self._ids(texts, add_special_tokens=True)
        separator = self._token_id(SEPARATOR)
        wanted = {language: self._token_id(language_token(language)) for language in {p.target_language for p in pairs}}
        return [
            [wanted[pair.target_language], *ids, separator] for ids, pair in zip(self._ids(sources), pairs, strict=True)
        ]

    def encode_targets(self, targets: Sequence[str]) -> list[list[int]]:
        """The ids of every translation, with eos."""
        space = " " if self.kind == "instruction" else ""
        return [[*ids, self.eos] for ids in self._ids([space + " ".join(target.split()) for target in targets])]

    def decode(self, ids: Sequence[Sequence[int]]) -> list[str]:
        """The texts of generated ids, up to eos."""
        return read_translations(self.tokenizer, ids, eos=self.eos)

    def _ids(self, texts: list[str], *, add_special_tokens: bool = False) -> list[list[int]]:
        if not texts:
            return []
        encoded: Any = self.tokenizer(
            texts,
            add_special_tokens=add_special_tokens,
            split_special_tokens=True,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )
        return encoded["input_ids"]

    def _token_id(self, token: str) -> int:
        found = self.tokenizer.get_vocab().get(token)
        if found is None:
            raise UserError(f"The model has no token {token}: it was not trained to translate into that language.")
        return found


def read_translations(tokenizer: Any, ids: Sequence[Sequence[int]], *, eos: int) -> list[str]:
    """The texts of generated ids, up to eos, with single spaces."""
    cut = [list(row[: row.index(eos)] if eos in row else row) for row in map(list, ids)]
    return [" ".join(text.split()) for text in tokenizer.batch_decode(cut, skip_special_tokens=True)]


def _instruction(source: str, pair: SentencePair) -> str:
    source_name, target_name = map(language_name, (pair.source_language, pair.target_language))
    return f"Translate this from {source_name} to {target_name}:\n{source_name}: {source}\n{target_name}:"


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
