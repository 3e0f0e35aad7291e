"""Stored results: what former releases wrote is read, and what is damaged is refused with a sentence."""

import dataclasses
import json
from pathlib import Path

import pytest

from fixtures.results import as_results
from mixtura.config import UserError
from mixtura.files import write_json, write_text
from mixtura.report.html import report_folder
from mixtura.report.summary import summarize
from mixtura.results import SCHEMA_VERSION, read_results
from mixtura.results.document import read_json, read_run, write_results, write_run
from mixtura.results.json_form import NotThatRecord, from_plain, to_plain
from mixtura.results.run import ClassificationDetails, PretrainingDetails, TranslationDetails

STORED = Path(__file__).parent / "stored"
"""Made by the release before schema version 3, of the tests' tiny comparisons."""


def test_a_file_that_cannot_be_written_whole_leaves_the_old_one(tmp_path):
    path = tmp_path / "value.json"
    write_json(path, {"a": 1})
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(path, {"a": float("nan")})
    assert read_json(path) == {"a": 1} and [file.name for file in tmp_path.iterdir()] == ["value.json"]


def test_what_utf8_cannot_hold_is_written_as_an_escape(tmp_path):
    write_text(tmp_path / "page.html", "caf\udce9.txt\n")
    assert (tmp_path / "page.html").read_bytes() == b"caf\\udce9.txt\n"


def test_no_file_reads_as_none_and_a_damaged_one_is_named(tmp_path):
    assert read_json(tmp_path / "none.json") is None
    for damage in (b'{"a": ', b"\xff\xfe", b"[]"):
        (tmp_path / "bad.json").write_bytes(damage)
        with pytest.raises(UserError, match=r"bad\.json' is damaged \(.*\): delete it"):
            read_json(tmp_path / "bad.json")


def test_a_json_file_without_the_keys_it_should_have_is_damaged(tmp_path):
    write_json(tmp_path / "value.json", {"a": 1})
    assert read_json(tmp_path / "value.json", keys={"a"}) == {"a": 1}
    with pytest.raises(UserError, match=r"value\.json' is damaged"):
        read_json(tmp_path / "value.json", keys={"a", "b"})


@pytest.mark.parametrize("task", ["pretraining", "translation", "classification"])
def test_results_of_the_former_schema_are_read(task):
    results, stored = read_results(STORED / f"{task}.json"), json.loads((STORED / f"{task}.json").read_text("utf-8"))
    assert stored["schema_version"] == 2 and results.schema_version == SCHEMA_VERSION
    assert results.task == task and results.data.tokens_per_run == stored["data"]["tokens_per_run"]
    assert results.data.facts.keys() == stored["data"].keys() - {
        "description",
        "tokens_per_step",
        "tokens_per_run",
        "epochs",
    }
    for name, arm in results.arms.items():
        for run, before in zip(arm.runs, stored["arms"][name]["runs"], strict=True):
            assert run.final == before["final"]
            assert [point.loss for point in run.curve] == [point["loss"] for point in before["curve"]]
            assert [point.flops for point in run.curve] == [point["flops"] for point in before["curve"]]
    assert results.summary is None, "it is computed anew"
    finding, zero = summarize(results).verdict.finding, "(0.00, 95\N{NO-BREAK SPACE}% interval 0.00 to 0.00)"
    # Then ends of intervals had no plus sign, and no difference was called equal.
    assert finding.replace("+", "").replace("(equal)", zero) == stored["summary"]["verdict"]["headline"].replace(
        "+", ""
    )


def test_what_former_tasks_told_is_told_apart():
    mixture = read_results(STORED / "pretraining.json").arms["mixture_of_tokens"].runs[0]
    assert isinstance(mixture.details, PretrainingDetails) and mixture.details.peakedness[0].layer == 1
    assert read_results(STORED / "pretraining.json").arms["dense"].runs[0].details is None
    translated = read_results(STORED / "translation.json")
    assert isinstance(translated.arms["dense"].runs[0].details, TranslationDetails)
    test = translated.across_arms.paired_bootstrap["token_choice"]["en-xx"]
    assert 0 < test.p_value <= 1 and test.low is None
    classified = read_results(STORED / "classification.json")
    assert isinstance(classified.arms["layer_mix"].runs[0].details, ClassificationDetails)
    test = classified.across_arms.paired_bootstrap["layer_mix"]["all"]
    assert test.low <= test.difference <= test.high


