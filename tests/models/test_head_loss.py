"""The loss without logits: the same numbers as the plain loss, and no tensor of the logits' size."""

import functools

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.testing import assert_close
from transformers import (
    CodeGenConfig,
    CodeGenForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.loss.loss_utils import ForCausalLMLoss

from mixtura import evaluation
from mixtura.diagnostics.health import measure_peak_memory
from mixtura.models import MixtureForCausalLM, losses
from mixtura.tasks.language_modelling.task import LanguageModelling
from mixtura.training.interface import StepLosses

BATCH, LENGTH, HIDDEN, VOCABULARY = 3, 7, 8, 50


@pytest.fixture(autouse=True)
def a_few_rows_at_a_time(monkeypatch):
    """Every loss here counts as large, and four rows fit at once: 21 rows are five parts and a rest."""
    monkeypatch.setattr(losses, "LARGE_LOGITS", 0)
    monkeypatch.setattr(losses, "ROWS_BYTES_ON_CPU", 4 * 4 * VOCABULARY)


def leaves(dtype):
    """Hidden states, the head's weight and labels of which some are no target."""
    torch.manual_seed(0)
    hidden_BLD = torch.randn(BATCH, LENGTH, HIDDEN, dtype=dtype, requires_grad=True)
    weight_VD = torch.randn(VOCABULARY, HIDDEN, dtype=dtype, requires_grad=True)
    labels_BL = torch.randint(VOCABULARY, (BATCH, LENGTH))
    labels_BL[0] = -100
    labels_BL[1, ::2] = -100
    return hidden_BLD, weight_VD, labels_BL


def gradients(loss_of, dtype):
    """The loss and what it gives the hidden states and the weight."""
    hidden_BLD, weight_VD, labels_BL = leaves(dtype)
    loss = loss_of(hidden_BLD, weight_VD, labels_BL)
    (3 * loss).backward()
    return loss.detach(), hidden_BLD.grad, weight_VD.grad


def plain(hidden_BLD, weight_VD, labels_BL, num_items_in_batch=None, ignore_index=-100):
    """The usual loss, which in float64 stays in it."""
    targets_T = torch.nn.functional.pad(labels_BL, (0, 1), value=ignore_index)[..., 1:].flatten()
    reduction = "mean" if num_items_in_batch is None else "sum"
    logits_TV = torch.nn.functional.linear(hidden_BLD, weight_VD).flatten(0, 1)
    wide = logits_TV.to(torch.promote_types(logits_TV.dtype, torch.float32))
    loss = torch.nn.functional.cross_entropy(wide, targets_T, reduction=reduction, ignore_index=ignore_index)
    return loss / (num_items_in_batch or 1)


@pytest.mark.parametrize("settings", [{}, {"num_items_in_batch": 40}, {"ignore_index": 3}], ids=str)
def test_value_and_gradients_are_those_of_the_plain_loss(settings):
    ignored = settings.get("ignore_index", -100)

    def run(loss, hidden_BLD, weight_VD, labels_BL):
        return loss(hidden_BLD, weight_VD, labels_BL.masked_fill(labels_BL == -100, ignored), **settings)

    found = gradients(functools.partial(run, losses.head_loss), torch.float64)
    wanted = gradients(functools.partial(run, plain), torch.float64)
    for value, reference in zip(found, wanted, strict=True):
        assert_close(value, reference, rtol=1e-12, atol=1e-14)


def test_float32_and_autocast_are_as_near_to_the_plain_loss_as_rounding():
    for dtype, rtol in ((torch.float32, 1e-5), (torch.bfloat16, 2e-2)):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
            found = gradients(losses.head_loss, torch.float32)
            wanted = gradients(plain, torch.float32)
        for value, reference in zip(found, wanted, strict=True):
            assert value.dtype == reference.dtype
            assert_close(value, reference, rtol=rtol, atol=rtol * float(reference.abs().max()))
    hidden_BLD, weight_VD, labels_BL = leaves(torch.float32)
    usual = ForCausalLMLoss(hidden_BLD @ weight_VD.T, labels_BL, VOCABULARY)
    assert_close(losses.head_loss(hidden_BLD, weight_VD, labels_BL), usual)


def test_a_second_backward_pass_adds_the_same_gradient():
    hidden_BLD, weight_VD, labels_BL = leaves(torch.float32)
    loss = losses.head_loss(hidden_BLD, weight_VD, labels_BL)
    loss.backward(retain_graph=True)
    once = weight_VD.grad.clone()
    loss.backward()
    assert_close(weight_VD.grad, 2 * once)


@pytest.fixture
def model(tiny_config):
    """A factory of tiny models in training."""

    def make(**changes):
        torch.manual_seed(0)
        return MixtureForCausalLM(tiny_config("token_choice", **changes)).train()

    return make


IDS_BL = torch.randint(3, 64, (4, 12), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_a_model_that_skips_its_logits_learns_the_same(model, tied):
    losses, grads = [], []
    for skip in (False, True):
        built = model(tie_word_embeddings=tied)
        out = built(IDS_BL, labels=IDS_BL, skip_logits=skip, num_items_in_batch=torch.tensor(44))
        assert (out.logits is None) is skip
        out.loss.backward()
        losses.append(out.loss.detach())
        grads.append({name: parameter.grad for name, parameter in built.named_parameters()})
    assert_close(*losses)
    for name, value in grads[0].items():
        assert_close(grads[1][name], value, rtol=1e-4, atol=1e-6)


def test_logits_are_there_unless_they_are_declined_or_nothing_else_was_asked_for(model):
    built = model()
    assert built(IDS_BL, labels=IDS_BL).logits is not None
    assert built(IDS_BL, skip_logits=True).logits is not None


def test_small_logits_a_changed_head_and_a_loss_of_ones_own_take_the_plain_path(model, monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("the loss without logits ran")

    monkeypatch.setattr(losses, "head_loss", refuse)
    hooked, own = model(), model()
    hooked.lm_head.register_forward_hook(lambda module, given, result: 2 * result)
    own.loss_function = lambda logits, labels, vocab_size, **_: logits.sum()
    for built in (hooked, own):
        assert_close(built(IDS_BL, labels=IDS_BL, skip_logits=True).loss, built(IDS_BL, labels=IDS_BL).loss)
    with pytest.raises(AssertionError, match="ran"):
        model()(IDS_BL, labels=IDS_BL, skip_logits=True)
    monkeypatch.setattr(losses, "LARGE_LOGITS", 4 * IDS_BL.numel() * 64)
    out = model()(IDS_BL, labels=IDS_BL, skip_logits=True)
    assert out.logits is None and torch.equal(out.loss, model()(IDS_BL, labels=IDS_BL).loss)


def test_the_logits_are_never_held(monkeypatch):
    vocabulary, rows = 4096, 256
    hidden_BLD = torch.randn(1, rows, HIDDEN, requires_grad=True)
    weight_VD = torch.randn(vocabulary, HIDDEN, requires_grad=True)
    labels_BL = torch.randint(vocabulary, (1, rows))
    monkeypatch.setattr(losses, "ROWS_BYTES_ON_CPU", 4 * 16 * vocabulary)
    logits = 4 * rows * vocabulary
    peak = measure_peak_memory(lambda: losses.head_loss(hidden_BLD, weight_VD, labels_BL).backward())
    assert (
        peak
        < 0.3 * logits
        < 2.5 * logits
        < measure_peak_memory(lambda: plain(hidden_BLD, weight_VD, labels_BL).backward())
    )


def test_training_declines_logits_and_evaluation_has_the_same_loss_without(model, monkeypatch):
    built = model()
    batch = {"input_ids": IDS_BL, "labels": IDS_BL}
    seen = []
    built.register_forward_hook(lambda module, given, result: seen.append(result.logits))
    step_losses = LanguageModelling.losses(None, built, batch, num_targets=44)
    assert isinstance(step_losses, StepLosses) and seen == [None]
    built.eval()
    without = evaluation._summed_loss(built, IDS_BL)
    monkeypatch.setattr(losses, "LARGE_LOGITS", 1 << 30)
    assert_close(without, evaluation._summed_loss(built, IDS_BL), rtol=1e-6, atol=0.0)
    assert seen[1] is None and seen[2] is not None


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_the_loss_compiles_as_one_graph(model):
    built = model()

    def loss_of(ids_BL):
        return built(ids_BL, labels=ids_BL, use_cache=False, skip_logits=True).loss

    torch._dynamo.reset()
    compiled = torch.compile(loss_of, fullgraph=True, backend="aot_eager", dynamic=False)
    compiled(IDS_BL).backward()
    grad = built.lm_head.weight.grad.clone()
    built.zero_grad()
    loss_of(IDS_BL).backward()
    assert_close(grad, built.lm_head.weight.grad, rtol=1e-4, atol=1e-6)


SIZES = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
DECODERS = {
    "plain": lambda: LlamaForCausalLM(LlamaConfig(**SIZES)),
    "with a soft cap on its logits": lambda: Gemma2ForCausalLM(
        Gemma2Config(**SIZES, num_key_value_heads=1, head_dim=8, final_logit_softcapping=0.5)
    ),
    "with a bias on its logits": lambda: CodeGenForCausalLM(
        CodeGenConfig(vocab_size=64, n_positions=16, n_embd=16, n_layer=1, n_head=4, rotary_dim=4)
    ),
}
PLACES_K = torch.tensor([3, 5, 6, 8])
TARGETS_BK = IDS_BL[:, PLACES_K + 1].masked_fill(torch.eye(4, dtype=torch.bool), -100)


def summed(model, monkeypatch, *, large, run=None, targets_BK=TARGETS_BK):
    """The output and summed loss of a model, and its gradients."""
    monkeypatch.setattr(losses, "LARGE_LOGITS", 0 if large else 1 << 30)
    run = run or (lambda: model(input_ids=IDS_BL, logits_to_keep=PLACES_K, use_cache=False))
    model.zero_grad()
    outputs, loss = losses.run_and_sum(model, run, targets_BK)
    loss.backward()
    return (
        outputs,
        loss,
        {name: value.grad.clone() for name, value in model.named_parameters() if value.grad is not None},
    )


@pytest.mark.parametrize("kind", DECODERS)
def test_any_decoder_has_the_same_loss_without_its_logits(kind, monkeypatch):
    torch.manual_seed(0)
    built = DECODERS[kind]()
    usual, wanted, grads = summed(built, monkeypatch, large=False)
    outputs, loss, without = summed(built, monkeypatch, large=True)
    assert usual.logits.shape[1] == len(PLACES_K)
    assert outputs.logits.shape[1] == (1 if kind == "plain" else len(PLACES_K))
    assert_close(loss, wanted)
    assert without.keys() == grads.keys()
    for name, value in grads.items():
        assert_close(without[name], value, rtol=1e-4, atol=1e-5)


def test_an_encoder_decoder_has_the_same_loss_without_its_logits(monkeypatch):
    torch.manual_seed(0)
    config = T5Config(vocab_size=64, d_model=16, d_ff=24, d_kv=8, num_layers=1, num_heads=2, decoder_start_token_id=0)
    built = T5ForConditionalGeneration(config).eval()
    targets_BL = IDS_BL.masked_fill(IDS_BL < 9, -100)
    given = {"run": lambda: built(input_ids=IDS_BL, decoder_input_ids=IDS_BL), "targets_BK": targets_BL}
    _, wanted, grads = summed(built, monkeypatch, large=False, **given)
    outputs, loss, without = summed(built, monkeypatch, large=True, **given)
    assert outputs.logits.shape[1] == 1
    assert_close(loss, wanted)
    for name, value in grads.items():
        assert_close(without[name], value, rtol=1e-4, atol=1e-5)


def test_a_frozen_head_gets_no_gradient_and_each_target_its_nats(monkeypatch):
    built = get_peft_model(DECODERS["plain"](), LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    _, wanted, grads = summed(built, monkeypatch, large=False)
    _, loss, without = summed(built, monkeypatch, large=True)
    assert_close(loss, wanted)
    assert without.keys() == grads.keys() and all("lora" in name for name in grads)
    run = lambda: built(input_ids=IDS_BL, logits_to_keep=PLACES_K, use_cache=False)  # noqa: E731
    _, hidden = losses.run_without_logits(built, run, rows=TARGETS_BK.numel())
    logits_TV = run().logits.detach().flatten(0, 1)
    reference = torch.nn.functional.cross_entropy(logits_TV, TARGETS_BK.flatten(), reduction="none")
    assert_close(hidden.nats(TARGETS_BK), reference.view_as(TARGETS_BK))
