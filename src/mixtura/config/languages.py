"""Languages: one spelling for a code, however it was typed, pairs of them, and their names in prompts.

A code is a language of two or three letters and then, each if need be, a script of four letters, a region of two
letters or three digits, and variants (BCP 47: RFC 5646, section 2.1). It may be typed in any case and with "-" or "_",
and is kept as "pt_br". As section 4.5 has it, the shortest form stands for all: "eng" and "eng_Latn" are "en".
"""

import re
from collections.abc import Collection, Iterable
from typing import NamedTuple

from mixtura.errors import UserError

# Code, codes of three letters for the same (ISO 639-3, macrolanguages with their main member), the script that goes
# without saying ("-" where there are several), and the English name.
_LANGUAGES = """
af afr latn Afrikaans
am amh ethi Amharic
ar ara,arb arab Arabic
be bel cyrl Belarusian
bg bul cyrl Bulgarian
bn ben beng Bengali
ca cat latn Catalan
cs ces,cze latn Czech
cy cym,wel latn Welsh
da dan latn Danish
de deu,ger latn German
el ell,gre grek Greek
en eng latn English
es spa latn Spanish
et est,ekk latn Estonian
eu eus,baq latn Basque
fa fas,per,pes arab Persian
fi fin latn Finnish
fr fra,fre latn French
ga gle latn Irish
gl glg latn Galician
gu guj gujr Gujarati
he heb,iw hebr Hebrew
hi hin deva Hindi
hr hrv latn Croatian
hu hun latn Hungarian
hy hye,arm armn Armenian
id ind latn Indonesian
is isl,ice latn Icelandic
it ita latn Italian
ja jpn jpan Japanese
ka kat,geo geor Georgian
kk kaz cyrl Kazakh
km khm khmr Khmer
kn kan knda Kannada
ko kor kore Korean
lt lit latn Lithuanian
lv lav,lvs latn Latvian
mk mkd,mac cyrl Macedonian
ml mal mlym Malayalam
mn mon,khk - Mongolian
mr mar deva Marathi
ms msa,may,zsm latn Malay
my mya,bur mymr Burmese
nb nob latn Norwegian Bokmål
ne nep,npi deva Nepali
nl nld,dut latn Dutch
nn nno latn Norwegian Nynorsk
no nor latn Norwegian
pa pan guru Punjabi
pl pol latn Polish
pt por latn Portuguese
ro ron,rum latn Romanian
ru rus cyrl Russian
si sin sinh Sinhala
sk slk,slo latn Slovak
sl slv latn Slovenian
sq sqi,alb,als latn Albanian
sr srp - Serbian
sv swe latn Swedish
sw swa,swh latn Swahili
ta tam taml Tamil
te tel telu Telugu
th tha thai Thai
tl tgl latn Tagalog
tr tur latn Turkish
uk ukr cyrl Ukrainian
ur urd arab Urdu
uz uzb,uzn - Uzbek
vi vie latn Vietnamese
zh zho,chi,cmn - Chinese
zu zul latn Zulu
"""
_VARIANTS = {
    "de_at": "Austrian German",
    "de_ch": "Swiss Standard German",
    "en_au": "Australian English",
    "en_ca": "Canadian English",
    "en_gb": "British English",
    "en_us": "American English",
    "es_419": "Latin American Spanish",
    "es_es": "European Spanish",
    "es_mx": "Mexican Spanish",
    "fr_ca": "Canadian French",
    "fr_ch": "Swiss French",
    "nl_be": "Flemish",
    "pt_br": "Brazilian Portuguese",
    "pt_pt": "European Portuguese",
    "zh_cn": "Simplified Chinese",
    "zh_hans": "Simplified Chinese",
    "zh_hant": "Traditional Chinese",
    "zh_tw": "Traditional Chinese",
}
# What other subtags are called; one that is missing goes by itself, "DJ" or "Tfng script".
_SUBTAGS = {
    **{"arab": "Arabic script", "cyrl": "Cyrillic script", "deva": "Devanagari script", "latn": "Latin script"},
    **{"mong": "Mongolian script", "ar": "Argentina", "be": "Belgium", "ca": "Canada", "ch": "Switzerland"},
    **{"cl": "Chile", "co": "Colombia", "de": "Germany", "eg": "Egypt", "fr": "France", "hk": "Hong Kong"},
    **{"ie": "Ireland", "in": "India", "it": "Italy", "ma": "Morocco", "mo": "Macau", "nz": "New Zealand"},
    **{"ph": "Philippines", "pk": "Pakistan", "sa": "Saudi Arabia", "sg": "Singapore", "za": "South Africa"},
    **{"br": "Brazil", "cn": "China", "tw": "Taiwan", "gb": "United Kingdom", "us": "United States"},
}
_TABLE = [line.split(maxsplit=3) for line in _LANGUAGES.strip().splitlines()]
_NAMES = {code: name for code, _, _, name in _TABLE}
_SHORTEST = {other: code for code, others, _, _ in _TABLE for other in others.split(",")}
_OWN_SCRIPT = {code: script for code, _, script, _ in _TABLE}
_CODE = re.compile(r"([a-z]{2,3})(?:_([a-z]{4}))?((?:_(?:[a-z]{2}|\d{3}))?(?:_(?:[a-z0-9]{5,8}|\d[a-z0-9]{3}))*)")


