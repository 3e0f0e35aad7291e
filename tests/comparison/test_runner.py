"""The main job from recipe to report: what is stored, what is not repeated, what goes on to the same numbers."""

import dataclasses
import math
import shutil
import signal
import subprocess
import sys

import pytest
import torch

from fixtures.arms import arm_of
from mixtura.comparison.plan import leak_warning
from mixtura.comparison.runner import compare, planned_steps, train_arm
from mixtura.config import Interrupted, UserError, load_recipe, recipe_from_dict, recipe_to_toml
from mixtura.data.packing import ScheduledDataset
from mixtura.data.prepare import prepare_data
from mixtura.files import write_json
from mixtura.results import Leaks, read_results
from mixtura.results.document import read_json, read_run
from mixtura.results.json_form import to_plain
from mixtura.tasks.language_modelling.experiment import Pretraining
from mixtura.training import SilentProgress

ARMS = {
    "dense": {"family": "dense"},
    "token_choice": {"family": "token_choice", "num_experts": 4, "top_k": 2},
    "mixture_of_tokens": {"family": "mixture_of_tokens", "num_experts": 4, "group_size": 4},
}


@pytest.fixture(scope="module")
def recipe(tiny_text):
    """Three arms with two seeds each, four steps a run."""
    data = {"source": "local", "path": str(tiny_text), "vocab_size": 300, "sequence_length": 16}
    model = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    training = {"steps": 4, "batch_size": 4, "eval_every": 2, "save_every": 2}
    training |= {"eval_sequences": 8, "final_eval_sequences": 8}
    return recipe_from_dict(
        {
            "name": "tiny",
            "seeds": [0, 1],
            "data": data | {"validation_fraction": 0.2},
            "model": model,
            "training": training,
            "arms": ARMS,
        }
    )


@pytest.fixture(scope="module")
def finished(recipe, tmp_path_factory):
    """A finished comparison, only to be looked at: its folder and its results."""
    out = tmp_path_factory.mktemp("finished") / "out"
    return out, compare(recipe, out=out, command="mixtura compare tiny.toml")


@pytest.fixture
def finished_copy(finished, tmp_path):
    """A copy of the finished comparison, to be changed."""
    return shutil.copytree(finished[0], tmp_path / "copy"), finished[1]


@pytest.fixture
def without_report(monkeypatch):
    """Leaves out the report, which takes longer than the training here."""
    monkeypatch.setattr("mixtura.report.html.write_report", lambda results, out: None)


class Listen(SilentProgress):
    """Keeps what it was told, and the sequences that each run was given."""

    def __init__(self):
        self.runs, self.notes, self.rows = [], [], {}

    def start_run(self, label, *, step, steps):
        self.runs.append((label, step, steps))

    def note(self, text):
        self.notes.append(text)


@pytest.fixture(scope="module")
def observed(recipe, tmp_path_factory):
    """The same comparison in another folder, with a listener: the listener and the results."""
    listener, original = Listen(), ScheduledDataset.__getitem__

    def listen(self, position):
        item = original(self, position)
        if listener.runs:  # a step is timed before any run
            listener.rows.setdefault(listener.runs[-1][0], []).append(item["input_ids"])
        return item

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ScheduledDataset, "__getitem__", listen)
        results = compare(recipe, out=tmp_path_factory.mktemp("observed") / "out", reporter=listener)
    return listener, results


def losses(results):
    return {
        (name, run.seed): (run.final, run.train_curve, [point.loss for point in run.curve])
        for name, arm in results.arms.items()
        for run in arm.runs
    }


def numbers_in(value):
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        return [number for item in value for number in numbers_in(item)]
    return [value] if isinstance(value, int | float) else []


def test_a_comparison_stores_every_arm_and_seed_and_writes_its_report(finished):
    out, results = finished
    assert read_results(out / "results.json") == results
    assert results.schema_version == 3 and results.command == "mixtura compare tiny.toml"
    assert list(results.arms) == list(ARMS)
    for name, arm in results.arms.items():
        assert [run.seed for run in arm.runs] == [0, 1]
        assert all(run.steps == 4 for run in arm.runs)
        assert arm.deployed_mode in arm.runs[0].final and arm.training_mode in arm.runs[0].final
        assert (out / "arms" / name / "seed1" / "checkpoint" / "model.safetensors").is_file()
    assert all(math.isfinite(number) for number in numbers_in(to_plain(results)))
    assert results.summary.verdict.headline
    for name in ("report.html", "report.md", "figures/loss.png", "recipe.toml", "environment.json"):
        assert (out / name).stat().st_size


def test_a_comparison_tells_what_leaks(finished):
    leaks = {name: arm.leaks for name, arm in finished[1].arms.items()}
    assert leaks["dense"] == leaks["token_choice"] == Leaks(False, False, False)
    assert leaks["mixture_of_tokens"] == Leaks(False, True, False)


