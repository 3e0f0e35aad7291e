"""The decoder and its heads: to disk and back, losses, padding, checkpointing, compilation, and equal logits with
transformers' own classes where there is one.
"""

import copy
import os

import pytest
import torch
from torch.nn import functional as F
from torch.testing import assert_close
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

from mixtura.config import UserError
from mixtura.config.families import FAMILIES
from mixtura.layers import LayerMix
from mixtura.layers.remoe import l1_penalty
from mixtura.layers.statistics import load_balancing_loss
from mixtura.models import MixtureForCausalLM, MixtureForSequenceClassification, MixtureModel

IDS_BL = torch.randint(64, (4, 9), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def build(tiny_config):
    """A factory of tiny causal language models with weights large enough that layers and routers matter."""

    def make(family, **changes):
        torch.manual_seed(0)
        return MixtureForCausalLM(tiny_config(family, **({"initializer_range": 0.3} | changes)))

    return make


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_saved_language_model_comes_back_bit_by_bit(build, family, tied, tmp_path):
    model = build(family, tie_word_embeddings=tied, expert_bias_update_rate=0.1, layer_mix=True).eval()
    for name, tensor in model.state_dict().items():
        if name.endswith(("expert_bias", "scale", "logits")):
            tensor.normal_()
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is MixtureForCausalLM and not loaded.training
    assert loaded.state_dict().keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    assert torch.equal(loaded(IDS_BL).logits, model(IDS_BL).logits)
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) is tied
    assert {os.path.splitext(file)[1] for file in os.listdir(tmp_path)} == {".json", ".safetensors"}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_decoder_and_a_classifier_come_back_too(tiny_config, family, tmp_path):
    config = tiny_config(family, pad_token_id=0, num_labels=3)
    for auto, cls in (
        (AutoModel, MixtureModel),
        (AutoModelForSequenceClassification, MixtureForSequenceClassification),
    ):
        model = auto.from_config(config).eval()
        model.save_pretrained(tmp_path / cls.__name__)
        loaded = auto.from_pretrained(tmp_path / cls.__name__)
        assert type(loaded) is type(model) is cls
        assert torch.equal(loaded(IDS_BL)[0], model(IDS_BL)[0])


def test_a_language_model_on_disk_loads_as_a_decoder(build, tmp_path):
    model = build("mixture_of_tokens").eval()
    model.save_pretrained(tmp_path)
    assert torch.equal(AutoModel.from_pretrained(tmp_path)(IDS_BL)[0], model.model(IDS_BL)[0])


def test_a_classifier_reads_the_last_real_token(tiny_config):
    model = MixtureForSequenceClassification(tiny_config("token_choice", pad_token_id=0, num_labels=3)).eval()
    ids_BL = IDS_BL.clamp_min(1)
    expected = model(ids_BL[:, :6]).logits
    padded_BL = torch.cat([ids_BL[:, :6], torch.zeros(4, 3, dtype=torch.long)], dim=1)
    output = model(padded_BL, attention_mask=padded_BL.ne(0).long(), labels=torch.tensor([0, 1, 2, 0]))
    assert_close(output.logits, expected)
    assert_close(output.loss, F.cross_entropy(expected, torch.tensor([0, 1, 2, 0])))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_weight_starts_with_the_same_spread(build, family):
    model = build(family, initializer_range=0.05, hidden_size=64, moe_intermediate_size=64, layer_mix=True)
    for name, parameter in model.named_parameters():
        if parameter.dim() >= 2:
            assert abs(parameter.std() / 0.05 - 1) < 0.2, name
        else:
            assert (parameter == (0 if name.endswith("layer_mix.logits") else 1)).all(), name


def test_a_gated_dense_model_is_llama(build):
    model = build("dense", hidden_act="silu", gated=True, tie_word_embeddings=False).eval()
    config = model.config
    shared = ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "head_dim"]
    shared += ["num_key_value_heads", "hidden_act", "rms_norm_eps", "rope_parameters", "max_position_embeddings"]
    llama = LlamaForCausalLM(LlamaConfig(**{name: getattr(config, name) for name in shared})).eval()
    llama.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(model(IDS_BL).logits, llama(IDS_BL).logits)


