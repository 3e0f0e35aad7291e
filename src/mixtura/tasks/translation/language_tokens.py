"""How the tokenizers of encoder-decoders are told the languages of a sentence pair.

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

import re
from collections.abc import Iterable
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

from mixtura.config import UserError
from mixtura.config.languages import find_language, language_code

Scheme = Literal["nllb", "m2m100", "marian", "madlad", "words"]

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