def test_curves_carry_what_they_cost(finished):
    for arm in finished[1].arms.values():
        points = arm.runs[0].curve
        assert [point.step for point in points] == [2, 4]
        for point in points:
            assert point.tokens == point.step * 4 * 16
            assert point.flops == pytest.approx(point.tokens * arm.flops_per_token)
            assert point.seconds == pytest.approx(point.step * arm.seconds_per_step)


def test_the_baseline_is_the_measure_of_time_and_flops(finished):
    arms = finished[1].arms
    assert arms["dense"].seconds_ratio == arms["dense"].flops_ratio == 1.0
    assert arms["mixture_of_tokens"].peak_memory_bytes > arms["dense"].peak_memory_bytes
    assert all(abs(arm.flops_ratio - 1) < 0.05 for arm in arms.values())


def test_a_finished_comparison_is_not_repeated(finished_copy, recipe):
    out, results = finished_copy
    files = sorted(out.glob("arms/*/*/result.json"))
    before = [path.stat().st_mtime_ns for path in files]
    listener = Listen()
    again = compare(recipe, out=out, command="mixtura compare tiny.toml", reporter=listener)
    assert listener.runs == [(f"{name} seed {seed}", 4, 4) for seed in (0, 1) for name in ARMS], "told as done before"
    assert [path.stat().st_mtime_ns for path in files] == before and len(files) == 6
    assert again.arms == results.arms


def test_the_same_recipe_gives_the_same_losses_anywhere(finished, observed):
    assert losses(observed[1]) == losses(finished[1])


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
def test_a_killed_comparison_goes_on_to_the_same_numbers(without_report, finished, recipe, tmp_path, label):
    out = tmp_path / "killed"
    with pytest.raises(RuntimeError, match="killed"):
        compare(recipe, out=out, reporter=Stop(label, 3))
    assert not (out / "results.json").exists()
    assert losses(compare(recipe, out=out)) == losses(finished[1])


def test_ctrl_c_stops_with_everything_saved(without_report, finished, recipe, tmp_path):
    class Press(Stop):
        def advance(self, step, *, loss, tokens_per_second):
            if (self.label, step) == self.at:
                signal.raise_signal(signal.SIGINT)

    out = tmp_path / "stopped"
    with pytest.raises(Interrupted, match="dense seed 1"):
        compare(recipe, out=out, reporter=Press("dense seed 1", 3))
    assert read_json(out / "arms" / "dense" / "seed0" / "result.json")
    assert losses(compare(recipe, out=out)) == losses(finished[1])


def test_starting_over_repeats_everything(without_report, finished_copy, recipe):
    out, results = finished_copy
    before = [path.stat().st_mtime_ns for path in sorted(out.glob("arms/*/*/result.json"))]
    again = compare(recipe, out=out, resume=False)
    assert all(
        new > old
        for new, old in zip(
            [path.stat().st_mtime_ns for path in sorted(out.glob("arms/*/*/result.json"))], before, strict=True
        )
    )
    assert losses(again) == losses(results)


def test_another_recipe_is_refused_in_the_same_folder(finished, recipe):
    longer = dataclasses.replace(recipe, training=dataclasses.replace(recipe.training, steps=6))
    with pytest.raises(UserError, match=r"begun with training\.steps = 4, now it is 6"):
        compare(longer, out=finished[0])


def test_arms_with_one_seed_see_the_same_tokens_in_the_same_order(observed):
    rows = {label: torch.stack(sequences) for label, sequences in observed[0].rows.items()}
    assert len(rows["dense seed 0"]) == 4 * 4
    for name in ("token_choice", "mixture_of_tokens"):
        for seed in (0, 1):
            assert torch.equal(rows[f"{name} seed {seed}"], rows[f"dense seed {seed}"])
    assert not torch.equal(rows["dense seed 1"], rows["dense seed 0"])


def test_a_trained_model_is_stored_as_it_is_deployed(finished):
    config = read_json(finished[0] / "arms" / "mixture_of_tokens" / "seed0" / "checkpoint" / "config.json")
    assert config["inference_mode"] == "alone" and config["alone_top_k"] == 2


def test_one_arm_can_be_trained_by_itself(finished, recipe, tmp_path):
    result = train_arm(recipe, "token_choice", seed=1, out=tmp_path / "one")
    assert result.final == finished[1].arms["token_choice"].runs[1].final


def test_the_steps_of_search_and_runs_are_planned(tiny_recipe):
    assert planned_steps(tiny_recipe(seeds=(0, 1, 2), steps=5)) == 2 * 3 * 5