def test_a_gated_token_choice_model_is_mixtral(build):
    model = build(
        "token_choice",
        hidden_act="silu",
        gated=True,
        norm_topk_prob=True,
        tie_word_embeddings=False,
        mlp_layer_types=["token_choice"] * 2,
    ).eval()
    config = model.config
    shared = ["vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "head_dim", "rms_norm_eps"]
    shared += ["num_key_value_heads", "hidden_act", "rope_parameters", "max_position_embeddings", "num_experts_per_tok"]
    mixtral = MixtralForCausalLM(
        MixtralConfig(
            **{name: getattr(config, name) for name in shared},
            intermediate_size=config.moe_intermediate_size,
            num_local_experts=config.num_experts,
            sliding_window=None,
        )
    ).eval()
    mixtral.load_state_dict(model.state_dict(), strict=True)
    assert_close(model(IDS_BL).logits, mixtral(IDS_BL).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_language_loss_is_the_cross_entropy_of_the_next_token(build, family):
    model = build(family)
    labels_BL = IDS_BL.clone()
    labels_BL[0, :4] = -100
    for mode in (model.train(), model.eval()):
        output = mode(IDS_BL, labels=labels_BL)
        expected = F.cross_entropy(output.logits[:, :-1].flatten(0, 1), labels_BL[:, 1:].flatten(), ignore_index=-100)
        assert_close(output.language_loss, expected)
    assert torch.equal(output.loss, output.language_loss)
    in_batch = model(IDS_BL, labels=labels_BL, num_items_in_batch=100).language_loss
    assert_close(in_batch, expected * (4 * 8 - 3) / 100)


def test_router_losses_are_added_in_training_only(build):
    settings = {"router_aux_loss_coef": 0.5, "router_z_loss_coef": 0.25, "num_hidden_layers": 3}
    model = build("token_choice", **settings, mlp_layer_types=["token_choice", "dense", "token_choice"])
    output = model.train()(IDS_BL, labels=IDS_BL, output_routing=True)
    stats = [output.routing[0], output.routing[2]]
    aux_loss = sum(load_balancing_loss(s.tokens_per_expert_E, s.importance_E) for s in stats) / 2
    z_loss = (stats[0].router_z_loss + stats[1].router_z_loss) / 2
    assert_close((output.aux_loss, output.z_loss), (aux_loss, z_loss))
    assert_close(output.loss, output.language_loss + 0.5 * aux_loss + 0.25 * z_loss)
    assert output.routing[1] is None
    assert model(IDS_BL, labels=IDS_BL).routing is None
    model.eval()
    output = model(IDS_BL, labels=IDS_BL, output_routing=True)
    assert output.aux_loss is not None and torch.equal(output.loss, output.language_loss)
    assert model(IDS_BL, labels=IDS_BL).aux_loss is None


def test_router_losses_reach_the_router(build):
    model = build("token_choice", router_z_loss_coef=1.0).train()
    output = model(IDS_BL, labels=IDS_BL)
    (output.loss - output.language_loss).backward()
    assert (model.model.layers[1].mlp.gate.weight.grad != 0).any()
    assert not model.model.norm.weight.grad.any(), "the language loss cancels, and only it passes the last norm"


def test_remoes_penalty_is_added_with_the_weight_of_the_moment(build):
    model = build("remoe", num_hidden_layers=3, mlp_layer_types=["remoe", "dense", "remoe"]).train()
    model.model.layers[0].mlp.l1_coef.fill_(0.5)
    output = model(IDS_BL, labels=IDS_BL, output_routing=True)
    penalty = (l1_penalty(output.routing[0], 2) + l1_penalty(output.routing[2], 2)) / 2
    assert_close(output.aux_loss, penalty)
    assert_close(output.loss, output.language_loss + 0.5 * penalty)
    assert torch.equal(model.eval()(IDS_BL, labels=IDS_BL).loss, output.language_loss)
    with pytest.raises(UserError, match="A model with token_choice and remoe layers cannot be trained"):
        build("remoe", mlp_layer_types=["token_choice", "remoe"]).train()(IDS_BL, labels=IDS_BL)


def test_thresholds_wait_for_the_first_steps_to_pass(build):
    model = build("expert_threshold", threshold_warmup=0.25).train()
    layer = model.model.layers[1].mlp
    for step, over_batch in ((0, True), (1, True), (2, False), (7, False)):
        model.prepare_step(step, steps=8)
        assert layer.choosing_over_batch is over_batch


@pytest.mark.parametrize("family", FAMILIES)
def test_a_micro_batch_of_padding_alone_has_no_loss_and_no_gradient(build, family):
    model = build(family, router_z_loss_coef=0.1, balance_over="sequence").train()
    padding_BL = torch.zeros_like(IDS_BL)
    output = model(
        IDS_BL,
        attention_mask=padding_BL,
        labels=padding_BL - 100,
        num_items_in_batch=torch.tensor(7),
        output_routing=True,
    )
    output.loss.backward()
    assert output.loss == 0
    assert all((weight.grad is None) or not weight.grad.any() for weight in model.parameters())
    assert all(value.isfinite().all() for stats in output.routing if stats is not None for value in stats)


@pytest.mark.parametrize("family", ["dense", "expert_choice", "expert_threshold", "soft", "mixture_of_tokens"])
def test_families_that_balance_by_construction_have_no_router_loss(build, family):
    output = build(family).train()(IDS_BL[:, :8], labels=IDS_BL[:, :8], output_routing=True)
    assert output.aux_loss is None and output.z_loss is None
    assert torch.equal(output.loss, output.language_loss)
    assert len(output.routing) == 2 and (output.routing[1] is None) is (family == "dense")


@pytest.mark.parametrize("family", FAMILIES)
def test_gradient_checkpointing_changes_neither_gradients_nor_statistics(build, family):
    model = build(family).train()
    runs = []
    # Before, not after: recomputation stops as soon as it has the last tensor that the backward pass needs.
    model.model.layers[1].mlp.register_forward_pre_hook(lambda *_: runs.append(1))
    results = []
    for checkpointing in (False, True):
        if checkpointing:
            getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
        model.zero_grad()
        output = model(IDS_BL, labels=IDS_BL, output_routing=True, use_cache=False)
        output.loss.backward()
        stats = [] if output.routing[1] is None else list(output.routing[1])
        results.append([output.loss, *stats] + [parameter.grad.clone() for parameter in model.parameters()])
    assert len(runs) == 1 + 2, "the second backward pass ran the layer again"
    assert all(torch.equal(plain, again) for plain, again in zip(*results, strict=True))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_training_step_under_autocast_stays_close(build, family):
    model = build(family).train()
    exact = model(IDS_BL, labels=IDS_BL).loss
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(IDS_BL, labels=IDS_BL).loss
    loss.backward()
    assert_close(loss, exact, rtol=0.01, atol=0)
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("family", FAMILIES)
def test_attention_implementations_agree(build, family):
    model = build(family).eval()
    mask_BL = torch.ones_like(IDS_BL)
    mask_BL[0, :3] = 0
    logits = []
    for implementation in ("sdpa", "eager"):
        model.set_attn_implementation(implementation)
        logits.append(model(IDS_BL, attention_mask=mask_BL).logits[mask_BL.bool()])
    assert_close(*logits)


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        pytest.param("dense", {}, id="dense"),
        pytest.param("token_choice", {"num_shared_experts": 1}, id="token choice"),
        pytest.param("expert_threshold", {}, id="expert threshold"),
        pytest.param("remoe", {}, id="remoe"),
        pytest.param("mixture_of_tokens", {"num_shared_experts": 1}, id="mixture of tokens and a shared expert"),
        pytest.param("mixture_of_tokens", {"alone_top_k": None}, id="mixture of tokens alone"),
        pytest.param("mixture_of_tokens", {"alone_top_k": 1}, id="mixture of tokens alone, top 1"),
    ],
)
def test_left_padding_does_not_change_an_answer(build, family, changes):
    model = build(family, pad_token_id=0, **changes).eval()
    ids_BL = IDS_BL.clamp_min(1)
    padded_BL = torch.cat([torch.zeros(4, 3, dtype=torch.long), ids_BL], dim=1)
    expected = model(ids_BL, output_routing=True)
    output = model(padded_BL, attention_mask=padded_BL.ne(0).long(), output_routing=True)
    assert_close(output.logits[:, 3:], expected.logits, rtol=0, atol=1e-5 * expected.logits.abs().max().item())
    assert_close(output.routing[1], expected.routing[1], rtol=1e-4, atol=1e-5)


