import json
import os
import signal

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from mixtura.config import UserError
from mixtura.training import SilentProgress, read_metrics
from mixtura.training import trainer as trainer_module

ARMS = {
    "dense": {},
    "mixture_of_tokens": {},
    "mixture_of_tokens with empty groups": {
        **{"zero_fill": 0.25, "alone_fraction": 0.3, "population": True, "population_rate": 0.1}
    },
    "mixture_of_tokens with layers alone": {"zero_fill": 0.5, "zero_fill_unit": "layer"},
    "mixture_of_tokens with steps alone": {"zero_fill": 0.5, "zero_fill_unit": "step", "alone_fraction": 0.2},
    "mixture_of_tokens that sharpens": {"first_temperature": 4.0, "temperature": 0.5},
    "mixture_of_tokens that becomes token choice": {"transition_to": "token_choice", "transition_fraction": 0.5},
    "token_choice": {"num_experts_per_tok": 2, "router_z_loss_coef": 0.1},
    "expert_threshold": {"threshold_warmup": 0.4},
    "merged_experts": {"segment_length": 4},
    "token_choice with free experts": {"copy_experts": 1, "constant_experts": 1, "balance_over": "sequence"},
    "remoe": {"l1_coef_start": 1e-3, "num_shared_experts": 1},
    "token_choice with expert bias and global balance": {"balance_over": "global", "expert_bias_update_rate": 0.01},
    "expert_choice": {},
}


class At(SilentProgress):
    """Does something once a step is over."""

    def __init__(self, step, action):
        self.step, self.action = step, action

    def advance(self, step, *, loss, tokens_per_second):
        if step == self.step:
            self.action()


def ctrl_c():
    os.kill(os.getpid(), signal.SIGINT)


def crash():
    raise RuntimeError("power cut")


def numbers(folder):
    """All that a run measured, but for the time it took."""
    return [
        {key: value for key, value in record.items() if key != "seconds"}
        for record in read_metrics(folder / "metrics.jsonl")
    ]


def assert_identical(first, second):
    for (name, expected), actual in zip(first.state_dict().items(), second.state_dict().values(), strict=True):
        assert torch.equal(expected, actual), name


@pytest.fixture
def make(tiny_model):
    def make(arm="dense", *, seed=0):
        return tiny_model(arm.split(" ")[0], seed=seed, **ARMS[arm])

    return make


@pytest.mark.parametrize("arm", ARMS)
def test_a_run_stopped_by_ctrl_c_goes_on_bit_for_bit(run, make, tmp_path, arm):
    straight, stopped, resumed = make(arm), make(arm), make(arm, seed=1)
    run(straight, out="straight", gradient_accumulation_steps=2)
    handler = signal.getsignal(signal.SIGINT)
    outcome = run(stopped, out="stopped", gradient_accumulation_steps=2, reporter=At(2, ctrl_c))
    assert (outcome.interrupted, outcome.steps) == (True, 3)
    assert signal.getsignal(signal.SIGINT) == handler
    assert not (tmp_path / "stopped" / "checkpoint").exists()
    outcome = run(resumed, out="stopped", gradient_accumulation_steps=2, resume=True)
    assert (outcome.interrupted, outcome.steps) == (False, 6)
    assert_identical(straight, resumed)
    assert numbers(tmp_path / "stopped") == numbers(tmp_path / "straight")


@pytest.mark.parametrize("arm", ["dense", "token_choice with expert bias and global balance"])
def test_a_run_killed_after_its_checkpoint_measures_no_step_twice(run, make, tmp_path, arm):
    straight, resumed = make(arm), make(arm, seed=1)
    run(straight, out="straight")
    with pytest.raises(RuntimeError, match="power cut"):
        run(make(arm), out="killed", reporter=At(5, crash))
    assert numbers(tmp_path / "killed")[-1]["step"] == 5
    (tmp_path / "killed" / ".checkpoint-6.partial").mkdir()
    run(resumed, out="killed", resume=True)
    assert_identical(straight, resumed)
    assert numbers(tmp_path / "killed") == numbers(tmp_path / "straight")
    assert not (tmp_path / "killed" / ".checkpoint-6.partial").exists()


def test_a_run_killed_before_its_first_checkpoint_starts_over(run, make, tmp_path):
    straight, again = make(), make()
    run(straight, out="straight")
    with pytest.raises(RuntimeError, match="power cut"):
        run(make(), out="killed", reporter=At(1, crash))
    run(again, out="killed", resume=True)
    assert_identical(straight, again)
    assert numbers(tmp_path / "killed") == numbers(tmp_path / "straight")


