"""What the page says without a script, and that nothing in a text or a name becomes markup."""

import dataclasses
import re
from collections.abc import Callable

import pytest

from mixtura.diagnostics.findings import Diagnosis, bits
from mixtura.diagnostics.page import percent, render_page, shown_token

MakeDiagnosis = Callable[..., Diagnosis]
HOSTILE = "<script>document.title='owned'</script> & <b>bold</b>"


def without_scripts(page: str) -> str:
    return re.sub(r"<script.*?</script>", "", page, flags=re.DOTALL)


def test_the_verdict_comes_first(make_diagnosis: MakeDiagnosis) -> None:
    found = make_diagnosis()
    page = without_scripts(render_page(found))
    heading = found.verdict.headline.replace("'", "&#39;")
    assert f"<h1>{heading}</h1>" in page
    assert page.index("<h1>") < page.index("<h2>")


def test_sentences_have_experts_without_a_script(make_diagnosis: MakeDiagnosis) -> None:
    found = make_diagnosis()
    page = without_scripts(render_page(found))
    first = found.verdict.layer
    shown = re.findall(r"<ruby.*?<rt>(\d+)</rt>", page, flags=re.DOTALL)
    expected = [str(experts[0]) for sample in found.samples for experts in sample.experts[first]]
    assert shown == expected
    assert page.count('title="expert ') == len(expected)


def test_every_layer_is_there_and_one_is_shown(make_diagnosis: MakeDiagnosis) -> None:
    page = without_scripts(render_page(make_diagnosis()))
    assert len(re.findall(r'<div[^>]*data-layer="\d"', page)) == 4
    assert len(re.findall(r'<div[^>]*data-layer="\d" hidden', page)) == 2


def test_texts_and_names_are_escaped(make_diagnosis: MakeDiagnosis) -> None:
    found = make_diagnosis(texts={HOSTILE: [HOSTILE] * 12, "b": ["x < y"] * 12})
    model = dataclasses.replace(found.model, name=HOSTILE)
    found = dataclasses.replace(found, model=model, command=HOSTILE, group_word=HOSTILE)
    page = render_page(found)
    assert HOSTILE not in page
    assert "<b>bold" not in page
    # Three scripts are the page's own: its data, plotly and the drawing.
    assert len(re.findall(r"<script[ >]", without_plotly(page))) == 3


def without_plotly(page: str) -> str:
    return re.sub(r"/\*\*\n\* plotly\.js.*?</script>", "</script>", page, flags=re.DOTALL)


def test_named_experts_carry_their_names(make_diagnosis: MakeDiagnosis) -> None:
    found = make_diagnosis()
    model = dataclasses.replace(found.model, expert_names=["de", "fr", "it", "rm"])
    found = dataclasses.replace(found, model=model)
    page = without_scripts(render_page(found))
    assert re.search(r">3</span> rm, \d", page)


def test_dead_experts_and_leaks_are_named(make_diagnosis: MakeDiagnosis) -> None:
    found = make_diagnosis()
    leaks = dataclasses.replace(found.leaks, future=True, largest_future_change=0.25)
    layers = [dataclasses.replace(layer, dead=[1, 2]) for layer in found.layers]
    found = dataclasses.replace(found, layers=layers, leaks=leaks)
    page = without_scripts(render_page(found))
    assert "2 of 4 experts are dead" in page
    assert "The future leaks:" in page
    assert "2.5e-01" in page


@pytest.mark.parametrize(
    ("token", "shown"),
    [
        (" the", "\N{OPEN BOX}the"),
        ("  ", "\N{OPEN BOX}\N{OPEN BOX}"),
        ("\n", "\N{DOWNWARDS ARROW WITH CORNER LEFTWARDS}"),
        ("\N{REPLACEMENT CHARACTER}", "\N{MIDDLE DOT}"),
        ("x", "x"),
    ],
)
def test_invisible_tokens_are_shown(token: str, shown: str) -> None:
    assert shown_token(token) == shown


def test_numbers_keep_what_matters() -> None:
    space = "\N{NO-BREAK SPACE}"
    assert [bits(value) for value in (0.0, 0.0001, 0.0123, 1.234)] == ["0.000", f"<{space}0.001", "0.012", "1.23"]
    assert [percent(value) for value in (0.0, 0.0994, 0.5, 1.0)] == [
        f"{n}{space}%" for n in ("0.0", "9.9", "50", "100")
    ]
