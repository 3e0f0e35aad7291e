import dataclasses
import time

import numpy as np
import pytest
import torch

from mixtura.data import PackedTokens, ScheduledDataset
from mixtura.tasks.language_modelling.task import LanguageModelling
from mixtura.training import TrainingDiverged, read_metrics
from mixtura.training import trainer as trainer_module
from mixtura.training.balance import update_thresholds

BALANCED = {"router_aux_loss_coef": 0.5, "router_z_loss_coef": 0.1, "num_experts_per_tok": 2}


def metrics_of(tmp_path, out="run"):
    return [record for record in read_metrics(tmp_path / out / "metrics.jsonl") if "loss" in record]


def assert_same_weights(first, second, *, atol):
    for (name, expected), actual in zip(first.state_dict().items(), second.state_dict().values(), strict=True):
        torch.testing.assert_close(actual, expected, rtol=0, atol=atol, msg=lambda text, name=name: f"{name}: {text}")


@pytest.fixture
def repeated_data(tiny_data):
    """Data in which all sequences, and so all micro-batches, are equal."""
    rows_NL = np.tile(tiny_data.train.sequences_NL[:1], (8, 1))
    return dataclasses.replace(tiny_data, train=PackedTokens(rows_NL, bytes_per_token=2.0))


@pytest.mark.parametrize("family", ["dense", "token_choice"])
def test_accumulated_micro_batches_are_one_batch(run, tiny_model, tmp_path, family):
    settings = {"router_aux_loss_coef": 0.0, "router_z_loss_coef": 0.1}
    whole, parts = tiny_model(family, **settings), tiny_model(family, **settings)
    run(whole, out="whole", batch_size=4)
    run(parts, out="parts", batch_size=2, gradient_accumulation_steps=2)
    assert_same_weights(whole, parts, atol=1e-6)
    for first, second in zip(metrics_of(tmp_path, "whole"), metrics_of(tmp_path, "parts"), strict=True):
        for key in ("loss", "z_loss", "grad_norm", "learning_rate", "tokens"):
            assert first[key] == pytest.approx(second[key], abs=1e-5), key


@pytest.mark.parametrize("balance_over", ["batch", "global"])
@pytest.mark.parametrize("accumulation", [2, 3])
def test_router_losses_count_once_however_a_step_is_cut(
    run, tiny_model, tmp_path, repeated_data, balance_over, accumulation
):
    settings = {**BALANCED, "balance_over": balance_over}
    one, several = tiny_model("token_choice", **settings), tiny_model("token_choice", **settings)
    run(one, out="one", data=repeated_data)
    run(several, out="several", data=repeated_data, gradient_accumulation_steps=accumulation)
    # A third of a loss is rounded, and Adam divides rounding by gradients that are hardly larger: hence not 1e-6.
    assert_same_weights(one, several, atol=1e-5)
    for first, second in zip(metrics_of(tmp_path, "one"), metrics_of(tmp_path, "several"), strict=True):
        for key in ("loss", "aux_loss", "z_loss", "grad_norm"):
            assert first[key] == pytest.approx(second[key], abs=1e-5), key


def test_the_recorded_loss_is_the_language_loss_alone(run, tiny_model, tmp_path, tiny_data):
    model = tiny_model("token_choice", **BALANCED)
    first = ScheduledDataset(tiny_data.train, length=4, seed=0)
    ids_BL = torch.stack([first[row]["input_ids"] for row in range(4)])
    with torch.no_grad():
        expected = model.train()(input_ids=ids_BL, labels=ids_BL)
    run(model, steps=1, eval_every=1)
    (recorded,) = metrics_of(tmp_path)
    assert recorded["loss"] == pytest.approx(expected.language_loss.item(), abs=1e-6)
    assert recorded["aux_loss"] == pytest.approx(expected.aux_loss.item(), abs=1e-6)
    assert recorded["z_loss"] == pytest.approx(expected.z_loss.item(), abs=1e-6)
    total = recorded["loss"] + 0.5 * recorded["aux_loss"] + 0.1 * recorded["z_loss"]
    assert total == pytest.approx(expected.loss.item(), abs=1e-5)


def test_every_predicted_token_weighs_the_same_when_micro_batches_have_different_numbers(run, tiny_model, monkeypatch):
    class HalfMasked(ScheduledDataset):
        """Every other pair of rows predicts only its last four tokens."""

        def __getitem__(self, position):
            item = super().__getitem__(position)
            if position % 4 >= 2:
                item["labels"][:-4] = -100
            return item

    monkeypatch.setattr("mixtura.tasks.language_modelling.task.ScheduledDataset", HalfMasked)
    whole, parts = tiny_model(), tiny_model()
    run(whole, out="whole", batch_size=4)
    run(parts, out="parts", batch_size=2, gradient_accumulation_steps=2)
    assert_same_weights(whole, parts, atol=1e-6)


