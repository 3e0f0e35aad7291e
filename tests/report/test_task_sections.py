"""The verdict, the tables and the page of translation and classification, on made-up results."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
import pytest

from fixtures.results import as_results, summary_of
from mixtura.report import facts, tables
from mixtura.report.figures import build_figures
from mixtura.report.html import render_html, write_report
from mixtura.report.markdown import render_markdown
from mixtura.report.sections import (
    calibration_figure,
    classification_section,
    specialization_maps,
    task_figures,
    translation_section,
)
from mixtura.report.verdict import judge_difference, write_rule
from mixtura.report.wording import written_amount, written_value
from mixtura.results import Interval
from mixtura.training.interface import LOSS, Measure

MakeResults = Callable[..., dict[str, Any]]
SPACE = "\N{NO-BREAK SPACE}"
CHRF = Measure("chrf", "chrF", "points", "higher", 2)
ACCURACY = Measure("accuracy", "accuracy", "%", "higher", 1)
HOSTILE = '</script><img src=x onerror=alert(1)>{{ 7 * 7 }}|`"'

HEADINGS = {
    "translation": ("Language pairs", "Some translations", "What experts specialise in"),
    "classification": ("Which layers are read", "How honest the confidence is", "What is taken for what"),
}
MARKDOWN = {
    "translation": ("## Language pairs", "| en-de | 15.20 |", "## What experts specialise in"),
    "classification": ("## Classes", "| weight of layer |", "layer mix by paired bootstrap: +3.10 points"),
}


def rows_of(results: dict[str, Any]) -> dict[str, list[dict[str, str]]]:
    groups = tables.main_table(as_results(results), summary_of(results))
    return {row.label: row.cells for group in groups for row in group.rows}


@pytest.mark.parametrize(
    ("low", "high", "outcome"),
    [(0.1, 0.2, "beats"), (-0.2, -0.1, "loses"), (-0.1, 0.1, "draw"), (0.0, 0.1, "draw"), (None, None, "one_seed")],
)
def test_where_more_is_better_an_interval_above_zero_wins(low: float | None, high: float | None, outcome: str) -> None:
    assert judge_difference(Interval(0.0, low, high, 3), better="higher") == outcome


def test_the_rule_names_the_measure_and_its_direction() -> None:
    assert "by their chrF as deployed, in points" in write_rule(CHRF)
    assert "lies above zero, loses if it lies below zero" in write_rule(CHRF)
    assert "by their held-out loss as deployed, in nats a token" in write_rule(LOSS)
    assert "lies below zero, loses if it lies above zero" in write_rule(LOSS)


@pytest.mark.parametrize(
    ("measure", "value", "amount"),
    [
        (LOSS, "2.500 nats a token", "2.500 nats a token"),
        (CHRF, "chrF 2.50", "2.50 points of chrF"),
        (ACCURACY, f"accuracy 2.5{SPACE}%", "2.5 percentage points of accuracy"),
        (Measure("brier", "Brier score", "", "lower"), "Brier score 2.500", "2.500 in Brier score"),
    ],
)
def test_values_and_differences_carry_their_unit(measure: Measure, value: str, amount: str) -> None:
    assert written_value(measure, 2.5) == value
    assert written_amount(measure, -2.5) == amount


def test_the_arm_with_the_higher_score_is_the_answer_with_its_price(make_translation: MakeResults) -> None:
    summary = summary_of(make_translation())
    arms, verdict = summary.arms, summary.verdict
    assert {name: arm.outcome for name, arm in arms.items()} == {
        "dense": "baseline", "token_choice": "beats", "mixture_of_tokens": "loses",
    }  # fmt: skip
    assert verdict.best == verdict.leader == "token_choice" and verdict.tied == []
    amount = -arms["mixture_of_tokens"].difference.deployed.mean
    assert verdict.finding.startswith(f"MoT loses to dense by {amount:.2f} points of chrF and")
    assert "token-choice MoE beats dense by" in verdict.finding
    score = arms["token_choice"].score.deployed
    assert f"the answer is token-choice MoE: chrF {score:.2f} as deployed, against" in verdict.answer
    assert f"2.89{SPACE}M trained parameters instead of 919{SPACE}k" in verdict.answer
    assert "1.31 times the time a step" in verdict.answer
    assert f"765{SPACE}MiB of memory while training instead of 584{SPACE}MiB" in verdict.answer


def test_a_higher_loss_does_not_lose_where_chrf_decides(make_translation: MakeResults) -> None:
    """The fixture's token-choice arm has the lowest loss; here it also has the lowest chrF."""
    summary = summary_of(make_translation(gains=(-1.0, 2.0)))
    assert summary.verdict.best == "mixture_of_tokens"
    assert summary.arms["token_choice"].outcome == "loses"