def test_muon_and_its_schedule_go_on_bit_for_bit(run, make, tmp_path):
    straight, resumed = make("token_choice"), make("token_choice", seed=1)
    settings = {"optimizer": "muon", "schedule": "wsd", "decay_fraction": 0.5}
    run(straight, **settings)
    stopped = make("token_choice")
    run(stopped, out="stopped", reporter=At(3, ctrl_c), **settings)
    run(resumed, out="stopped", resume=True, **settings)
    assert_identical(straight, resumed)
    assert numbers(tmp_path / "run") == numbers(tmp_path / "stopped")


def test_resuming_where_there_is_no_run_starts_one(run, make):
    assert run(make(), resume=True).steps == 6


def test_seconds_go_on_counting(run, make, tmp_path):
    first = run(make(), reporter=At(2, ctrl_c))
    second = run(make(), resume=True)
    assert second.train_seconds > first.train_seconds
    seconds = [record["seconds"] for record in read_metrics(tmp_path / "run" / "metrics.jsonl")]
    assert seconds == sorted(seconds)


@pytest.mark.parametrize("lost", [False, True], ids=["complete", "killed before its end was written"])
def test_resuming_a_finished_run_takes_no_step(run, make, tmp_path, monkeypatch, lost):
    finished, loaded = make("token_choice"), make("token_choice", seed=1)
    before = run(finished)
    measured = numbers(tmp_path / "run")
    if lost:
        (tmp_path / "run" / "checkpoint").rename(tmp_path / "elsewhere")
    monkeypatch.setattr(trainer_module.MixtureTrainer, "train", lambda *args, **kwargs: pytest.fail("it trained"))
    assert run(loaded, resume=True) == before
    assert_identical(finished, loaded)
    assert numbers(tmp_path / "run") == measured
    assert (tmp_path / "run" / "checkpoint" / "complete.json").exists()


def test_ctrl_c_in_the_last_step_still_completes_the_run(run, make, tmp_path):
    outcome = run(make(), reporter=At(5, ctrl_c))
    assert (outcome.interrupted, outcome.steps) == (True, 6)
    assert (tmp_path / "run" / "checkpoint" / "complete.json").exists()


def test_the_final_checkpoint_loads_as_any_model_does(run, make, tmp_path, tiny_data):
    model = make("mixture_of_tokens")
    run(model)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "checkpoint")
    assert_identical(model, loaded)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run" / "checkpoint")
    assert tokenizer.get_vocab() == tiny_data.tokenizer.get_vocab()


def test_a_run_is_compiled_where_its_recipe_says_so_and_leaves_an_eager_model(run, make, monkeypatch):
    asked = []

    def note(model):
        asked.append(model)
        model._compiled_call_impl = model._call_impl

    monkeypatch.setattr(torch.nn.Module, "compile", note)
    run(make(), out="plain", steps=2)
    assert not asked
    model = make()
    run(model, out="compiled", steps=2, compile=True)
    assert asked == [model] and model._compiled_call_impl is None


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*should not be instantiated")
@pytest.mark.parametrize("arm", ["dense", "token_choice", "mixture_of_tokens"])
def test_a_compiled_run_computes_what_an_eager_one_does(run, make, monkeypatch, arm):
    plain, compiled = make(arm), make(arm)

    def compile_without_a_compiler(model):
        model._compiled_call_impl = torch.compile(model._call_impl, backend="eager")

    monkeypatch.setattr(torch.nn.Module, "compile", compile_without_a_compiler)
    run(plain, out="plain", steps=2, eval_every=2)
    run(compiled, out="compiled", steps=2, eval_every=2, compile=True)
    assert_identical(plain, compiled)


def test_what_sharpens_in_training_is_measured_at_its_end_as_it_is_loaded(run, make, tmp_path):
    model = make("mixture_of_tokens that sharpens")
    run(model)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "checkpoint").eval()
    layers = [layer for each in (model, loaded) for layer in each.mixture_of_tokens_layers()]
    assert [layer.temperature for layer in layers] == [0.5, 0.5]
    ids_BL = torch.arange(16).view(2, 8)
    assert torch.equal(model.eval()(ids_BL).logits, loaded(ids_BL).logits)


