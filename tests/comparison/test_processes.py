"""Comparisons under torchrun: two processes write the report of one."""

import json
import subprocess
import sys

import pytest

from mixtura.comparison.plan import check_arms
from mixtura.comparison.runner import compare
from mixtura.config import UserError, recipe_to_toml
from mixtura.tasks.language_modelling.experiment import make_pretraining
from mixtura.training import ranks

ARMS = {
    "dense": {"family": "dense"},
    "token_choice": {"family": "token_choice", "num_experts": 4, "top_k": 2, "router_aux_loss_coef": 0.1},
    "mixture_of_tokens": {"family": "mixture_of_tokens", "num_experts": 4, "group_size": 4},
}
OF_THE_CLOCK = ("seconds", "time", "created", "command", "environment", "bytes", "step_parts", "equal_time", "cautions")
"""Keys, or parts of them, whose values no two runs share."""


def launch(*arguments):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    return subprocess.run(
        [*command, "-m", "mixtura", *map(str, arguments)], capture_output=True, text=True, timeout=300
    )


def differences(one, two, where=""):
    """The places at which two trees differ, numbers by more than 1e-5 of their size."""
    if any(key in where for key in OF_THE_CLOCK):
        return []
    if isinstance(one, dict) and isinstance(two, dict) and one.keys() == two.keys():
        return [found for key in one for found in differences(one[key], two[key], f"{where}.{key}")]
    if isinstance(one, list) and isinstance(two, list) and len(one) == len(two):
        pairs = enumerate(zip(one, two, strict=True))
        return [found for number, pair in pairs for found in differences(*pair, f"{where}.{number}")]
    if isinstance(one, float) and isinstance(two, float):
        return [] if one == pytest.approx(two, rel=1e-5, abs=1e-5) else [(where, one, two)]
    return [] if one == two else [(where, one, two)]


def test_two_processes_write_the_report_of_one_and_one_of_them_speaks(tiny_recipe, tmp_path):
    recipe = tiny_recipe(arms=ARMS, batch_size=8, eval_sequences=8)
    path = tmp_path / "tiny.toml"
    path.write_text(recipe_to_toml(recipe), encoding="utf-8")
    run = launch("compare", path, "--out", tmp_path / "two")
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("Report: ") == 1 and run.stdout.count("dense seed 0: step 4/4") == 1
    compare(recipe, out=tmp_path / "one")
    one, two = (json.loads((tmp_path / name / "results.json").read_text()) for name in ("one", "two"))
    assert differences(one, two) == []
    assert two["environment"]["processes"] == 2
    assert json.loads((tmp_path / "two/arms/dense/seed0/run.json").read_text())["settings"]["world_size"] == 2
    files = [sorted(path.name for path in (tmp_path / name).iterdir()) for name in ("one", "two")]
    assert files[0] == files[1]


def test_arms_that_processes_cannot_share_are_refused_before_any_is_trained(tiny_recipe, tmp_path, monkeypatch):
    recipe = tiny_recipe(batch_size=4)
    arms = make_pretraining(recipe, cache_dir=tmp_path).arms
    check_arms(arms, recipe.training)
    monkeypatch.setattr(ranks, "world_size", lambda: 2)
    with pytest.raises(UserError) as told:
        check_arms(arms, recipe.training)
    assert str(told.value) == (
        "Each of 2 processes would get 2 examples of 'training.batch_size' 4, which do not fill groups of 4, and a "
        "group must not be divided: make 'training.gradient_accumulation_steps', which is 1, a multiple of 2, so that "
        "each of the 2 processes takes whole micro-batches; lower 'training.batch_size' for the same batch a step."
    )
