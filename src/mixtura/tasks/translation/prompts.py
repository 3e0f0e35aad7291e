"""How a sentence and its languages are put to a model: as tokens of our own or of its tokenizer, or in words.

`tokens`, for a model from scratch: <2xx> source <sep> | target <eos>, where <2xx> names the target language (Johnson et
al. 2017, "Google's Multilingual Neural Machine Translation System", section 3). `instruction`, for a pretrained model:
the words of ALMA (Xu et al. 2024, arXiv 2309.11674, section 2). The loss counts what comes after the bar.

A model from scratch reads with a byte-level BPE over all languages of the comparison, with its prompt tokens. The
encoder of one that has an encoder reads what stands before the bar.

The tokenizers of encoder-decoders are told the languages of a pair thus:

| scheme | source | translation begins with |
|---|---|---|
| `nllb` (NLLB-200, NLLB-MoE) | `eng_Latn` words `</s>`, or the code last in older checkpoints | `</s>` `deu_Latn` |
| `m2m100` | `__en__` words `</s>` | `</s>` `__de__` |
| `marian` (OPUS-MT) | words `</s>`; `>>deu<<` before them where there are several target languages | `<pad>` |
| `madlad` | `<2de>` words `</s>` | `<pad>` |
| `words` (T5, mT5) | "translate English to German:" words `</s>` | `<pad>` |

Fan et al. 2020 (arXiv 2010.11125) for M2M100, NLLB Team 2022 (arXiv 2207.04672), Raffel et al. 2019 (arXiv 1910.10683,
appendix D) for T5's words, Kudugunta et al. 2023 (arXiv 2309.04662) for MADLAD-400.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from transformers import AddedToken, PreTrainedTokenizerBase

from mixtura.config import UserError
from mixtura.config.languages import find_language, language_code, language_name
from mixtura.data.parallel import SentencePair
from mixtura.data.prepare import load_tokenizer, train_tokenizer
from mixtura.files import cache_entry

Scheme = Literal["nllb", "m2m100", "marian", "madlad", "words", "tokens"]

_TOKENS: dict[Scheme, re.Pattern[str]] = {
    "nllb": re.compile(r"([a-z]{3}_[A-Z][a-z]{3})"),
    "m2m100": re.compile(r"__([a-z]{2,3})__"),
    "marian": re.compile(r">>([A-Za-z_]+)<<"),
    "madlad": re.compile(r"<2([A-Za-z_]+)>"),
}
"""What a language's token looks like, with its code in parentheses."""
_NAMED = 12
"""Languages that a sentence lists, at most."""


def scheme_of(tokenizer: PreTrainedTokenizerBase, model_type: str) -> Scheme:
    """How a base model is told languages, by the tokens that its vocabulary has and the kind of model.

    Raises:
        UserError: it is a model whose way is not known here.
    """
    if model_type == "marian":
        return "marian"
    if model_type in ("t5", "mt5", "umt5", "switch_transformers"):
        return "madlad" if language_tokens(tokenizer, "madlad") else "words"
    for scheme in ("m2m100", "nllb"):
        if model_type in ("m2m_100", "nllb-moe") and language_tokens(tokenizer, scheme):
            return scheme
    raise UserError(
        f"'base.name' is a model of type '{model_type}', and how it is told languages is not known here: name a "
        "Marian, M2M100, NLLB, T5, mT5 or MADLAD model, or a decoder."
    )


def language_tokens(tokenizer: Any, scheme: Scheme) -> dict[str, int]:
    """Ids by the tokenizer's own codes, in the order of the ids; empty where the scheme has no tokens."""
    known = getattr(tokenizer, "lang_code_to_id", None)
    if scheme == "m2m100" and isinstance(known, dict):  # its vocabulary need not list them
        return dict(known)
    pattern = _TOKENS.get(scheme)
    if pattern is None:
        return {}
    found = [(index, match[1]) for token, index in tokenizer.get_vocab().items() if (match := pattern.fullmatch(token))]
    return {code: index for index, code in sorted(found)}


class LanguageTokens:
    """The languages of one tokenizer, found by the codes that data and users have."""

    def __init__(self, tokenizer: Any, scheme: Scheme) -> None:
        """Reads the tokenizer's vocabulary."""
        self.tokenizer, self.scheme = tokenizer, scheme
        self.ids = language_tokens(tokenizer, scheme)
        self._codes: dict[str, str] = {}
        for own in self.ids:
            self._codes.setdefault(language_code(own) or own.lower(), own)

    @property
    def tells_target(self) -> bool:
        """Whether the model can be told which language to translate into."""
        return self.scheme == "words" or bool(self.ids)

    def own_code(self, language: str) -> str:
        """The tokenizer's code for a language: "deu_Latn" for "de" in NLLB.

        What a code says beyond the languages that are known is left off from its end, and a script that is the only one
        goes without saying: "pt_br" is "por_Latn", "sr" is "srp_Cyrl".

        Raises:
            UserError: there is none, or there are several scripts to choose from.
        """
        found = find_language(language, self._codes) or language
        if found in self._codes:
            return self._codes[found]
        scripts = [known for known in self._codes if known.split("_")[0] == found]
        if len(scripts) == 1:
            return self._codes[scripts[0]]
        listed = scripts or sorted(self._codes)
        more = ", ..." if len(listed) > _NAMED else ""
        what = "several scripts" if scripts else "no token"
        raise UserError(
            f"The base model has {what} for the language '{language}': name one of "
            f"{', '.join(listed[:_NAMED])}{more} in 'data.pairs'."
        )

    def token(self, language: str) -> str:
        """The token of a language, as text; raises UserError as `own_code` does."""
        return self.tokenizer.convert_ids_to_tokens(self.ids[self.own_code(language)])

    def check(self, directions: Iterable[str]) -> None:
        """Refuses directions that the model cannot be told, or cannot be told apart.

        Args:
            directions: such as "en-de".

        Raises:
            UserError: names the languages.
        """
        pairs = [direction.split("-") for direction in directions]
        targets = list(dict.fromkeys(target for _, target in pairs))
        if not self.tells_target and len(targets) > 1:
            raise UserError(
                f"The base model has no tokens for languages, so it translates into one, but 'data.pairs' has "
                f"{', '.join(targets)}: name pairs with one target, or a base for several."
            )
        if not self.ids:
            return
        asked: dict[str, str] = {}
        for target in targets:
            other = asked.setdefault(self.own_code(target), target)
            if other != target:
                raise UserError(
                    f"'data.pairs' has '{other}' and '{target}', which are one language to the base model, "
                    f"{self.own_code(target)}: keep one of them."
                )
        if self.scheme in ("nllb", "m2m100"):  # the others are not told the source
            for source, _ in pairs:
                self.own_code(source)


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