def test_a_tie_is_named_with_the_cheapest_of_the_tied(make_translation: MakeResults) -> None:
    verdict = summary_of(make_translation(gains=(0.01, -0.01), noise=0.5)).verdict
    assert verdict.best is None and len(verdict.tied) == 2
    assert verdict.finding.startswith("No winner")
    assert "has the highest mean chrF as deployed" in verdict.answer
    assert "dense takes the least time a step, trains the fewest parameters" in verdict.answer
    assert f"needs the least memory (584{SPACE}MiB)" in verdict.answer


def test_the_baseline_as_answer_says_what_it_trains(make_classification: MakeResults) -> None:
    verdict = summary_of(make_classification(gains=(-3.0, -3.0))).verdict
    assert verdict.best == "last_layer"
    assert re.search(r"the answer is last layer: accuracy 7\d\.\d.% as deployed\. It trains 770 of", verdict.answer)


def test_one_seed_says_above_and_below_and_decides_nothing(make_translation: MakeResults) -> None:
    verdict = summary_of(make_translation(seeds=(0,))).verdict
    assert verdict.finding.startswith("One seed cannot decide")
    assert re.search(r"MoT ended \d\.\d\d points of chrF below dense", verdict.finding)
    assert re.search(r"token-choice MoE ended \d\.\d\d above dense", verdict.finding)
    assert verdict.answer is None


def test_what_is_said_of_curves_is_said_to_be_about_the_loss(make_translation: MakeResults) -> None:
    summary = summary_of(make_translation())
    assert "measured only at the end of a run" in summary.verdict.longer[0]
    assert summary.anchor is None
    assert "published" not in " ".join(summary.verdict.longer)
    assert "In held-out loss at equal training time it" in summary.verdict.answer


def test_the_table_has_the_measure_what_else_was_measured_and_what_is_trained(make_translation: MakeResults) -> None:
    rows = rows_of(make_translation())
    assert rows["chrF"][0].text == "41.00" and rows["chrF"][2].note == "mode alone"
    assert rows["Minus dense's"][1].text.startswith("+1.4")
    assert {"chrF as trained", "chrF++", "BLEU", "Held-out loss", "Perplexity"} <= rows.keys()
    assert "Bits per byte" not in rows
    assert rows["Parameters, trained"][1] == tables.Cell(f"2.89{SPACE}M", f"100.0{SPACE}%")
    assert rows["Optimizer state"][0].text == f"7.01{SPACE}MiB"
    assert {"Load imbalance", "Leaks while training"} <= rows.keys()


def test_experts_are_left_out_where_no_arm_routes(make_classification: MakeResults) -> None:
    rows = rows_of(make_classification())
    assert not {"Load imbalance", "Router entropy", "Leaks while training", "Accuracy as trained"} & rows.keys()
    assert {"Accuracy", "Macro F1", "Expected calibration error"} <= rows.keys()
    assert rows["Parameters, trained"][0].note == f"0.08{SPACE}%"


def test_a_measure_that_one_run_lacks_has_no_row(make_translation: MakeResults) -> None:
    results = make_translation()
    del results["arms"]["dense"]["runs"][0]["final"]["causal"]["bleu"]
    rows = rows_of(results)
    assert "BLEU" not in rows and "chrF++" in rows


def test_a_score_that_is_decoded_as_deployed_alone_is_no_divergence(make_translation: MakeResults) -> None:
    results = make_translation()
    for run in results["arms"]["mixture_of_tokens"]["runs"]:
        for mode in ("group", "alone_all"):
            del run["final"][mode]["chrf"]
    summary = summary_of(results)
    arm = summary.arms["mixture_of_tokens"]
    assert arm.diverged == 0 and arm.score.trained is None and arm.difference.trained is None
    assert len(facts.seed_table(as_results(results), summary).columns) == 3
    assert rows_of(results)["chrF as trained"][2].text == "\N{EN DASH}"


