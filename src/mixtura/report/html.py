"""The report of a comparison: report.html (one file, no network), report.md and the pictures, all from results.json.

Nothing is measured or decided here: numbers come from the results and their summary, texts are escaped by the template,
and each file appears under its name only once it is whole.
"""

import datetime
import math
from dataclasses import dataclass
from pathlib import Path

from markupsafe import Markup
from plotly.offline import get_plotlyjs

from mixtura.config import UserError
from mixtura.errors import reason_of
from mixtura.files import write_text
from mixtura.pages import page_environment
from mixtura.report import facts, tables
from mixtura.report.chat_scores import chat_section
from mixtura.report.deployment import deployment_figures
from mixtura.report.facts import continuations_section, held_out, is_even, load_maps, time_bars
from mixtura.report.figures import AXES, SYMBOLS, arms_in, build_figures
from mixtura.report.markdown import render_markdown
from mixtura.report.pictures import write_pictures
from mixtura.report.sections import classification_section, specialization_maps, task_figures, translation_section
from mixtura.report.summary import summarize
from mixtura.report.verdict import difference_words
from mixtura.report.wording import (
    NBSP,
    NONE,
    Yardstick,
    arm_colours,
    capital,
    count,
    difference_unit,
    listing,
    number,
    quantity,
    rate,
    signed_margin,
    start,
    without_interval,
    yardstick_of,
)
from mixtura.results import ArmResult, ArmSummary, Results, Summary, read_results
from mixtura.results.document import RESULTS
from mixtura.results.json_form import to_plain

_TEMPLATES = Path(__file__).parent / "templates"
WORDS_BEFORE_THE_PICTURE = 40
"""A reader sees who wins before reading: with more words than these, the picture stands above the cards."""


def write_report(results: Results, out: Path) -> Path:
    """Writes `report.html`, `report.md` and `figures/*.png` into folder `out`; returns the path of `report.html`.

    Args:
        results: a comparison; its summary is computed if it has none.
        out: folder of the run; made if it is missing.
    """
    summary = results.summary or summarize(results)
    markdown, page = render_markdown(results, summary), render_html(results, summary)
    write_pictures(results, summary, out / "figures")
    write_text(out / "report.md", markdown)
    write_text(out / "report.html", page)
    return out / "report.html"


def report_folder(folder: Path) -> Path:
    """Writes the report of a folder again, from its results.json alone; returns the path of `report.html`.

    Raises:
        UserError: there is no results.json, it is damaged or of a version that is not read, or the folder cannot be
            written.
    """
    if folder.is_file():
        raise UserError(f"'{folder}' is a file: give the folder of a finished comparison, in which it lies.")
    results = read_results(folder / RESULTS)
    if results is None:
        raise UserError(
            f"'{folder}' has no {RESULTS}: give the folder of a finished comparison; an unfinished one goes on with "
            "'mixtura compare'."
        )
    try:
        return write_report(results, folder)
    except OSError as error:
        raise UserError(
            f"'{folder}' cannot be written ({error.strerror}): make room or check its permissions."
        ) from None
    except (ArithmeticError, LookupError, AttributeError, TypeError, ValueError) as error:
        # Each field has its type, but together they say what no comparison does: an arm without runs, say.
        raise UserError(
            f"'{folder / RESULTS}' is damaged (its parts do not fit together: {reason_of(error)}): put back the one "
            "that the comparison wrote, or run it again."
        ) from error


