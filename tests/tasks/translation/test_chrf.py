"""Scores, their signatures, and how sure a difference is."""

import pytest

from mixtura.tasks.translation.chrf import bleu_tokenizer, paired_bootstrap, score

REFERENCES = [f"der Baum Nummer {i} steht im Garten hinter dem Haus" for i in range(40)]


def test_a_perfect_translation_scores_100_and_an_empty_one_0():
    perfect, signatures = score(REFERENCES, REFERENCES, target_language="de")
    assert perfect == pytest.approx((100, 100, 100))
    assert score([""] * 40, REFERENCES, target_language="de")[0] == pytest.approx((0, 0, 0))
    assert signatures["chrf"].startswith("chrF2|nrefs:1|") and "nw:0" in signatures["chrf"]
    assert "nw:2" in signatures["chrf_pp"] and "tok:13a" in signatures["bleu"]


def test_chrf_of_one_word_by_hand():
    # Of the 1-grams 2 of 3 match, of the 2-grams 1 of 2, of the 3-grams 0 of 1; precision and recall are equal.
    found, _ = score(["abd"], ["abc"], target_language="de")
    assert found.chrf == pytest.approx(100 * (2 / 3 + 1 / 2 + 0) / 3)


def test_languages_without_spaces_have_their_own_tokenizer():
    assert [bleu_tokenizer(code) for code in ("zh", "zh_cn", "ja", "ko", "de", "xx")] == [
        "zh",
        "zh",
        "char",
        "char",
        "13a",
        "13a",
    ]
    assert "tok:char" in score(["ab"], ["ab"], target_language="ja")[1]["bleu"]


def test_the_bootstrap_tells_a_real_difference_from_none():
    worse = [reference.replace("Garten", "Wald") for reference in REFERENCES]
    found = paired_bootstrap(worse, REFERENCES, REFERENCES)
    assert found.difference > 5 and found.p_value < 0.01
    swapped = paired_bootstrap(REFERENCES, worse, REFERENCES)
    assert swapped.difference == pytest.approx(-found.difference)
    same = paired_bootstrap(worse, worse, REFERENCES)
    assert (same.difference, same.p_value) == (0, 1)


def test_different_outputs_of_one_score_are_no_sure_difference():
    nothing, as_little = ["qq", "ww", "kk"], ["ww", "qq", "vv"]
    found = paired_bootstrap(nothing, as_little, ["ab cd", "ef gh", "ab ef"])
    assert (found.difference, found.p_value) == (0, 1)
