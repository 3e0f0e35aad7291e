"""The main job from recipe to report: what is stored, what is not repeated, what goes on to the same numbers."""

import json
import math

import pytest
import torch

from mixtura.comparison.arms import leak_warning, make_arms, probe_arm
from mixtura.comparison.folder import read_json
from mixtura.comparison.runner import compare, planned_steps, train_arm
from mixtura.config import Interrupted, UserError
from mixtura.data.packing import ScheduledDataset
from mixtura.data.prepare import prepare_data
from mixtura.training import SilentProgress

ARMS = {
    "dense": {"family": "dense"},
    "token_choice": {"family": "token_choice", "num_experts": 4, "top_k": 2},
    "mixture_of_tokens": {"family": "mixture_of_tokens", "num_experts": 4, "group_size": 4},
}


@pytest.fixture
def recipe(tiny_recipe):
    return tiny_recipe(arms=ARMS, seeds=(0, 1))


@pytest.fixture
def finished(recipe, tmp_path):
    """A finished comparison: its folder and its results."""
    return tmp_path / "out", compare(recipe, out=tmp_path / "out", command="mixtura compare tiny.toml")


def losses(results):
    return {
        (name, run["seed"]): (run["final"], run["train_curve"], [point["loss"] for point in run["curve"]])
        for name, arm in results["arms"].items()
        for run in arm["runs"]
    }


def numbers_in(value):
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        return [number for item in value for number in numbers_in(item)]
    return [value] if isinstance(value, int | float) else []


def test_a_comparison_stores_every_arm_and_seed_and_writes_its_report(finished):
    out, results = finished
    assert json.loads((out / "results.json").read_text(encoding="utf-8")) == results
    assert results["schema_version"] == 1 and results["command"] == "mixtura compare tiny.toml"
    assert list(results["arms"]) == list(ARMS)
    for name, arm in results["arms"].items():
        assert [run["seed"] for run in arm["runs"]] == [0, 1]
        assert all(run["steps"] == 4 for run in arm["runs"])
        assert arm["deployed_mode"] in arm["runs"][0]["final"] and arm["training_mode"] in arm["runs"][0]["final"]
        assert (out / "arms" / name / "seed1" / "checkpoint" / "model.safetensors").is_file()
    assert all(math.isfinite(number) for number in numbers_in(results))
    assert results["summary"]["verdict"]["headline"]
    for name in ("report.html", "report.md", "figures/loss.png", "recipe.toml", "environment.json"):
        assert (out / name).stat().st_size


def test_a_comparison_tells_what_leaks(finished):
    leaks = {name: arm["leaks"] for name, arm in finished[1]["arms"].items()}
    assert leaks["dense"] == leaks["token_choice"] == {"future": False, "batch": False, "batch_deployed": False}
    assert leaks["mixture_of_tokens"] == {"future": False, "batch": True, "batch_deployed": False}


def test_curves_carry_what_they_cost(finished):
    for arm in finished[1]["arms"].values():
        points = arm["runs"][0]["curve"]
        assert [point["step"] for point in points] == [2, 4]
        for point in points:
            assert point["tokens"] == point["step"] * 4 * 16
            assert point["flops"] == pytest.approx(point["tokens"] * arm["flops_per_token"])
            assert point["seconds"] == pytest.approx(point["step"] * arm["seconds_per_step"])


def test_the_baseline_is_the_measure_of_time_and_flops(finished):
    arms = finished[1]["arms"]
    assert arms["dense"]["seconds_ratio"] == arms["dense"]["flops_ratio"] == 1.0
    assert arms["mixture_of_tokens"]["peak_memory_bytes"] > arms["dense"]["peak_memory_bytes"]
    assert all(abs(arm["flops_ratio"] - 1) < 0.05 for arm in arms.values())


def test_a_finished_comparison_is_not_repeated(finished, recipe):
    out, results = finished
    files = sorted(out.glob("arms/*/*/result.json"))
    before = [path.stat().st_mtime_ns for path in files]
    again = compare(recipe, out=out, command="mixtura compare tiny.toml")
    assert [path.stat().st_mtime_ns for path in files] == before and len(files) == 6
    assert again["arms"] == results["arms"]


def test_the_same_recipe_gives_the_same_losses_anywhere(finished, recipe, tmp_path):
    assert losses(compare(recipe, out=tmp_path / "elsewhere")) == losses(finished[1])


class Stop(SilentProgress):
    """Stops the comparison as a person would pull the plug: in the middle of a run, with no time to save."""

    def __init__(self, label, step):
        self.at, self.label = (label, step), ""

    def start_run(self, label, *, step, steps):
        self.label = label

    def advance(self, step, *, loss, tokens_per_second):
        if (self.label, step) == self.at:
            raise RuntimeError("killed")


@pytest.mark.parametrize("label", ["token_choice seed 0", "mixture_of_tokens seed 1"])
def test_a_killed_comparison_goes_on_to_the_same_numbers(finished, recipe, tmp_path, label):
    out = tmp_path / "killed"
    with pytest.raises(RuntimeError, match="killed"):
        compare(recipe, out=out, reporter=Stop(label, 3))
    assert not (out / "results.json").exists()
    assert losses(compare(recipe, out=out)) == losses(finished[1])