def test_mixture_of_tokens_uses_groups_in_eval_only_when_told(build, monkeypatch, tmp_path):
    model = build("mixture_of_tokens")
    in_groups = model.train()(IDS_BL).logits
    alone = model.eval()(IDS_BL[:3]).logits  # three examples are no multiple of a group of four
    assert_close(model(IDS_BL).logits[:3], alone)
    assert not torch.allclose(in_groups[:3], alone)
    model.set_inference_mode("group")
    assert torch.equal(model(IDS_BL).logits, in_groups)
    model.set_inference_mode("alone", top_k=1)
    assert torch.equal(model.train()(IDS_BL).logits, in_groups)
    top_1 = model.eval()(IDS_BL).logits
    assert not torch.allclose(top_1[:3], alone)
    model.save_pretrained(tmp_path)
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path)(IDS_BL).logits, top_1)


def test_an_unknown_inference_mode_is_refused_and_changes_nothing(build):
    model = build("mixture_of_tokens")
    with pytest.raises(ValueError, match="inference_mode is 'solo': it must be group, alone or population"):
        model.set_inference_mode("solo")
    assert model.config.inference_mode == "alone"


def test_mixture_layers_are_those_that_are_not_dense(build):
    families = ["token_choice", "dense", "mixture_of_tokens"]
    model = build("dense", num_hidden_layers=3, mlp_layer_types=families)
    assert model.mixture_layers() == [model.model.layers[0].mlp, model.model.layers[2].mlp]
    assert model.model.mixture_layers() == model.mixture_layers()