def test_a_classifier_that_reads_its_whole_text_takes_part(make_classification: MakeResults) -> None:
    summary = summary_of(make_classification())
    assert all(arm.excluded is None for arm in summary.arms.values())
    assert "leaks_future" not in {caution.kind for caution in summary.cautions}


def test_unequal_flops_are_a_property_of_fine_tuned_arms_and_no_unfairness(make_classification: MakeResults) -> None:
    results = make_classification()
    results["arms"]["lora"]["flops_ratio"] = 2.0
    caution = next(caution for caution in summary_of(results).cautions if caution.kind == "flops")
    assert caution.level == "note"


def test_language_pairs_stand_beside_the_copied_source_with_bootstrap_and_beam(make_translation: MakeResults) -> None:
    section = translation_section(as_results(make_translation()))
    assert section is not None
    assert [table.title for table in section.tables] == ["chrF", "chrF++", "BLEU"]
    row = section.tables[0].rows[0]
    assert row.label == "en-de"
    assert [cell.text for cell in row.cells] == ["15.20", "41.00", "42.40*", "40.10"]
    assert row.cells[2].note == "beam 43.00; +1.40, p < 0.001"
    assert row.cells[3].note.endswith("p = 0.210")
    assert section.tables[1].rows[0].cells[0].text == "\N{EN DASH}"
    assert [name for name, _ in section.signatures] == ["chrF", "BLEU"]


def test_comet_has_a_table_of_its_own_where_it_was_asked_for(make_translation: MakeResults) -> None:
    results = make_translation()
    for arm in results["arms"].values():
        for run in arm["runs"]:
            for scores in run["details"]["pairs"].values():
                scores |= {"comet": 71.5, "copy_comet": 40.25}
    name = next(name for name in results["arms"] if name != results["baseline"])
    pair = next(iter(results["arms"][name]["runs"][0]["details"]["pairs"]))
    results["across_arms"]["comet"] = {name: {pair: {"difference": 1.5, "p_value": 0.01}}}
    section = translation_section(as_results(results))
    assert section is not None
    table = section.tables[-1]
    cells = table.rows[0].cells
    assert table.title == "COMET" and cells[0].text == "40.25"
    cell = cells[1 + list(results["arms"]).index(name)]
    assert cell.text == "71.50*" and "p = 0.010" in cell.note


def test_each_sample_shows_what_every_arm_makes_of_it(make_translation: MakeResults) -> None:
    section = translation_section(as_results(make_translation()))
    assert section is not None
    assert [sample.pair for sample in section.samples] == ["en-de"] * 2 + ["en-fr"] * 2 + ["en-ru"] * 2
    assert section.samples[0].outputs == [
        (name, f"{name} says dialog.") for name in ("dense", "token_choice", "mixture_of_tokens")
    ]


def test_a_specialisation_map_is_relative_to_an_even_share(make_translation: MakeResults) -> None:
    results = make_translation()
    maps = specialization_maps(as_results(results), summary_of(results))
    assert [(entry.arm, entry.layer) for entry in maps] == [("token_choice", 2), ("token_choice", 3)]
    for entry in maps:
        assert entry.groups == ["en-de", "en-fr", "en-ru"] and entry.experts == 8
        for matrix in entry.seeds.values():
            for column in zip(*matrix, strict=True):
                assert sum(column) == pytest.approx(8, abs=1e-2)


def test_confusions_add_up_over_seeds(make_classification: MakeResults) -> None:
    results = make_classification()
    section = classification_section(as_results(results), summary_of(results))
    assert section is not None and [found.arm for found in section.confusions] == list(results["arms"])
    first = section.confusions[0].rows[0]
    counts = [int(cell.note.replace(",", "")) for cell in first.cells]
    assert sum(counts) == 3 * 500
    assert first.cells[0].text == f"{100 * counts[0] / 1500:.1f}{SPACE}%"
    assert section.tests[0][0] == "layer_mix" and section.tests[0][1].startswith("+3.10 points")


