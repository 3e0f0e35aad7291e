"""Mixtura's models inside transformers' plain Trainer, beside a stock Mixtral in the same script."""

import copy

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from torch.testing import assert_close
from transformers import (
    MixtralConfig,
    MixtralForCausalLM,
    MixtralForSequenceClassification,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from mixtura.models import MixtureForCausalLM, MixtureForSequenceClassification
from mixtura.models import losses as router_losses_module

GATE = "model.layers.1.mlp.gate.weight"
IDS_BL = torch.randint(3, 64, (8, 12), generator=torch.Generator().manual_seed(1))
pytestmark = pytest.mark.filterwarnings("ignore:.*pin_memory.*")


@pytest.fixture
def mixture(tiny_config):
    """A factory of our language model or classifier."""

    def make(cls=MixtureForCausalLM, family="token_choice", **changes):
        torch.manual_seed(0)
        return cls(tiny_config(family, **({"initializer_range": 0.3, "pad_token_id": 0, "num_labels": 3} | changes)))

    return make


@pytest.fixture
def mixtral():
    """A factory of transformers' own."""

    def make(cls=MixtralForCausalLM, **changes):
        torch.manual_seed(0)
        sizes = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2}
        heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "num_local_experts": 4, "pad_token_id": 0}
        return cls(MixtralConfig(**sizes, **heads, initializer_range=0.3, num_labels=3, **changes))

    return make


@pytest.fixture
def trainer(tmp_path):
    """A factory of trainers on one step's examples, without an optimizer that moves anything."""

    def make(model, rows=None, compute_metrics=None, callbacks=None, **changes):
        settings = {"per_device_train_batch_size": 8, "max_steps": 1, "learning_rate": 0.0, "max_grad_norm": 0}
        quiet = {"report_to": "none", "save_strategy": "no", "disable_tqdm": True, "use_cpu": True, "optim": "sgd"}
        arguments = TrainingArguments(output_dir=str(tmp_path), **(settings | quiet | changes))
        rows = language_rows() if rows is None else rows
        return Trainer(
            model=model,
            args=arguments,
            train_dataset=rows,
            eval_dataset=rows,
            callbacks=callbacks,
            compute_metrics=compute_metrics,
        )

    return make


def language_rows(masked=False):
    """Eight texts; where `masked`, each with another number of targets."""
    rows = [{"input_ids": ids, "labels": ids.clone()} for ids in IDS_BL]
    for number, row in enumerate(rows):
        row["labels"][: number + 1 if masked else 0] = -100
    return rows


def class_rows():
    return [{"input_ids": ids, "labels": index % 3} for index, ids in enumerate(IDS_BL)]