FAMILIES = {
    "dense": ("causal", "causal", Leaks(False, False, False), None),
    "token_choice": ("causal", "causal", Leaks(False, False, False), None),
    "expert_choice": ("group", None, Leaks(False, True), "also when deployed"),
    "expert_threshold": ("causal", "causal", Leaks(False, False, False), None),
    "remoe": ("causal", "causal", Leaks(False, False, False), None),
    "merged_experts": ("causal", "causal", Leaks(False, False, False), None),
    "soft": ("group", None, Leaks(True, False), "sees the future"),
    "mixture_of_tokens": ("group", "alone", Leaks(False, True, False), "does not"),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_probed_and_warned_of(tiny_recipe, family):
    training_mode, deployed_mode, leaks, warning = FAMILIES[family]
    mixture = arm_of(family, num_experts=4, group_size=4)
    recipe = tiny_recipe(arms={"dense": {"family": "dense"}, "arm": mixture})
    arm = Pretraining(recipe, prepare_data(recipe.data, cache_dir=None)).arms["arm"]
    before = arm.model_config.to_dict()
    assert (arm.training_mode, arm.deployed_mode) == (training_mode, deployed_mode)
    assert arm.leaks() == leaks
    assert arm.model_config.to_dict() == before, "a probed model must not change the arm"
    said = leak_warning(arm, leaks, "pretraining")
    assert (said is None) if warning is None else (said is not None and warning in said)


def test_a_family_that_cannot_be_deployed_stays_out_of_the_verdict(tiny_recipe, tmp_path):
    arms = {"dense": {"family": "dense"}, "soft": {"family": "soft", "num_experts": 4}}
    results = compare(tiny_recipe(arms=arms, seeds=(0, 1)), out=tmp_path / "out")
    assert results.summary.arms["soft"].excluded
    assert "soft" not in results.summary.verdict.tied


def test_a_comparison_has_every_key_of_its_contract(finished):
    results = read_json(finished[0] / "results.json")
    top = {"schema_version", "created", "command", "recipe", "recipe_toml", "environment", "data", "held_equal"}
    assert results.keys() == top | {"task", "measure", "baseline", "total_seconds", "arms", "across_arms", "summary"}
    costs = {"parameters_total", "parameters_active", "flops_per_token", "flops_ratio", "seconds_per_step"}
    costs |= {"parameters_trainable", "seconds_ratio", "peak_memory_bytes", "optimizer_state_bytes", "step_parts"}
    identity = {"family", "label", "settings", "learning_rate", "learning_rate_search", "leaks", "runs"}
    run_keys = {"seed", "learning_rate", "steps", "train_seconds", "final", "curve", "train_curve", "grad_norm"}
    run_keys |= {"details", "spikes", "load", "load_imbalance", "dropped_share", "router_entropy"}
    for arm in results["arms"].values():
        assert arm.keys() == identity | costs | {"training_mode", "deployed_mode"}
        assert all(run.keys() == run_keys for run in arm["runs"])
    assert results["data"]["tokens_per_step"] == 4 * 16
    assert results["data"]["tokens_per_run"] == 4 * 4 * 16


def test_what_is_held_equal_is_said_with_its_numbers(finished):
    results = finished[1]
    apart = max(abs(arm.flops_ratio - 1) for arm in results.arms.values())
    sentences = " ".join(results.held_equal)
    assert "paired by seed" in sentences and "steps (4) and tokens a step (64)" in sentences
    assert f"FLOPs a token within {100 * apart:.2g} %" in sentences


def test_each_experts_load_is_a_share(finished):
    for name in ("token_choice", "mixture_of_tokens"):
        load = finished[1].arms[name].runs[0].load
        assert load.layers == [1] and load.steps == [2, 4]
        assert all(sum(share_E) == pytest.approx(1) for share_ME in load.share for share_E in share_ME)
    assert finished[1].arms["dense"].runs[0].load is None


def test_a_recipe_that_came_from_no_file_is_reproduced_from_its_folder(without_report, tiny_recipe, tmp_path):
    out = tmp_path / "out"
    recipe = tiny_recipe(arms={"dense": {"family": "dense"}})
    assert compare(recipe, out=out).command == f"mixtura compare {out / 'recipe.toml'} --out {out}"
    assert load_recipe(out / "recipe.toml") == recipe


def test_a_comparison_that_went_on_counts_the_time_of_all_its_runs(without_report, finished_copy, recipe):
    out, results = finished_copy
    (out / "results.json").unlink()
    trained = 0.0
    for path in out.glob("arms/*/*/result.json"):
        result = read_json(path) | {"train_seconds": 1000.0}
        write_json(path, result)
        trained += 1000.0
    # Two at a time take half as long.
    assert trained / 2 <= compare(recipe, out=out, arms_in_parallel=2).total_seconds < trained
    assert compare(recipe, out=out).total_seconds >= trained > results.total_seconds


def test_the_reporter_hears_of_every_run_and_leak(observed):
    listener = observed[0]
    assert listener.runs == [(f"{name} seed {seed}", 0, 4) for seed in (0, 1) for name in ARMS]
    assert sum("lets examples of a batch see each other in training" in note for note in listener.notes) == 1
    assert [note for note in listener.notes if note.startswith("data: ")] == [f"data: {observed[1].data.description}"]


def test_an_arm_that_the_recipe_has_not_is_refused_before_anything_is_written(recipe, tmp_path):
    with pytest.raises(UserError, match="no arm 'soft': choose one of dense, token_choice, mixture_of_tokens"):
        train_arm(recipe, "soft", seed=0, out=tmp_path / "one")
    assert not (tmp_path / "one").exists()


def test_one_arm_trained_by_itself_leaves_its_result_and_model(recipe, tmp_path):
    result = train_arm(recipe, "mixture_of_tokens", seed=3, out=tmp_path / "one")
    folder = tmp_path / "one" / "arms" / "mixture_of_tokens" / "seed3"
    assert read_run(folder / "result.json") == result and result.seed == 3
    assert (folder / "checkpoint" / "model.safetensors").is_file()


@pytest.mark.parametrize(("mode", "top_k"), [("group", 2), ("alone", 1), ("alone", None)])
def test_the_recipes_inference_mode_is_the_checkpoints(tiny_recipe, tmp_path, mode, top_k):
    mixture = ARMS["mixture_of_tokens"] | {"inference_mode": mode, "alone_top_k": "none" if top_k is None else top_k}
    recipe = tiny_recipe(arms={"dense": {"family": "dense"}, "mixture": mixture})
    train_arm(recipe, "mixture", seed=0, out=tmp_path / "one")
    config = read_json(tmp_path / "one" / "arms" / "mixture" / "seed0" / "checkpoint" / "config.json")
    assert (config["inference_mode"], config["alone_top_k"]) == (mode, top_k)


def test_a_process_that_was_killed_outright_goes_on_to_the_same_numbers(without_report, finished, recipe, tmp_path):
    """SIGKILL between two checkpoints, in a process of its own: nothing can be tidied up."""
    out, toml = tmp_path / "killed", tmp_path / "tiny.toml"
    toml.write_text(recipe_to_toml(recipe), encoding="utf-8")
    program = f"""
import os, signal
from mixtura.comparison.runner import compare
from mixtura.training import SilentProgress

class Kill(SilentProgress):
    def start_run(self, label, *, step, steps):
        self.label = label

    def advance(self, step, *, loss, tokens_per_second):
        if (self.label, step) == ("mixture_of_tokens seed 0", 3):
            os.kill(os.getpid(), signal.SIGKILL)

compare({str(toml)!r}, out={str(out)!r}, reporter=Kill())
"""
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, timeout=120).returncode == -9
    assert (out / "arms" / "mixture_of_tokens" / "seed0" / "checkpoint-2").is_dir()
    assert losses(compare(toml, out=out)) == losses(finished[1])