def test_the_data_come_in_scheduled_order(run, tiny_model, tiny_data):
    model, seen = tiny_model(), []

    def record(module, args, kwargs):
        if module.training:
            seen.append(kwargs["input_ids"].clone())

    model.register_forward_pre_hook(record, with_kwargs=True)
    run(model, seed=5, batch_size=4, gradient_accumulation_steps=2, steps=3)
    schedule = ScheduledDataset(tiny_data.train, length=24, seed=5)
    assert torch.equal(torch.cat(seen), torch.stack([schedule[i]["input_ids"] for i in range(24)]))


def test_global_balance_uses_the_load_of_all_micro_batches_so_far(run, tiny_model, tmp_path, monkeypatch):
    model = tiny_model("token_choice", **BALANCED, balance_over="global")
    loads, used = [], []
    router_losses = type(model).router_losses

    def spy(self, routing):
        if routing is not None:  # an evaluation asks for none
            used.append(routing[1].tokens_per_expert_E.clone())
        return router_losses(self, routing)

    monkeypatch.setattr(type(model), "router_losses", spy)
    run(model, steps=2, gradient_accumulation_steps=3)
    # Each micro-batch calls it twice: the model with its own load, then the trainer with the step's so far.
    loads, used = used[0::2], used[1::2]
    assert len(used) == 6
    for step in (0, 3):
        for micro_batch in range(3):
            expected = torch.stack(loads[step : step + micro_batch + 1]).sum(0)
            assert torch.equal(used[step + micro_batch], expected)


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("activation_checkpointing", [False, True], ids=["plain", "recomputed"])
def test_expert_bias_moves_by_the_rate_against_the_load_of_the_whole_step(
    run, tiny_model, tmp_path, accumulation, activation_checkpointing
):
    model = tiny_model("token_choice", expert_bias_update_rate=0.125, router_aux_loss_coef=0.0)
    run(
        model,
        steps=1,
        eval_every=1,
        gradient_accumulation_steps=accumulation,
        activation_checkpointing=activation_checkpointing,
    )
    evaluation = read_metrics(tmp_path / "run" / "metrics.jsonl")[-1]
    (share_E,) = evaluation["load"]
    expected = [0.125 * np.sign(0.25 - share) for share in share_E]
    assert any(expected)
    assert model.mixture_layers()[0].expert_bias.tolist() == expected


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("activation_checkpointing", [False, True], ids=["plain", "recomputed"])
def test_remoes_penalty_weighs_more_or_less_once_a_step(run, tiny_model, accumulation, activation_checkpointing):
    model = tiny_model("remoe", l1_coef_start=0.25, l1_coef_growth=0.5)
    run(
        model,
        steps=2,
        gradient_accumulation_steps=accumulation,
        activation_checkpointing=activation_checkpointing,
    )
    # At the start about two of the four experts run for a token, and one is asked for.
    assert model.mixture_layers()[0].l1_coef.item() == 0.25 * 1.5**2


def test_thresholds_are_those_of_the_tokens_of_a_step(run, tiny_model):
    models = [tiny_model("expert_threshold") for _ in range(3)]
    run(models[0], steps=1, batch_size=4, out="one")
    run(models[1], steps=1, batch_size=4, out="recomputed", activation_checkpointing=True)
    run(models[2], steps=1, batch_size=2, out="parts", gradient_accumulation_steps=2)
    first, recomputed, parts = (model.mixture_layers()[0] for model in models)
    assert first.updates == recomputed.updates == parts.updates == 1
    assert torch.equal(first.threshold, recomputed.threshold)
    assert not torch.equal(first.threshold, parts.threshold)  # a mean of two k-th best scores, close to that of all
    assert torch.allclose(first.threshold, parts.threshold, atol=0.02) and first.observed is None


def test_ranks_move_thresholds_together(tiny_model):
    layer = tiny_model("expert_threshold").mixture_layers()[0]
    layer.observed = torch.tensor([2.0, 4.0, 6.0, 8.0, 2.0])
    other = torch.tensor([6.0, 0.0, 0.0, 0.0, 2.0])
    update_thresholds([layer, torch.nn.Identity()], rate=0.1, reduce=lambda own: own + other)
    assert layer.threshold.tolist() == [2.0, 1.0, 1.5, 2.0]


