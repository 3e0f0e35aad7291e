"""The page in a real browser: no errors, no requests, no sideways scrolling, and every control does what it says."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from fixtures.browser import next_frame, sticking_out
from fixtures.results import as_results, summary_of
from mixtura.report.html import render_html

pytestmark = pytest.mark.browser
MakeResults = Callable[..., dict[str, Any]]


@pytest.fixture
def open_page(browser: Any, tmp_path: Path) -> Iterator[Callable[..., Any]]:
    """Opens a report at a window size and colour scheme; fails the test on any error, warning or request."""
    complaints, contexts = [], []

    def opened(results: dict[str, Any], *, width: int = 1280, height: int = 900, scheme: str = "light") -> Any:
        context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: complaints.append(f"{message.type}: {message.text}"))
        page.on("pageerror", lambda error: complaints.append(f"error: {error}"))
        page.on("request", lambda request: _complain_of_request(request.url, complaints))
        (tmp_path / "report.html").write_text(render_html(as_results(results), summary_of(results)), encoding="utf-8")
        page.goto((tmp_path / "report.html").as_uri())
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


def test_every_figure_is_drawn_and_every_loss_is_on_the_page(
    make_results: MakeResults, open_page: Callable[..., Any]
) -> None:
    results = make_results()
    page = open_page(results)
    assert page.locator(".plot").count() == 9
    assert page.locator(".plot svg path.js-line").count() >= 20
    assert page.locator(".plot svg path.point").count() >= 40
    assert page.locator(".plot svg image").count() == 4
    text = page.locator("main").inner_text()
    for arm in results["arms"].values():
        for run in arm["runs"]:
            for mode in run["final"].values():
                assert f"{mode['loss']:.4f}" in text
    assert overflow(page) == 0


@pytest.mark.parametrize("seeds", [(0,), (0, 1, 2)], ids=["one seed", "three seeds"])
def test_phone_shows_the_page_without_sideways_scrolling(
    make_results: MakeResults, open_page: Callable[..., Any], seeds: tuple[int, ...]
) -> None:
    page = open_page(make_results(seeds=seeds), width=390, height=844)
    assert overflow(page) <= 0
    assert sticking_out(page) == []


def test_plots_are_never_wider_than_their_place(make_results: MakeResults, open_page: Callable[..., Any]) -> None:
    page = open_page(make_results(), width=500)
    page.evaluate("document.body.style.width = '360px'")  # as a scroll bar or a fold does: the window says nothing
    next_frame(page)
    wider = (
        "[...document.querySelectorAll('.plot')].filter((p) => p.querySelector('svg').clientWidth > p.clientWidth + 1)"
    )
    assert page.evaluate(f"{wider}.length") == 0


def test_dark_follows_the_system_and_the_switch_turns_it(
    make_results: MakeResults, open_page: Callable[..., Any]
) -> None:
    page = open_page(make_results(), scheme="dark")
    assert max(background(page)) < 64
    dark_line = page.evaluate("document.querySelector('[data-figure=curves]').data[0].line.color")
    page.locator("#theme").click()
    assert min(background(page)) > 224
    light_line = page.evaluate("document.querySelector('[data-figure=curves]').data[0].line.color")
    assert light_line != dark_line


def test_axes_and_arms_can_be_switched_by_keyboard(make_results: MakeResults, open_page: Callable[..., Any]) -> None:
    page = open_page(make_results())
    read = "document.querySelector('[data-figure=curves]')"
    page.locator('input[value="steps"]').focus()
    for axis, last in (("tokens", 1_024_000), ("flops", 500 * 2048 * 5.5e6), ("seconds", 75.5)):
        page.keyboard.press("ArrowRight")
        assert page.locator(f'input[value="{axis}"]').is_checked()
        assert page.evaluate(f"{read}.data[0].x.at(-1)") == pytest.approx(last)
        assert axis.lower() in page.evaluate(f"{read}.layout.xaxis.title.text").lower()
    page.locator("#log").focus()
    page.keyboard.press("Space")
    assert page.evaluate(f"{read}.layout.xaxis.type") == "log"
    page.locator('input[data-arm="0"]').focus()
    page.keyboard.press("Space")
    assert page.evaluate(f"{read}.data.filter(t => t.meta.arm === 0).every(t => t.visible === false)")
    assert page.evaluate(f"{read}.data.filter(t => t.meta.arm === 1).every(t => t.visible)")


def test_load_maps_follow_the_chosen_seed(make_results: MakeResults, open_page: Callable[..., Any]) -> None:
    page = open_page(make_results())
    read = "document.querySelector('[data-map]').data[0].z"
    before = page.evaluate(read)
    page.locator('input[name="map-seed"][value="2"]').focus()
    page.keyboard.press("Space")
    assert page.evaluate(read) != before


def test_paper_is_white_even_in_dark(make_results: MakeResults, open_page: Callable[..., Any]) -> None:
    page = open_page(make_results(), width=720, height=1000, scheme="dark")
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    page.emulate_media(media="print")
    assert min(background(page)) == 255
    assert overflow(page) <= 0
    page.emulate_media(media="screen")
    page.evaluate("dispatchEvent(new Event('afterprint'))")
    assert max(background(page)) < 64


def test_hostile_label_runs_nothing(make_results: MakeResults, open_page: Callable[..., Any]) -> None:
    results = make_results()
    results["arms"]["token_choice"]["label"] = "</script><img src=x onerror=\"document.title='owned'\"><b>x</b>"
    page = open_page(results)
    assert page.title() != "owned"
    assert page.locator("img").count() == 0
    assert "<b>x</b>" in page.locator("h1").inner_text()


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (390, "dark")], ids=["screen", "phone"])
def test_translation_has_its_pairs_samples_and_specialisation(
    make_translation: MakeResults, open_page: Callable[..., Any], width: int, scheme: str
) -> None:
    page = open_page(make_translation(), width=width, scheme=scheme)
    assert page.locator("#languages table").first.locator("tbody tr").count() == 3
    assert page.locator(".samples dl").count() == 6
    assert page.locator(".maps.wide .plot svg image").count() == 2
    assert overflow(page) <= 0
    read = "document.querySelector('.maps.wide [data-map]').data[0].z"
    before = page.evaluate(read)
    page.locator('input[name="map-seed"][value="2"]').focus()
    page.keyboard.press("Space")
    assert page.evaluate(read) != before
    page.locator("#languages details").first.locator("summary").click()
    assert page.locator("#languages table").nth(1).is_visible()
    assert overflow(page) <= 0
    assert sticking_out(page) == []


@pytest.mark.parametrize(("width", "scheme"), [(1280, "dark"), (390, "light")], ids=["screen", "phone"])
def test_classification_has_its_layers_calibration_and_confusion(
    make_classification: MakeResults, open_page: Callable[..., Any], width: int, scheme: str
) -> None:
    page = open_page(make_classification(), width=width, scheme=scheme)
    assert page.locator("[data-figure=layer_weights] svg path.js-line").count() == 4
    assert page.locator("[data-figure=calibration] svg path.js-line").count() == 3
    assert page.evaluate("document.querySelector('[data-figure=calibration]').layout.shapes.length") == 1
    assert page.locator(".confusion").count() == 3
    assert overflow(page) <= 0
    assert sticking_out(page) == []
