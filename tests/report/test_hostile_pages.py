"""Every text that a stranger may choose, hostile, on every page, in a real browser: none of it runs or connects."""

from collections.abc import Callable
from typing import Any

import pytest

from fixtures.results import as_results, build_classification, build_results, build_translation, summary_of
from mixtura.comparison.advising import render_advice
from mixtura.planning.advice import advise_on
from mixtura.planning.evidence import Evidence, Row, Setting
from mixtura.planning.question import question_of
from mixtura.report.html import render_html

pytestmark = pytest.mark.browser

RUNS = (
    "<script>window.owned=1</script></script><img src=x onerror=window.owned=2>"
    "\"' onmouseover=window.owned=3 x='<svg/onload=window.owned=4><a href=javascript:window.owned=5>{{7*7}}"
    "<iframe srcdoc='<script>parent.owned=6</script>'><!--]]>`${window.owned=7}`\u2028"
    "<link rel=stylesheet href=http://stranger.example/x.css>url(http://stranger.example/y)"
)
FIXED = {"kind", "task", "better", "family", "training_mode", "deployed_mode", "created", "key", "placement"}
"""Words that the code chooses among its own, which reading a results.json holds to them or which it looks up."""
OWN_KEYS = {"arms", "settings", "pairs", "paired_bootstrap", "left_out"}
"""Tables whose keys are a stranger's: names of arms, of directions, of whatever the data says of itself."""


def poisoned(value: Any, key: str = "") -> Any:
    """The same results with a hostile text in place of every text and, as `OWN_KEYS` are named, of every key."""
    if isinstance(value, dict):
        return {named(name, key): poisoned(each, name) for name, each in value.items()}
    if isinstance(value, list):
        return [poisoned(each, key) for each in value]
    if not isinstance(value, str) or key in FIXED:
        return value
    return named(value, "arms") if key == "baseline" else named(value, "pairs") if key == "pair" else value + RUNS


def named(name: str, of: str) -> str:
    return name + RUNS if of in OWN_KEYS else name


@pytest.mark.parametrize("build", [build_results, build_translation, build_classification], ids=lambda b: b.__name__)
def test_no_text_of_a_report_runs_or_connects(browser: Any, tmp_path: Any, build: Callable[..., Any]) -> None:
    results = poisoned(build())
    page_text = render_html(as_results(results), summary_of(results))
    assert page_text.count("window.owned") > 50
    check_page(browser, tmp_path, page_text)


def test_the_texts_of_advice_run_nothing(browser: Any, tmp_path: Any) -> None:
    """Its only texts from outside are those of the stored runs."""
    rows = tuple(
        Row(
            arm=arm,
            width=64,
            tokens=tokens,
            seed=seed,
            loss=2 + 150 * tokens**-0.35 + 0.01 * seed + 0.02 * (arm != "dense"),
            in_groups=None,
            alone=None,
            parameters=230_000,
            seconds_per_step=0.2,
            processor=RUNS,
        )
        for arm in ("dense", "token_choice")
        for tokens in (1_000_000, 3_000_000, 10_000_000)
        for seed in (0, 1)
    )
    sizes = {"layers": 4, "vocabulary": 512, "context": 64, "tokens_per_step": 4096, "experts": 16, "top_k": 2}
    setting = Setting(**sizes, group_size=16, text=RUNS, machine=RUNS, created=RUNS)
    evidence = Evidence(setting=setting, rows=rows)
    advice = advise_on(question_of(tokens=3e6, width=64), evidence)
    check_page(browser, tmp_path, render_advice(advice, evidence))


def test_the_texts_would_run_where_they_are_not_escaped(browser: Any, tmp_path: Any) -> None:
    with pytest.raises(AssertionError):
        check_page(browser, tmp_path, f"<p title='{RUNS}'>{RUNS}</p>")


def check_page(browser: Any, folder: Any, text: str) -> None:
    """Opens a page, opens all of it, and asserts that nothing ran and nothing was asked for."""
    (folder / "page.html").write_text(text, encoding="utf-8")
    context = browser.new_context()
    asked: list[str] = []
    context.route("**/*", lambda route: (asked.append(route.request.url), route.continue_()))
    page = context.new_page()
    complaints: list[str] = []
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.goto((folder / "page.html").as_uri())
    page.wait_for_function("document.querySelectorAll('.plot:not(:has(svg))').length === 0")
    page.evaluate("document.querySelectorAll('details').forEach(each => { each.open = true })")
    assert page.evaluate("window.owned") is None
    assert page.locator("img[src=x], iframe, a[href^='javascript:'], link, [onmouseover], [onload]").count() == 0
    assert [url for url in asked if not url.startswith(("file://", "data:", "blob:"))] == []
    assert complaints == []
    context.close()
