"""The written report: complete, escaped, self-contained, and the same numbers everywhere."""

import dataclasses
import json
import re
import typing
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, cast

import plotly.graph_objects as go
import pytest

from fixtures.results import as_results, summary_of
from mixtura.config import UserError
from mixtura.report import facts, tables
from mixtura.report.facts import load_maps
from mixtura.report.figures import build_figures, smooth
from mixtura.report.html import render_html, report_folder, write_report
from mixtura.report.markdown import escape, fence, render_markdown
from mixtura.report.wording import arm_colours
from mixtura.results import Results
from mixtura.results.document import write_results

MakeResults = Callable[..., dict[str, Any]]
HOSTILE = '</script><img src=x onerror=alert(1)>{{ 7 * 7 }}|`"'


class Page(HTMLParser):
    """What a browser would see: tags with their attributes, and the text outside scripts and styles."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text, self.scripts, self._inside = "", [], ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._inside = tag
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""

    def handle_data(self, data: str) -> None:
        if self._inside == "script":
            self.scripts[-1] += data
        elif self._inside != "style":
            self.text += data


def build_page(results: dict[str, Any]) -> tuple[str, Page]:
    text = render_html(as_results(results), summary_of(results))
    return text, Page(text)


def test_folder_holds_page_markdown_and_pictures(make_results: MakeResults, tmp_path: Path) -> None:
    results = make_results()
    path = write_report(as_results(results), tmp_path / "run")
    assert path == tmp_path / "run" / "report.html"
    names = {str(p.relative_to(tmp_path / "run")) for p in (tmp_path / "run").rglob("*") if p.is_file()}
    pictures = {f"figures/{name}.png" for name in ("loss", "differences", "load")}
    assert names == {"report.html", "report.md", *pictures}
    for name in pictures:
        assert (tmp_path / "run" / name).read_bytes().startswith(b"\x89PNG")


def test_writing_again_replaces_and_repeats_every_byte(make_results: MakeResults, tmp_path: Path) -> None:
    results = make_results()
    write_report(as_results(results), tmp_path)
    first = {p.name: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    write_report(as_results(results), tmp_path)
    assert {p.name: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == first


def test_interrupted_write_leaves_the_old_report(
    make_results: MakeResults, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_report(as_results(make_results()), tmp_path)
    before = path.read_bytes()

    def fail(*_: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("mixtura.files.os.replace", fail)
    with pytest.raises(OSError, match="disk full"):
        write_report(as_results(make_results(seeds=(0,))), tmp_path)
    assert path.read_bytes() == before


def test_stored_summary_is_what_the_page_shows(make_results: MakeResults, tmp_path: Path) -> None:
    results = as_results(make_results())
    summary = summary_of(make_results())
    verdict = dataclasses.replace(summary.verdict, headline="A stored sentence.")
    stored = dataclasses.replace(results, summary=dataclasses.replace(summary, verdict=verdict))
    assert "A stored sentence." in write_report(stored, tmp_path).read_text(encoding="utf-8")


def test_the_report_is_made_again_from_the_stored_results_alone(make_results: MakeResults, tmp_path: Path) -> None:
    results = as_results(make_results())
    write_report(results, tmp_path / "first")
    write_results(tmp_path / "again" / "results.json", results)
    assert report_folder(tmp_path / "again") == tmp_path / "again" / "report.html"
    for name in ("report.html", "report.md", "figures/loss.png", "figures/differences.png", "figures/load.png"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "first" / name).read_bytes()


def test_a_folder_without_results_has_no_report(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has no results\.json: give the folder of a finished comparison"):
        report_folder(tmp_path)
    assert not list(tmp_path.iterdir())


def test_page_shows_every_final_loss_and_the_verdict_first(make_results: MakeResults) -> None:
    results = make_results()
    summary = summary_of(results)
    _, page = build_page(results)
    for arm in results["arms"].values():
        for run in arm["runs"]:
            for mode in run["final"].values():
                assert f"{mode['loss']:.4f}" in page.text
    headline = page.text.index(summary.verdict.headline)
    places = ("The rule, fixed before the runs", "What is held equal", "The arms side by side")
    assert headline < page.text.index(summary.verdict.finding) < min(map(page.text.index, places))
    for caution in summary.cautions:
        assert caution.text in page.text


def test_page_has_the_sections_a_reader_needs(make_results: MakeResults) -> None:
    _, page = build_page(make_results())
    for heading in ("What is held equal", "What this cannot tell you", "Reproduce this", "Every run", "Learning rates"):
        assert heading in page.text
    assert "mixtura compare --preset default --out runs/default" in page.text
    assert "[arms.mixture_of_tokens]" in page.text
    levels = [int(tag[1]) for tag, _ in page.tags if re.fullmatch(r"h\d", tag)]
    assert levels.count(1) == 1
    ids = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
    assert len(ids) == len(set(ids))
    links = {attrs["href"] for tag, attrs in page.tags if tag == "a"}
    assert {link.removeprefix("#") for link in links if link} <= set(ids)


def test_page_refers_to_nothing_outside_itself(make_results: MakeResults) -> None:
    _, page = build_page(make_results())
    for tag, attrs in page.tags:
        assert tag not in ("link", "iframe", "img", "base")
        assert "src" not in attrs
        assert (attrs.get("href") or "#").startswith("#")
    policy = next(attrs["content"] for tag, attrs in page.tags if attrs.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None
    assert "default-src 'none'" in policy


def test_names_and_descriptions_cannot_become_markup(make_results: MakeResults) -> None:
    results = make_results()
    _, clean = build_page(results)
    results["arms"]["token_choice"]["label"] = HOSTILE
    results["data"]["description"] = HOSTILE
    results["command"] = HOSTILE
    results["recipe_toml"] = HOSTILE
    results["recipe"]["name"] = HOSTILE
    results["held_equal"] = [HOSTILE]
    results["environment"]["processor"] = HOSTILE
    text, page = build_page(results)
    assert "<img" not in text.replace(clean.scripts[1], "")
    assert len(page.scripts) == len(clean.scripts) == 3
    assert HOSTILE in page.text
    assert "49" not in re.findall(r"alert\(1\)>(\S+)", page.text)
    data = json.loads(page.scripts[0])
    assert "&lt;/script&gt;" in json.dumps(data["figures"]["curves"])
    assert page.scripts[1] == clean.scripts[1]


def test_markdown_shows_hostile_names_as_written(make_results: MakeResults) -> None:
    results = make_results()
    results["arms"]["token_choice"]["label"] = "a|b <b>*c*</b>"
    results["recipe_toml"] = "````\nx = 1"
    text = render_markdown(as_results(results), summary_of(results))
    table = [line for line in text.splitlines() if line.startswith("| As deployed")]
    header = next(line for line in text.splitlines() if line.startswith("|  |"))
    assert len(re.findall(r"(?<!\\)\|", header)) == len(re.findall(r"(?<!\\)\|", table[0])) == 5
    assert r"a\|b \<b\>\*c\*\</b\>" in header
    assert "`````toml\n````\nx = 1\n`````" in text
    assert escape("_a_\n# b") == r"\_a\_ \# b"
    assert fence("x") == "```\nx\n```"


def test_markdown_holds_verdict_table_and_command(make_results: MakeResults) -> None:
    results = make_results()
    summary = summary_of(results)
    text = render_markdown(as_results(results), summary)
    assert f"**{summary.verdict.headline}**".replace("\N{NO-BREAK SPACE}", " ") in text
    assert "| Seconds a step |" in text
    assert results["command"] in text
    assert "![Held-out loss over training](figures/loss.png)" in text


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("three_seeds", {}),
        ("one_seed", {"seeds": (0,)}),
        ("draws", {"offsets": (-0.002, 0.003), "noise": 0.02}),
        ("mot_wins", {"offsets": (0.05, -0.1)}),
    ],
)
def test_pretraining_is_told_in_the_words_and_numbers_stored(
    make_results: MakeResults, name: str, settings: dict[str, Any]
) -> None:
    """What other tasks add to the report must not change a word of pretraining's."""
    stored = (Path(__file__).parent / "stored" / f"{name}.md").read_text(encoding="utf-8")
    results = make_results(**settings)
    assert render_markdown(as_results(results), summary_of(results)) == stored


