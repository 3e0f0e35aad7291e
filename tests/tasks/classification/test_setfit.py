"""SetFit as a reference beside the arms: asked for, refused, trained where it is installed, and shown."""

import dataclasses
import json
from typing import Any

import pytest

from fixtures.results import as_results, build_classification, summary_of
from mixtura import compare
from mixtura.config import (
    BaseConfig,
    ClassificationArmConfig,
    ClassificationDataConfig,
    ClassificationRecipe,
    TrainingConfig,
    UserError,
)
from mixtura.config.finetune_checks import check_finetune_recipe
from mixtura.report.budgets import budget_rows
from mixtura.tasks.classification import setfit
from mixtura.tasks.classification.experiment import make_classification


@pytest.fixture
def recipe(encoder_folder: Any, reviews: Any) -> ClassificationRecipe:
    """One arm and one budget."""
    return ClassificationRecipe(
        name="few",
        setfit=True,
        data=ClassificationDataConfig(
            source="local",
            path=str(reviews),
            max_length=12,
            validation_examples=32,
            test_examples=32,
            budgets=(4,),
        ),
        base=BaseConfig(name=str(encoder_folder)),
        training=TrainingConfig(steps=4, batch_size=8, eval_every=4, eval_sequences=16, save_every=4),
        arms={"last_layer": ClassificationArmConfig()},
    )


def test_a_package_that_is_not_there_is_named(recipe: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(setfit, "find_spec", lambda _: None)
    with pytest.raises(UserError, match="'setfit' is true, but the package setfit is not installed: run pip install"):
        make_classification(recipe, cache_dir=None, on_progress=lambda _: None)


def test_it_wants_a_number_of_texts(recipe: Any) -> None:
    whole = dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, budgets=()))
    with pytest.raises(UserError, match=r"SetFit is for few texts and 'data\.budgets' names no number of them: set it"):
        check_finetune_recipe(whole)


@pytest.mark.parametrize("several", [False, True])
def test_it_is_trained_once_on_the_same_few_texts(
    recipe: Any, tmp_path: Any, monkeypatch: Any, reviews: Any, several: bool
) -> None:
    pytest.importorskip("setfit", reason="setfit is not installed")
    if several:
        rows = [json.loads(line) for line in reviews.read_text(encoding="utf-8").splitlines()]
        path = tmp_path / "several.jsonl"
        words = ("good", "bad", "film")
        kept = [{"text": of["text"], "label": [w for w in words if w in of["text"].split()]} for of in rows]
        path.write_text("\n".join(map(json.dumps, kept)), encoding="utf-8")
        recipe = dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, path=str(path)))
    out = tmp_path / "out"
    results = compare(recipe, out=out)
    (score,) = results.across_arms.references["SetFit"]
    assert (score.rows, score.seed) == (4, 0) and 0 <= score.accuracy <= 100
    assert "SetFit (reference)" in (out / "report.html").read_text(encoding="utf-8")
    monkeypatch.setattr("mixtura.tasks.classification.experiment.setfit_answers", lambda *_, **__: pytest.fail("again"))
    assert compare(recipe, out=out).across_arms.references == results.across_arms.references


def test_a_reference_has_a_row_in_the_table_and_no_arm() -> None:
    built = build_classification(seeds=(0, 1))
    scores = [{"rows": rows, "seed": seed, "accuracy": 60.0 + rows + seed} for rows in (8, 64) for seed in (0, 1)]
    built["across_arms"] |= {"budgets": {"layer_mix": scores}, "references": {"SetFit": scores[:2]}}
    head, *rows = budget_rows(as_results(built), summary_of(built))
    assert head.label == "accuracy, %, by texts of each class"
    assert [cell.text for cell in head.cells] == ["8", "64", "all"]
    cells = {row.label: [cell.text for cell in row.cells] for row in rows}
    assert cells["layer mix"][:2] == ["68.50", "124.50"] and cells["layer mix"][2].startswith("81.")
    assert cells["SetFit (reference)"][0] == "68.50" and cells["SetFit (reference)"][2] == "\u2013"
    assert budget_rows(as_results(without := build_classification()), summary_of(without)) == []