def test_every_class_has_its_f1_beside_the_number_of_its_test_texts(make_classification: MakeResults) -> None:
    results = make_classification(seeds=(0,))
    for arm in results["arms"].values():
        arm["runs"][0]["details"] |= {"labels": ["no", "yes"], "confusion": [[80, 10], [6, 4]]}
    section = classification_section(as_results(results), summary_of(results))
    assert section is not None
    assert [row.label for row in section.label_rows] == ["no (90)", "yes (10)"]
    assert [row.cells[0].text for row in section.label_rows] == ["90.9", "33.3"]
    assert section.label_rows[1].cells[0].note == "given 14 times"
    assert "How well each label is found" in render_html(as_results(results), summary_of(results))


def test_classifiers_that_one_answer_for_every_text_outscores_are_named(make_classification: MakeResults) -> None:
    results = make_classification()
    results["data"]["facts"]["majority_accuracy"] = 57.61
    assert "below_majority" not in {caution.kind for caution in summary_of(results).cautions}
    for run in results["arms"]["lora"]["runs"]:
        run["final"]["classify"]["accuracy"] = 36.0
    (found,) = [caution for caution in summary_of(results).cautions if caution.kind == "below_majority"]
    assert found.level == "warning" and "57.6 % accuracy, no less than LoRA:" in found.text


def test_texts_that_the_tokenizer_does_not_know_are_told(make_classification: MakeResults) -> None:
    results = make_classification()
    results["data"]["facts"]["unknown_percent"] = 1.5
    assert "unknown_tokens" not in {caution.kind for caution in summary_of(results).cautions}
    results["data"]["facts"]["unknown_percent"] = 68.7
    (found,) = [caution for caution in summary_of(results).cautions if caution.kind == "unknown_tokens"]
    assert "does not know 69 % of these texts: name another base" in found.text


def test_training_examples_that_a_run_does_not_reach_are_counted(make_classification: MakeResults) -> None:
    results = make_classification()
    results["data"]["epochs"] = 0.125
    (found,) = [caution for caution in summary_of(results).cautions if caution.kind == "unread"]
    steps = results["arms"]["lora"]["runs"][0]["steps"]
    assert f"reads 12.5{SPACE}% of the training examples" in found.text and f"{8 * steps:,} reads" in found.text


def test_calibration_pools_the_answers_of_all_seeds(make_classification: MakeResults) -> None:
    results = make_classification()
    bins = [{"low": 0.5, "high": 1.0, "confidence": 0.8, "accuracy": 0.5, "count": 100}]
    other = [{"low": 0.5, "high": 1.0, "confidence": 0.6, "accuracy": 1.0, "count": 300}]
    empty = [{"low": 0.5, "high": 1.0, "confidence": None, "accuracy": None, "count": 0}]
    for run, found in zip(results["arms"]["lora"]["runs"], (bins, other, empty), strict=True):
        run["details"]["calibration"] = found
    figure = calibration_figure(as_results(results), summary_of(results))
    assert figure is not None
    trace = figure["data"][2]
    assert trace["x"] == [pytest.approx(0.65)] and trace["y"] == [pytest.approx(0.875)]
    assert trace["customdata"] == [400]


def test_task_figures_are_valid_plotly(make_translation: MakeResults, make_classification: MakeResults) -> None:
    results = make_classification()
    figures = task_figures(as_results(results), summary_of(results))
    assert set(figures) == {"layer_weights", "calibration"}
    weights = [trace for trace in figures["layer_weights"]["data"] if trace["meta"]["role"] == "mean"]
    assert [len(trace["y"]) for trace in weights] == [7] and sum(weights[0]["y"]) == pytest.approx(1)
    translated = make_translation()
    assert task_figures(as_results(translated), summary_of(translated)) == {}
    for figure in figures.values():
        assert go.Figure(figure).data
        json.dumps(figure, allow_nan=False)


def test_differences_point_to_the_better_side(make_results: MakeResults, make_translation: MakeResults) -> None:
    ends = {}
    for results in (make_results(), make_translation()):
        layout = build_figures(as_results(results), summary_of(results))["differences"]["layout"]
        ends[results["task"]] = (
            [note["text"].split(SPACE)[0] for note in layout["annotations"]],
            layout["xaxis"]["title"],
        )
    assert ends["pretraining"][0] == ["\N{LEFTWARDS ARROW}", "worse"]
    assert ends["translation"][0] == ["\N{LEFTWARDS ARROW}", "better"]
    assert ends["translation"][1] == {"text": "Difference (points)"}