class Pair(NamedTuple):
    """A direction of translation, such as "en-pt_br" as text."""

    source: str
    target: str

    def __str__(self) -> str:
        return f"{self.source}-{self.target}"


def language_code(text: str) -> str | None:
    """The one spelling of a code: "pt_br" for "pt-BR", "en" for "eng_Latn"; None for what is no code."""
    found = _CODE.fullmatch(text.strip().lower().replace("-", "_"))
    if found is None:
        return None
    language, script, rest = found.groups()
    language = _SHORTEST.get(language, language)
    return language + (f"_{script}" if script and script != _OWN_SCRIPT.get(language) else "") + rest


def find_language(text: str, known: Collection[str]) -> str | None:
    """The language among `known` that a typed code means; else the code's own language; None for what is no code.

    What a code says beyond the languages that are known is left off from its end: "en-US" is "en" unless "en_us" is
    known.
    """
    code = language_code(text)
    if code is None:
        return None
    parts = code.split("_")
    shorter = ("_".join(parts[:length]) for length in range(len(parts), 0, -1))
    return next((one for one in shorter if one in known), parts[0])


def language_of_column(column: str) -> str | None:
    """The language that a column's name says: "de" for "German", "de", "text_de" or "deu"; None for any other name."""
    names = {name.casefold(): code for code, name in _NAMES.items()}
    for part in (column.strip(), *re.split(r"[\W_]+", column)):
        word = part.casefold()
        if code := names.get(word) or (word if word in _NAMES else _SHORTEST.get(word)):
            return code
    return None


def parse_pairs(pairs: Iterable[str]) -> tuple[Pair, ...]:
    """Directions from "en-de", "pt_BR-en" or "en-zh-Hans".

    Raises:
        UserError: there are none, one is malformed, has the same language twice, or is named twice.
    """
    pairs = list(pairs)
    if not pairs:
        raise UserError("'data.pairs' is empty: name at least one direction, such as \"en-de\".")
    parsed = []
    for text in pairs:
        pair = split_pair(text)
        if pair is None or pair.source == pair.target:
            advice = _name_advice(re.split(r"[-_>:/, ]+", text))
            raise UserError(
                f"'data.pairs' has '{text}': write two different language codes{advice or ''}, such as "
                '"en-de" or "en-pt_BR".'
            )
        parsed.append(pair)
    if len(set(parsed)) < len(parsed):
        raise UserError(f"'data.pairs' is {pairs}: name each direction once.")
    return tuple(parsed)


def split_pair(text: str) -> Pair | None:
    """A direction from two codes with "-" between them; None where it is none, or could be read in two ways.

    Where a hyphen may also lie inside a code, capitals tell a region from a language ("en-pt-BR"), and else the regions
    that have a name of their own do ("en-pt-br").
    """
    parts = text.strip().split("-")
    readings = []
    for cut in range(1, len(parts)):
        source, target = (language_code("-".join(part)) for part in (parts[:cut], parts[cut:]))
        if source and target and (parts[cut][:2].islower() or text.isupper() or len(parts) == 2):
            readings.append(Pair(source, target))
    named = [pair for pair in readings if all("_" not in code or code in _VARIANTS for code in pair)]
    (found,) = readings if len(readings) == 1 else named if len(named) == 1 else [None]
    return found


def language_name(code: str) -> str:
    """The English name of a language as a prompt says it, "Brazilian Portuguese" or "German (Germany)".

    A language that is not listed goes by its code.
    """
    parts = (language_code(code) or code).split("_")
    for length in range(len(parts), 0, -1):
        known = "_".join(parts[:length])
        name = _VARIANTS.get(known) or _NAMES.get(known) or (known if length == 1 else None)
        if name:
            further = [_SUBTAGS.get(part) or _plain_subtag(part) for part in parts[length:]]
            return f"{name} ({', '.join(further)})" if further else name
    return code


def check_distinct_names(pairs: Iterable[Pair]) -> None:
    """Refuses two languages that a pretrained model would be asked for in the same words.

    Raises:
        UserError: names them.
    """
    codes: dict[str, str] = {}
    for code in dict.fromkeys(code for pair in pairs for code in pair):
        other = codes.setdefault(language_name(code), code)
        if other != code:
            raise UserError(
                f"'data.pairs' has '{other}' and '{code}', and a pretrained model would be asked for both as "
                f"{language_name(code)}: keep one of them."
            )


def code_advice(text: str) -> str:
    """What to write in place of a text that is no code: to stand after a colon."""
    return f"write a language code{_name_advice([text]) or ', such as en, pt_BR or zh-Hans'}"


def _name_advice(words: Iterable[str]) -> str | None:
    """How the languages that were typed as names are written; None where none was."""
    codes = {name.casefold(): code for code, name in [*_NAMES.items(), *_VARIANTS.items()]}
    typed = [word.strip() for word in words]
    known = [f"{codes[word.casefold()]} for {word}" for word in typed if word.casefold() in codes]
    return f" ({', '.join(known)})" if known else None


def _plain_subtag(part: str) -> str:
    if len(part) == 4 and part.isalpha():
        return f"{part.title()} script"
    return part.upper() if len(part) < 4 else part.title()