def test_a_run_folder_has_the_last_two_checkpoints_and_no_pickle(run, make, tmp_path):
    run(make("token_choice"), save_every=1)
    folders = {path.name for path in (tmp_path / "run").iterdir() if path.is_dir()}
    assert folders == {"checkpoint-5", "checkpoint-6", "checkpoint"}
    files = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert {path.suffix for path in files} == {".json", ".jsonl", ".safetensors", ".pt"}
    for path in files:
        if path.suffix == ".pt":
            torch.load(path, weights_only=True)


def test_a_folder_that_holds_a_run_is_not_overwritten(run, make, tmp_path):
    run(make())
    measured = numbers(tmp_path / "run")
    with pytest.raises(UserError, match=r"already holds a run: continue it with --resume, or choose another"):
        run(make())
    assert numbers(tmp_path / "run") == measured


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 8}, "training.steps = 6, and now it is 8"),
        ({"learning_rate": 1e-4}, "learning_rate = 0.003, and now it is 0.0001"),
        ({"seed": 3}, "seed = 0, and now it is 3"),
    ],
    ids=["steps", "learning rate", "seed"],
)
def test_a_run_that_was_started_otherwise_is_not_continued(run, make, change, message):
    run(make(), reporter=At(2, ctrl_c))
    with pytest.raises(UserError, match=message):
        run(make(), resume=True, **change)


def test_a_run_of_another_model_is_not_continued(run, make, tiny_model):
    run(make(), reporter=At(2, ctrl_c))
    with pytest.raises(UserError, match=r"model.intermediate_size = 64, and now it is 32"):
        run(tiny_model(intermediate_size=32), resume=True)


def test_saving_more_often_is_allowed_when_a_run_resumes(run, make):
    run(make(), reporter=At(2, ctrl_c))
    assert run(make(), resume=True, save_every=1, threads=1).steps == 6


def test_a_damaged_checkpoint_is_not_continued(run, make, tmp_path):
    run(make(), reporter=At(2, ctrl_c))
    weights = tmp_path / "run" / "checkpoint-3" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(UserError, match=r"checkpoint-3' is damaged: model.safetensors has .* remove the folder"):
        run(make(), resume=True)
    assert not any(record["step"] > 3 for record in numbers(tmp_path / "run"))


def test_removing_the_damaged_checkpoint_goes_on_from_the_one_before(run, make, tmp_path):
    straight, resumed = make(), make(seed=1)
    run(straight, out="straight")
    run(make(), reporter=At(2, ctrl_c))
    damaged = tmp_path / "run" / "checkpoint-3"
    for path in damaged.iterdir():
        path.unlink()
    damaged.rmdir()
    run(resumed, resume=True)
    assert_identical(straight, resumed)
    assert numbers(tmp_path / "run") == numbers(tmp_path / "straight")


def test_a_foreign_checkpoint_folder_is_refused(run, make, tmp_path):
    run(make(), reporter=At(2, ctrl_c))
    (tmp_path / "run" / "checkpoint-9").mkdir()
    with pytest.raises(UserError, match=r"checkpoint-9' is no checkpoint of this library .* move it"):
        run(make(), resume=True)


def test_metrics_that_lost_steps_are_noticed(run, make, tmp_path):
    run(make(), reporter=At(2, ctrl_c))
    path = tmp_path / "run" / "metrics.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[1:]))
    with pytest.raises(UserError, match="has 2 steps but the checkpoint was made after 3"):
        run(make(), resume=True)


def test_an_output_folder_that_is_a_file_is_a_users_error(run, make, tmp_path):
    (tmp_path / "run").write_text("a file")
    with pytest.raises(UserError, match=r"run' cannot be written \(File exists\)"):
        run(make())


def test_an_impossible_evaluation_is_refused_before_anything_is_written(run, make, tmp_path):
    with pytest.raises(UserError, match=r"'training.eval_sequences' is 999 but only 32"):
        run(make(), eval_sequences=999)
    with pytest.raises(UserError, match="multiple of the group size"):
        run(make("mixture_of_tokens"), eval_sequences=6)
    assert list(tmp_path.iterdir()) == []


def test_a_model_for_a_smaller_vocabulary_is_refused(run, tiny_model):
    with pytest.raises(UserError, match=r"vocab_size is 256: build the model"):
        run(tiny_model(vocab_size=256))