@pytest.mark.parametrize(("arm", "seeds"), [("token_choice", (0, 1)), ("dense", (0,))])
def test_an_arm_that_diverges_is_marked_and_the_others_finish(recipe, tmp_path, arm, seeds):
    arms = {name: recipe.arms[name] for name in ARMS}
    wild = dataclasses.replace(arms[arm], learning_rate=1e30)
    recipe = dataclasses.replace(recipe, arms=arms | {arm: wild}, seeds=seeds)
    listen = Listen()
    results = compare(recipe, out=tmp_path / "out", reporter=listen)
    assert any(f"{arm} seed 0 diverged" in note and "The other runs go on." in note for note in listen.notes)
    for name, found in results.summary.arms.items():
        assert found.diverged == (len(seeds) if name == arm else 0)
        assert (found.excluded == "diverged") == (name == arm)
    assert all(run.diverged and run.steps < 4 for run in results.arms[arm].runs)
    assert "diverged" in (tmp_path / "out" / "report.md").read_text(encoding="utf-8")
    # The same command does not try again.
    again = Listen()
    assert losses(compare(recipe, out=tmp_path / "out", reporter=again)) == losses(results)
    assert not any("diverged" in note for note in again.notes)


def test_where_every_arm_diverges_there_is_nothing_to_compare(recipe, tmp_path):
    wild = {name: dataclasses.replace(arm, learning_rate=1e30) for name, arm in recipe.arms.items()}
    with pytest.raises(UserError, match="Every run of every arm diverged: lower the learning rates"):
        compare(dataclasses.replace(recipe, arms=wild, seeds=(0,)), out=tmp_path / "out")