def test_figures_are_valid_plotly(make_results: MakeResults) -> None:
    results = make_results()
    figures = build_figures(as_results(results), summary_of(results))
    assert set(figures) == {"differences", "curves", "gap", "training", "search"}
    for figure in figures.values():
        assert go.Figure(figure).data
        json.dumps(figure, allow_nan=False)


def test_curves_keep_deployed_and_trained_apart(make_results: MakeResults) -> None:
    results = make_results()
    figure = build_figures(as_results(results), summary_of(results))["curves"]
    means = {trace["name"]: trace for trace in figure["data"] if trace["meta"]["role"] == "mean"}
    assert set(means) == {"dense", "token-choice MoE", "MoT, as deployed", "MoT, as trained"}
    assert means["MoT, as deployed"]["line"]["dash"] == "solid"
    assert means["MoT, as trained"]["line"]["dash"] == "dot"
    scale = means["token-choice MoE"]["meta"]["scale"]
    assert scale["tokens"] == 2048
    assert scale["seconds"] == results["arms"]["token_choice"]["seconds_per_step"]
    last = [run["curve"][-1]["measures"]["loss"]["causal"] for run in results["arms"]["dense"]["runs"]]
    assert means["dense"]["y"][-1] == pytest.approx(sum(last) / 3)


