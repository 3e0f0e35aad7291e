"""A run of something that is no language model: a frozen embedding, a trained head, and texts of any length."""

import math

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn.functional import cross_entropy

from mixtura.config import UserError
from mixtura.layers import RoutingStats
from mixtura.training import SilentProgress, StepLosses, TrainingTask, read_metrics
from mixtura.training import saving as checkpoints

WORDS, WIDTH, CLASSES = 20, 8, 3


class TinyClassifier(nn.Module):
    """Mean of frozen embeddings, dropout, and a head that is trained."""

    def __init__(self, seed=0, classes=CLASSES):
        super().__init__()
        torch.manual_seed(7)
        self.embedding = nn.Embedding(WORDS, WIDTH)
        self.embedding.weight.requires_grad_(False)
        torch.manual_seed(seed)
        self.dropout = nn.Dropout(0.2)
        self.head = nn.Linear(WIDTH, classes)
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, ids_BL, mask_BL):
        self.calls += int(self.training)
        pooled_BD = (self.embedding(ids_BL) * mask_BL[..., None]).sum(1) / mask_BL.sum(1, keepdim=True)
        return self.head(self.dropout(pooled_BD))


class Texts(torch.utils.data.Dataset):
    """Texts of one to six words whose class is the first word's remainder; item i follows from (seed, i)."""

    def __init__(self, length, seed):
        self.length, self.seed = length, seed

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        generator = torch.Generator().manual_seed(1000 * self.seed + index)
        size = int(torch.randint(1, 7, (), generator=generator))
        ids_L = torch.randint(1, WORDS, (size,), generator=generator)
        return {"ids": ids_L, "label": int(ids_L[0]) % CLASSES, "note": f"text {index}"}


class Classification(TrainingTask):
    """Classifies; every third example has no label, so that micro-batches differ in their targets."""

    tokens_per_example = 3.5

    def __init__(self, *, masked=False, balanced=False):
        self.masked, self.balanced = masked, balanced

    def settings(self, model):
        return {"model": {"head": list(model.head.weight.shape)}, "data": {"texts": "tiny"}}

    def check(self, model, *, batch_size):
        if batch_size > 1000:
            raise UserError("The batch is too large: lower it.")

    def dataset(self, *, length, seed):
        return Texts(length, seed)

    def collate(self, items):
        longest = max(len(item["ids"]) for item in items)
        padded = torch.stack([nn.functional.pad(item["ids"], (0, longest - len(item["ids"]))) for item in items])
        labels = [
            -100 if self.masked and int(item["note"].split()[1]) % 3 == 0 else int(item["label"]) for item in items
        ]
        return {"ids": padded, "labels": torch.tensor(labels), "notes": [item["note"] for item in items]}

    def count_targets(self, batch):
        return batch["labels"].ne(-100).sum()

    def losses(self, model, batch, *, num_targets):
        logits_BC = model(batch["ids"], batch["ids"].ne(0).float())
        loss = cross_entropy(logits_BC, batch["labels"], reduction="sum") / num_targets
        if not self.balanced:
            return StepLosses(loss, None, None, None)
        load_E, zero = torch.tensor([3.0, 1.0]), torch.zeros(())
        stats = RoutingStats(load_E, load_E / 4, torch.tensor(4.0), zero, torch.tensor(0.5), zero, zero)
        return StepLosses(loss, (model.head.weight**2).sum(), None, (None, stats))

    def router_loss_weights(self, model):
        return 0.5, 0.0

    @torch.no_grad()
    def evaluate(self, model, *, final):
        was_training = model.training
        model.eval()
        batch = self.collate([Texts(12, 99)[index] for index in range(12)])
        logits_BC = model(batch["ids"], batch["ids"].ne(0).float())
        model.train(was_training)
        labels = batch["labels"]
        accuracy = (logits_BC.argmax(-1) == labels).float().mean().item()
        return {
            "plain": {"loss": cross_entropy(logits_BC, labels).item(), "accuracy": accuracy, "odds": math.inf},
            "short": {"loss": 2.0},
        }

    def save(self, model, folder):
        checkpoints.save_trained(model, folder)

    def load(self, model, folder):
        checkpoints.load_trained(model, folder)


class PowerCut(SilentProgress):
    """Ends the run once a step is over."""

    def __init__(self, step):
        self.step = step

    def advance(self, step, *, loss, tokens_per_second):
        if step == self.step:
            raise RuntimeError("power cut")


def numbers(folder):
    return [
        {key: value for key, value in record.items() if key != "seconds"}
        for record in read_metrics(folder / "metrics.jsonl")
    ]


def same(first, second):
    return all(
        torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    )


def test_only_what_requires_a_gradient_is_trained(run):
    model, before = TinyClassifier(), TinyClassifier()
    run(model, task=Classification())
    assert torch.equal(model.embedding.weight, before.embedding.weight)
    assert not torch.equal(model.head.weight, before.head.weight)


