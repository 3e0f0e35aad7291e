"""Mixture of tokens as it is served: an answer depends on its own text alone, with a cache or without."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

from mixtura.models import MixtureConfig, MixtureForCausalLM
from mixtura.models.calibration import calibrate

MODES = [
    pytest.param(mode, top_k, id=f"{mode}, {'all' if top_k is None else f'top {top_k}'}")
    for mode in ("alone", "population")
    for top_k in (None, 1, 2)
]
EXPERTS = [
    pytest.param({"hidden_act": activation, "gated": gated, **more}, id=" ".join([activation, name]))
    for activation in ("relu", "gelu", "silu")
    for gated in (False, True)
    for name, more in (
        ("gated" if gated else "plain", {}),
        (f"{'gated' if gated else 'plain'} two mixtures", {"mixtures_per_expert": 2, "combine": "separate"}),
    )
]


def build(mode, top_k, **changes):
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "moe_intermediate_size": 12}
    shape = {"num_hidden_layers": 2, "num_attention_heads": 2, "num_experts": 4, "group_size": 4}
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": False}
    families = {"mlp_layer_types": ["mixture_of_tokens"] * 2, "initializer_range": 0.3}
    model = MixtureForCausalLM(MixtureConfig(**(sizes | shape | special | families | changes))).eval()
    if mode == "population":
        calibrate(model, [torch.randint(64, (2 * model.config.group_size, 8))])
    model.set_inference_mode(mode, top_k=top_k)
    return model


def continue_greedily(model, ids_BL, **options):
    return model.generate(ids_BL, max_new_tokens=6, do_sample=False, eos_token_id=None, **options)[:, ids_BL.size(1) :]


def padded_left(rows):
    length = max(len(row) for row in rows)
    ids_BL = torch.stack([torch.cat([torch.zeros(length - len(row), dtype=torch.long), row]) for row in rows])
    return ids_BL, ids_BL.ne(0).long()


@pytest.mark.parametrize(("mode", "top_k"), MODES)
@pytest.mark.parametrize("experts", EXPERTS)
@torch.no_grad()
def test_a_cache_gives_the_logits_of_a_full_pass(mode, top_k, experts):
    model, ids_BL = build(mode, top_k, **experts), torch.randint(3, 64, (3, 7))
    full_BLV = model(ids_BL, use_cache=False).logits
    cache, parts = None, []
    for piece_BL in ids_BL.split([3, 1, 1, 2], dim=1):
        output = model(piece_BL, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        parts.append(output.logits)
    assert_close(torch.cat(parts, 1), full_BLV, rtol=0, atol=1e-6 * max(1, full_BLV.abs().max().item()))


@pytest.mark.parametrize(("mode", "top_k"), MODES)
@torch.no_grad()
def test_batch_mates_and_padding_change_no_logit(mode, top_k):
    model = build(mode, top_k, hidden_act="silu", mixtures_per_expert=2)
    rows = [torch.randint(3, 64, (length,)) for length in (7, 4, 6, 1, 5)]
    ids_BL, mask_BL = padded_left(rows)
    positions_BL = (mask_BL.cumsum(-1) - 1).clamp_min(0)
    together_BLV = model(ids_BL, attention_mask=mask_BL, position_ids=positions_BL).logits
    for row, logits_LV in zip(rows, together_BLV, strict=True):
        assert_close(
            logits_LV[-len(row) :], model(row[None]).logits[0], rtol=0, atol=1e-6 * max(1, logits_LV.abs().max().item())
        )


@settings(max_examples=12)
@given(
    lengths=st.lists(st.integers(1, 7), min_size=1, max_size=5),
    experts=st.integers(2, 5),
    group=st.integers(2, 6),
    mixtures=st.integers(1, 2),
    top_k=st.one_of(st.none(), st.integers(1, 4)),
    mode=st.sampled_from(["alone", "population"]),
    activation=st.sampled_from(["relu", "gelu", "silu"]),
    gated=st.booleans(),
)
def test_greedy_text_is_the_same_alone_and_in_any_batch(
    lengths, experts, group, mixtures, top_k, mode, activation, gated
):
    top_k = None if top_k is None else min(top_k, experts * mixtures)
    model = build(
        mode,
        top_k,
        num_experts=experts,
        group_size=group,
        mixtures_per_expert=mixtures,
        hidden_act=activation,
        gated=gated,
    )
    rows = [torch.randint(3, 64, (length,)) for length in lengths]
    ids_BL, mask_BL = padded_left(rows)
    together = continue_greedily(model, ids_BL, attention_mask=mask_BL)
    for row, text in zip(rows, together, strict=True):
        assert torch.equal(continue_greedily(model, row[None])[0], text)
        assert torch.equal(continue_greedily(model, row[None], use_cache=False)[0], text)


@pytest.mark.parametrize(("mode", "top_k"), MODES)
def test_a_checkpoint_answers_as_the_model_did(mode, top_k, tmp_path):
    model, ids_BL = build(mode, top_k, group_size=3, mixtures_per_expert=2), torch.randint(3, 64, (2, 5))
    expected = continue_greedily(model, ids_BL)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert (loaded.config.inference_mode, loaded.config.alone_top_k, loaded.config.group_size) == (mode, top_k, 3)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in loaded.state_dict().items())
    with torch.no_grad():  # where the weights lie in memory may round a product the other way
        assert_close(loaded(ids_BL).logits, model(ids_BL).logits, rtol=0, atol=1e-6)
    assert torch.equal(continue_greedily(loaded, ids_BL), expected)
