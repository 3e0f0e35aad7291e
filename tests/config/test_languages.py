"""Language codes in every spelling, pairs of them, and names that tell languages apart."""

import pytest

from mixtura.config import TranslationDataConfig, UserError, recipe_from_dict
from mixtura.config.languages import Pair, find_language, language_code, language_name, parse_pairs

CODES = {
    "en": "en",
    "EN": "en",
    " en ": "en",
    "xx": "xx",
    "pt-BR": "pt_br",
    "pt_br": "pt_br",
    "PT_BR": "pt_br",
    "zh-Hans": "zh_hans",
    "zh_hant": "zh_hant",
    "zh-Hant-TW": "zh_hant_tw",
    "es-419": "es_419",
    "eng": "en",
    "eng_Latn": "en",
    "zho_Hans": "zh_hans",
    "srp_Cyrl": "sr_cyrl",
    "arb_Arab": "ar",
    "ast_Latn": "ast_latn",
    "ca-valencia": "ca_valencia",
    "English": None,
    "English (US)": None,
    "e": None,
    "": None,
    "en-": None,
    "en_de-fr": None,
}


@pytest.mark.parametrize(("text", "code"), CODES.items())
def test_a_code_has_one_spelling(text, code):
    assert language_code(text) == code
    if code is not None:
        assert language_code(code) == code


def test_a_region_that_nobody_asked_for_is_left_off():
    assert [find_language("en-US", known) for known in (["en"], ["en", "en_us"], ["de"])] == ["en", "en_us", "en"]
    assert find_language("zh-Hans-CN", ["zh", "zh_hans"]) == "zh_hans"
    assert find_language("English", ["en"]) is None


PAIRS = {
    "en-de": "en-de",
    "EN-DE": "en-de",
    "pt_br-en": "pt_br-en",
    "pt-BR-en": "pt_br-en",
    "en-pt-BR": "en-pt_br",
    "en-pt-br": "en-pt_br",
    "en-zh-Hans": "en-zh_hans",
    "zh-Hans-zh-Hant": "zh_hans-zh_hant",
    "eng_Latn-deu_Latn": "en-de",
    "en_us-en_gb": "en_us-en_gb",
    "en-US-pt-BR": "en_us-pt_br",
    "es-es_419": "es-es_419",
}


@pytest.mark.parametrize(("text", "pair"), PAIRS.items())
def test_a_pair_is_read_whatever_its_codes_look_like(text, pair):
    assert str(parse_pairs([text])[0]) == pair
    assert TranslationDataConfig(pairs=(text,)).pairs == (pair,)


@pytest.mark.parametrize("text", ["en", "en_de", "en/de", "en-en", "en-eng_Latn", "en-de-fr", "", "-", "a-b"])
def test_what_is_no_pair_of_two_languages_is_refused_with_an_example(text):
    with pytest.raises(UserError, match=r"write two different language codes, such as \"en-de\" or \"en-pt_BR\""):
        parse_pairs([text])


def test_languages_typed_by_name_are_answered_with_their_codes():
    with pytest.raises(UserError, match=r"'English-German': .* codes .en for English, de for German."):
        parse_pairs(["English-German"])


def test_a_pair_named_twice_in_two_spellings_is_refused():
    with pytest.raises(UserError, match="name each direction once"):
        parse_pairs(["en-pt_BR", "en-pt-br"])


def test_names_tell_variants_apart():
    told = {
        "pt": "Portuguese",
        "pt_br": "Brazilian Portuguese",
        "pt_pt": "European Portuguese",
        "zh_hans": "Simplified Chinese",
        "zh_hant": "Traditional Chinese",
        "zh_hans_cn": "Simplified Chinese (China)",
        "zh_hk": "Chinese (Hong Kong)",
        "sr_latn": "Serbian (Latin script)",
        "sr_cyrl": "Serbian (Cyrillic script)",
        "de_li": "German (LI)",
        "en_gb": "British English",
        "no": "Norwegian",
        "ca_valencia": "Catalan (Valencia)",
        "xx": "xx",
        "xx_tfng": "xx (Tfng script)",
    }
    assert {code: language_name(code) for code in told} == told


def translation(*pairs: str, base: dict | None = None) -> object:
    arms = {"dense": {"adapter": {"method": "lora", "rank": 2}} if base else {}}
    return recipe_from_dict(
        {"task": "translation", "name": "x", "data": {"pairs": list(pairs)}, "base": base or {}, "arms": arms}
    )


def test_two_languages_of_one_name_are_refused_where_the_name_is_the_prompt():
    with pytest.raises(UserError, match=r"'zh_cn' and 'zh_hans', and .* both as Simplified Chinese: keep one"):
        translation("en-zh_CN", "en-zh-Hans", base={"name": "smollm2"})
    translation("en-zh_CN", "en-zh-Hans")  # a model from scratch has a token of its own for each


def test_experts_named_for_languages_are_counted_whatever_their_spelling():
    arm = {"feed_forward": {"family": "token_choice", "num_experts": 2, "top_k": 1, "route_by": "target"}}
    table = {"task": "translation", "name": "x", "data": {"pairs": ["en-pt-BR", "en-deu"]}, "baseline": "target"}
    assert recipe_from_dict({**table, "arms": {"target": arm}}).data.pairs == ("en-pt_br", "en-de")


def test_pairs_are_the_pair_itself():
    assert parse_pairs(("en-de",)) == (Pair("en", "de"),)