def test_layer_mix_blends_the_embeddings_and_every_layer(build):
    model = build("token_choice", layer_mix=True).eval()
    plain = build("token_choice").eval()
    assert isinstance(model.model.layer_mix, LayerMix) and model.model.layer_mix.num_layers == 3
    assert plain.model.layer_mix is None
    hidden_states = []
    for module in (model.model.embed_tokens, *model.model.layers):
        module.register_forward_hook(lambda _module, _inputs, output: hidden_states.append(output))
    logits = model(IDS_BL).logits
    blended_BLD = torch.stack(hidden_states).mean(0)
    assert_close(logits, model.lm_head(model.model.norm(blended_BLD)))
    with torch.no_grad():
        model.model.layer_mix.logits[-1] = 1000
    plain.load_state_dict(model.state_dict(), strict=False)
    assert_close(model(IDS_BL).logits, plain(IDS_BL).logits)
    model(IDS_BL, labels=IDS_BL).loss.backward()
    assert model.model.layer_mix.logits.grad is not None and model.model.layer_mix.scale.grad != 0


def test_hidden_states_are_the_same_with_and_without_routing(build):
    model = build("token_choice").eval()
    plain = model(IDS_BL, output_hidden_states=True).hidden_states
    routed = model(IDS_BL, output_hidden_states=True, output_routing=True).hidden_states
    assert len(plain) == 3 and all(torch.equal(a, b) for a, b in zip(plain, routed, strict=True))


def test_embeddings_may_stand_in_for_ids(build):
    model = build("token_choice").eval()
    embedded_BLD = model.get_input_embeddings()(IDS_BL)
    assert torch.equal(model(inputs_embeds=embedded_BLD).logits, model(IDS_BL).logits)
    for inputs in ({}, {"input_ids": IDS_BL, "inputs_embeds": embedded_BLD}):
        with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
            model(**inputs)


@pytest.mark.parametrize(("keep", "kept"), [(0, slice(None)), (1, [8]), (3, [6, 7, 8]), (torch.tensor([2, 5]), [2, 5])])
def test_logits_may_be_kept_for_some_positions_only(build, keep, kept):
    model = build("dense").eval()
    assert_close(model(IDS_BL, logits_to_keep=keep).logits, model(IDS_BL).logits[:, kept])


def test_a_tuple_is_returned_on_request(build):
    model = build("dense").eval()
    output = model(IDS_BL, return_dict=False)
    assert isinstance(output, tuple) and torch.equal(output[0], model(IDS_BL).logits)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch.compile's own doing
@pytest.mark.parametrize("family", ["token_choice", "mixture_of_tokens"])
def test_a_training_step_compiles_into_one_graph(build, family):
    model = build(family).train()
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True, backend="aot_eager")
    losses = []
    for run in (model, compiled):
        loss = run(IDS_BL, labels=IDS_BL, use_cache=False).loss
        loss.backward()
        losses.append(loss)
    assert_close(*losses)
    for (name, plain), (_, other) in zip(model.named_parameters(), compiled.named_parameters(), strict=True):
        assert_close(other.grad, plain.grad, msg=name)
