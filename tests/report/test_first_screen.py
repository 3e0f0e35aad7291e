"""What a reader takes in at one glance: a short headline, few words before the picture, one statistic a thing."""

import re
from collections.abc import Callable
from typing import Any

import pytest

from fixtures.results import as_results, summary_of
from mixtura.report import tables
from mixtura.report.facts import held_out
from mixtura.report.figures import build_figures
from mixtura.report.html import WORDS_BEFORE_THE_PICTURE, render_html
from mixtura.report.pictures import draw_differences, draw_loss

MakeResults = Callable[..., dict[str, Any]]
SPACE = "\N{NO-BREAK SPACE}"


def words_before_the_picture(results: dict[str, Any]) -> list[str]:
    page = render_html(as_results(results), summary_of(results))
    body = page[page.index("<body>") : page.index('<div class="plot"')]
    return re.sub(r"<[^>]*>", " ", body).split()


@pytest.mark.parametrize("seeds", [(0,), (0, 1, 2)], ids=["one seed", "three seeds"])
@pytest.mark.parametrize("make", ["make_results", "make_translation", "make_classification"])
def test_few_words_stand_before_the_picture(request: pytest.FixtureRequest, make: str, seeds: tuple[int, ...]) -> None:
    words = words_before_the_picture(request.getfixturevalue(make)(seeds=seeds))
    assert 10 < len(words) <= 40


def test_with_many_arms_the_picture_stands_above_the_cards(make_results: MakeResults) -> None:
    results = make_results()
    for place in range(8):
        results["arms"][f"arm_{place}"] = {**results["arms"]["token_choice"], "label": f"arm_{place}"}
    words = words_before_the_picture(results)
    assert len(words) <= WORDS_BEFORE_THE_PICTURE
    page = render_html(as_results(results), summary_of(results))
    assert page.index('<div class="plot"') < page.index('<div class="cards"')


def headline(results: dict[str, Any]) -> str:
    return summary_of(results).verdict.headline.replace(SPACE, " ")


def test_headline_has_the_winner_first_and_the_numbers_of_the_picture(make_results: MakeResults) -> None:
    found = re.fullmatch(
        r"Token-choice MoE beats dense by (0\.\d{3} ± 0\.\d{3}); MoT loses by (0\.\d{3} ± 0\.\d{3})",
        headline(make_results()),
    )
    assert found
    figure = build_figures(as_results(make_results()), summary_of(make_results()))["differences"]
    rows = [text.replace(SPACE, " ") for text in figure["layout"]["yaxis"]["ticktext"]]
    assert rows == [f"MoT<br><b>+{found[2]}</b>", f"token-choice MoE<br><b>\N{MINUS SIGN}{found[1]}</b>"]


def test_headline_says_why_there_is_no_verdict(make_results: MakeResults) -> None:
    assert headline(make_results(seeds=(0,))) == "No verdict: one seed"
    results = make_results()
    results["arms"]["dense"]["runs"][0]["final"]["causal"]["loss"] = None
    assert headline(results) == "No verdict: dense is left out"
    assert headline(make_results(offsets=(-0.002, 0.003), noise=0.02)) == (
        "No winner: MoT and token-choice MoE draw with dense"
    )


def test_headline_of_unequal_flops_has_their_price(make_results: MakeResults) -> None:
    results = make_results()
    results["arms"]["token_choice"]["flops_ratio"] = 1.6
    assert "at 1.60\N{MULTIPLICATION SIGN} its FLOPs; MoT loses" in headline(results)


def test_headline_of_many_arms_counts_them(make_results: MakeResults) -> None:
    results = make_results()
    for place in range(3):
        results["arms"][f"arm_{place}"] = {**results["arms"]["mixture_of_tokens"], "label": f"arm_{place}"}
    assert headline(results).endswith("; 4 arms lose")
    assert headline(results).startswith("Token-choice MoE beats dense by")


def test_arms_are_called_as_the_user_wrote_them(make_results: MakeResults) -> None:
    results = make_results()
    results["arms"] = {"dense": results["arms"]["dense"], "mine": results["arms"]["token_choice"]}
    results["arms"]["mine"]["label"] = "mine"
    assert headline(results).startswith("mine beats dense")
    results["arms"] = {"dense": results["arms"]["dense"], "my_own_arm": results["arms"]["mine"]}
    results["arms"]["my_own_arm"]["label"] = "my own arm"  # as fine-tuning's arms have it
    assert headline(results).startswith("my_own_arm beats dense")


def test_seconds_and_ratios_agree(make_results: MakeResults) -> None:
    results = make_results()
    # Medians that a busy machine made: their quotient is not the median of the paired ratios.
    results["arms"]["dense"]["seconds_per_step"] = 0.108
    results["arms"]["token_choice"].update(seconds_per_step=0.105, seconds_ratio=1.05)
    found = {
        row.label: row.cells
        for group in tables.main_table(as_results(results), summary_of(results))
        for row in group.rows
    }
    assert [cell.both for cell in found["Seconds a step"][:2]] == ["0.108", "0.113 (1.05\N{MULTIPLICATION SIGN})"]
    assert [cell.text for cell in found["Training time"][:2]] == [f"54.0{SPACE}s", f"56.7{SPACE}s"]
    curves = build_figures(as_results(results), summary_of(results))["curves"]["data"]
    seconds = {trace["name"]: trace["meta"]["scale"]["seconds"] for trace in curves}
    assert seconds["token-choice MoE"] == pytest.approx(0.108 * 1.05)