def test_a_killed_run_of_any_task_goes_on_bit_for_bit(run, tmp_path):
    straight, resumed = TinyClassifier(), TinyClassifier(seed=1)
    run(straight, task=Classification(), out="straight", gradient_accumulation_steps=2)
    with pytest.raises(RuntimeError, match="power cut"):
        run(TinyClassifier(), task=Classification(), out="killed", gradient_accumulation_steps=2, reporter=PowerCut(5))
    run(resumed, task=Classification(), out="killed", gradient_accumulation_steps=2, resume=True)
    assert same(straight, resumed)
    assert resumed.calls == 12
    assert numbers(tmp_path / "straight") == numbers(tmp_path / "killed")


def test_a_finished_run_is_read_back_into_a_model_with_the_same_frozen_part(run):
    finished, loaded = TinyClassifier(), TinyClassifier(seed=1)
    before = run(finished, task=Classification())
    assert run(loaded, task=Classification(), resume=True) == before
    assert same(finished, loaded)


def test_a_checkpoint_and_the_optimizer_hold_the_trained_part_alone(run, tmp_path):
    run(TinyClassifier(), task=Classification())
    folder = tmp_path / "run" / "checkpoint-6"
    assert set(load_file(folder / "model.safetensors")) == {"head.weight", "head.bias", "calls"}
    state = torch.load(folder / "optimizer.pt", weights_only=True)["state"]
    assert sorted(tuple(of["exp_avg"].shape) for of in state.values()) == [(CLASSES,), (CLASSES, WIDTH)]


def test_the_norm_that_is_clipped_is_that_of_the_trained_parameters(run, tmp_path):
    model, twin, task = TinyClassifier(), TinyClassifier(), Classification()
    model.dropout.p = twin.dropout.p = 0.0
    run(model, task=task, steps=1, eval_every=1)
    task.losses(twin, task.collate([Texts(4, 0)[index] for index in range(4)]), num_targets=4).task_loss.backward()
    expected = torch.stack([parameter.grad.norm() for parameter in twin.head.parameters()]).norm().item()
    assert numbers(tmp_path / "run")[0]["grad_norm"] == pytest.approx(expected, rel=1e-5)


def test_targets_weigh_the_same_however_a_step_is_cut(run):
    whole, parts = TinyClassifier(), TinyClassifier()
    for model in (whole, parts):
        model.dropout.p = 0.0
    run(whole, task=Classification(masked=True), out="whole", batch_size=4)
    run(parts, task=Classification(masked=True), out="parts", batch_size=2, gradient_accumulation_steps=2)
    torch.testing.assert_close(whole.head.weight, parts.head.weight, rtol=0, atol=1e-6)


def test_metrics_count_the_tasks_tokens_and_keep_all_its_finite_measures(run, tmp_path):
    outcome = run(TinyClassifier(), task=Classification())
    records = numbers(tmp_path / "run")
    assert [record["tokens"] for record in records if "loss" in record] == [14.0 * step for step in range(1, 7)]
    assert [set(record["eval"]["plain"]) for record in records if "eval" in record] == [{"loss", "accuracy"}] * 2
    assert outcome.curve[0].measures.keys() == {"loss", "accuracy"}
    assert outcome.curve[0].loss.keys() == {"plain", "short"}
    assert outcome.curve[0].measures["accuracy"].keys() == {"plain"}
    assert not any("load" in record for record in records)


def test_router_losses_of_any_task_count_with_its_own_weight(run, tmp_path):
    model = TinyClassifier()
    model.dropout.p = 0.0
    penalty = (model.head.weight**2).sum().item()
    run(model, task=Classification(balanced=True), steps=1, eval_every=1, gradient_accumulation_steps=2)
    step, evaluation = numbers(tmp_path / "run")
    assert step["aux_loss"] == pytest.approx(penalty)
    assert step["z_loss"] == 0
    assert evaluation["layers"] == [1]
    assert evaluation["load"] == [[0.75, 0.25]]


def test_what_the_task_refuses_is_refused_before_anything_is_written(run, tmp_path):
    with pytest.raises(UserError, match="too large"):
        run(TinyClassifier(), task=Classification(), batch_size=2000)
    with pytest.raises(UserError, match=r"A TinyClassifier cannot recompute .*activation_checkpointing' to false"):
        run(TinyClassifier(), task=Classification(), activation_checkpointing=True)
    assert list(tmp_path.iterdir()) == []


def test_a_run_of_other_settings_of_the_task_is_not_continued(run):
    with pytest.raises(RuntimeError, match="power cut"):
        run(TinyClassifier(), task=Classification(), reporter=PowerCut(3))
    with pytest.raises(UserError, match=r"model.head = \[3, 8\], and now it is \[4, 8\]"):
        run(TinyClassifier(classes=4), task=Classification(), resume=True)


def test_trained_weights_of_another_model_are_refused(tmp_path):
    checkpoints.save_trained(TinyClassifier(), tmp_path)
    with pytest.raises(UserError, match=r"head.bias has shape \[3\] there and \[4\] here"):
        checkpoints.load_trained(TinyClassifier(classes=4), tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"torn")
    with pytest.raises(UserError, match=r"damaged: model\.safetensors cannot be read"):
        checkpoints.load_trained(TinyClassifier(), tmp_path)