@pytest.mark.parametrize("family", ["dense", "token_choice", "mixture_of_tokens"])
def test_activation_checkpointing_changes_nothing(run, tiny_model, tmp_path, family):
    settings = {"expert_bias_update_rate": 0.01 if family == "token_choice" else 0.0}
    plain, recomputed = tiny_model(family, **settings), tiny_model(family, **settings)
    run(plain, out="plain")
    run(recomputed, out="recomputed", activation_checkpointing=True)
    assert_same_weights(plain, recomputed, atol=0)
    loads = [
        [record.get("load") for record in read_metrics(tmp_path / out / "metrics.jsonl")]
        for out in ("plain", "recomputed")
    ]
    assert loads[0] == loads[1]


@pytest.mark.parametrize("family", ["token_choice", "mixture_of_tokens"])
def test_bfloat16_trains_in_autocast_and_evaluates_in_float32(run, tiny_model, tmp_path, family):
    model, seen = tiny_model(family), set()
    model.lm_head.register_forward_hook(lambda module, args, output: seen.add((module.training, output.dtype)))
    outcome = run(model, dtype="bfloat16")
    assert seen == {(True, torch.bfloat16), (False, torch.float32)}
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())
    assert metrics_of(tmp_path)[0]["loss"] == pytest.approx(np.log(300), abs=0.1)
    assert outcome.steps == 6


def test_training_lowers_the_loss(run, tiny_model, tmp_path):
    outcome = run(tiny_model("token_choice"), steps=40, learning_rate=1e-2, eval_every=20)
    losses = [record["loss"] for record in metrics_of(tmp_path)]
    assert losses[-1] < losses[0] - 1
    assert outcome.curve[1].loss["causal"] < outcome.curve[0].loss["causal"]


def test_the_recorded_learning_rates_are_those_that_were_used(run, tiny_model, tmp_path):
    run(tiny_model(), steps=10, warmup_fraction=0.2, min_learning_rate_fraction=0.1, learning_rate=0.01)
    rates = [record["learning_rate"] for record in metrics_of(tmp_path)]
    assert rates[:2] == pytest.approx([0.005, 0.01])
    assert rates[-1] == pytest.approx(0.001)


def test_evaluations_come_at_their_steps_and_at_the_end(run, tiny_model, tmp_path):
    outcome = run(tiny_model("mixture_of_tokens"), steps=5, eval_every=2)
    assert [point.step for point in outcome.curve] == [2, 4, 5]
    assert set(outcome.curve[0].loss) == {"group", "alone"}
    assert outcome.curve[-1].tokens == 5 * 4 * 16
    records = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [record["step"] for record in records if "eval" in record] == [2, 4, 5]


def test_seconds_leave_out_evaluations_and_checkpoints(run, tiny_model, monkeypatch):
    def slowly(function):
        def wrapped(*args, **kwargs):
            time.sleep(0.1)
            return function(*args, **kwargs)

        return wrapped

    monkeypatch.setattr(LanguageModelling, "evaluate", slowly(LanguageModelling.evaluate))
    monkeypatch.setattr(trainer_module.checkpoints, "random_state", slowly(trainer_module.checkpoints.random_state))
    began = time.perf_counter()
    outcome = run(tiny_model(), steps=4, eval_every=1, save_every=1)
    assert outcome.train_seconds < time.perf_counter() - began - 8 * 0.1


def diverge_at(model, step):
    """Makes the loss of training step `step` not a number."""
    calls = []

    def spoil(module, args, output):
        if module.training:
            calls.append(1)
        return output * float("nan") if module.training and len(calls) == step else output

    model.lm_head.register_forward_hook(spoil)
    return model


def test_a_loss_that_is_no_number_stops_the_run_and_names_the_fix(run, tiny_model, tmp_path):
    with pytest.raises(
        TrainingDiverged, match=r"tiny, seed 0 diverged: its loss became nan at step 4; lower .* is 0.003"
    ) as caught:
        run(diverge_at(tiny_model(), 4), save_every=1)
    assert caught.value.step == 4
    assert "checkpoint-3'" in str(caught.value)
    assert {path.name for path in (tmp_path / "run").glob("checkpoint*")} == {"checkpoint-2", "checkpoint-3"}
    assert [record["step"] for record in metrics_of(tmp_path)] == [1, 2, 3]


def test_divergence_before_the_first_checkpoint_says_so(run, tiny_model):
    with pytest.raises(TrainingDiverged, match="there is no checkpoint yet"):
        run(diverge_at(tiny_model(), 1))