def gradients(trainer, model, rows, batch_size):
    """The gradients of one optimizer step that is cut into micro-batches of `batch_size`."""
    found = {}

    class Keep(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, **_):
            found.update({name: parameter.grad.clone() for name, parameter in model.named_parameters()})

    cut = {"per_device_train_batch_size": batch_size, "gradient_accumulation_steps": len(rows) // batch_size}
    trainer(model, rows, callbacks=[Keep()], **cut).train()
    return found


@pytest.mark.parametrize("batch_size", [4, 1])
@pytest.mark.parametrize("task", ["language", "classification"])
def test_a_routers_gradient_does_not_grow_with_gradient_accumulation(mixture, trainer, task, batch_size):
    cls, rows = (
        (MixtureForCausalLM, language_rows())
        if task == "language"
        else (MixtureForSequenceClassification, class_rows())
    )
    parts = {}
    for size in (8, batch_size):
        for coefficient in (0.0, 1.0):
            model = mixture(cls, router_aux_loss_coef=coefficient, router_z_loss_coef=coefficient)
            parts[size, coefficient] = gradients(trainer, model, rows, size)
    for name, whole in parts[8, 0.0].items():
        assert_close(parts[batch_size, 0.0][name], whole, rtol=1e-3, atol=1e-5, msg=f"the task's gradient, {name}")
    added = {size: (parts[size, 1.0][GATE] - parts[size, 0.0][GATE]).norm() for size in (8, batch_size)}
    # Not equal: the load of a micro-batch is not that of the whole.
    assert 0.5 < added[batch_size] / added[8] < 2


def test_stock_mixtral_is_the_fault_that_is_not_ours(mixtral, trainer):
    """The day this fails, transformers balances in the same way, and the comparison above can be one of equals."""
    added = {}
    for size in (8, 1):
        found = [
            gradients(trainer, mixtral(output_router_logits=True, router_aux_loss_coef=coef), language_rows(), size)
            for coef in (0.0, 1.0)
        ]
        added[size] = (found[1][GATE] - found[0][GATE]).norm()
    assert added[1] / added[8] > 4


def test_micro_batches_count_by_their_targets(mixture):
    """The router losses of two halves, weighted by the targets that each has in the step."""
    model = mixture(router_aux_loss_coef=1.0).train()
    labels_BL = IDS_BL.clone()
    labels_BL[:4, :9] = -100
    total = (labels_BL[:, 1:] != -100).sum()
    for half, targets in ((slice(0, 4), 4 * 3), (slice(4, 8), 4 * 11)):
        output = model(IDS_BL[half], labels=labels_BL[half], num_items_in_batch=total)
        assert_close(output.loss - output.language_loss, output.aux_loss * targets / total)
    ready = F.pad(labels_BL, (0, 1), value=-100)[:, 1:].contiguous()
    output = model(IDS_BL, labels=labels_BL, shift_labels=ready, num_items_in_batch=total)
    assert_close(output.loss - output.language_loss, output.aux_loss)


def test_label_smoothing_shifts_the_labels_as_for_mixtral(mixture, mixtral, trainer):
    for model in (mixture().eval(), mixtral().eval()):
        with torch.no_grad():
            inputs = {"input_ids": IDS_BL, "labels": IDS_BL.clone()}
            loss = trainer(model, label_smoothing_factor=0.1).compute_loss(model, inputs)
            logits = model(IDS_BL).logits[:, :-1].flatten(0, 1)
        assert_close(loss, F.cross_entropy(logits, IDS_BL[:, 1:].flatten(), label_smoothing=0.1))


def test_router_losses_that_label_smoothing_leaves_out_are_missed_aloud(mixture, trainer, monkeypatch):
    said = []
    monkeypatch.setattr(router_losses_module.logger, "warning_once", said.append)
    for model in (mixture(), mixture(router_aux_loss_coef=0.0), mixture(family="mixture_of_tokens")):
        trainer(model, label_smoothing_factor=0.1).train()
    assert len(said) == 1 and "nothing balances the experts" in said[0]


def test_a_classifier_adds_the_router_losses_and_returns_them(mixture, mixtral):
    settings = {"router_aux_loss_coef": 10.0, "router_z_loss_coef": 0.5}
    model = mixture(MixtureForSequenceClassification, **settings).train()
    labels_B = torch.arange(8) % 3
    output = model(IDS_BL, labels=labels_B)
    cross_entropy = F.cross_entropy(output.logits, labels_B)
    assert_close(output.loss, cross_entropy + 10 * output.aux_loss + 0.5 * output.z_loss)
    output.aux_loss.backward()
    assert model.model.layers[1].mlp.gate.weight.grad.any()
    evaluated = model.eval()(IDS_BL, labels=labels_B)
    assert_close(evaluated.loss, F.cross_entropy(evaluated.logits, labels_B))
    stock = mixtral(MixtralForSequenceClassification).eval()(IDS_BL, labels=labels_B)
    assert list(evaluated.keys()) == list(stock.keys())
    assert "aux_loss" not in evaluated and output.routing is None


@pytest.mark.parametrize("labels", [torch.rand(8), torch.rand(8, 3).round()], ids=["regression", "many labels"])
def test_a_classifiers_loss_of_any_kind_counts_by_its_share(mixture, labels):
    model = mixture(MixtureForSequenceClassification, num_labels=1 if labels.dim() == 1 else 3).train()
    whole = model(IDS_BL, labels=labels).loss
    assert_close(model(IDS_BL, labels=labels, num_items_in_batch=labels.numel() * 4).loss, whole / 4)


@pytest.mark.parametrize("kind", ["language", "classification"])
def test_metrics_get_logits_alone_as_from_mixtral(mixture, mixtral, trainer, kind):
    ours, theirs, rows = (
        (MixtureForCausalLM, MixtralForCausalLM, language_rows())
        if kind == "language"
        else (MixtureForSequenceClassification, MixtralForSequenceClassification, class_rows())
    )
    shapes = []

    def measure(prediction):
        assert isinstance(prediction.predictions, np.ndarray)
        shapes.append((prediction.predictions.shape, prediction.label_ids.shape))
        return {}

    for model in (mixture(ours), mixtral(theirs)):
        trainer(model, rows, measure, per_device_eval_batch_size=3).evaluate()
    assert shapes[0] == shapes[1]


def test_outputs_stand_where_mixtrals_do(mixture, mixtral):
    asked = {"output_router_logits": True, "output_hidden_states": True, "labels": IDS_BL}
    for mode, changes in (("eval", {"labels": IDS_BL}), ("eval", asked), ("train", asked)):
        keys = []
        for model in (mixture(), mixtral()):
            output = getattr(model, mode)()(IDS_BL, **changes)
            keys.append(list(output.keys()))
        assert keys[0][: len(keys[1])] == keys[1]
        assert set(keys[0]) - set(keys[1]) <= {"language_loss", "z_loss"}
    assert list(mixture().train()(IDS_BL, labels=IDS_BL).keys())[:3] == ["loss", "aux_loss", "logits"]


def test_router_logits_are_those_of_mixtral(mixture, mixtral):
    stock = mixtral().eval()
    changes = {"gated": True, "hidden_act": "silu", "norm_topk_prob": True, "tie_word_embeddings": False}
    changes |= {"rope_parameters": stock.config.rope_parameters, "mlp_layer_types": ["token_choice"] * 2}
    ours = mixture(**changes).eval()
    ours.load_state_dict(stock.state_dict(), strict=True)
    found, expected = (model(IDS_BL, output_router_logits=True).router_logits for model in (ours, stock))
    assert_close(found, tuple(expected), rtol=1e-4, atol=1e-4)
    ours.config.output_router_logits = True
    assert ours(IDS_BL).aux_loss is not None and len(ours(IDS_BL).router_logits) == 2
    assert ours(IDS_BL, output_router_logits=False).router_logits is None


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("cls", [MixtureForCausalLM, MixtureForSequenceClassification], ids=["language", "classes"])
def test_reentrant_checkpointing_keeps_the_routers_gradient(mixture, cls):
    labels = IDS_BL if cls is MixtureForCausalLM else torch.arange(8) % 3
    model = mixture(cls, router_aux_loss_coef=1.0, mlp_layer_types=["token_choice"] * 2).train()
    found = []
    for reentrant in (None, False, True):
        other = copy.deepcopy(model)
        if reentrant is not None:
            other.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        output = other(IDS_BL, labels=labels, use_cache=False, output_routing=True)
        assert output.aux_loss.requires_grad and not output.routing[1].tokens_per_expert_E.requires_grad
        output.loss.backward()
        found.append({name: parameter.grad for name, parameter in other.named_parameters()})
    for other in found[1:]:
        assert_close(other, found[0])