def test_a_report_of_the_former_schema_is_made_again(tmp_path):
    (tmp_path / "results.json").write_bytes((STORED / "translation.json").read_bytes())
    assert "Language pairs" in report_folder(tmp_path).read_text(encoding="utf-8")


def test_a_run_of_the_former_schema_is_read(tmp_path):
    run = read_run(STORED / "run.json")
    assert isinstance(run.details, PretrainingDetails) and run.final["alone"]["loss"] > 0
    assert run.curve[-1].measures.keys() == {"loss", "bits_per_byte"} and run.curve[-1].flops is None
    write_run(tmp_path / "result.json", run)
    assert read_run(tmp_path / "result.json") == run


@pytest.mark.parametrize("make", ["make_results", "make_translation", "make_classification"])
def test_what_is_written_reads_as_it_was(make, request, tmp_path):
    results = as_results(request.getfixturevalue(make)())
    results = dataclasses.replace(results, summary=summarize(results))
    write_results(tmp_path / "results.json", results)
    assert read_results(tmp_path / "results.json") == results
    assert to_plain(from_plain(type(results), to_plain(results))) == to_plain(results)


@pytest.mark.parametrize("version", [1, 4, None, "3"])
def test_another_schema_version_is_refused(make_results, tmp_path, version):
    write_json(tmp_path / "results.json", {**make_results(), "schema_version": version})
    with pytest.raises(UserError, match=f"is of schema version {version}, and this release reads versions 2 and 3"):
        read_results(tmp_path / "results.json")


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        (("command",), None, "command is None, which is no text"),
        (("command",), ..., "command is missing"),
        (("task",), "cooking", "task is 'cooking', which is none of pretraining, translation, classification"),
        (("baseline",), "soft", "baseline is 'soft', which is none of its arms"),
        (("arms",), [], r"arms is \[\], which is no table"),
        (
            ("arms", "dense", "parameters_total"),
            1.5,
            r"arms\.dense\.parameters_total is 1\.5, which is no whole number",
        ),
        (("arms", "dense", "leaks", "future"), 0, r"arms\.dense\.leaks\.future is 0, which is no true or false"),
        (("arms", "dense", "runs", 1, "seed"), True, r"arms\.dense\.runs\[1\]\.seed is True, which is no whole number"),
        (("arms", "dense", "runs", 0, "details"), {"kind": "x"}, r"runs\[0\]\.details is of no known kind"),
        (("data",), 3, "data is no table of fields"),
    ],
)
def test_a_damaged_file_is_named_with_the_field(make_results, tmp_path, path, value, words):
    stored = make_results()
    *parents, last = path
    table = stored
    for key in parents:
        table = table[key]
    if value is ...:
        del table[last]
    else:
        table[last] = value
    write_json(tmp_path / "results.json", stored)
    with pytest.raises(UserError, match=rf"results\.json' is damaged \(.*{words}.*\): delete it"):
        read_results(tmp_path / "results.json")


def test_a_damaged_file_of_the_former_schema_is_refused(tmp_path):
    stored = json.loads((STORED / "pretraining.json").read_text(encoding="utf-8"))
    for damage in ({"arms": 3}, {"data": None}, {"arms": {"dense": {"runs": [{}]}}}):
        write_json(tmp_path / "results.json", stored | damage)
        with pytest.raises(UserError, match=r"results\.json' is damaged"):
            read_results(tmp_path / "results.json")


def test_fields_of_a_later_release_are_passed_over(make_results, tmp_path):
    stored = make_results()
    write_json(tmp_path / "results.json", {**stored, "colour": "blue"})
    assert read_results(tmp_path / "results.json") == as_results(stored)


def test_a_value_that_is_no_record_says_where():
    with pytest.raises(NotThatRecord, match="pairs is missing"):
        from_plain(TranslationDetails, {"signatures": {}, "samples": []})
