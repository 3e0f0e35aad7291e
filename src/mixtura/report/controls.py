"""What a comparison's controls say: whether an arm is better than what is left of it without one thing."""

from mixtura.report.significance import paired_difference
from mixtura.report.verdict import difference_words, judge_difference
from mixtura.report.wording import capital
from mixtura.results import ArmSummary, Measure, Results
from mixtura.results.conclusions import Caution

_WITHOUT = {
    "uniform_router": "the same with uniform routers",
    "random_routing": "the same with random, fixed routers",
    "shared_width": "dense layers as wide as its shared experts",
}


def about_controls(results: Results, arms: dict[str, ArmSummary], measure: Measure) -> list[Caution]:
    """A line for each control whose arm is there: a note where the arm beats it, a warning where that is not shown.

    Args:
        results: whose recipe says which arms are controls, and of which.
        arms: the summary's arms.
        measure: of the verdict.
    """
    tables = results.recipe.get("arms")
    found = []
    for name, table in tables.items() if isinstance(tables, dict) else ():
        of = table.get("control_of") if isinstance(table, dict) else None
        if name not in arms or of not in arms or arms[name].excluded or arms[of].excluded:
            continue
        difference = paired_difference(_deployed(arms[of], measure), _deployed(arms[name], measure))
        beats = judge_difference(difference, better=measure.better) == "beats"
        text = (
            f"{arms[of].label} minus its control {arms[name].label} ({_WITHOUT[table['control']]}): "
            f"{difference_words(difference, digits=measure.digits)}."
        )
        if not beats:
            text += f" So a gain of {arms[of].label} is not shown to come from that."
        found.append(Caution("note" if beats else "warning", "control", of, capital(text)))
    return found


def _deployed(arm: ArmSummary, measure: Measure) -> dict[int, float]:
    """The verdict's measure by seed, as deployed."""
    scores = arm.modes[str(arm.deployed_mode)][measure.key].values
    return {seed: value for seed, value in zip(arm.seeds, scores, strict=True) if value is not None}