def test_load_maps_are_relative_to_an_even_share(make_results: MakeResults) -> None:
    results = make_results()
    maps = load_maps(as_results(results), summary_of(results))
    assert [(entry.arm, entry.layer) for entry in maps] == [
        ("token_choice", 2), ("token_choice", 3), ("mixture_of_tokens", 2), ("mixture_of_tokens", 3),
    ]  # fmt: skip
    for entry in maps:
        assert list(entry.seeds) == ["0", "1", "2"]
        for matrix in entry.seeds.values():
            assert len(matrix) == entry.experts == 16
            for column in zip(*matrix, strict=True):
                assert sum(column) == pytest.approx(16, abs=1e-2)


def test_even_load_is_said_and_not_mapped(make_results: MakeResults) -> None:
    results = make_results()
    for run in results["arms"]["mixture_of_tokens"]["runs"]:
        run["load"]["share"] = [[[1 / 16] * 16] * 2 for _ in run["load"]["steps"]]
    assert {entry.arm for entry in load_maps(as_results(results), summary_of(results))} == {"token_choice"}
    _, page = build_page(results)
    assert "MoT: every expert had an even share at every evaluation" in page.text


def test_arms_keep_their_family_colours_and_never_share_one(make_results: MakeResults) -> None:
    known = as_results(make_results()).arms
    arms = {"a": known["token_choice"], "dense": known["dense"], "b": known["token_choice"]}
    colours = arm_colours(arms)
    assert colours["a"] == arm_colours({"x": known["token_choice"]})["x"]
    assert len(set(colours.values())) == 3


def test_smoothing_keeps_constants_and_length() -> None:
    points = [(step, 4.0) for step in range(100)]
    assert smooth(points) == points
    assert smooth([]) == []
    assert [step for step, _ in smooth([(1, 5.0), (2, 4.0)])] == [1, 2]


def test_mean_of_the_surviving_seeds_is_shown_nowhere(make_results: MakeResults) -> None:
    results = make_results()
    results["arms"]["token_choice"]["runs"][1]["final"]["causal"]["loss"] = None
    table = tables.main_table(as_results(results), summary_of(results))
    rows = {row.label: row.cells for group in table for row in group.rows}
    for label in ("As deployed", "As trained", "Bits per byte", "Minus dense's"):
        assert rows[label][1].text == "\N{EN DASH}"
    seeds = facts.seed_table(as_results(results), summary_of(results))
    assert seeds.mean[1] == "\N{EN DASH}"
    assert seeds.rows[1][1][1] == "diverged"


def fields_of(hint: Any, seen: set[type]) -> set[str]:
    """Names of all fields of a record, and of the records inside it."""
    if dataclasses.is_dataclass(hint) and hint not in seen:
        seen.add(cast(type, hint))
        inside = typing.get_type_hints(hint).values()
        return {field.name for field in dataclasses.fields(hint)}.union(*(fields_of(part, seen) for part in inside))
    return set().union(*(fields_of(part, seen) for part in typing.get_args(hint)))


def test_schema_page_documents_every_field() -> None:
    page = (Path(__file__).parents[2] / "docs" / "report.md").read_text(encoding="utf-8")
    fields = fields_of(Results, set())
    assert {"schema_version", "spikes_loss", "token_range", "at_edge", "chance_high", "layer_weights"} <= fields
    assert fields - set(re.findall(r"`([a-z_0-9]+)[`\[]", page)) == set()


@pytest.mark.parametrize("case", ["one_seed", "no_search", "no_curves", "not_deployable", "diverged", "no_memory"])
def test_incomplete_results_still_make_a_report(make_results: MakeResults, tmp_path: Path, case: str) -> None:
    results = make_results(seeds=(0,) if case == "one_seed" else (0, 1, 2), search=case != "no_search")
    mot = results["arms"]["mixture_of_tokens"]
    for arm in results["arms"].values():
        for run in arm["runs"]:
            if case == "no_curves":
                run.update(curve=[], train_curve=[], load=None)
        if case == "no_memory":
            arm.update(peak_memory_bytes=None, seconds_per_step=None, seconds_ratio=None)
    if case == "not_deployable":
        mot["deployed_mode"] = None
    if case == "diverged":
        mot["runs"][0]["final"]["alone"]["loss"] = None
    page = Page(write_report(as_results(results), tmp_path).read_text(encoding="utf-8"))
    said = {
        "one_seed": "No verdict: one seed",
        "no_search": "not searched",
        "no_curves": "No evaluations were made",
        "not_deployable": "cannot be deployed",
        "diverged": "diverged in 1 of 3",
        "no_memory": "Peak memory",
    }
    assert said[case] in page.text.replace("\N{NO-BREAK SPACE}", " ")
    assert "None" not in page.text
    assert "nan" not in re.findall(r"\w+", page.text.lower())