def render_html(results: Results, summary: Summary) -> str:
    """The page as text: the template filled with plain values; every text in it is escaped."""
    environment = page_environment(_TEMPLATES)
    figures = build_figures(results, summary) | task_figures(results, summary) | deployment_figures(results, summary)
    maps, shares = load_maps(results, summary), specialization_maps(results, summary)
    yardstick = yardstick_of(results)
    arms = _cards(results, summary, yardstick)
    seeds, base = summary.budget.seeds, summary.arms[results.baseline].label
    map_seeds = list(dict.fromkeys(seed for entry in [*maps, *shares] for seed in entry.seeds))
    return environment.get_template("report.html.j2").render(
        title=f"{question(summary)} {results.name or ''}".strip(),
        recipe_name=results.name or "unnamed",
        created=_date(results.created),
        palette=[(f"arm-{arm.index}", arm.light, arm.dark) for arm in arms],
        measure_words=_measure_words(yardstick),
        cards_first=_are_few(results, summary, arms, yardstick),
        main_cautions=[caution for caution in summary.cautions if caution.level != "note"],
        notes=[caution.text for caution in summary.cautions if caution.level == "note"],
        legends={name: arms_in(figure) for name, figure in figures.items()},
        held_out_note=held_out(results).note,
        writings=continuations_section(results),
        time_bars=time_bars(results),
        results=results,
        held_equal=[item.replace(" %", f"{NBSP}%") for item in results.held_equal],
        summary=summary,
        verdict=summary.verdict,
        arms=arms,
        by_name={arm.name: arm for arm in arms},
        base_label=base,
        many_seeds=seeds > 1,
        table_text=_table_text(seeds),
        two_modes=any(arm.deployed_mode not in (None, arm.training_mode) for arm in results.arms.values()),
        table=tables.main_table(results, summary),
        seed_table=facts.seed_table(results, summary),
        pairs=facts.pair_table(results, summary),
        data_facts=facts.data_facts(results, summary),
        environment_facts=facts.environment_facts(results),
        axes=[(axis, "FLOPs" if axis == "flops" else axis.capitalize()) for axis in AXES],
        ruler=_ruler(summary),
        figures=figures,
        differences_text=_describe_differences(summary, yardstick),
        measure=yardstick.measure,
        final_text=f"{yardstick.measure.name} in {yardstick.measure.unit}"
        if yardstick.measure.unit
        else yardstick.measure.name,
        curves_note=_curves_note(yardstick),
        task=yardstick.task,
        differences_caption=_difference_caption(seeds, base),
        maps=maps,
        shares=shares,
        translation=translation_section(results),
        classification=classification_section(results, summary),
        chat=chat_section(results),
        even=[judged.label for name, judged in summary.arms.items() if is_even(results.arms[name])],
        map_seeds=map_seeds,
        page_data={"figures": figures, "maps": to_plain([*maps, *shares]), "mapSeeds": map_seeds},
        plotly_js=Markup(get_plotlyjs()),
    )


def question(summary: Summary) -> str:
    """The question a comparison answers, by its arms: "dense, token-choice MoE or MoT?"."""
    first, *others = [arm.label for arm in summary.arms.values()]
    return f"{listing([start(first), *others], 'or')}?"


def _date(created: str) -> str:
    moment = datetime.datetime.fromisoformat(created)
    zone = "" if moment.tzinfo is None else f" {moment.tzname()}"
    return f"{moment.day} {moment:%B %Y, %H:%M}{zone}"


def _measure_words(yardstick: Yardstick) -> str:
    """What the cards show: "Held-out loss, nats a token: lower is better"."""
    measure = yardstick.measure
    unit = f", {measure.unit}" if measure.unit else ""
    return f"{capital(measure.name)}{unit}: {measure.better} is better"


def _are_few(results: Results, summary: Summary, arms: list["_Card"], yardstick: Yardstick) -> bool:
    """Whether the words above the picture are few with the cards among them."""
    cards = [word for arm in arms for word in (arm.label, arm.score, arm.difference, arm.outcome)]
    parts = ["Mixtura", results.name or "unnamed", summary.verdict.headline, _measure_words(yardstick), *cards]
    return len(" ".join(parts).split()) <= WORDS_BEFORE_THE_PICTURE


def _difference_caption(seeds: int, base: str) -> str:
    against = f"Each arm minus {base}, the vertical line; all as deployed."
    if seeds > 1:
        return f"{against} Filled: the mean, with its 95{NBSP}% interval over seeds. Open: single seeds."
    return f"{against} One seed: there is no interval, so nothing is decided."


def _table_text(seeds: int) -> str:
    if seeds > 1:
        return (
            f"Means over {count(seeds, 'seed')}. Differences and ratios are paired by seed, with 95{NBSP}% t-intervals."
        )
    return "One seed: these are single values, without intervals."


def _curves_note(yardstick: Yardstick) -> str:
    if yardstick.on_loss:
        return ""
    return (
        f"{capital(yardstick.measure.name)} is measured only at the end of a run; the curves are of the held-out loss."
    )


def _describe_differences(summary: Summary, yardstick: Yardstick) -> str:
    """The difference figure in words, for readers who cannot see it."""
    measure = yardstick.measure
    title = f"{capital(measure.name)} minus the baseline's"
    title += f", in {difference_unit(measure)}" if measure.unit else ""
    differences = {arm.label: arm.difference.deployed for arm in summary.arms.values()}
    parts = [
        f"{label} {difference_words(found, digits=measure.digits)}" for label, found in differences.items() if found
    ]
    return f"{title}: {'; '.join(parts)}"


@dataclass(frozen=True)
class _Card:
    """What the page needs to know of an arm besides the tables."""

    name: str
    index: int
    label: str
    light: str
    dark: str
    """Its colours in the two themes."""
    symbol: str
    score: str
    difference: str
    outcome: str
    settings: str
    rate: str
    rate_source: str


