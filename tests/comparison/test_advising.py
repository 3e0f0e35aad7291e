"""What advice says: a sentence first, what it stands on, and a page without network; and the evidence it comes with."""

import dataclasses
import importlib.util
import json
import sys
from pathlib import Path

import pytest

import mixtura
from fixtures.browser import sticking_out
from mixtura import cli
from mixtura.comparison import advising
from mixtura.comparison.advising import difference_figure, render_advice
from mixtura.errors import UserError
from mixtura.planning import advice as reading
from mixtura.planning.advice import advise_on
from mixtura.planning.evidence import FILE, Evidence, Row, Setting, load_evidence
from mixtura.planning.question import Expected, Payoff, question_of
from mixtura.report.wording import NBSP

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "evidence.py"


@pytest.fixture
def script(monkeypatch):
    spec = importlib.util.spec_from_file_location("evidence_script", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def evidence():
    """Token choice gets ahead of dense at about 2 M tokens."""
    rows = [
        Row(
            arm=arm,
            width=64,
            tokens=tokens,
            seed=seed,
            loss=floor + scale * tokens**-0.35 + 0.003 * seed,
            in_groups=None,
            alone=None,
            parameters=230_000,
            seconds_per_step=seconds,
            processor="a processor",
        )
        for arm, floor, scale, seconds in (("dense", 2.0, 150.0, 0.2), ("token_choice", 1.9, 166.0, 0.22))
        for seed in (0, 1)
        for tokens in (1_000_000, 3_000_000, 10_000_000)
    ]
    setting = Setting(
        layers=4,
        vocabulary=512,
        context=64,
        tokens_per_step=4096,
        experts=16,
        top_k=2,
        group_size=16,
        text="film reviews",
        machine="one thread",
        created="2026-11-28",
    )
    return Evidence(setting=setting, rows=tuple(rows))


def advice_of(evidence, **asked):
    return advise_on(question_of(**asked), evidence)


def test_the_first_line_is_the_answer(evidence):
    ahead = advising.headline(advice_of(evidence, tokens=1e7, width=64))
    assert ahead.startswith("Token-choice MoE is expected to be 0.0")
    assert "nats ahead of dense at equal FLOPs at width 64" in ahead and "at equal seconds." in ahead
    assert advising.headline(advice_of(evidence, tokens=1e6, width=64)).startswith("Train dense:")
    assert ahead.count("extrapolated") == 0
    beyond = advising.headline(advice_of(evidence, tokens=1e8, width=64))
    assert beyond.endswith("at equal seconds. This is extrapolated.")


def test_the_first_line_names_what_would_be_ahead_with_more_memory(evidence):
    no_room = advising.headline(advice_of(evidence, tokens=1e6, width=64, memory=10)).replace(NBSP, " ")
    assert no_room.startswith("No family fits 10 B") and no_room.endswith(": dense needs the least, 3.98 MiB.")
    little = advising.headline(advice_of(evidence, tokens=1e7, width=64, memory=8e6)).replace(NBSP, " ")
    assert little.startswith("Train dense: ") and "no mixture that fits 7.63 MiB is expected" in little
    assert little.endswith(", needs 17.1 MiB.") and "; token-choice MoE, \N{MINUS SIGN}0.0" in little


def test_a_difference_is_called_decided_likely_or_open():
    def expected(mean, half, ahead):
        return Expected(mean=mean, low=mean - half, high=mean + half, ahead=ahead)

    assert advising.certainty(expected(-0.1, 0.05, 0.99)) == "decided"
    assert advising.certainty(expected(0.04, 0.05, 0.06)) == "likely"
    assert advising.certainty(expected(0.01, 0.05, 0.4)) == "open"


def test_a_budget_that_pays_is_named_with_its_interval_or_bounded():
    def words(tokens, low, high):
        found = advising.payoff(Payoff(tokens=tokens, low=low, high=high, least=1e6, farthest=1e8))
        return found.replace(NBSP, " ")

    assert words(2e6, 1.5e6, 4e6) == "from 2.00 M (1.50 M to 4.00 M)"
    assert words(2e6, 2e5, None) == "from 2.00 M (below 1.00 M to beyond 100 M)"
    assert words(5e5, 2e5, 3e6) == "from below 1.00 M (at most 3.00 M)"
    assert words(2e5, 1e5, 9e5) == "from below 1.00 M"
    assert words(None, 2e7, None) == "not below 100 M"
    assert advising.payoff(None) == "\N{EN DASH}"


def test_shares_too_small_to_tell_apart_are_bounded(evidence):
    best = advice_of(evidence, tokens=1e13, width=64).best
    assert advising.dense_loss(best) in ("below 0.01\N{MULTIPLICATION SIGN}", "\N{EN DASH}")


def test_the_terminal_shows_what_it_stands_on_and_what_is_extrapolated(evidence):
    lines = advising.console_lines(advice_of(evidence, tokens=1e9, width=256), evidence)
    text = "\n".join(lines)
    assert "6 results at width 64, 1.00 M to 10.0 M tokens; nearest: 2 seeds at width 64 and 10.0 M" in text
    assert "Extrapolated: 1,000,000,000 tokens lie outside" in text and "Extrapolated: width 256" in text
    table = lines[2 : lines.index("Stands on:")]
    assert all(len(line) < 130 for line in table)


def test_what_has_one_seed_near_the_question_is_named(evidence):
    kept = tuple(row for row in evidence.rows if row.seed == 0 or row.tokens < 2e6)
    thin = dataclasses.replace(evidence, rows=kept)
    assert any("One seed only" in said for said in advising.cautions(advice_of(thin, tokens=1e7, width=64), thin))
    near = advising.cautions(advice_of(thin, tokens=1e6, width=64), thin)
    assert not any("One seed only" in said for said in near)


def test_planned_times_are_said_to_be_planned(evidence):
    advice = advice_of(evidence, tokens=3e6, width=64, hardware="8xH200")
    assert advising.cautions(advice, evidence)[-1].startswith("Time was planned, not measured: one device of 8xH200")
    assert "on 8xH200" in (page := render_advice(advice, evidence)) and '<span class="note">planned</span>' in page
    assert json.loads(json.dumps(advising.plain_advice(advice)))["question"]["hardware"]["devices"] == 8


def test_passes_over_ones_own_text_are_counted(made_up, tiny_text, capsys, monkeypatch):
    asked = {"width": 64, "vocabulary": 300, "text": tiny_text}
    few, many = (mixtura.advise(tokens=tokens, **asked) for tokens in (1e5, 1e8))
    assert few.question.text_tokens == many.question.text_tokens > 1_000
    found = [advising.cautions(advice, load_evidence())[1].replace(NBSP, " ") for advice in (few, many)]
    assert "is worth clearly less than new text" in found[1] and " passes, and text read more than 4" in found[1]
    alone = advising.cautions(mixtura.advise(tokens=1e5, width=64), load_evidence())
    assert not any("passes" in said for said in alone)
    with pytest.raises(UserError, match="no file"):
        mixtura.advise(tokens=1e6, width=64, text=tiny_text.with_name("nope.txt"))


def test_in_groups_the_rows_are_those_of_the_groups(evidence):
    """The page stands on the losses that the law was fitted to."""
    mixing = (
        dataclasses.replace(row, arm="mixture_of_tokens", loss=row.loss + 0.1, in_groups=row.loss - 0.05)
        for row in evidence.rows
        if row.arm == "dense"
    )
    given = dataclasses.replace(evidence, rows=(*evidence.rows, *mixing))
    for token_by_token, expected in ((True, 0.1), (False, -0.05)):
        advice = advice_of(given, tokens=3e6, width=64, token_by_token=token_by_token)
        traces = difference_figure(advice, given)["data"]
        (marks,) = (each for each in traces if each["mode"] == "markers" and each["meta"]["arm"] == "mixture_of_tokens")
        assert marks["y"] == pytest.approx([expected] * 3)
        rows = advising._evidence_rows(given, ["mixture_of_tokens"], advice.question)
        assert [row.difference for row in rows] == pytest.approx([expected] * 3)


def test_the_page_holds_the_numbers_and_needs_no_network(evidence):
    advice = advice_of(evidence, tokens=3e6, width=64)
    page = render_advice(advice, evidence)
    assert advising.headline(advice) in page.replace("&#39;", "'")
    assert "src=" not in page.split("<script")[0] and "<h2>The rows it stands on</h2>" in page
    figure = difference_figure(advice, evidence)
    assert [trace["meta"]["arm"] for trace in figure["data"]] == ["token_choice"] * 3
    assert len(figure["data"][2]["x"]) == 3


@pytest.mark.browser
@pytest.mark.parametrize("width", [390, 1280], ids=["phone", "laptop"])
def test_the_page_fits_the_screen(evidence, browser, tmp_path, width):
    page = browser.new_page(viewport={"width": width, "height": 800})
    (tmp_path / "advice.html").write_text(render_advice(advice_of(evidence, tokens=3e6, width=64), evidence), "utf-8")
    page.goto((tmp_path / "advice.html").as_uri())
    assert sticking_out(page) == []
    if width > 390:  # a phone scrolls the table
        assert page.evaluate("[...document.querySelectorAll('.scroll')].every((e) => e.scrollWidth <= e.clientWidth)")
    page.close()


@pytest.fixture
def made_up(monkeypatch, evidence):
    """The verb reads the runs above instead of the package's."""
    for module in (reading, advising):
        monkeypatch.setattr(module, "load_evidence", lambda: evidence)


def test_the_verb_writes_its_page_or_says_why_not(made_up, tmp_path):
    asked = {"tokens": 3e6, "width": 64}
    found = mixtura.advise(**asked, out=tmp_path / "advice.html")
    assert found == mixtura.advise(**asked) and (tmp_path / "advice.html").stat().st_size > 100_000
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(UserError, match="cannot be written"):
        mixtura.advise(**asked, out=tmp_path / "file" / "advice.html")


def test_the_command_answers_in_a_sentence_and_in_json(made_up, monkeypatch, capsys, tmp_path):
    def run(*arguments):
        monkeypatch.setattr("sys.argv", ["mixtura", "advise", *arguments])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        assert stop.value.code == 0
        return capsys.readouterr().out

    text = run("--width", "64", "--tokens", "3M", "--out", str(tmp_path / "advice.html"))
    assert "at width 64 and 3.00 million tokens" in text.splitlines()[0]
    assert "Before you believe it:" in text and (tmp_path / "advice.html").exists()
    answer = json.loads(run("--parameters", "0.2M", "--tokens", "3e6", "--memory", "1GB", "--json"))
    assert answer["question"]["width"] == 64 and answer["question"]["memory"] == 1e9
    assert {"arm", "at_equal_flops", "at_equal_seconds", "pays_flops"} <= set(answer["arms"][0])


def test_the_package_holds_what_the_stored_runs_say(script):
    record = json.loads(script.RECORD.read_text(encoding="utf-8"))
    assert FILE.read_text(encoding="utf-8") == script.evidence_text(record)
    assert {"dense", "token_choice", "mixture_of_tokens"} <= {row.arm for row in load_evidence().rows}


def test_two_results_of_one_run_are_refused(script):
    record = json.loads(script.RECORD.read_text(encoding="utf-8"))
    counts = (row for row in record["rows"] if row["tokens"] >= script.FEWEST_TOKENS)
    named = next(row for row in counts if row["name"] in script.ARMS)
    with pytest.raises(ValueError, match="name one of them otherwise"):
        script.evidence_of({**record, "rows": [*record["rows"], named]})