def test_a_seed_decides_the_order_of_the_data_alone(run, make, tmp_path):
    run(make(), out="a", seed=0)
    run(make(), out="b", seed=0)
    run(make(), out="c", seed=1)
    assert numbers(tmp_path / "a") == numbers(tmp_path / "b")
    assert numbers(tmp_path / "a")[0]["loss"] != numbers(tmp_path / "c")[0]["loss"]


def test_the_last_share_of_the_steps_runs_alone(run, make):
    model, shares = make("mixture_of_tokens with empty groups"), []

    class Recorder(SilentProgress):
        def advance(self, step, *, loss, tokens_per_second):
            shares.append(model.mixture_of_tokens_layers()[0].zero_fill)

    run(model, reporter=Recorder())
    assert shares == [0.25] * 4 + [1.0] * 2  # 0.3 of 6 steps, rounded
    assert model.config.zero_fill == 0.25


def test_steps_alone_are_whole_for_all_their_micro_batches(run, make):
    model, seen = make("mixture_of_tokens with steps alone"), []
    layer = model.mixture_of_tokens_layers()[0]
    layer.register_forward_hook(lambda layer, *_: seen.append(layer.zero_fill) if layer.training else None)
    run(model, gradient_accumulation_steps=2)
    assert seen == [0, 0, 1, 1] * 2 + [0, 0, 1, 1]  # every other step; the last fifth of six is one more of them


@pytest.mark.parametrize("stop", [2, 3, 4], ids=["before it", "right after its first step", "after it"])
def test_a_run_that_changes_to_token_choice_goes_on_bit_for_bit(run, make, tmp_path, stop):
    arm = "mixture_of_tokens that becomes token choice"
    straight, stopped, resumed = make(arm), make(arm), make(arm, seed=1)
    run(straight, out="straight")
    assert straight.config.mlp_layer_types == ["dense", "token_choice"]
    run(stopped, out="stopped", reporter=At(stop, ctrl_c))
    run(resumed, out="stopped", resume=True)
    assert_identical(straight, resumed)
    assert numbers(tmp_path / "stopped") == numbers(tmp_path / "straight")
    finished = make(arm, seed=2)
    run(finished, out="stopped", resume=True)
    assert_identical(straight, finished)


def test_the_curve_of_what_could_be_deployed_goes_through_the_change(run, make, tmp_path):
    run(make("mixture_of_tokens that becomes token choice"), eval_every=1)
    modes = [set(record["eval"]) for record in numbers(tmp_path / "run") if "eval" in record]
    assert modes == [{"group", "causal"}] * 3 + [{"causal"}] * 3
    assert all(record["aux_loss"] == 0 for record in numbers(tmp_path / "run")[:1])
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "checkpoint")
    assert loaded.config.mlp_layer_types == ["dense", "token_choice"] and loaded.config.transition_to is None


def test_every_step_moves_a_populations_averages_once(run, make):
    model = make("mixture_of_tokens with empty groups")
    run(model, gradient_accumulation_steps=2)
    population = model.mixture_of_tokens_layers()[0].population
    assert population.updates == 4  # the last two steps have no groups to observe
    assert (population.mean != 0).any()


def test_the_reporter_sees_every_step_and_the_end(run, make):
    class Recorder(SilentProgress):
        def __init__(self):
            self.calls = []

        def start_run(self, label, *, step, steps):
            self.calls.append(("start", label, step, steps))

        def advance(self, step, *, loss, tokens_per_second):
            assert loss > 0 and tokens_per_second > 0
            self.calls.append(step)

        def end_run(self):
            self.calls.append("end")

    recorder = Recorder()
    run(make(), reporter=recorder)
    assert recorder.calls == [("start", "tiny, seed 0", 0, 6), 1, 2, 3, 4, 5, 6, "end"]


def test_training_prints_nothing_of_its_own(run, make, capfd, monkeypatch):
    # The environment of the tests turns transformers' progress bars off; that of a user does not.
    monkeypatch.setattr(logging, "_tqdm_active", True)
    monkeypatch.setattr(logging.hf_hub_utils, "enable_progress_bars", lambda: None)
    run(make())
    assert capfd.readouterr() == ("", "")
    assert logging.is_progress_bar_enabled()


def test_run_json_stores_the_settings_and_their_hash(run, make, tmp_path):
    run(make())
    stored = json.loads((tmp_path / "run" / "run.json").read_text())
    assert stored["settings"]["training"]["batch_size"] == 4
    assert len(stored["hash"]) == 32