def _cards(results: Results, summary: Summary, yardstick: Yardstick) -> list[_Card]:
    colours, digits = arm_colours(results.arms), yardstick.measure.digits
    cards = []
    for index, (name, arm) in enumerate(results.arms.items()):
        judged = summary.arms[name]
        difference = judged.difference.deployed
        cards.append(
            _Card(
                name=name,
                index=index,
                label=judged.label,
                light=colours[name][0],
                dark=colours[name][1],
                symbol=SYMBOLS[index % len(SYMBOLS)],
                score=NONE if judged.excluded else number(judged.score.deployed, digits),
                difference="" if difference is None else signed_margin(without_interval(difference), least=digits),
                outcome=outcome_word(judged),
                settings=_settings(arm),
                rate=rate(arm.learning_rate),
                rate_source=_rate_source(arm),
            )
        )
    return cards


def outcome_word(arm: ArmSummary) -> str:
    """What the rule says of an arm beside the baseline; nothing for one seed, of which the headline says so."""
    reasons = {"not_deployable": "cannot be deployed", "leaks_future": "sees the future", "diverged": "diverged"}
    words = {"baseline": "baseline", "beats": "better", "loses": "worse", "draw": "draw", "one_seed": ""}
    return words.get(arm.outcome, reasons.get(arm.excluded or "", "no verdict"))


def _settings(arm: ArmResult) -> str:
    words = [f"{key} {value}" for key, value in arm.settings.items() if value is not None]
    return f"{arm.family}: {', '.join(words)}" if words else arm.family


def _rate_source(arm: ArmResult) -> str:
    search = arm.searched
    if search is None:
        return "not searched: the recipe's"
    seeds = " and ".join(map(str, search.seeds))
    trials = f"{count(len(search.trials), 'trial')} of {search.steps} steps with seed {seeds}"
    if search.best_scale is not None:
        trials = f"{trials}, best scale {search.best_scale:g}"
    text = f"{trials}, {search.source}"
    return f"{text}; best at the edge of the grid" if search.at_edge else text


def _decade(power: int) -> str:
    """A power of ten of tokens: 10 M, 1 B."""
    prefixes = {0: "", 1: "k", 2: "M", 3: "B", 4: "T"}
    return f"{10 ** (power % 3)}{NBSP}{prefixes.get(power // 3, f'e{power // 3 * 3}')}"


@dataclass(frozen=True)
class _RulerRow:
    """One budget on the ruler: where it begins and how wide it is, in per cent of the axis."""

    label: str
    index: int | None
    """Of the arm it is about."""
    text: str
    left: float
    width: float

    @property
    def flip(self) -> bool:
        """Whether its text stands on the left, where there is room."""
        return self.left + self.width > 55


@dataclass(frozen=True)
class _Ruler:
    """Budgets on a logarithmic axis of tokens, and its ticks with their places."""

    rows: list[_RulerRow]
    ticks: list[tuple[float, str]]


def _ruler(summary: Summary) -> _Ruler | None:
    """This budget, the estimated crossings, and the published curve's; None for this budget alone."""
    budget = summary.budget.tokens
    rows: list[tuple[str, int | None, float, float, str]] = [("This budget", None, budget, budget, quantity(budget))]
    for index, arm in enumerate(summary.arms.values()):
        found = arm.crossing
        if found and found.tokens is not None and found.token_range is not None:
            low, high = (end or found.tokens for end in found.token_range)
            rows.append((f"Estimated crossing, {arm.label}", index, low, high, f"about {quantity(found.tokens)}"))
    if summary.anchor:
        anchor = summary.anchor
        low, high = anchor.behind_until_tokens
        text = f"{low / 1e9:.2f} to {high / 1e9:.2f}{NBSP}billion"
        rows.append(("Published: MoT behind dense until", None, low, high, text))
        end = anchor.end_tokens
        label = f"Published: {anchor.end_ratio_steps:.1f} times fewer steps at"
        rows.append((label, None, end, end, quantity(end)))
    if len(rows) == 1:
        return None
    first = math.floor(math.log10(min(row[2] for row in rows)))
    last = math.ceil(math.log10(max(row[3] for row in rows)))

    def place(tokens: float) -> float:
        return round(100 * (math.log10(tokens) - first) / (last - first), 2)

    return _Ruler(
        rows=[
            _RulerRow(label, index, text, place(low), round(place(high) - place(low), 2))
            for label, index, low, high, text in rows
        ],
        ticks=[(place(10**power), _decade(power)) for power in range(first, last + 1)],
    )