def test_ctrl_c_stops_with_everything_saved(finished, recipe, tmp_path):
    class Press(Stop):
        def advance(self, step, *, loss, tokens_per_second):
            if (self.label, step) == self.at:
                import signal

                signal.raise_signal(signal.SIGINT)

    out = tmp_path / "stopped"
    with pytest.raises(Interrupted, match="dense seed 1"):
        compare(recipe, out=out, reporter=Press("dense seed 1", 3))
    assert read_json(out / "arms" / "dense" / "seed0" / "result.json")
    assert losses(compare(recipe, out=out)) == losses(finished[1])


def test_starting_over_repeats_everything(finished, recipe):
    out, results = finished
    before = [path.stat().st_mtime_ns for path in sorted(out.glob("arms/*/*/result.json"))]
    again = compare(recipe, out=out, resume=False)
    assert all(
        new > old
        for new, old in zip(
            [path.stat().st_mtime_ns for path in sorted(out.glob("arms/*/*/result.json"))], before, strict=True
        )
    )
    assert losses(again) == losses(results)


def test_another_recipe_is_refused_in_the_same_folder(finished, tiny_recipe):
    with pytest.raises(UserError, match=r"begun with training\.steps = 4, now it is 6"):
        compare(tiny_recipe(arms=ARMS, seeds=(0, 1), steps=6), out=finished[0])


def test_arms_with_one_seed_see_the_same_tokens_in_the_same_order(recipe, tmp_path, monkeypatch):
    seen, original = {}, ScheduledDataset.__getitem__

    class Listen(SilentProgress):
        def start_run(self, label, *, step, steps):
            self.batches = seen.setdefault(label, [])

    listener = Listen()

    def listen(self, position):
        item = original(self, position)
        listener.batches.append(item["input_ids"])
        return item

    monkeypatch.setattr(ScheduledDataset, "__getitem__", listen)
    compare(recipe, out=tmp_path / "out", reporter=listener)
    rows = {label: torch.stack(batches) for label, batches in seen.items()}
    assert len(rows["dense seed 0"]) == 4 * 4
    for name in ("token_choice", "mixture_of_tokens"):
        assert torch.equal(rows[f"{name} seed 0"], rows["dense seed 0"])
    assert not torch.equal(rows["dense seed 1"], rows["dense seed 0"])


def test_a_trained_model_is_stored_as_it_is_deployed(finished):
    config = read_json(finished[0] / "arms" / "mixture_of_tokens" / "seed0" / "checkpoint" / "config.json")
    assert config["inference_mode"] == "alone" and config["alone_top_k"] == 2


def test_one_arm_can_be_trained_by_itself(finished, recipe, tmp_path):
    result = train_arm(recipe, "token_choice", seed=1, out=tmp_path / "one")
    assert result["final"] == finished[1]["arms"]["token_choice"]["runs"][1]["final"]


def test_the_steps_of_search_and_runs_are_planned(tiny_recipe):
    assert planned_steps(tiny_recipe(seeds=(0, 1, 2), steps=5)) == 2 * 3 * 5


FAMILIES = {
    "dense": ("causal", "causal", {"future": False, "batch": False, "batch_deployed": False}, None),
    "token_choice": ("causal", "causal", {"future": False, "batch": False, "batch_deployed": False}, None),
    "expert_choice": ("group", None, {"future": False, "batch": True}, "also when deployed"),
    "soft": ("group", None, {"future": True, "batch": False}, "sees the future"),
    "mixture_of_tokens": ("group", "alone", {"future": False, "batch": True, "batch_deployed": False}, "does not"),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_probed_and_warned_of(tiny_recipe, family):
    training_mode, deployed_mode, leaks, warning = FAMILIES[family]
    mixture = {"family": family, "num_experts": 4, "group_size": 4}
    recipe = tiny_recipe(arms={"dense": {"family": "dense"}, "arm": mixture})
    arm = make_arms(recipe, prepare_data(recipe.data, cache_dir=None))["arm"]
    before = arm.model_config.to_dict()
    assert (arm.training_mode, arm.deployed_mode) == (training_mode, deployed_mode)
    assert probe_arm(arm) == leaks
    assert arm.model_config.to_dict() == before, "a probed model must not change the arm"
    said = leak_warning(arm, leaks)
    assert (said is None) if warning is None else (said is not None and warning in said)


def test_a_family_that_cannot_be_deployed_stays_out_of_the_verdict(tiny_recipe, tmp_path):
    arms = {"dense": {"family": "dense"}, "soft": {"family": "soft", "num_experts": 4}}
    results = compare(tiny_recipe(arms=arms, seeds=(0, 1)), out=tmp_path / "out")
    assert results["summary"]["arms"]["soft"]["excluded"]
    assert "soft" not in results["summary"]["verdict"]["tied"]