@pytest.mark.parametrize("task", ["translation", "classification"])
def test_a_report_of_a_task_is_whole(task: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    results = request.getfixturevalue(f"make_{task}")()
    page = write_report(as_results(results), tmp_path).read_text(encoding="utf-8")
    shown = re.sub(r"<script>.*?</script>", "", page, flags=re.DOTALL)
    assert "None" not in re.sub(r"<[^>]*>", "", shown)
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    for heading in HEADINGS[task]:
        assert heading in shown
    for part in MARKDOWN[task]:
        assert part in text


def test_texts_of_the_data_cannot_become_markup(
    make_translation: MakeResults, make_classification: MakeResults
) -> None:
    translated, classified = make_translation(), make_classification()
    for run in (run for arm in translated["arms"].values() for run in arm["runs"]):
        run["details"]["samples"][0] |= {"output": HOSTILE, "source": HOSTILE, "reference": HOSTILE}
    for run in translated["arms"]["token_choice"]["runs"]:
        run["details"]["specialization"]["groups"][0] = HOSTILE
    for arm in classified["arms"].values():
        for run in arm["runs"]:
            run["details"]["labels"][0] = HOSTILE
    for results in (translated, classified):
        page = render_html(as_results(results), summary_of(results))
        scripts = re.findall(r"<script.*?</script>", page, flags=re.DOTALL)
        assert len(scripts) == 3
        assert "<img" not in page.replace(scripts[1], "")
        assert "&lt;img src=x onerror=alert(1)&gt;{{ 7 * 7 }}|" in page
        assert "<img" not in render_markdown(as_results(results), summary_of(results)).replace("\\<img", "")


@pytest.mark.parametrize("case", ["one_seed", "no_details", "too_many_classes"])
def test_incomplete_details_still_make_a_page(make_classification: MakeResults, case: str) -> None:
    results = make_classification(seeds=(0,) if case == "one_seed" else (0, 1, 2))
    results["across_arms"] = {} if case == "no_details" else results["across_arms"]
    for arm in results["arms"].values():
        for run in arm["runs"]:
            if case == "no_details":
                run["details"] = None
            if case == "too_many_classes":
                run["details"] |= {
                    "labels": [str(label) for label in range(30)],
                    "confusion": [[1] * 30 for _ in range(30)],
                }
    page = render_html(as_results(results), summary_of(results))
    assert ("Classes and confidence" in page) == (case != "no_details")
    assert ("too many for a table of what" in page) == (case == "too_many_classes")


def test_arms_that_the_copied_source_outscores_are_named(make_translation: MakeResults) -> None:
    results = make_translation()
    found = {caution.kind for caution in summary_of(results).cautions}
    assert "below_copying" not in found
    name, arm = list(results["arms"].items())[-1]
    for run in arm["runs"]:
        for pair in run["details"]["pairs"].values():
            pair["chrf"] = pair["copy_chrf"] - 1.0
    cautions = [c for c in summary_of(results).cautions if c.kind == "below_copying"]
    assert len(cautions) == 1
    assert summary_of(results).arms[name].label in cautions[0].text


def test_texts_that_were_mostly_cut_are_a_caution(make_classification: MakeResults) -> None:
    results = make_classification()
    results["data"]["facts"]["truncated_percent"] = 50.0
    assert "cut_texts" not in {caution.kind for caution in summary_of(results).cautions}
    results["data"]["facts"]["truncated_percent"] = 98.4
    (found,) = [caution for caution in summary_of(results).cautions if caution.kind == "cut_texts"]
    assert found.level == "warning" and "Of 98 % of the texts only the start is read" in found.text


def test_classes_of_one_side_alone_are_cautions(make_classification: MakeResults) -> None:
    results = make_classification()
    assert not {"untested_class", "unlearnt_class"} & {c.kind for c in summary_of(results).cautions}
    results["data"]["facts"] |= {"labels_untested": [f"<b>{i}</b>" for i in range(7)], "labels_unlearnt": ["rare"]}
    texts = {c.kind: c.text for c in summary_of(results).cautions}
    assert "label '<b>0</b>', '<b>1</b>', '<b>2</b>', '<b>3</b>', '<b>4</b>' or 2 more:" in texts["untested_class"]
    assert texts["unlearnt_class"].startswith("No training text has the label 'rare': its texts were left out")
    assert "<b>0</b>" not in render_html(as_results(results), summary_of(results))