def test_curves_end_in_a_ring_at_the_value_of_the_table(make_results: MakeResults) -> None:
    results = make_results()
    summary = summary_of(results)
    figures = build_figures(as_results(results), summary)
    rings = {trace["name"]: trace for trace in figures["curves"]["data"] if trace["meta"]["role"] == "final"}
    assert set(rings) == {"dense", "token-choice MoE", "MoT, as deployed", "MoT, as trained"}
    assert rings["MoT, as deployed"]["y"] == [summary.arms["mixture_of_tokens"].score.deployed]
    assert rings["MoT, as trained"]["y"] == [summary.arms["mixture_of_tokens"].score.trained]
    gaps = {trace["name"]: trace["y"] for trace in figures["gap"]["data"] if trace["meta"]["role"] == "final"}
    assert gaps["MoT"] == [pytest.approx(summary.arms["mixture_of_tokens"].difference.deployed.mean)]
    low, high = figures["curves"]["layout"]["yaxis"]["range"]
    assert all(low < trace["y"][0] < high for trace in rings.values())


def test_the_page_says_on_what_lines_and_rings_are_measured(make_results: MakeResults) -> None:
    results = make_results()
    results["recipe"]["training"] = {"eval_sequences": 64, "final_eval_sequences": 5000, "batch_size": 16}
    found = held_out(as_results(results))
    # 275,072 held-out tokens are 2,149 sequences of 128, and 134 whole batches of 16.
    assert (found.curve, found.final) == ("the first 64 held-out sequences", "the first 2,144 held-out sequences")
    assert found.note in render_html(as_results(results), summary_of(results))


def test_one_seed_is_drawn_once(make_results: MakeResults) -> None:
    single, several = make_results(seeds=(0,)), make_results()
    for results, marks in ((single, 1), (several, 2)):
        traces = build_figures(as_results(results), summary_of(results))["differences"]["data"]
        assert len([trace for trace in traces if trace["name"] == "MoT"]) == marks
    picture = draw_differences(as_results(single), summary_of(single))
    assert picture is not None
    points = [line for line in picture.axes[0].get_lines() if line.get_marker() == "o" and len(line.get_xdata())]
    assert len(points) == 2, "one mark an arm"


def test_pictures_have_a_legend_in_every_panel(make_results: MakeResults) -> None:
    results = make_results()
    picture = draw_loss(as_results(results), summary_of(results))
    assert picture is not None
    assert [len(axes.get_legend().get_texts()) for axes in picture.axes] == [3, 2]


@pytest.mark.parametrize("make", ["make_results", "make_classification"])
def test_every_line_figure_of_the_page_has_a_legend(request: pytest.FixtureRequest, make: str) -> None:
    results = request.getfixturevalue(make)()
    page = render_html(as_results(results), summary_of(results))
    figures = re.findall(
        r'(<ul class="legend">.*?</ul>)?\s*<div class="plot" data-figure="(\w+)"', page, flags=re.DOTALL
    )
    # The rows of the differences are named, and the boxes that hide an arm of the curves are their legend.
    without = {name for legend, name in figures if not legend}
    assert without <= {"differences", "curves"}
    assert len(figures) >= 4


def test_what_does_not_differ_is_called_equal(make_results: MakeResults) -> None:
    results = make_results()
    results["arms"]["token_choice"] = {**results["arms"]["dense"], "family": "token_choice", "label": "token_choice"}
    summary = summary_of(results)
    rows = {row.label: row.cells[1] for group in tables.main_table(as_results(results), summary) for row in group.rows}
    assert rows["Minus dense's"].text == "equal"
    assert rows["FLOPs a token"].note == rows["Seconds a step"].note == "equal"
    assert rows["Steps to dense's final loss"].text == "equal"
    assert "token-choice MoE from dense (equal)" in summary.verdict.finding


def test_differences_have_their_signs_everywhere(make_results: MakeResults) -> None:
    results = make_results()
    summary = summary_of(results)
    rows = {row.label: row.cells for group in tables.main_table(as_results(results), summary) for row in group.rows}
    for label in ("Minus dense's", "Loss difference at equal time", "Deployed minus trained"):
        for cell in rows[label]:
            if " to " in cell.note:
                low, high = cell.note.split(" to ")
                assert {low[0], high[0]} <= {"+", "\N{MINUS SIGN}"}


def test_page_shows_what_each_arm_writes_and_where_its_time_goes(make_results: MakeResults) -> None:
    results = make_results()
    page = render_html(as_results(results), summary_of(results))
    assert "What they write" not in page
    assert "Where the time goes" not in page
    for name, arm in results["arms"].items():
        arm["step_parts"] = {"forward": 0.3, "backward": 0.55, "optimizer": 0.15}
        arm["runs"][0]["details"] = {
            "kind": "pretraining",
            "peakedness": [],
            "continuations": [{"prompt": "The film", "reference": "is old.", "output": f"by {name} <b>"}],
        }
    page = render_html(as_results(results), summary_of(results))
    for name in results["arms"]:
        assert f"by {name} &lt;b&gt;" in page
    assert page.count('title="backward: 55\N{NO-BREAK SPACE}%"') == 3
    rows = {
        row.label: row.cells
        for group in tables.main_table(as_results(results), summary_of(results))
        for row in group.rows
    }
    assert rows["Forward, backward, optimizer"][0].text == f"30 / 55 / 15{SPACE}%"
