"""The page in a real browser: no errors, no requests, no sideways scrolling, and the layer can be chosen."""

import dataclasses
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from fixtures.browser import sticking_out
from mixtura.diagnostics.findings import Diagnosis
from mixtura.diagnostics.page import render_page

pytestmark = pytest.mark.browser
MakeDiagnosis = Callable[..., Diagnosis]


@pytest.fixture
def open_page(browser: Any, tmp_path: Path) -> Iterator[Callable[..., Any]]:
    """Opens a diagnosis; fails the test on any error, warning or request."""
    complaints, contexts = [], []

    def opened(found: dict[str, Any], *, width: int = 1280, scheme: str = "light", script: bool = True) -> Any:
        context = browser.new_context(
            viewport={"width": width, "height": 900}, color_scheme=scheme, java_script_enabled=script
        )
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: complaints.append(f"{message.type}: {message.text}"))
        page.on("pageerror", lambda error: complaints.append(f"error: {error}"))
        page.on("request", lambda request: _complain_of_request(request.url, complaints))
        (tmp_path / "diagnosis.html").write_text(render_page(found), encoding="utf-8")
        page.goto((tmp_path / "diagnosis.html").as_uri())
        if script:
            page.wait_for_function("document.querySelectorAll('.plot:not(:has(svg))').length === 0")
        return page

    yield opened
    for context in contexts:
        context.close()
    assert complaints == []


def _complain_of_request(url: str, complaints: list[str]) -> None:
    if not url.startswith(("file://", "data:", "blob:")):
        complaints.append(f"request: {url}")


def overflow(page: Any) -> int:
    return page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")


def background(page: Any) -> list[int]:
    colour = page.evaluate("getComputedStyle(document.body).backgroundColor")
    return [int(part) for part in colour.removeprefix("rgb(").removesuffix(")").split(",")]


@pytest.mark.parametrize("width", [1280, 390], ids=["window", "phone"])
def test_figures_are_drawn_without_sideways_scrolling(
    make_diagnosis: MakeDiagnosis, open_page: Callable[..., Any], width: int
) -> None:
    page = open_page(make_diagnosis(), width=width)
    assert page.locator(".plot svg .heatmaplayer image").count() == 2
    assert page.locator(".plot svg path.js-line").count() == 4
    assert overflow(page) <= 0
    assert sticking_out(page) == []


def test_the_layer_is_chosen_by_keyboard(make_diagnosis: MakeDiagnosis, open_page: Callable[..., Any]) -> None:
    found = make_diagnosis()
    first = found.verdict.layer
    page = open_page(found)
    page.locator(f'input[name="layer"][value="{first}"]').focus()
    page.keyboard.press("ArrowRight")
    other = 1 - first
    assert page.locator(f'input[name="layer"][value="{other}"]').is_checked()
    drawn = page.evaluate("document.querySelector('[data-map=groups]').data[0].z")
    assert drawn == found.layers[other].share
    shown = page.locator("ruby rt").all_inner_texts()
    assert shown == [str(e[0]) for sample in found.samples for e in sample.experts[other]]
    assert page.locator(f'.typical[data-layer="{other}"]').is_visible()
    assert page.locator(f'.typical[data-layer="{first}"]').is_hidden()
    assert page.locator("[data-chosen]").first.inner_text() == f"layer {found.layers[other].layer}"


def test_the_page_reads_without_a_script(make_diagnosis: MakeDiagnosis, open_page: Callable[..., Any]) -> None:
    found = make_diagnosis()
    page = open_page(found, script=False)
    assert page.locator("h1").inner_text() == found.verdict.headline
    assert page.locator("ruby").first.is_visible()
    assert page.locator("#chooser").is_hidden()


def test_dark_follows_the_system_and_the_switch_turns_it(
    make_diagnosis: MakeDiagnosis, open_page: Callable[..., Any]
) -> None:
    page = open_page(make_diagnosis(), scheme="dark")
    assert max(background(page)) < 64
    page.locator("#theme").click()
    assert min(background(page)) > 224


def test_a_dense_model_has_a_page_too(make_diagnosis: MakeDiagnosis, open_page: Callable[..., Any]) -> None:
    page = open_page(make_diagnosis("dense"))
    assert "routes nothing" in page.locator("h1").inner_text()
    assert page.locator("#leaks").is_visible()


def test_hostile_text_runs_nothing(make_diagnosis: MakeDiagnosis, open_page: Callable[..., Any]) -> None:
    hostile = "</script><img src=x onerror=\"document.title='owned'\"><b>x</b>"
    found = make_diagnosis(texts={hostile: [hostile] * 12, "b": ["x"] * 12})
    model = dataclasses.replace(found.model, name=hostile, expert_names=[hostile] * 4)
    page = open_page(dataclasses.replace(found, model=model, command=hostile, group_word=hostile))
    assert page.title() != "owned"
    assert page.locator("img").count() == 0
    assert page.locator("main b").filter(has_text=re.compile("^x$")).count() == 0
